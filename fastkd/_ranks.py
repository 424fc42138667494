"""Which part of an epoch a sampler hands out: that of its rank, or all of it where its reader divides what it reads."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.utils.data import DistributedSampler

from fastkd._checks import check_count

__all__ = ["Part", "Ranks"]


class Part(NamedTuple):
    """The draws ``rank, rank + stride, ...`` of each epoch."""

    rank: int
    stride: int
    world_size: int
    """Processes that an epoch is for: num_samples is rounded up to a multiple of it."""
    at_once: int
    """Draws of the epoch that all processes together have done when one has done one."""
    batches_at_once: int
    """The same for batches: 1 where each batch that is handed out is split among the processes."""


class Ranks:
    """The rank as given, or that of the process group, which may be made after the sampler."""

    def __init__(self, rank: int | None, world_size: int | None) -> None:
        self.rank = None if rank is None else check_count("rank", rank)
        self.world_size = None if world_size is None else check_count("world_size", world_size, 1, 2**31)
        self.own()

    @property
    def settled(self) -> bool:
        """Whether the number of processes will not change any more."""
        return self.world_size is not None or _grouped()

    def own(self) -> tuple[int, int]:
        """Rank and number of processes, as far as they are known by now."""
        world_size = self.world_size if self.world_size is not None else dist.get_world_size() if _grouped() else 1
        rank = self.rank if self.rank is not None else dist.get_rank() if _grouped() else 0
        if not 0 <= rank < world_size:
            raise ValueError(f"fastkd: rank is {rank}, must be in [0, {world_size})")
        if self.rank is None and world_size > 1 and not _grouped():
            raise ValueError(
                f"fastkd: rank is not given and world_size is {world_size}, must be given together where "
                "torch.distributed has no process group"
            )
        return rank, world_size

    def part(self) -> Part:
        """What to hand out to whoever called the caller, from now on for an epoch."""
        rank, world_size = self.own()
        reader = _dividing_reader()
        if reader is None:
            return Part(rank, world_size, world_size, world_size, world_size)
        if self.world_size is not None and world_size > 1:
            raise RuntimeError(
                f"fastkd: rank is {rank} and world_size is {world_size}, but {reader.name} divides the draws among "
                f"{reader.processes} processes once more; must be left out, or be rank=0, world_size=1"
            )
        shared = reader.processes if self.world_size is None else 1
        return Part(0, 1, shared, reader.processes, 1 if reader.splits_batches else reader.processes)


class _Reader(NamedTuple):
    name: str
    processes: int
    splits_batches: bool


def _dividing_reader() -> _Reader | None:
    """Whoever reads the sampler, up the stack, and hands each process its share of what it has read, if there is one.

    Accelerate wraps the batch samplers of the loaders that it prepares, and other trainers wrap samplers in a
    DistributedSampler. All of them read the whole sampler on each process, and none says so to the sampler.
    """
    accelerate = sys.modules.get("accelerate.data_loader")
    shard, dispatcher = (getattr(accelerate, name, None) for name in ("BatchSamplerShard", "DataLoaderDispatcher"))
    frame = sys._getframe(1)
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        if "self" not in frame.f_code.co_varnames:
            continue
        reader: Any = frame.f_locals.get("self")
        kind = type(reader)
        if shard is not None and issubclass(kind, shard):
            processes, splits = reader.num_processes, reader.split_batches
        elif dispatcher is not None and issubclass(kind, dispatcher):
            processes, splits = reader.state.num_processes, reader.split_batches
        elif issubclass(kind, DistributedSampler):
            processes, splits = vars(reader).get("num_replicas", 1), False  # our own samplers have no such attribute
        else:
            continue
        if processes > 1:
            return _Reader(f"{kind.__module__.partition('.')[0]}'s {kind.__name__}", processes, splits)
    return None


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()
