"""The plain form of ``draw_batch``: Python's integers for draws and places, slices, float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy.typing as npt
import torch
from torch import Tensor

from fastkd.reference import alias, crop


def draw_batch(
    scores: npt.ArrayLike,
    inverse_temperature: float,
    seed: int,
    first: int,
    crop_seed: int,
    images: Tensor,
    count: int,
    size: tuple[int, int],
    padding: int,
    flip_probability: float,
    center: Sequence[float],
    scale: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Draws ``first, first + 1, ...`` of ``seed``, cropped: the batch in float64 and the indices."""
    indices = [alias.sample(scores, inverse_temperature, seed % 2**64, first + i) for i in range(count)]
    y_range, x_range = (
        (-padding, extent + 2 * padding - side + 1) for extent, side in zip(images.shape[2:], size, strict=True)
    )
    offsets, flip = crop.crop_offsets(crop_seed, count, 1, y_range, x_range, flip_probability)
    pixels = crop.crop(images[indices], offsets, size, flip).double()
    shift, factor = (torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1) for values in (center, scale))
    return (pixels - shift) * factor, torch.tensor(indices)
