"""Samplers for ``torch.utils.data`` on top of :class:`fastkd.AliasTable`: epochs, ranks, threads, resume."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from torch import Tensor
from torch.utils.data import DistributedSampler

from fastkd._checks import check_count, check_size, check_state
from fastkd._ranks import Part, Ranks
from fastkd._seeding import seed_of
from fastkd.alias_table import AliasTable, check_table, new_stream
from fastkd.iqpr_schedule import IqprSchedule

__all__ = ["CollectionBatchSampler", "CollectionSampler"]

T_co = TypeVar("T_co", covariant=True)

_CHUNK = 1 << 16  # draws made at a time where indices are handed out one by one
_STATE = ("seed", "epoch", "draws_done", "num_samples")


class _Sampler(DistributedSampler[T_co]):
    """What both samplers have in common.

    Lightning and others leave samplers of torch's DistributedSampler alone, as these take care of the ranks themselves.
    """

    _draws: _Draws  # the constructor of the base, which asks for a dataset, is not called

    @property
    def table(self) -> AliasTable:
        """The table that is drawn from."""
        return self._draws.table

    @property
    def num_samples(self) -> int:  # type: ignore[override]
        """Draws of an epoch, over all ranks, before they are rounded up to a multiple of the number of ranks."""
        return self._draws.num_samples(self._draws.ranks.own()[1])

    @property
    def rank(self) -> int:  # type: ignore[override]
        """Which of ``num_replicas`` processes this is."""
        return self._draws.ranks.own()[0]

    @property
    def num_replicas(self) -> int:  # type: ignore[override]
        """Processes that share an epoch."""
        return self._draws.ranks.own()[1]

    def set_epoch(self, epoch: int) -> None:
        """Lets the next iteration be this epoch; where a state of this epoch was just loaded, it goes on from there."""
        self._draws.set_epoch(self._draws.check_epoch("epoch", epoch))

    def update(self, indices: Tensor, scores: Tensor) -> None:
        """Gives items of the table new scores, :meth:`fastkd.AliasTable.update`."""
        self.table.update(indices, scores)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Lets the next iteration go on where ``state`` was taken, on as many ranks or another number of them.

        A state that was taken after updates brings the weights of the table; that of an iterator never does.
        """
        self._draws.load_state_dict(state)


class CollectionSampler(_Sampler[int]):
    """A ``torch.utils.data`` sampler that draws ``num_samples`` items an epoch from an :class:`AliasTable`.

    Epoch e consists of the draws ``[e * num_samples, (e + 1) * num_samples)`` of ``seed``; rank r of w takes every w-th of
    them, from r on. So ranks are independent, and their union is the same for any number of ranks (``num_samples`` is
    rounded up to a multiple of w). A reader that divides what it reads among the processes by itself, as Accelerate does,
    gets all draws of the epoch: docs/samplers.md.

    Each iteration is one epoch, the one after the last, also where that was left early. After ``load_state_dict`` the
    next iteration goes on where the state was taken; after ``set_epoch`` it is that epoch. Iterations may overlap, and
    threads may share one: no draw comes twice. The state is that of the iteration that began last. ``copy.deepcopy`` and pickle
    of a sampler together with its iterator give a pair that goes on by itself; an iterator copied alone counts for no sampler.

    Args:
        table: the table to draw from; updates of it take effect at the next chunk of draws.
        num_samples: draws in an epoch, over all ranks.
        seed: of the draws, any int, modulo 2^64, the same on all ranks. By default it follows from that of the table, and
            each sampler of a table has another one: the first takes the table's own. So ranks that make their samplers
            in the same order draw from the same streams. Copies of a table, ``table.to(device)`` among them, count their own
            samplers: they draw the same epochs as the table's.
        rank, world_size: by default those of ``torch.distributed`` when an iteration begins, or 0 and 1.
        iqpr_schedule: of the table, which must keep its scores: the IQPR of each epoch, from 0 on, set as the epoch begins. A
            function of the epoch alone, for all samplers of the table.

    Raises:
        TypeError: a table that is none, numbers that are no ints, a schedule that is no function.
        ValueError: num_samples below 1, an epoch whose draws would have numbers of 2^63 or more, a rank outside
            [0, world_size), or none without a process group; a schedule for a table that does not keep its scores.
        RuntimeError: when iterated or asked for its length, a rank of several was given, and the reader divides again.
    """

    def __init__(
        self,
        table: AliasTable,
        num_samples: int,
        *,
        seed: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        iqpr_schedule: Callable[[int], float] | None = None,
    ) -> None:
        num_samples = check_count("num_samples", num_samples, 1, 2**63)
        self._draws = _Draws(table, num_samples, None, seed, Ranks(rank, world_size), iqpr_schedule)

    @classmethod
    def _of(cls, draws: _Draws) -> CollectionSampler:
        made = cls.__new__(cls)
        made._draws = draws
        return made

    def __len__(self) -> int:
        return self._draws.length(self._draws.ranks.part())

    def __iter__(self) -> Iterator[int]:
        return _Items(self._draws)

    def __repr__(self) -> str:
        return f"CollectionSampler({self.table}, num_samples={self.num_samples}, {self._draws})"

    def state_dict(self, done: int | None = None) -> dict[str, Any]:
        """Where the epoch under way stands; after updates also the table's weights, 8 bytes an item.

        Args:
            done: how many items of it the loop has finished, on this rank. By default all that were handed out, which is
                too many where DataLoader workers prefetch: count the loop's own and pass them.
        """
        return self._draws.state_dict(done, 1, "at_once")


class CollectionBatchSampler(_Sampler[list[int]]):
    """Whole batches of indices, lists of ``batch_size`` ints, as ``batch_sampler`` of a DataLoader.

    :meth:`tensors` gives them as tensors, to index others with: ``for batch in sampler.tensors(): x = images[batch]``.
    Distribution over ranks, epochs, threads and resume as in :class:`CollectionSampler`, with
    ``num_samples = batch_size * num_batches * world_size``.

    Args:
        table: the table to draw from; updates of it take effect at the next batch.
        batch_size: items of a batch, on each rank.
        num_batches: batches of an epoch, on each rank.
        seed, rank, world_size, iqpr_schedule: as in :class:`CollectionSampler`.

    Attributes:
        sampler: the same draws one by one, a :class:`CollectionSampler`: where trainers look for ``set_epoch``.

    Raises:
        As :class:`CollectionSampler`.
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
        iqpr_schedule: Callable[[int], float] | None = None,
    ) -> None:
        self.batch_size = check_size("batch_size", batch_size, 1)
        self.num_batches = check_count("num_batches", num_batches, 1, 2**63)
        draws = self.batch_size * self.num_batches
        self._draws = _Draws(table, None, draws, seed, Ranks(rank, world_size), iqpr_schedule)
        self.sampler = CollectionSampler._of(self._draws)

    def __len__(self) -> int:
        return self._draws.length(self._draws.ranks.part()) // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        return _Batches(self._draws, self.batch_size, Tensor.tolist)

    def tensors(self) -> Iterator[Tensor]:
        """An iteration, as ``iter(sampler)`` is, whose batches are int64 ``[batch_size]`` on the device of the table."""
        return _Batches(self._draws, self.batch_size, _itself)

    def __repr__(self) -> str:
        return (
            f"CollectionBatchSampler({self.table}, batch_size={self.batch_size}, num_batches={self.num_batches}, "
            f"{self._draws})"
        )

    def state_dict(self, done: int | None = None) -> dict[str, Any]:
        """As :meth:`CollectionSampler.state_dict`, with ``done`` in batches."""
        return self._draws.state_dict(done, self.batch_size, "batches_at_once")


class _Draws:
    """The draws of one seed, epoch by epoch, and how far they have come: what a sampler and its iterators share.

    Positions count the draws of an epoch over all ranks. The lock is the table's.
    """

    def __init__(
        self,
        table: AliasTable,
        num_samples: int | None,
        per_rank: int | None,
        seed: int | None,
        ranks: Ranks,
        iqpr_schedule: Callable[[int], float] | None,
    ) -> None:
        self.table = check_table("table", table)
        self._schedule = IqprSchedule(table, iqpr_schedule)
        table._check_known("drawn from by a sampler")
        self.ranks = ranks
        self._num_samples = num_samples
        self._per_rank = per_rank
        check_count("num_samples", self.num_samples(ranks.own()[1]), 1, 2**63)
        self.seed = table._new_seed(ranks.rank) if seed is None else seed_of(seed)
        self.epoch = 0  # the one under way, or that the next iteration begins with
        self._position = 0  # in it
        self._under_way = False
        self._part: Part | None = None  # of the iteration that began last
        self._current: _Iteration[Any] | None = None  # that iteration, while it lasts: it knows the position

    def __repr__(self) -> str:
        rank, world_size = self.ranks.own()
        return f"seed={self.seed}, rank={rank} of {world_size}, epoch={self.epoch}"

    def __getstate__(self) -> dict[str, Any]:
        with self.table._alone():
            # a copy of the current iteration says of itself that it is: no copies of samplers carry what it has drawn
            return {**vars(self), "_position": self.position, "_current": None}

    @property
    def position(self) -> int:
        return self._position if self._current is None else self._current.position

    def num_samples(self, world_size: int) -> int:
        if self._num_samples is not None:
            return self._num_samples
        assert self._per_rank is not None
        return self._per_rank * world_size

    def total(self, part: Part) -> int:
        """Draws of an epoch over all ranks."""
        return -(-self.num_samples(part.world_size) // part.world_size) * part.world_size

    def check_epoch(self, name: str, epoch: object, total: int | None = None) -> int:
        """The epoch, where its draws have numbers that the table takes."""
        return check_count(name, epoch, 0, 2**63 // (total or self.num_samples(self.ranks.own()[1])))

    def length(self, part: Part) -> int:
        """Draws of an epoch that are handed out."""
        return self.total(part) // part.stride

    def upcoming(self) -> tuple[int, int]:
        """Epoch and position of the next iteration."""
        return (self.epoch + 1, 0) if self._under_way else (self.epoch, self._position)

    def begin(self, iteration: _Iteration[Any], epoch: int, position: int) -> Part:
        part = self.ranks.part()
        total = self.total(part)
        self.check_epoch("epoch", epoch, total)
        if position % part.stride:
            raise ValueError(
                f"fastkd: state['draws_done'] is {position}, which {part.stride} ranks cannot share equally"
            )
        if self._per_rank is not None and position > total:
            raise ValueError(f"fastkd: state['draws_done'] is {position}, but this sampler draws {total} an epoch")
        self._schedule.begin(epoch, anew=position == 0)
        self.epoch, self._under_way, self._part, self._current = epoch, True, part, iteration
        return part

    def end(self, iteration: _Iteration[Any]) -> None:
        if self._current is iteration:
            self._position, self._current = iteration.position, None

    def set_epoch(self, epoch: int) -> None:
        with self.table._alone():
            if epoch != self.epoch or self._under_way:
                self._go_to(epoch, 0)

    def _go_to(self, epoch: int, position: int) -> None:
        self.epoch, self._position, self._under_way, self._current = epoch, position, False, None

    def state_dict(self, done: int | None, unit: int, at_once: str) -> dict[str, Any]:
        with self.table._alone():
            part = self._part if self._part is not None and self._under_way else self.ranks.part()
            if done is None:
                position = self.position
            else:
                draws, factor, total = check_count("done", done) * unit, getattr(part, at_once), self.total(part)
                position = draws * factor
                if not 0 <= position <= total:
                    raise ValueError(f"fastkd: done is {draws} draws, must be from 0 to the epoch's {total // factor}")
            state: dict[str, Any] = self.state_at(self.epoch, position, part)
            if self.table.changed:
                state["table"] = self.table.state_dict(weights=True)
            return state

    def state_at(self, epoch: int, position: int, part: Part) -> dict[str, int]:
        return {
            "seed": self.seed,
            "epoch": epoch,
            "draws_done": position,
            "num_samples": self.num_samples(part.world_size),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        seed, epoch, position, num_samples = self.checked(state)
        with self.table._alone():
            if "table" in state:
                self.table.load_state_dict(state["table"], stream=False)
            self.seed = seed
            # the last draw of an epoch is followed by the first of the next one
            self._go_to(*((epoch + 1, 0) if position >= num_samples else (epoch, position)))

    def checked(self, state: dict[str, Any]) -> tuple[int, int, int, int]:
        check_state(state, _STATE, "a collection sampler")
        seed = seed_of(state["seed"], "state['seed']")
        epoch = self.check_epoch("state['epoch']", state["epoch"])
        position, num_samples = (check_count(f"state['{name}']", state[name], 0) for name in _STATE[2:])
        _, world_size = self.ranks.own()
        own = self.num_samples(world_size)
        # where the process group may still come, batches may be for any number of ranks
        fits = num_samples == own if self.ranks.settled or self._per_rank is None else num_samples % own == 0
        if not fits:
            raise ValueError(f"fastkd: state['num_samples'] is {num_samples}, but this sampler draws {own} an epoch")
        if self.ranks.world_size is not None and position % world_size:
            raise ValueError(
                f"fastkd: state['draws_done'] is {position}, which {world_size} ranks cannot share equally"
            )
        return seed, epoch, position, num_samples


class _Iteration(Iterator[T_co], Generic[T_co]):
    """An epoch in pieces of ``size`` draws. It begins with the first piece: an iterator that nobody asks changes nothing.

    Its state is what torchdata's StatefulDataLoader saves besides the sampler's. A state that was taken at the end of an
    epoch makes an iteration without draws.
    """

    def __init__(self, draws: _Draws, size: int) -> None:
        self._draws = draws
        self._size = size
        self._from: tuple[int, int] | None = None  # of a state that was loaded
        self._part: Part | None = None
        self._stream: Tensor | None = None  # seed, 0
        self._total = self._epoch = 0
        self._made = 0  # position behind the draws made

    def __getstate__(self) -> dict[str, Any]:
        with self._draws.table._alone():
            return {**vars(self), "_is_current": self._draws._current is self}

    def __setstate__(self, state: dict[str, Any]) -> None:
        is_current = state.pop("_is_current")
        vars(self).update(state)
        if is_current and self._draws._current is None:  # copied together with the draws, which are others now
            self._draws._current = self

    def __iter__(self) -> _Iteration[T_co]:
        return self

    @property
    def position(self) -> int:
        """Draws of the epoch that were handed out, on all ranks."""
        return self._made

    def _piece(self) -> Tensor | None:
        """The next draws, or None at the end; with the lock of the table."""
        draws = self._draws
        if self._part is None:
            self._epoch, self._made = self._from or draws.upcoming()
            self._part = draws.begin(self, self._epoch, self._made)
            self._stream, self._total = new_stream(draws.seed, draws.table.device), draws.total(self._part)
        assert self._stream is not None
        part, total = self._part, self._total
        n = min(self._size, -(-(total - self._made) // part.stride))
        if n <= 0:
            draws.end(self)
            return None
        start = self._epoch * total + self._made + part.rank
        piece = draws.table._draw_at(self._stream, start, n, part.stride)
        self._made += n * part.stride
        return piece

    def state_dict(self) -> dict[str, int]:
        """Of this iteration, whatever others the sampler has begun."""
        with self._draws.table._alone():
            if self._part is not None:
                return self._draws.state_at(self._epoch, self.position, self._part)
            return self._draws.state_at(*(self._from or self._draws.upcoming()), self._draws.ranks.part())

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on where the state was taken, to the end of that epoch."""
        seed, epoch, position, _ = self._draws.checked(state)
        with self._draws.table._alone():
            self._draws.seed, self._from, self._part = seed, (epoch, position), None


class _Batches(_Iteration[T_co]):
    def __init__(self, draws: _Draws, size: int, made_of: Callable[[Tensor], T_co]) -> None:
        super().__init__(draws, size)
        self._made_of = made_of

    def __next__(self) -> T_co:
        with self._draws.table._alone():
            piece = self._piece()
        if piece is None:
            raise StopIteration
        return self._made_of(piece)


class _Items(_Iteration[int]):
    def __init__(self, draws: _Draws) -> None:
        super().__init__(draws, _CHUNK)
        self._chunk: Iterator[int] = iter(())

    def __next__(self) -> int:
        for index in self._chunk:  # one step of the interpreter, so that threads can share the iterator
            return index
        with self._draws.table._alone():
            for index in self._chunk:  # another thread has been here
                return index
            piece = self._piece()
            if piece is None:
                raise StopIteration
            index, *rest = piece.tolist()
            self._chunk = iter(rest)
        return index  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        with self._draws.table._alone():
            # of its own also in a shallow copy
            return {**super().__getstate__(), "_chunk": copy.copy(self._chunk)}

    @property
    def position(self) -> int:
        left = operator.length_hint(self._chunk)
        return self._made - left * (1 if self._part is None else self._part.stride)

    def load_state_dict(self, state: dict[str, int]) -> None:
        super().load_state_dict(state)
        self._chunk = iter(())


def _itself(batch: Tensor) -> Tensor:
    return batch
