"""The alias table of a collection whose scores lie on several ranks: each holds those of its items, all draw the same."""

from __future__ import annotations

import hashlib
import math
import warnings
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastkd._checks import check_count, check_dtype, check_number, check_size, check_state
from fastkd._group import Group
from fastkd._seeding import draw_seed, seed_of
from fastkd.ops import alias as _ops
from fastkd.ops import alias_shard as _parts
from fastkd.ops.alias import BLOCK_SIZE
from fastkd.owned_draws import OwnedDraws, check_on_cpu, check_same, gathered

__all__ = ["OwnedDraws", "ShardedAliasTable"]


class ShardedAliasTable:
    """:class:`fastkd.AliasTable` over the items of all ranks of torch.distributed, of which each rank holds its own only.

    Rank r has the scores of items ``[offset, offset + len(scores))``, and of the table the bins of these items, 8 bytes
    each. What every rank has is the small table over blocks of 4096 items: ``24 ceil(N / 4096)`` bytes for N items in all,
    5,859,384 for 1e9. The blocks, their integer weights and the table over them are those of an ``AliasTable`` of all
    scores in a row. So the distribution is as exact, and **draw number i of a seed is the same item, bit for bit, in an
    AliasTable and for any number of ranks**; states go from one to the other.

    Which rank owns a draw follows from the table over blocks, which all have: nobody asks anybody. :meth:`owned` says which of
    some draws are of this rank's items; it loads these, and :meth:`OwnedDraws.gather` brings each to the rank that drew it.
    Of every w draws rank r of w gets number r. The bytes of a draw are those of the item, for indices (:meth:`sample`) 8, and
    none where drawer and owner are one.

    All ranks make the table together, and call :meth:`update`, :meth:`sample`, :meth:`OwnedDraws.gather` and
    :meth:`load_state_dict` together, in one thread; the others exchange nothing. What is wrong on one rank is then the same
    error on all of them. Without a process group there is one rank.

    Args:
        scores: ``[n]``, float32, float64, bfloat16 or float16, on the CPU: those of this rank's items. There may be none. Where
            the items of a rank begin must be a multiple of 4096, so that no block lies on two ranks (:meth:`shard`).
        inverse_temperature: lambda >= 0, a number or a float tensor ``[]``, the same on all ranks. Give this or ``iqpr``;
            with neither it is 1.
        iqpr: the ratio of the probabilities of the items at the third and at the first quartile of all scores, >= 1. The
            quartiles are exact; what is exchanged is counts, 6.8 MB at most, no scores.
        seed: of the table's own stream of draws, the same on all ranks; by default rank 0 draws one for all.
        group: the ranks, by default all.

    Attributes:
        inverse_temperature: lambda, float64 ``[]``.
        offset: the first item of this rank.

    Raises:
        TypeError, ValueError: as ``AliasTable``, on all ranks; scores that are not on the CPU, that begin within a block of
        4096, or are all -inf or none on every rank; arguments that are not the same on all ranks.
    """

    def __init__(
        self,
        scores: Tensor,
        inverse_temperature: float | Tensor | None = None,
        *,
        iqpr: float | None = None,
        seed: int | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._group = Group(group)
        told = self._group.together(lambda: _facts(scores, inverse_temperature, iqpr, seed))
        scores = scores.detach()
        for name in ("inverse_temperature", "iqpr", "seed"):
            check_same(name, [getattr(facts, name) for facts in told])
        starts = _starts([facts.items for facts in told])
        maximum = max(facts.maximum for facts in told)
        if maximum == -math.inf:
            raise ValueError("fastkd: scores are all -inf, must hold at least one finite score on some rank")
        self.offset, self._items = starts[self._group.rank], starts[-1]
        # the first block of each rank, and the first behind the last one: those behind the items have no blocks
        self._first_block = torch.tensor([_blocks(start) for start in starts])
        if iqpr is None:
            self.inverse_temperature = torch.tensor(told[0].inverse_temperature, dtype=torch.float64)
        else:
            self.inverse_temperature = _lambda_of(_parts.quartiles(scores, self._group.sum), told[0].iqpr)
        kappa = float(self.inverse_temperature) * _parts.LOG2_E
        if kappa == math.inf:
            raise ValueError(f"fastkd: inverse_temperature is {float(self.inverse_temperature)}, too large")
        self._build(scores, maximum + 0.0, kappa)  # no -0
        self._seed, self._next = told[0].seed if told[0].seed is not None else told[0].fresh_seed, 0

    def _build(self, scores: Tensor, reference: float, kappa: float) -> None:
        if self._group.size == 1:
            self._bins, self._block_weight, self._top, scale = _ops.build(scores, self.inverse_temperature)
            self._scale, self._total = _parts.Scale(reference, kappa, int(scale[2])), int(scale[3])
            return
        terms = sum(self._group.gather(_parts.partition(scores, reference, kappa)))
        self._scale = _parts.Scale(reference, kappa, _parts.exponent_of(terms))
        self._bins, block_weight = _parts.build(scores, self._scale)
        self._take(self._weights_of_all(block_weight))

    @staticmethod
    def shard(items: int, rank: int, world_size: int) -> tuple[int, int]:
        """The items of a rank, from the first up to the one behind the last, where ranks share them as equally as blocks allow.

        Each begins at a multiple of 4096, as a block has one owner; where there are fewer blocks than ranks some have none.
        """
        items = check_count("items", items, 0, _parts.LARGEST_ITEMS)
        world_size = check_count("world_size", world_size, 1, 2**31)
        rank = check_count("rank", rank, 0, world_size)
        blocks = _blocks(items)
        start, stop = (min(items, BLOCK_SIZE * (blocks * r // world_size)) for r in (rank, rank + 1))
        return start, stop

    def __len__(self) -> int:
        """Items of all ranks."""
        return self._items

    def __repr__(self) -> str:
        return (
            f"ShardedAliasTable({len(self)} items, {len(self._bins)} from {self.offset} on here, "
            f"rank {self._group.rank} of {self._group.size}, inverse_temperature={float(self.inverse_temperature):.6g})"
        )

    @property
    def nbytes(self) -> int:
        """Bytes that this rank holds."""
        return sum(t.nbytes for t in (self._bins, self._block_weight, self._top))

    @property
    def total_weight(self) -> int:
        """The sum of the integer weights of all ranks."""
        return self._total

    def weights(self) -> Tensor:
        """The exact integer weights of this rank's items: int64 ``[n]``; probability = weight / ``total_weight``."""
        if not len(self._bins):
            return torch.empty(0, dtype=torch.int64)
        begin, end = self._own_blocks()
        weight = self._block_weight[begin:end].contiguous()
        return _ops.weights(_ops.Table(self._bins, weight, self._top, torch.empty(4, dtype=torch.float64)))

    def probabilities(self) -> Tensor:
        """The probability of each of this rank's items, float64 ``[n]``; they sum to 1 over the ranks."""
        return self.weights().double() / self._block_weight.sum()

    # ---- draws ---------------------------------------------------------------------------------------------------------

    def owned(self, start: int, count: int, *, seed: int | None = None) -> OwnedDraws:
        """Which of the draws ``start, start + 1, ...`` (``count`` of them, of all ranks) fall into this rank's items.

        Nothing is exchanged, and no state changes: a loader's worker may ask for batches ahead.

        Args:
            start: in [0, 2^63).
            count: >= 0; rank r of w gets the draws ``start + r, start + r + w, ...`` of these.
            seed: any int, modulo 2^64; by default that of the table's own stream.
        """
        count, start = check_size("count", count), check_count("start", start, 0, 2**63)
        if start + count > 2**63:
            raise ValueError(f"fastkd: start is {start}, must be at most 2^63 - {count}, the number of draws")
        seed = self._seed if seed is None else seed_of(seed)
        group = self._group
        if group.size == 1:
            scale = torch.tensor([*self._scale, self.total_weight], dtype=torch.float64)
            table = _ops.Table(self._bins, self._block_weight, self._top, scale)
            items = _ops.sample(table, torch.tensor([seed, 0]), count, start)
            return OwnedDraws(torch.arange(count), items, group, (seed, start, count), None)
        part = (self._bins, self._own_blocks(), self._block_weight, self._top, self.total_weight, self._items)
        positions, items, told = _parts.draw(*part, seed, start, count, (group.rank, group.size))
        owners = torch.searchsorted(self._first_block[1:].contiguous(), told, right=True)
        return OwnedDraws(positions, items, group, (seed, start, count), owners)

    def next_owned(self, n: int) -> OwnedDraws:
        """:meth:`owned` of the next draws of the table's own stream, ``n`` for each rank: the same ``n`` on all of them."""
        count = check_size("n", n) * self._group.size
        draws = self.owned(self._next, count)
        self._next += count
        return draws

    def sample(self, n: int) -> Tensor:
        """This rank's share of the next ``n`` draws for each rank: items of all ranks, int64 ``[n]``.

        Of the ``n w`` next draws of the table's own stream rank r of w gets number r, r + w, ...: those of all ranks together
        are the same for any number of ranks. Called by all ranks, with the same ``n``.

        Raises:
            TypeError, ValueError: an ``n`` that is no int or below 0, or not the same on all ranks; on all of them.
        """
        draws: OwnedDraws | None = None
        wrong: Exception | None = None
        before = self._next
        try:
            draws = self.next_owned(n)
        except Exception as error:
            wrong = error
        try:
            return gathered(self._group, draws, None if draws is None else draws.items + self.offset, wrong)
        except Exception:
            self._next = before
            raise

    # ---- updates -------------------------------------------------------------------------------------------------------

    def update(self, indices: Tensor, scores: Tensor) -> None:
        """Gives some items new scores, as ``AliasTable.update`` does: the same table as there, bit for bit.

        Called by all ranks, each with changes of its own items, or none (``[0]``). Rebuilt are the blocks of these items and
        the table over blocks, for which all ranks exchange the weights of their blocks, 8 bytes each.

        Args:
            indices: int64 ``[n]``, items in ``[offset, offset + len(scores))`` of this rank. Of equal ones the last counts.
            scores: float ``[n]``, their new scores; ``-inf`` takes an item out.

        Raises:
            TypeError, ValueError: as there, on all ranks; an item of another rank. The table is then unchanged.
        """
        told = self._group.together(lambda: self._change(indices, scores))
        count = sum(change.items for change in told)
        if not count:
            return
        items, scores = indices - self.offset, scores.detach()
        scale = self._scale
        maximum = max(change.maximum for change in told)
        t = (maximum - scale.reference) * scale.kappa if maximum > scale.reference else 0.0
        if not t < _parts.LARGEST_T:
            raise ValueError(
                f"fastkd: scores hold {maximum:g}, too far above {scale.reference:g}, the largest score of the build, for this "
                "inverse temperature; build a new table"
            )
        largest_t = _parts.floor_of(t)

        def added(exponent: int) -> int:
            return sum(self._group.gather(_parts.sum_of_weights(scores, scale._replace(exponent=exponent), largest_t)))

        shift = _parts.shift_for(scale.exponent, largest_t, added, count, self.total_weight, len(self))
        scale = scale._replace(exponent=scale.exponent - shift)
        own = slice(*self._own_blocks())

        def changed() -> Any:
            return _parts.rebuilt(self._bins, self._block_weight[own], scale, shift, items, scores)

        # Nothing is written before it is known that some weight is left. What a few changes make is kept meanwhile; where all
        # weights are divided it would be a second table, so it is made twice.
        kept = None if shift else list(changed())
        block_weight = self._block_weight[own].clone()
        for blocks, _, weight in kept if kept is not None else changed():
            block_weight[blocks] = weight
        of_all = self._weights_of_all(block_weight)
        if not int(of_all.sum()):
            raise ValueError("fastkd: scores would leave no item with a positive weight")
        for blocks, bins, _ in kept if kept is not None else changed():
            for block, new in zip(blocks, bins.split(BLOCK_SIZE), strict=True):
                self._bins[block * BLOCK_SIZE :][: len(new)] = new
        self._scale = scale
        self._take(of_all)
        if len(self) > 1e-6 * self.total_weight:
            warnings.warn(
                f"fastkd: after this update the table's weights sum to {self.total_weight} for {len(self)} items, too few "
                "for exact probabilities; build a new ShardedAliasTable from the scores",
                stacklevel=2,
            )

    def _change(self, indices: Tensor, scores: Tensor) -> _Change:
        """What the others must know of the changes here."""
        check_dtype("indices", indices, (torch.int64,))
        check_dtype("scores", scores)
        if indices.dim() != 1 or indices.shape != scores.shape:
            raise ValueError(
                f"fastkd: scores has shape {tuple(scores.shape)} and indices {tuple(indices.shape)}, must both be [n]"
            )
        check_on_cpu("indices", indices)
        check_on_cpu("scores", scores)
        outside = ((indices < self.offset) | (indices >= self.offset + len(self._bins))).nonzero()
        if len(outside):
            at = int(outside[0])
            raise ValueError(
                f"fastkd: indices[{at}] is {int(indices[at])}, must be in [{self.offset}, "
                f"{self.offset + len(self._bins)}), an item of this rank"
            )
        return _Change(len(indices), _maximum_of(scores))

    # ---- state ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Seed and position of the own stream, lambda, and a fingerprint of the table; the same on every rank.

        It is good for any number of ranks, and has all that ``AliasTable.load_state_dict`` asks for.
        """
        return {
            "seed": self._seed,
            "next_index": self._next,
            "inverse_temperature": float(self.inverse_temperature),
            "items": len(self),
            "total_weight": self.total_weight,
            "block_weights": hashlib.blake2b(self._block_weight.numpy().tobytes(), digest_size=16).hexdigest(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues the stream of ``state``, of this kind of table or an ``AliasTable``. Called by all ranks.

        The table must be the one it was saved from: of the same scores and lambda, and updated alike; on any number of ranks.

        Raises:
            TypeError, ValueError: no such state, or that of another table, or not the same on all ranks; on all of them.
        """
        told = self._group.together(lambda: self._checked(state))
        check_same("state", told)
        self._seed, self._next = told[0]

    def _checked(self, state: dict[str, Any]) -> tuple[int, int]:
        own = self.state_dict()
        compared = ("items", "total_weight", "inverse_temperature")
        check_state(state, ("seed", "next_index", *compared), "a ShardedAliasTable")
        for key in (*compared, "block_weights"):
            if state.get(key, own[key]) != own[key]:
                raise ValueError(
                    f"fastkd: state['{key}'] is {state[key]}, but this table has {own[key]}; rebuild the table from "
                    "the scores it was saved with, and repeat its updates"
                )
        return seed_of(state["seed"], "state['seed']"), check_count(
            "state['next_index']", state["next_index"], 0, 2**63
        )

    # ---- parts ---------------------------------------------------------------------------------------------------------

    def _own_blocks(self) -> tuple[int, int]:
        begin, end = self._first_block[self._group.rank :][:2].tolist()
        return begin, end

    def _take(self, block_weight: Tensor) -> None:
        """The weights of all blocks, and what follows from them."""
        self._block_weight, self._top = block_weight, _parts.top_of(block_weight)
        self._total = int(block_weight.sum())

    def _weights_of_all(self, own: Tensor) -> Tensor:
        """The weights of all blocks, of which each rank has its own."""
        every = torch.zeros(_blocks(self._items), dtype=torch.int64)
        every[slice(*self._own_blocks())] = own
        return self._group.sum(every)


class _Facts(NamedTuple):
    """What a rank says of its arguments."""

    items: int
    maximum: float
    inverse_temperature: float
    iqpr: float
    seed: int | None
    fresh_seed: int


class _Change(NamedTuple):
    items: int
    maximum: float


def _facts(scores: Tensor, inverse_temperature: float | Tensor | None, iqpr: float | None, seed: int | None) -> _Facts:
    check_dtype("scores", scores)
    if inverse_temperature is not None and iqpr is not None:
        raise ValueError(
            f"fastkd: inverse_temperature is {inverse_temperature} and iqpr is {iqpr}, must be given one at a time"
        )
    if scores.dim() != 1:
        raise ValueError(f"fastkd: scores has shape {tuple(scores.shape)}, must be [n], the scores of this rank")
    check_on_cpu("scores", scores)
    if isinstance(inverse_temperature, Tensor):
        check_dtype("inverse_temperature", inverse_temperature)
        if inverse_temperature.numel() != 1:
            raise ValueError(
                f"fastkd: inverse_temperature has shape {tuple(inverse_temperature.shape)}, must be a single number"
            )
        inverse_temperature = float(inverse_temperature.detach())
    value = 1.0 if inverse_temperature is None else check_number("inverse_temperature", inverse_temperature)
    if not 0 <= value < math.inf:
        raise ValueError(f"fastkd: inverse_temperature is {value}, must be finite and at least 0")
    ratio = 1.0 if iqpr is None else check_number("iqpr", iqpr)
    if not 1 <= ratio < math.inf:
        raise ValueError(f"fastkd: iqpr is {ratio}, must be finite and at least 1")
    fresh = int(draw_seed(0, 2**62, torch.device("cpu"))) if seed is None else 0
    own = None if seed is None else seed_of(seed)
    return _Facts(len(scores), _maximum_of(scores.detach()), value, ratio, own, fresh)


def _maximum_of(scores: Tensor) -> float:
    maximum = float(scores.max()) if len(scores) else -math.inf  # NaN if one is
    if not maximum < math.inf:
        raise ValueError("fastkd: scores holds NaN or +inf, must be finite, or -inf for items that are never drawn")
    return maximum


def _starts(counts: list[int]) -> list[int]:
    """Where the items of each rank begin, and behind the last one."""
    starts = [0]
    for rank, count in enumerate(counts):
        if count and starts[-1] % BLOCK_SIZE:
            raise ValueError(
                f"fastkd: scores of rank {rank} begin at item {starts[-1]}, must begin at a multiple of {BLOCK_SIZE}, as a "
                f"block of {BLOCK_SIZE} items has one owner; ShardedAliasTable.shard(items, rank, world_size) says where"
            )
        starts.append(starts[-1] + count)
    if not 0 < starts[-1] < _parts.LARGEST_ITEMS:
        raise ValueError(
            f"fastkd: scores hold {starts[-1]} items on all ranks, must be at least one and fewer than "
            f"{_parts.LARGEST_ITEMS}"
        )
    return starts


def _blocks(items: int) -> int:
    return -(-items // BLOCK_SIZE)


def _lambda_of(quartiles: tuple[float, float], iqpr: float) -> Tensor:
    """By the operator, of five scores that have these quartiles."""
    lower, upper = quartiles
    if not (math.isfinite(lower) and math.isfinite(upper)):  # further apart than floats are
        return torch.zeros([], dtype=torch.float64)
    return _ops.inverse_temperature(torch.tensor([lower] * 3 + [upper] * 2, dtype=torch.float64), iqpr)
