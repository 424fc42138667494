"""Moments of channels in plain torch, differentiable any number of times: two passes."""

from __future__ import annotations

from torch import Tensor


def channel_moments(x: Tensor, per_sample: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over pixels, and over samples unless ``per_sample``: ``[N, C, ...] -> [C]`` or ``[N, C]``."""
    rows = x.flatten(2) if x.dim() > 2 else x[:, :, None]
    dims = (2,) if per_sample else (0, 2)
    mean = rows.mean(dims, keepdim=True)
    return mean.squeeze(dims), (rows - mean).square().mean(dims)
