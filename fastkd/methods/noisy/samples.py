"""What is known of each sample of the training set, on the device, in the processes together."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastkd._checks import check_count

__all__ = ["UNSEEN", "Samples"]

UNSEEN = -1.0  # in the place of a probability


class Samples(nn.Module):
    """A row for each sample, by name: ``samples["loss"]`` is ``[N, ...]``. No row goes to the host.

    Each process writes the rows of its own batches; :meth:`share`, at the end of an epoch, gives all processes the rows of all.

    Args:
        items: N, samples of the training set.
        initial: by name, the value of every row at first, ``[...]``: float.
    """

    written: Tensor

    def __init__(self, items: int, **initial: Tensor) -> None:
        super().__init__()
        self.items = check_count("items", items, 1)
        self._names = tuple(initial)
        for name, value in initial.items():
            self.register_buffer(f"rows_{name}", value.expand(self.items, *value.shape).clone())
        self.register_buffer("written", torch.zeros(self.items, dtype=torch.bool))

    def __getitem__(self, name: str) -> Tensor:
        rows: Tensor = getattr(self, f"rows_{name}")
        return rows

    def __len__(self) -> int:
        return self.items

    @torch.no_grad()
    def write(self, index: Tensor, **rows: Tensor) -> None:
        """New values of some rows.

        Args:
            index: int64 ``[B]``, each sample once: of one that is there twice, either value may stay.
            rows: by name, ``[B, ...]``.
        """
        for name, values in rows.items():
            ours = self[name]
            ours[index] = values.detach().to(ours.dtype)
        self.written[index] = True

    @torch.no_grad()
    def share(self) -> None:
        """Each process gets the rows that others have written since the last call, of one that several have the mean."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            writers = self.written.float()
            dist.all_reduce(writers)
            for name in self._names:
                rows = self[name]
                shape = (-1,) + (1,) * (rows.dim() - 1)
                sums = torch.where(self.written.view(shape), rows, 0)  # 0 times a row that is not finite would be none
                dist.all_reduce(sums)
                rows.copy_(torch.where(writers.view(shape) > 0, sums / writers.view(shape).clamp(min=1), rows))
        self.written.zero_()
