"""What an alias table has beside its arrays: scores that it keeps, what was changed, and numbers for its samplers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Content", "Numbering", "keep_last"]


class Content:
    """What tables that share their weights share besides: the scores that are kept, and what was changed since the build."""

    def __init__(self) -> None:
        self.scores: Tensor | None = None
        self.version = 0  # goes up with each change
        self.updated = False  # by items: the weights are not those of a build
        self.rescored = False  # the scores are not those of construction
        self.epoch: int | None = None  # that a schedule has set lambda for

    def changed(self, *, updated: bool) -> None:
        if torch.compiler.is_compiling():  # whose programs would be made anew for each number
            return
        self.version += 1
        self.updated = updated
        self.rescored |= updated

    def copy(self) -> Content:
        made = Content()
        vars(made).update(vars(self))
        return made

    def move(self, moved: Callable[[Tensor], Tensor]) -> None:
        if self.scores is not None:
            self.scores = moved(self.scores)


def keep_last(kept: Tensor, indices: Tensor, scores: Tensor) -> None:
    """``kept[indices] = scores``, where of equal indices the last one counts; waits for no device."""
    order = torch.sort(indices, stable=True)
    count = indices.shape[0]
    if not count:
        return
    place = torch.arange(count, device=indices.device)
    is_last = torch.ones_like(place, dtype=torch.bool)
    is_last[:-1] = order.values[1:] != order.values[:-1]
    last = torch.where(is_last, place, count).flip(0).cummin(0).values.flip(0)  # of equal ones
    with torch.inference_mode():
        # an index out of range, which only a GPU lets through, has spoiled the table already
        kept[order.values.clamp(0, kept.shape[0] - 1)] = scores[order.indices[last]]


class Numbering:
    """Numbers the samplers of a table, so that each has a stream of its own, which is the same on every rank.

    Every process makes its samplers in the same order, so they count alike. Samplers of given ranks are counted by rank:
    those that one process makes for several ranks are parts of one.
    """

    def __init__(self) -> None:
        self._least = 0
        self._of_rank: dict[int, int] = {}

    def next(self, rank: int | None) -> int:
        if rank is None:
            number = max(self._of_rank.values(), default=self._least)
            self._least, self._of_rank = number + 1, {}
            return number
        number = self._of_rank.get(rank, self._least)
        self._of_rank[rank] = number + 1
        return number

    def copy(self) -> Numbering:
        made = Numbering()
        made._least, made._of_rank = self._least, dict(self._of_rank)
        return made
