"""torch's ``WeightedRandomSampler``, exact for any number of items."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import WeightedRandomSampler as _Sampler

from fastkd._seeding import check_generator, draw_seed
from fastkd.alias_table import AliasTable, new_stream

__all__ = ["WeightedRandomSampler"]

_CHUNK = 1 << 16  # draws that are made, and held as Python's ints, at a time
_DIVISIBLE = 2.0**900  # weights from its inverse to it have quotients that float64 holds


class WeightedRandomSampler(_Sampler):
    """Items drawn with probability proportional to their weights: in the place of ``torch.utils.data.WeightedRandomSampler``.

    The same arguments, attributes and checks, and an instance of it. torch takes at most 2^24 items; this takes any number of
    them, from an :class:`AliasTable`, which is built when an iteration begins with other weights than the last one: O(N), then
    O(1) a draw. The draws of an iteration are never held together.

    Without replacement the ``num_samples`` largest of ``w_i / e_i`` are taken, in their order, with ``e_i`` exponential in
    float64: the draws that torch makes of the same generator. With replacement they are others than torch's.

    Args:
        weights: a sequence or tensor ``[N]``, finite and at least 0, not all 0; kept as float64, without a copy of what is
            that already. Changes, assigned to ``weights`` or in place, count from the next iteration on.
        num_samples: draws of an iteration, at least 1.
        replacement: if False, each item at most once.
        generator: on the device of the weights; torch's default one of it if None. Each iteration takes other numbers from it.

    Raises:
        ValueError: as torch's, at construction: num_samples that is no positive int, replacement that is no bool, weights of
            other than one dimension.
        RuntimeError: as torch's, when iterated: weights that are negative, NaN, infinite or all 0; without replacement, fewer
            weights above 0 than num_samples.
        TypeError: weights that torch cannot make a tensor of, a generator that is none.
    """

    _built: tuple[Tensor, AliasTable] | None = None  # of which weights

    def __iter__(self) -> Iterator[int]:
        weights = torch.as_tensor(self.weights, dtype=torch.double)
        check_generator(self.generator)
        if not self.replacement:
            yield from self._without_replacement(weights)
            return
        table = self._table(weights)
        stream = torch.cat([draw_seed(0, 2**62, weights.device, self.generator), new_stream(0, weights.device)[1:]])
        for start in range(0, self.num_samples, _CHUNK):
            yield from table._draw_at(stream, start, min(_CHUNK, self.num_samples - start), 1).tolist()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_built": None}

    def _table(self, weights: Tensor) -> AliasTable:
        built = self._built
        if built is None or built[0].device != weights.device or not torch.equal(built[0], weights):
            _check_weights(weights)
            self._built = built = weights.clone(), AliasTable.from_weights(weights, seed=0)
        return built[1]

    def _without_replacement(self, weights: Tensor) -> Iterator[int]:
        positive = _check_weights(weights)
        if positive < self.num_samples:
            raise RuntimeError(
                f"fastkd: num_samples is {self.num_samples}, must be at most the {positive} items of weight above 0 "
                "without replacement"
            )
        exponential = torch.empty_like(weights).exponential_(1, generator=self.generator)
        least, most = torch.where(weights > 0, weights, weights.amax()).aminmax()
        if float(least) > 1 / _DIVISIBLE and float(most) < _DIVISIBLE:
            keys = torch.div(weights, exponential, out=exponential)
        else:
            keys = weights.log() - exponential.log_()
        yield from torch.topk(keys, self.num_samples).indices.tolist()


def _check_weights(weights: Tensor) -> int:
    """How many are above 0."""
    if weights.dim() != 1:
        raise RuntimeError(f"fastkd: weights has shape {tuple(weights.shape)}, must be [N]")
    if not weights.numel():
        raise RuntimeError("fastkd: weights is empty, must have one item at least")
    least, most = (float(end) for end in weights.aminmax())
    if not (least >= 0 and most < math.inf):  # NaN is neither
        raise RuntimeError(f"fastkd: weights holds {least} to {most}, must be finite and at least 0")
    if most == 0:
        raise RuntimeError("fastkd: weights has none above 0, must have one at least")
    return int(torch.count_nonzero(weights))
