"""Where batches come from: what a training asks of a source, and a DataLoader as one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from fastkd._checks import check_count
from fastkd._seeding import mixed_generator

__all__ = ["BatchSource", "LoaderBatches"]


class BatchSource(Protocol):
    """Batches of an epoch, the same whenever they are asked for: what exact resume stands on."""

    def __len__(self) -> int:
        """Batches of an epoch, on each rank."""

    def epoch(self, epoch: int, /, start: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """Those of an epoch, from 0 on, but for the first ``start``: images ``[B, C, H, W]``, target int64 ``[B]``, and
        what else there is.

        What comes out of it depends on the epoch and the number of the batch. A batch may also draw from the global
        generators as it is made, but nothing of that comes before the first one is asked for, save to skip.
        """


class LoaderBatches:
    """The batches of a ``DataLoader`` for a :class:`fastkd.training.Trainer`.

    >>> sampler = torch.utils.data.DistributedSampler(dataset, num_replicas=1, rank=0)
    >>> batches = LoaderBatches(DataLoader(dataset, 128, sampler=sampler, drop_last=True))

    On resume, the batches that are done are loaded again and dropped. What its workers draw is theirs: they are seeded by
    ``seed`` and the epoch, so that they draw the same again where there are as many, if they do not outlive the epoch
    (``persistent_workers``) and their order is that of the sampler.

    Args:
        loader: it gives ``(images, target, ...)``; its sampler, or its own batch sampler, has ``set_epoch``, or it goes in
            order.
        seed: of the workers.

    Raises:
        TypeError: a loader that is none, a seed that is no int.
        ValueError: a sampler whose order is another each time, as that of ``shuffle=True``.
    """

    def __init__(self, loader: DataLoader[Any], *, seed: int = 0) -> None:
        if not hasattr(loader, "batch_sampler"):
            raise TypeError(f"fastkd: loader is {type(loader).__name__}, must be a torch.utils.data.DataLoader")
        # torch gives a loader with a batch sampler of its own a SequentialSampler that nothing asks
        decides: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        if type(decides) is BatchSampler:
            decides = decides.sampler
        if not hasattr(decides, "set_epoch") and not isinstance(decides, SequentialSampler):
            raise ValueError(
                f"fastkd: loader has a {type(decides).__name__}, whose order cannot be had again after an interruption; "
                "must have a sampler with set_epoch: torch.utils.data.DistributedSampler(dataset, num_replicas=1, rank=0)"
            )
        samplers = (decides, getattr(decides, "sampler", None))
        self._with_epochs: list[Any] = [sampler for sampler in samplers if hasattr(sampler, "set_epoch")]
        self._loader, self._seed = loader, check_count("seed", seed)

    def __len__(self) -> int:
        return len(self._loader)

    def epoch(self, epoch: int, /, start: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """As in :class:`BatchSource`."""
        for sampler in self._with_epochs:
            sampler.set_epoch(epoch)
        with _drawing_from(mixed_generator("workers", self._seed, epoch), self._loader):
            batches: Iterator[tuple[Tensor, ...]] = iter(self._loader)
        for _ in range(start):  # now, not at the first next(): these may draw from the global generators
            next(batches)
        return batches


@contextmanager
def _drawing_from(generator: torch.Generator, loader: Any) -> Iterator[None]:
    """Inside the ``with`` block the loader draws the seeds of its workers from this generator.

    Not from the process's at a seed: other threads draw from that, while this one forks and may wait for a sampler.
    """
    before = loader.generator
    loader.generator = generator
    try:
        with torch.device("cpu"):  # where the generator is
            yield
    finally:
        loader.generator = before
