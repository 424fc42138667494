"""Batches drawn from an unlabeled collection by an alias table."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from fastkd import statistics
from fastkd._checks import check_count, check_flag, check_state, check_tensor
from fastkd._seeding import mixed_seed
from fastkd.alias_table import AliasTable, check_table
from fastkd.data.batch import Batch
from fastkd.data.collection import PREFETCH, Collection, Gathered, Source, put_rows, unreadable_error
from fastkd.data.source import check_start
from fastkd.data.source_statistics import SourceStatistics, by_source, statistics_by_source
from fastkd.draw import draw_batch
from fastkd.iqpr_schedule import IqprSchedule
from fastkd.patches import random_crop_flip

__all__ = ["DrawnBatches"]


class DrawnBatches:
    """Images of a collection, drawn with replacement as a table says, cropped, mirrored and normalised.

    Where the images are a tensor on the table's device, or a collection that is in its memory, a batch is one launch. Else
    they are read ahead, and cropped on the table's device: the same bits.

    The draws and crops of a batch follow from (seed, epoch, batch, rank) and the table, so a training goes on with
    ``epoch(e, start=k)`` as if it had not stopped, on any device. ``counts`` says how often each image was drawn on this
    rank; it is part of the checkpoint, as is a fingerprint of the table, and all of it after updates.

    Args:
        images: the collection: uint8 ``[N, C, H, W]`` on the table's device, or a :class:`fastkd.data.Collection`.
        table: over its images, on the device where the batches are to be.
        batch_size: images of a batch, on each rank.
        batches: of an epoch.
        seed: any int.
        padding: pixels of zeros that crops may reach into; 0 leaves the images where they are.
        flip: whether half of the images are mirrored.
        mean, std: of each channel, in units of x / 255.
        dtype: of the batches: float32, float64, bfloat16 or float16.
        rank: of this process.
        iqpr_schedule: of the table, which must keep its scores: the IQPR of each epoch, from 0 on, set as the epoch begins.
        prefetch: batches of a collection that are read ahead, for each worker, if there are any.

    Raises:
        TypeError, ValueError: at construction, numbers out of range, a collection of another size than the table; at the
        first batch, as of :func:`fastkd.draw_batch`; an image that was drawn and cannot be read, by name.
    """

    def __init__(
        self,
        images: Tensor | Collection,
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
        iqpr_schedule: Callable[[int], float] | None = None,
        prefetch: int = PREFETCH,
    ) -> None:
        self.images = images if isinstance(images, Collection) else check_tensor("images", images)
        self.table = check_table("table", table)
        if isinstance(images, Collection) and len(images) != len(table):
            raise ValueError(
                f"fastkd: images has {len(images)} items, must have one for each of the table's {len(table)}"
            )
        self.batch_size, self.batches = check_count("batch_size", batch_size, 1), check_count("batches", batches, 1)
        self.seed, self.rank = check_count("seed", seed), check_count("rank", rank, 0)
        flip_probability = 0.5 if check_flag("flip", flip) else 0.0
        self._augmentation: dict[str, Any] = {"padding": padding, "flip_probability": flip_probability, "dtype": dtype}
        self._augmentation |= {"mean": mean, "std": std}
        self._schedule = IqprSchedule(table, iqpr_schedule)
        self.prefetch = check_count("prefetch", prefetch, 0)
        self.counts = torch.zeros(len(table), dtype=torch.int64, device=table.device)

    def __len__(self) -> int:
        return self.batches

    @property
    def sources(self) -> tuple[Source, ...]:
        """Those of the collection; one of a tensor."""
        return self.images.sources if isinstance(self.images, Collection) else (Source("images", 0, len(self.table)),)

    def epoch(self, epoch: int, /, start: int = 0) -> Iterator[Batch]:
        """As of :class:`fastkd.data.BatchSource`; ``index`` says which images of the collection they are."""
        return self._iterate(*check_start(self, epoch, start))

    def update(self, indices: Tensor, scores: Tensor) -> None:
        """Gives items of the table new scores, :meth:`fastkd.AliasTable.update`: from the next batch on."""
        self.table.update(indices, scores)

    def counts_by_source(self) -> dict[str, Tensor]:
        """The counts of the items of each source: views of ``counts``."""
        return by_source(self.counts, self.sources)

    def statistics_by_source(self) -> dict[str, SourceStatistics]:
        """What was drawn of each source, on this rank; waits for the device."""
        return statistics_by_source(self.counts, self.sources)

    def _iterate(self, epoch: int, start: int) -> Iterator[Batch]:
        self._schedule.begin(epoch, anew=start == 0)
        resident = self.images.resident if isinstance(self.images, Collection) else self.images
        if isinstance(self.images, Collection) and (resident is None or resident.device != self.table.device):
            drawn = self._read(self.images, epoch, start)
        else:
            assert resident is not None
            self._check_readable()
            drawn = self._launch(resident, epoch, start)
        for batch in drawn:
            assert batch.index is not None
            statistics.draw_counts(batch.index, out=self.counts)
            yield batch

    def _generator(self, device: torch.device, epoch: int, number: int) -> torch.Generator:
        return torch.Generator(device).manual_seed(mixed_seed("draws", self.seed, epoch, number, self.rank))

    def _launch(self, images: Tensor, epoch: int, start: int) -> Iterator[Batch]:
        for number in range(start, self.batches):
            generator = self._generator(images.device, epoch, number)
            batch, index = draw_batch(self.table, images, self.batch_size, generator=generator, **self._augmentation)
            yield Batch(batch, index=index)

    def _check_readable(self) -> None:
        """Of a collection that was loaded: what is zeros there has no weight."""
        missing = self.images.missing if isinstance(self.images, Collection) else ()
        if missing:
            index = torch.tensor([item.index for item in missing], device=self.table.device)
            drawn = (self.table.weights()[index] > 0).nonzero().flatten().tolist()
            if drawn:
                raise unreadable_error(missing[drawn[0]])

    def _read(self, collection: Collection, epoch: int, start: int) -> Iterator[Batch]:
        """What is drawn ahead is drawn once more where the table was changed meanwhile, and what is then another is read."""
        device = self.table.device
        drawn: deque[tuple[int, torch.Generator, Tensor]] = deque()

        def draw(number: int) -> tuple[torch.Generator, Tensor]:
            generator = self._generator(device, epoch, number)
            return generator, self.table.sample(self.batch_size, generator)

        def indices() -> Iterator[Tensor]:
            for number in range(start, self.batches):
                version = self.table.version
                drawn.append((version, *draw(number)))
                yield drawn[-1][-1]

        with closing(collection.stream(indices(), self.prefetch)) as stream:
            for number, gathered in zip(range(start, self.batches), stream, strict=False):
                version, generator, index = drawn.popleft()
                if version != self.table.version:
                    before = index
                    generator, index = draw(number)
                    gathered = _exchanged(gathered, before.cpu(), index.cpu(), collection)
                if gathered.unreadable:
                    raise unreadable_error(gathered.unreadable[0])
                images = gathered.images.to(device)
                yield Batch(random_crop_flip(images, **self._augmentation, generator=generator), index=index)

    def state_dict(self) -> dict[str, Any]:
        """The counts, and what says which table this is, or after updates all of it."""
        return {"table": self.table.state_dict(weights=True), "counts": self.counts.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As :meth:`state_dict` returned it.

        Raises:
            ValueError: the table is another: it must be built from the same scores.
        """
        state = check_state(state, ("table", "counts"), "DrawnBatches")
        self.table.load_state_dict(state["table"])
        self.counts.copy_(state["counts"])


def _exchanged(gathered: Gathered, before: Tensor, index: Tensor, collection: Collection) -> Gathered:
    """Images of one index, with those read that another has in its place."""
    others = (before != index).nonzero().flatten()
    images = gathered.images.clone()
    put_rows(images, others, collection.read(index[others]))
    wanted = set(index.tolist())
    return Gathered(images, tuple(item for item in gathered.unreadable if item.index in wanted))
