"""From an alias table to a training batch in one step: ``torch.ops.fastkd.draw_batch``.

Not differentiable: images are uint8.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd import _library as _library  # registers the operators
from fastkd.ops._fake import register_fake
from fastkd.ops._numbers import call_by_name
from fastkd.ops.alias import Table
from fastkd.ops.crop import new_images


def draw_batch(
    table: Table,
    stream: Tensor,
    crop_seed: Tensor,
    images: Tensor,
    count: int,
    size: tuple[int, int],
    padding: int,
    flip_probability: float,
    *,
    center: Sequence[float] = (),
    scale: Sequence[float] = (),
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Crops of ``count`` images drawn from the table.

    The bits of ``indices = alias.sample(table, stream, count)``, then ``crop(images[indices], ...)`` at the places of
    ``crop_offsets(crop_seed, count, 1, ...)``, ``padding`` pixels beyond the image at most.

    Args:
        table: over N items.
        stream: int64 ``[2]``: seed, number of the first draw.
        crop_seed: int64, one element.
        images: uint8 ``[N, C, H, W]``.
        size, padding, flip_probability: (height, width) of a crop, and zeros around the image, in pixels; of mirroring.
        center, scale: C numbers each, or none: ``(pixel - center[c]) * scale[c]``, computed in float64, rounded once.
        dtype: a float dtype.

    Returns:
        batch: ``[count, C, height, width]``, in the memory format of images. NaN where a table that is broken, or without
        weight, gives an index outside of ``[0, N)``; indices: int64 ``[count]``.
    """
    batch, indices = call_by_name(
        "draw_batch",
        *table,
        stream,
        crop_seed,
        images,
        count,
        *size,
        padding,
        flip_probability,
        list(center),
        list(scale),
        dtype,
    )
    return batch, indices


@register_fake("draw_batch")
def _draw_batch_fake(
    table: Tensor,
    block_weight: Tensor,
    top: Tensor,
    table_scale: Tensor,
    stream: Tensor,
    crop_seed: Tensor,
    images: Tensor,
    count: int,
    height: int,
    width: int,
    padding: int,
    flip_probability: float,
    center: Sequence[float],
    scale: Sequence[float],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return new_images(images, count, height, width, dtype), table.new_empty([count])
