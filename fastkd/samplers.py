"""Samplers for ``torch.utils.data`` on top of :class:`fastkd.AliasTable`: epochs, ranks, resume."""

from __future__ import annotations

from collections.abc import Iterator

import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Sampler

from fastkd.sampling import AliasTable, check_count

__all__ = ["CollectionBatchSampler", "CollectionSampler"]

_CHUNK = 1 << 16  # draws made at a time where indices are handed out one by one


class CollectionSampler(Sampler[int]):
    """A ``torch.utils.data`` sampler that draws ``num_samples`` items an epoch from an :class:`AliasTable`.

    Epoch e consists of the draws ``[e * num_samples, (e + 1) * num_samples)`` of ``seed``; rank r of w takes every w-th of
    them, from r on. So ranks are independent, and their union is the same for any number of ranks (``num_samples`` is
    rounded up to a multiple of w).

    Each iteration is one epoch, the one after the last, also where that was left early. After ``load_state_dict`` the
    next iteration goes on where the state was taken; after ``set_epoch`` it is that epoch.

    Args:
        table: the table to draw from; updates of it take effect at the next chunk of draws.
        num_samples: draws in an epoch, over all ranks.
        seed: of the draws, the same on all ranks; by default the table's own.
        rank, world_size: by default those of ``torch.distributed``, or 0 and 1.
    """

    def __init__(
        self,
        table: AliasTable,
        num_samples: int,
        *,
        seed: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        check_count("num_samples", num_samples, 1)
        self.table = table
        self.num_samples = num_samples
        self._draws = _Draws(table, num_samples, seed, rank, world_size)

    def __len__(self) -> int:
        return self._draws.per_rank

    def __iter__(self) -> Iterator[int]:
        for chunk in self._draws.epoch_in_chunks(_CHUNK):
            start = self._draws.position - len(chunk)
            for taken, index in enumerate(chunk.tolist(), start + 1):
                self._draws.position = taken  # a state saved between two items continues with the second
                yield index

    def __repr__(self) -> str:
        return f"CollectionSampler({self.table}, num_samples={self.num_samples}, {self._draws})"

    def set_epoch(self, epoch: int) -> None:
        """Lets the next iteration be this epoch; where a state of this epoch was just loaded, it goes on from there."""
        self._draws.set_epoch(epoch)

    def state_dict(self, done: int | None = None) -> dict[str, int]:
        """Where the epoch under way stands.

        Args:
            done: how many items of it the loop has finished. By default all that were handed out, which is too many
                where DataLoader workers prefetch: count the loop's own and pass them.
        """
        return self._draws.state_dict(done)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Lets the next iteration go on where ``state`` was taken, on as many ranks or another number of them."""
        self._draws.load_state_dict(state)


class CollectionBatchSampler(Sampler[Tensor]):
    """Whole batches of indices, int64 ``[batch_size]``, as ``batch_sampler`` of a DataLoader or to index tensors directly.

    ``for batch in CollectionBatchSampler(table, 256, 20): x = images[batch]`` spares the million Python integers of a
    per-item sampler. Distribution over ranks, epochs and resume as in :class:`CollectionSampler`, with
    ``num_samples = batch_size * num_batches * world_size``.

    Args:
        table: the table to draw from.
        batch_size: items of a batch, on each rank.
        num_batches: batches of an epoch, on each rank.
        seed, rank, world_size: as in :class:`CollectionSampler`.
    """

    def __init__(
        self,
        table: AliasTable,
        batch_size: int,
        num_batches: int,
        *,
        seed: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        check_count("batch_size", batch_size, 1)
        check_count("num_batches", num_batches, 1)
        self.table = table
        self.batch_size = batch_size
        self.num_batches = num_batches
        rank, world_size = _ranks(rank, world_size)
        self._draws = _Draws(table, batch_size * num_batches * world_size, seed, rank, world_size)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Tensor]:
        return self._draws.epoch_in_chunks(self.batch_size)

    def __repr__(self) -> str:
        return (
            f"CollectionBatchSampler({self.table}, batch_size={self.batch_size}, num_batches={self.num_batches}, "
            f"{self._draws})"
        )

    def set_epoch(self, epoch: int) -> None:
        """As :meth:`CollectionSampler.set_epoch`."""
        self._draws.set_epoch(epoch)

    def state_dict(self, done: int | None = None) -> dict[str, int]:
        """As :meth:`CollectionSampler.state_dict`, with ``done`` in batches."""
        return self._draws.state_dict(None if done is None else done * self.batch_size)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """As :meth:`CollectionSampler.load_state_dict`."""
        self._draws.load_state_dict(state)


class _Draws:
    """The draws of one rank, epoch by epoch: what both samplers hand out."""

    def __init__(
        self, table: AliasTable, num_samples: int, seed: int | None, rank: int | None, world_size: int | None
    ) -> None:
        self.table = table
        self.num_samples = num_samples
        self.rank, self.world_size = _ranks(rank, world_size)
        self.per_rank = -(-num_samples // self.world_size)
        self.seed = int(table.state_dict()["seed"]) if seed is None else seed
        self.epoch = 0  # the one under way, or that the next iteration begins with
        self.position = 0  # draws of this rank handed out in it
        self.under_way = False

    def __repr__(self) -> str:
        return f"seed={self.seed}, rank={self.rank} of {self.world_size}, epoch={self.epoch}"

    def epoch_in_chunks(self, size: int) -> Iterator[Tensor]:
        if self.under_way:  # ended, or left early
            self.epoch, self.position = self.epoch + 1, 0
        self.under_way = True
        epoch, position = self.epoch, self.position
        while position < self.per_rank:
            n = min(size, self.per_rank - position)
            start = (epoch * self.per_rank + position) * self.world_size + self.rank
            position += n
            self.position = position
            yield self.table.sample_at(self.seed, start, n, self.world_size)

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch or self.under_way:
            self.epoch, self.position, self.under_way = epoch, 0, False

    def state_dict(self, done: int | None) -> dict[str, int]:
        position = self.position if done is None else done
        if not 0 <= position <= self.per_rank:
            raise ValueError(f"fastkd: done is {position} draws, must be from 0 to the epoch's {self.per_rank}")
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "draws_done": position * self.world_size,
            "num_samples": self.num_samples,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        missing = {"seed", "epoch", "draws_done", "num_samples"} - set(state)
        if missing:
            raise ValueError(
                f"fastkd: state has no {', '.join(sorted(missing))}; it is not that of a collection sampler"
            )
        if state["num_samples"] != self.num_samples:
            raise ValueError(
                f"fastkd: state['num_samples'] is {state['num_samples']}, but this sampler draws {self.num_samples} an epoch"
            )
        if state["draws_done"] % self.world_size != 0:
            raise ValueError(
                f"fastkd: state['draws_done'] is {state['draws_done']}, which {self.world_size} ranks cannot share equally"
            )
        self.seed, self.epoch, self.under_way = state["seed"], state["epoch"], False
        self.position = state["draws_done"] // self.world_size
        if self.position >= self.per_rank:
            self.epoch, self.position = self.epoch + 1, 0


def _ranks(rank: int | None, world_size: int | None) -> tuple[int, int]:
    distributed = dist.is_available() and dist.is_initialized()
    world_size = world_size if world_size is not None else dist.get_world_size() if distributed else 1
    rank = rank if rank is not None else dist.get_rank() if distributed else 0
    if not 0 <= rank < world_size:
        raise ValueError(f"fastkd: rank is {rank}, must be in [0, {world_size})")
    return rank, world_size
