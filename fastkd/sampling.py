"""Weighted sampling with replacement from millions of items: ``softmax(lambda u)`` over the scores of a collection.

The sampler of "Distillation from heterogeneous unlabeled collections" (Begon & Geurts, section 2.1): each image is
drawn with probability proportional to ``exp(lambda u_i)``, and lambda is set through the inter-quartile sampling
probability ratio, ``lambda = ln(IQPR) / (Q3(u) - Q1(u))``.
"""

from __future__ import annotations

import math
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
        draws are the first ``n`` of that seed; the own stream stays where it is.
        """
        if n < 0:
            raise ValueError(f"fastkd: n is {n}, must be at least 0")
        if generator is not None:
            seed = torch.randint(2**62, (1,), dtype=torch.int64, generator=generator, device=generator.device)
            return _ops.sample(self._table, _stream_of(seed, self.device), n)
        indices = _ops.sample(self._table, self._stream, n)
        self._stream[1] += n
        return indices

    def sample_at(self, seed: int, start: int, n: int, stride: int = 1) -> Tensor:
        """The draws number ``start, start + stride, ...`` (``n`` of them) of ``seed``, int64 ``[n]``; changes no state."""
        if n < 0 or stride < 1:
            raise ValueError(f"fastkd: n is {n} and stride is {stride}, must be at least 0 and at least 1")
        stream = torch.tensor([_as_int64(seed), start], dtype=torch.int64, device=self.device)
        return _ops.sample(self._table, stream, n, 0, stride)

    def update(self, indices: Tensor, scores: Tensor) -> None:
        """Gives some items new scores, rebuilding only their blocks of 4096 (and the small table over blocks).

        The scale stays that of the build: lambda is not changed, and an update to the same scores as a fresh build
        gives the same probabilities. Of equal indices the last one counts.

        Args:
            indices: int64 ``[n]``, items in ``[0, N)``.
            scores: float ``[n]``, their new scores; ``-inf`` takes an item out.

        Raises:
            RuntimeError: an index out of range, NaN or +inf, no item left, or scores so far above the old largest that
                they cannot be put in scale; the table is then unchanged.
        """
        _ops.update(self._table, indices, scores)

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
        """Continues the stream of ``state``. The table must be the one it was saved from, rebuilt from the same scores."""
        own = self.state_dict()
        for key in ("items", "total_weight", "inverse_temperature"):
            if state[key] != own[key]:
                raise ValueError(
                    f"fastkd: state['{key}'] is {state[key]}, but this table has {own[key]}; rebuild the table from the "
                    "scores it was saved with"
                )
        self._stream.copy_(torch.tensor([state["seed"], state["next_index"]], dtype=torch.int64))


class CollectionSampler(Sampler[int]):
    """A ``torch.utils.data`` sampler that draws ``num_samples`` items an epoch from an :class:`AliasTable`.

    Epoch e consists of the draws ``[e * num_samples, (e + 1) * num_samples)`` of ``seed``; rank r of w takes every w-th of
    them, from r on. So ranks are independent, and their union is the same for any number of ranks (``num_samples`` is
    rounded up to a multiple of w). Iterating to the end moves on to the next epoch.

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
        if num_samples < 1:
            raise ValueError(f"fastkd: num_samples is {num_samples}, must be at least 1")
        distributed = dist.is_available() and dist.is_initialized()
        self.world_size = world_size if world_size is not None else dist.get_world_size() if distributed else 1
        self.rank = rank if rank is not None else dist.get_rank() if distributed else 0
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"fastkd: rank is {self.rank}, must be in [0, {self.world_size})")
        self.table = table
        self.num_samples = num_samples
        self.seed = int(table.state_dict()["seed"]) if seed is None else seed
        self.epoch = 0
        self.position = 0  # draws of this rank already handed out in this epoch

    @property
    def samples_per_rank(self) -> int:
        """Draws of each rank in an epoch."""
        return -(-self.num_samples // self.world_size)

    def __len__(self) -> int:
        return self.samples_per_rank

    def set_epoch(self, epoch: int) -> None:
        """Goes to the start of an epoch, as ``DistributedSampler.set_epoch``; at the epoch under way it changes nothing."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def draw(self, n: int) -> Tensor:
        """The next ``n`` draws of this rank (fewer at the end of the epoch), int64, on the table's device."""
        n = min(n, self.samples_per_rank - self.position)
        start = (self.epoch * self.samples_per_rank + self.position) * self.world_size + self.rank
        indices = self.table.sample_at(self.seed, start, n, self.world_size)
        self.position += n
        return indices

    def __iter__(self) -> Iterator[int]:
        while self.position < self.samples_per_rank:
            start = self.position
            for taken, index in enumerate(self.draw(_CHUNK).tolist(), start + 1):
                self.position = taken  # a state saved between two items continues with the second
                yield index
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """Seed, epoch and position. With DataLoader workers the position is that of the prefetch, ahead of the loop."""
        return {"seed": self.seed, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues where ``state`` was taken."""
        self.seed, self.epoch, self.position = state["seed"], state["epoch"], state["position"]


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
        for name, value in (("batch_size", batch_size), ("num_batches", num_batches)):
            if value < 1:
                raise ValueError(f"fastkd: {name} is {value}, must be at least 1")
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.sampler = CollectionSampler(table, 1, seed=seed, rank=rank, world_size=world_size)
        self.sampler.num_samples = batch_size * num_batches * self.sampler.world_size

    def __len__(self) -> int:
        return self.num_batches

    def set_epoch(self, epoch: int) -> None:
        """Goes to the start of an epoch."""
        self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[Tensor]:
        while self.sampler.position < self.sampler.samples_per_rank:
            yield self.sampler.draw(self.batch_size)
        self.sampler.epoch, self.sampler.position = self.sampler.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """As :meth:`CollectionSampler.state_dict`."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues where ``state`` was taken."""
        self.sampler.load_state_dict(state)


def _as_int64(seed: int) -> int:
    """The seed modulo 2^64, as torch.Generator takes it, in int64."""
    return (seed + 2**63) % 2**64 - 2**63


def _new_stream(seed: int | None, device: torch.device) -> Tensor:
    if seed is None:
        return _stream_of(torch.randint(2**62, (1,), dtype=torch.int64), device)
    return _stream_of(torch.tensor([_as_int64(seed)], dtype=torch.int64), device)


def _stream_of(seed: Tensor, device: torch.device) -> Tensor:
    return torch.cat([seed, torch.zeros_like(seed)]).to(device)
