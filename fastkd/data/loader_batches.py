"""A DataLoader as a source of batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, SequentialSampler

from fastkd._checks import check_count
from fastkd._seeding import mixed_generator, mixed_seed

__all__ = ["LoaderBatches"]


class LoaderBatches:
    """The batches of a ``DataLoader`` for a :class:`fastkd.training.Trainer`.

    >>> sampler = torch.utils.data.DistributedSampler(dataset, num_replicas=1, rank=0)
    >>> batches = LoaderBatches(DataLoader(dataset, 128, sampler=sampler, drop_last=True))

    On resume, the batches that are done are loaded again and dropped. What its workers draw is theirs: they are seeded by
    ``seed`` and the epoch, so that they draw the same again where there are as many, if they do not outlive the epoch
    (``persistent_workers``) and their order is that of the sampler.

    Args:
        loader: it gives what :func:`fastkd.data.batch.as_batches` takes, ``(images, target)`` for instance; its sampler, or
            its own batch sampler, has ``set_epoch``, or it goes in order.
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

    @classmethod
    def of(
        cls,
        dataset: Dataset[Any],
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
        **options: Any,
    ) -> LoaderBatches:
        """Shuffled batches of a map-style data set, whose items are ``(image, label)``, an image, or a mapping of the fields
        of :class:`fastkd.data.Batch`.

        >>> LoaderBatches.of(torchvision.datasets.ImageFolder(root, transform), 256, seed=0, num_workers=8)

        Args:
            batch_size: items of a batch, on each rank.
            seed: of the order, and of the workers.
            rank, world_size: which of how many processes this is; they share an epoch out.
            drop_last: leaves out the items that fill no batch.
            options: of the DataLoader: ``num_workers``, ``pin_memory``, ``collate_fn``, ...

        Raises:
            TypeError, ValueError: a data set without a length, numbers out of range, more in a batch than there is.
        """
        batch_size, seed = check_count("batch_size", batch_size, 1), check_count("seed", seed)
        rank, world_size = check_count("rank", rank, 0), check_count("world_size", world_size, 1)
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise TypeError(
                f"fastkd: dataset is {type(dataset).__name__}, must be map-style, with len() and dataset[i]"
            )
        if rank >= world_size:
            raise ValueError(f"fastkd: rank is {rank}, must be in [0, world_size), world_size is {world_size}")
        sampler: DistributedSampler[Any] = DistributedSampler(
            dataset, world_size, rank, seed=mixed_seed("order", seed), drop_last=drop_last
        )
        if drop_last and len(sampler) < batch_size:
            raise ValueError(
                f"fastkd: batch_size is {batch_size}, must be at most the {len(sampler)} items of a rank, or drop_last=False"
            )
        return cls(DataLoader(dataset, batch_size, sampler=sampler, drop_last=drop_last, **options), seed=seed)

    def __len__(self) -> int:
        return len(self._loader)

    def epoch(self, epoch: int, /, start: int = 0) -> Iterator[Any]:
        """As of :class:`fastkd.data.BatchSource`."""
        for sampler in self._with_epochs:
            sampler.set_epoch(epoch)
        with _drawing_from(mixed_generator("workers", self._seed, epoch), self._loader):
            batches: Iterator[Any] = iter(self._loader)
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
