"""Samples that were made before, kept where they were made."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastkd._checks import check_size

__all__ = ["Bank"]


class Bank(nn.Module):
    """Rows of several tensors, the last ``capacity`` of them, on the device: a state, saved and taken up with the training.

    >>> bank = Bank(4096, images=(3, 32, 32), logits=(10,))
    >>> bank.add(images=made, logits=given)
    >>> drawn = bank.draw(256)                  # with replacement, by torch's global generator

    How many there are is known without a look at the device, as each call adds as many as it is given.
    """

    def __init__(self, capacity: int, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.capacity = check_size("capacity", capacity, 1)
        self._names = tuple(shapes)
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(self.capacity, *shape))
        self.added = 0
        """Rows, of all calls."""

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    @torch.no_grad()
    def add(self, **rows: Tensor) -> None:
        """As many of each, at most ``capacity``; the oldest go where there is no more room."""
        count = len(next(iter(rows.values())))
        if set(rows) != set(self._names) or count > self.capacity:
            raise ValueError(
                f"fastkd: rows are {count} of {', '.join(rows)}, must be at most {self.capacity} of {', '.join(self._names)}"
            )
        start = self.added % self.capacity
        first = min(count, self.capacity - start)
        for name, values in rows.items():
            kept = getattr(self, name)
            kept[start : start + first] = values[:first]
            kept[: count - first] = values[first:]
        self.added += count

    def draw(self, count: int) -> dict[str, Tensor]:
        """So many of them, chosen at random.

        Raises:
            RuntimeError: there are none.
        """
        if not self.added:
            raise RuntimeError("fastkd: the bank is empty, must hold a row to draw one")
        device: torch.device = getattr(self, self._names[0]).device
        index = torch.randint(len(self), (count,), device=device)
        return {name: getattr(self, name).index_select(0, index) for name in self._names}

    def all(self) -> dict[str, Tensor]:
        """Those that are there."""
        return {name: getattr(self, name)[: len(self)] for name in self._names}

    def get_extra_state(self) -> dict[str, int]:
        return {"added": self.added}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.added = state["added"]
