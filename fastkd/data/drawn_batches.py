"""Batches drawn from an unlabeled collection by an alias table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import statistics
from fastkd._checks import check_count, check_flag, check_state, check_tensor
from fastkd._seeding import mixed_seed
from fastkd.alias_table import AliasTable, check_table
from fastkd.data.batch import Batch
from fastkd.data.source import check_start
from fastkd.draw import draw_batch

__all__ = ["DrawnBatches"]


class DrawnBatches:
    """Images of a collection, drawn with replacement as a table says, cropped, mirrored and normalised: one launch a batch.

    The draws and crops of a batch follow from (seed, epoch, batch, rank), so a training goes on with
    ``epoch(e, start=k)`` as if it had not stopped, on any device. ``counts`` says how often each image was drawn on this
    rank; it is part of the checkpoint, as is a fingerprint of the table.

    Args:
        images: the collection, uint8 ``[N, C, H, W]``.
        table: over its images, on their device.
        batch_size: images of a batch, on each rank.
        batches: of an epoch.
        seed: any int.
        padding: pixels of zeros that crops may reach into; 0 leaves the images where they are.
        flip: whether half of the images are mirrored.
        mean, std: of each channel, in units of x / 255.
        dtype: of the batches: float32, float64, bfloat16 or float16.
        rank: of this process.

    Raises:
        TypeError, ValueError: at construction, numbers out of range; at the first batch, as of :func:`fastkd.draw_batch`.
    """

    def __init__(
        self,
        images: Tensor,
        table: AliasTable,
        batch_size: int,
        batches: int,
        *,
        seed: int,
        padding: int = 4,
        flip: bool = True,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        dtype: torch.dtype = torch.float32,
        rank: int = 0,
    ) -> None:
        self.images, self.table = check_tensor("images", images), check_table("table", table)
        self.batch_size, self.batches = check_count("batch_size", batch_size, 1), check_count("batches", batches, 1)
        self.seed, self.rank = check_count("seed", seed), check_count("rank", rank, 0)
        flip_probability = 0.5 if check_flag("flip", flip) else 0.0
        self._augmentation: dict[str, Any] = {"padding": padding, "flip_probability": flip_probability, "dtype": dtype}
        self._augmentation |= {"mean": mean, "std": std}
        self.counts = torch.zeros(len(table), dtype=torch.int64, device=table.device)

    def __len__(self) -> int:
        return self.batches

    def epoch(self, epoch: int, /, start: int = 0) -> Iterator[Batch]:
        """As of :class:`fastkd.data.BatchSource`; ``index`` says which images of the collection they are."""
        return self._iterate(*check_start(self, epoch, start))

    def _iterate(self, epoch: int, start: int) -> Iterator[Batch]:
        for number in range(start, self.batches):
            seed = mixed_seed("draws", self.seed, epoch, number, self.rank)
            generator = torch.Generator(self.images.device).manual_seed(seed)
            images, index = draw_batch(
                self.table, self.images, self.batch_size, generator=generator, **self._augmentation
            )
            statistics.draw_counts(index, out=self.counts)
            yield Batch(images, index=index)

    def state_dict(self) -> dict[str, Any]:
        """The counts, and what says which table this is."""
        return {"table": self.table.state_dict(), "counts": self.counts.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As :meth:`state_dict` returned it.

        Raises:
            ValueError: the table is another: it must be built from the same scores, and updated alike.
        """
        state = check_state(state, ("table", "counts"), "DrawnBatches")
        self.table.load_state_dict(state["table"])
        self.counts.copy_(state["counts"])
