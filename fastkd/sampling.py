"""Weighted sampling with replacement from millions of items: ``softmax(lambda u)`` over the scores of a collection.

The sampler of "Distillation from heterogeneous unlabeled collections" (Begon & Geurts, section 2.1): each image is
drawn with probability proportional to ``exp(lambda u_i)``, and lambda is set through the inter-quartile sampling
probability ratio, ``lambda = ln(IQPR) / (Q3(u) - Q1(u))``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Sampler

from fastkd.ops import alias as _ops

__all__ = ["AliasTable", "CollectionBatchSampler", "CollectionSampler"]

_CHUNK = 1 << 16  # draws made at a time where indices are handed out one by one


class AliasTable:
    """O(1) draws from ``softmax(inverse_temperature * scores)``, built in O(N), 8 bytes an item.

    Probabilities are held in fixed point: integers that sum to less than 2^52, so that they are the same on every
    device and for any number of threads, and the distribution differs from the fp64 softmax by less than 1e-6 in total
    variation for up to 2^31 items (about 1e-9 for millions). Items of score ``-inf`` are never drawn.

    Draw number ``i`` of a seed is a function of (seed, i): results do not depend on threads, on the device, on ranks,
    or on whether n draws come in one call or in many.

    Args:
        scores: ``[N]``, float32, float64, bfloat16 or float16; higher is drawn more often. Detached.
        inverse_temperature: lambda >= 0, a number or a float tensor ``[]``; 0 is uniform. Give this or ``iqpr``; with
            neither it is 1, the plain softmax of the scores.
        iqpr: the ratio, >= 1, of the probabilities of the items at the third and at the first quartile of the scores.
            1 is uniform. Where the quartiles coincide no lambda can give it: the table is then uniform (lambda = 0).
        seed: of the table's own stream of draws; by default drawn from torch's default generator.

    Raises:
        ValueError, RuntimeError: no item, scores that are NaN or +inf or all -inf, lambda < 0, iqpr < 1.
    """

    def __init__(
        self,
        scores: Tensor,
        inverse_temperature: float | Tensor | None = None,
        *,
        iqpr: float | None = None,
        seed: int | None = None,
    ) -> None:
        if not isinstance(scores, Tensor):
            raise TypeError(f"fastkd: scores is {type(scores).__name__}, must be a float tensor [N]")
        if inverse_temperature is not None and iqpr is not None:
            raise ValueError(
                f"fastkd: inverse_temperature is {inverse_temperature} and iqpr is {iqpr}, must be given one at a time"
            )
        if iqpr is not None:
            self.inverse_temperature = _ops.inverse_temperature(scores, iqpr)
        else:
            self.inverse_temperature = torch.as_tensor(
                1.0 if inverse_temperature is None else inverse_temperature, dtype=torch.float64, device=scores.device
            ).detach()
        self._table = _ops.build(scores, self.inverse_temperature)
        self._stream = _new_stream(seed, scores.device)

    @classmethod
    def from_weights(cls, weights: Tensor, *, seed: int | None = None) -> AliasTable:
        """A table that draws item i with probability ``weights[i] / weights.sum()``; weights ``[N]``, >= 0, any float dtype."""
        if not isinstance(weights, Tensor) or not weights.is_floating_point():
            given = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
            raise TypeError(f"fastkd: weights is {given}, must be a float tensor [N]")
        # (a traced program cannot branch on values: there the build finds the NaN of their logarithm)
        if not torch.compiler.is_compiling() and not (
            bool((weights >= 0).all()) and bool((weights < math.inf).all()) and bool((weights > 0).any())
        ):
            raise ValueError("fastkd: weights must be finite and at least 0, and not all 0")
        return cls(weights.detach().double().log(), 1.0, seed=seed)

    def __len__(self) -> int:
        return self._table.bins.shape[0]

    @property
    def device(self) -> torch.device:
        """The device of the table and of its draws."""
        return self._table.bins.device

    @property
    def nbytes(self) -> int:
        """Bytes that the table holds."""
        return sum(t.numel() * t.element_size() for t in self._table)

    def to(self, device: torch.device | str) -> AliasTable:
        """The same table, at the same place of its stream, on another device; draws there are the same numbers."""
        moved = AliasTable.__new__(AliasTable)
        moved._table = _ops.Table(*(t.to(device) for t in self._table))
        with torch.inference_mode(False):
            moved._stream = self._stream.clone().to(device)
        moved.inverse_temperature = self.inverse_temperature.to(device)
        return moved

    def __repr__(self) -> str:
        return (
            f"AliasTable({len(self)} items, inverse_temperature={float(self.inverse_temperature):.6g}, {self.device})"
        )

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` item indices, int64 ``[n]``, on the table's device.

        Without a generator, the next ``n`` draws of the table's own stream. With one, a seed is taken from it, and the
        draws are the first ``n`` of that seed; the own stream stays where it is. Draw in the main process: each
        DataLoader worker has a stream of its own, which begins at the same place (use :meth:`sample_at`, or a sampler).
        """
        _check_count("n", n, 0)
        if generator is not None:
            seed = torch.randint(2**62, (1,), dtype=torch.int64, generator=generator, device=generator.device)
            return _ops.sample(self._table, _stream_of(seed, self.device), n)
        indices = _ops.sample(self._table, self._stream, n)
        self._stream[1] += n
        return indices

    def sample_at(self, seed: int, start: int, n: int, stride: int = 1) -> Tensor:
        """The draws number ``start, start + stride, ...`` (``n`` of them) of ``seed``, int64 ``[n]``; changes no state."""
        _check_count("n", n, 0)
        _check_count("stride", stride, 1)
        stream = torch.tensor([_as_int64(seed), start], dtype=torch.int64, device=self.device)
        return _ops.sample(self._table, stream, n, 0, stride)

    def update(self, indices: Tensor, scores: Tensor) -> None:
        """Gives some items new scores, rebuilding only their blocks of 4096 (and the small table over blocks).

        Lambda is not changed, and the weights stay in the units of the build, or coarser ones where new scores need
        room: the distribution is within ``N / weights().sum()`` of the softmax in total variation. That is as good as
        a fresh build unless the total weight falls far: where the items that held nearly all of it leave, a warning says
        so (on the CPU), and a new table should be built. Of equal indices the last one counts.

        Args:
            indices: int64 ``[n]``, items in ``[0, N)``.
            scores: float ``[n]``, their new scores; ``-inf`` takes an item out.

        Raises:
            RuntimeError: an index out of range, NaN or +inf, no item left, or scores so far above the old largest that
                they cannot be put in scale; the table is then unchanged.
        """
        for name, value in (("indices", indices), ("scores", scores)):
            if not isinstance(value, Tensor):
                raise TypeError(f"fastkd: {name} is {type(value).__name__}, must be a tensor")
        _ops.update(self._table, indices, scores)
        if self.device.type == "cpu" and not torch.compiler.is_compiling():
            total = self._table.scale[3].item()
            if len(self) > 1e-6 * total:
                warnings.warn(
                    f"fastkd: after this update the table's weights sum to {total:.0f} for {len(self)} items, too few for "
                    "exact probabilities; build a new AliasTable from the scores",
                    stacklevel=2,
                )

    def weights(self) -> Tensor:
        """The exact integer weights that the draws follow: int64 ``[N]``; probability = weight / sum."""
        return _ops.weights(self._table)

    def probabilities(self) -> Tensor:
        """The probability of each item: float64 ``[N]``."""
        weights = self.weights()
        return weights.double() / weights.sum()

    def state_dict(self) -> dict[str, Any]:
        """Seed and position of the own stream, lambda, and a fingerprint of the table; not the table, which the scores give."""
        seed, position = self._stream.tolist()
        return {
            "seed": seed,
            "next_index": position,
            "inverse_temperature": float(self.inverse_temperature),
            "items": len(self),
            "total_weight": int(self._table.block_weight.sum()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues the stream of ``state``.

        The table must be the one it was saved from: built from the same scores and lambda, and updated alike.
        """
        own = self.state_dict()
        for key in ("items", "total_weight", "inverse_temperature"):
            if state[key] != own[key]:
                raise ValueError(
                    f"fastkd: state['{key}'] is {state[key]}, but this table has {own[key]}; rebuild the table from the "
                    "scores it was saved with, and repeat its updates"
                )
        self._stream.copy_(torch.tensor([state["seed"], state["next_index"]], dtype=torch.int64))


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
        _check_count("num_samples", num_samples, 1)
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
        _check_count("batch_size", batch_size, 1)
        _check_count("num_batches", num_batches, 1)
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


def _check_count(name: str, value: int, least: int) -> None:
    if not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"fastkd: {name} is {type(value).__name__}, must be an int")
    if value < least:
        raise ValueError(f"fastkd: {name} is {value}, must be at least {least}")


def _as_int64(seed: int) -> int:
    """The seed modulo 2^64, as torch.Generator takes it, in int64."""
    return (seed + 2**63) % 2**64 - 2**63


def _new_stream(seed: int | None, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a table made in inference mode can be drawn from outside of it
        if seed is None:
            return _stream_of(torch.randint(2**62, (1,), dtype=torch.int64), device)
        return _stream_of(torch.tensor([_as_int64(seed)], dtype=torch.int64), device)


def _stream_of(seed: Tensor, device: torch.device) -> Tensor:
    return torch.cat([seed, torch.zeros_like(seed)]).to(device)
