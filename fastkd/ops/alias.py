"""Alias tables of ``softmax(lambda u)`` in 64-bit fixed point: ``torch.ops.fastkd.alias_*``. Maths: csrc/alias/math.h.

None of these is differentiable: scores come detached.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastkd import _library as _library  # registers the operators
from fastkd.ops._fake import register_fake
from fastkd.ops._numbers import call_by_name

BLOCK_SIZE = 4096


class Table(NamedTuple):
    """The tensors of one table over N items; all on the device of the scores."""

    bins: Tensor  # int64 [N]: threshold (52 bits) and alias within the block (12 bits)
    block_weight: Tensor  # int64 [ceil(N / 4096)]
    top: Tensor  # int64 [ceil(N / 4096), 2]: threshold and alias of the table over blocks
    scale: Tensor  # float64 [4]: reference score, lambda * log2(e), exponent, total weight


def inverse_temperature(scores: Tensor, iqpr: float) -> Tensor:
    """``ln(iqpr) / (Q3 - Q1)`` of the finite scores ``[N]``, float64 ``[]``; 0 (uniform) where the quartiles coincide."""
    return call_by_name("alias_inverse_temperature", scores.detach(), iqpr)  # type: ignore[no-any-return]


def build(scores: Tensor, inverse_temperature: Tensor) -> Table:
    """The table of ``softmax(inverse_temperature * scores)``; scores ``[N]``, ``-inf`` for items never drawn."""
    return Table(*torch.ops.fastkd.alias_build.default(scores.detach(), inverse_temperature))


def update(table: Table, indices: Tensor, scores: Tensor) -> None:
    """Gives the items ``indices`` (int64 ``[n]``) new scores ``[n]``, in place."""
    torch.ops.fastkd.alias_update_.default(*table, indices, scores.detach())


def sample(table: Table, stream: Tensor, count: int, offset: int = 0, stride: int = 1) -> Tensor:
    """int64 ``[count]``: the draws ``stream[1] + offset + i * stride`` of the seed ``stream[0]`` (int64 ``[2]``)."""
    return torch.ops.fastkd.alias_sample.default(  # type: ignore[no-any-return]
        *table, stream, count, offset, stride
    )


def weights(table: Table) -> Tensor:
    """The exact integer weights that the table draws by: int64 ``[N]``."""
    return torch.ops.fastkd.alias_weights.default(table.bins, table.block_weight)  # type: ignore[no-any-return]


def _blocks(items: int | torch.SymInt) -> int | torch.SymInt:
    return (items + BLOCK_SIZE - 1) // BLOCK_SIZE


@register_fake("alias_inverse_temperature")
def _inverse_temperature_fake(scores: Tensor, iqpr: float) -> Tensor:
    return scores.new_empty([], dtype=torch.float64)


@register_fake("alias_build")
def _build_fake(scores: Tensor, inverse_temperature: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    blocks = _blocks(scores.shape[0])
    return (
        scores.new_empty([scores.shape[0]], dtype=torch.int64),
        scores.new_empty([blocks], dtype=torch.int64),
        scores.new_empty([blocks, 2], dtype=torch.int64),
        scores.new_empty([4], dtype=torch.float64),
    )


@register_fake("alias_update_")
def _update_fake(
    table: Tensor, block_weight: Tensor, top: Tensor, scale: Tensor, indices: Tensor, scores: Tensor
) -> None:
    return None


@register_fake("alias_sample")
def _sample_fake(
    table: Tensor,
    block_weight: Tensor,
    top: Tensor,
    scale: Tensor,
    stream: Tensor,
    count: int,
    offset: int,
    stride: int,
) -> Tensor:
    return table.new_empty([count])


@register_fake("alias_weights")
def _weights_fake(table: Tensor, block_weight: Tensor) -> Tensor:
    return torch.empty_like(table)
