"""Crops of images at given or random places: ``torch.ops.fastkd.crop``, ``crop_backward`` and ``crop_offsets``.

``crop`` is linear up to its shift, so the transpose, ``crop_backward``, is all the calculus there is: each is the
other's derivative, to any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import _library as _library  # registers the operators
from fastkd.ops._autograd import call_in_backward, register_autograd, save_tensors
from fastkd.ops._fake import register_fake
from fastkd.ops._numbers import call_by_name

_crop = torch.ops.fastkd.crop.default
_crop_backward = torch.ops.fastkd.crop_backward.default


def crop(
    images: Tensor,
    offsets: Tensor,
    size: tuple[int, int],
    flip: Tensor | None = None,
    *,
    center: Sequence[float] = (),
    scale: Sequence[float] = (),
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``k`` patches of each image; patch ``j`` of image ``b`` is ``out[b * k + j]``.

    Args:
        images: ``[B, C, H, W]``, any strides; float32, float64, bfloat16, float16, an integer dtype or bool.
        offsets: int64 ``[B, k, 2]``, (y, x) of each top left corner in the image. Any value: pixels outside are 0.
        size: (height, width) of a patch, pixels.
        flip: bool ``[B, k]``: mirror these patches left to right.
        center, scale: C numbers each, or none: ``(pixel - center[c]) * scale[c]``, computed in float64, rounded once.
        dtype: that of images (the default); for uint8 images also a float dtype.

    Returns:
        ``[B * k, C, height, width]``, in the memory format of images (NCHW or channels-last).
    """
    height, width = size
    dtype = images.dtype if dtype is None else dtype
    out: Tensor = call_by_name("crop", images, offsets, flip, height, width, list(center), list(scale), dtype)
    return out


def crop_offsets(
    seed: Tensor,
    batch: int,
    patches: int,
    y_range: tuple[int, int],
    x_range: tuple[int, int],
    flip_probability: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Random places from Philox4x32-10, keyed by the seed, counted by ``b * patches + j``: the same on every device.

    Args:
        seed: int64, one element; its device is that of the result.
        y_range, x_range: (lowest, how many) values, each equally likely (to 2^-48).
        flip_probability: in [0, 1], exact to 2^-32.

    Returns:
        offsets: int64 ``[batch, patches, 2]``, (y, x); flip: bool ``[batch, patches]``.
    """
    offsets, flip = call_by_name("crop_offsets", seed, batch, patches, *y_range, *x_range, flip_probability)
    return offsets, flip


def new_images(like: Tensor, batch: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised images, packed, in the memory format of ``like``, as the kernels see it (``is_channels_last``)."""
    channels = like.shape[1]
    channels_last = channels > 1 and like.stride(1) == 1 and like.stride(3) == channels
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((batch, channels, height, width), dtype=dtype, device=like.device, memory_format=memory_format)


@register_fake("crop")
def _crop_fake(
    images: Tensor,
    offsets: Tensor,
    flip: Tensor | None,
    height: int,
    width: int,
    center: Sequence[float],
    scale: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    return new_images(images, images.shape[0] * offsets.shape[1], height, width, dtype)


@register_fake("crop_backward")
def _crop_backward_fake(
    grad_patches: Tensor,
    offsets: Tensor,
    flip: Tensor | None,
    height: int,
    width: int,
    scale: Sequence[float],
) -> Tensor:
    return new_images(grad_patches, offsets.shape[0], height, width, grad_patches.dtype)


@register_fake("crop_offsets")
def _crop_offsets_fake(
    seed: Tensor,
    batch: int,
    patches: int,
    y_low: int,
    y_count: int,
    x_low: int,
    x_count: int,
    flip_probability: float,
) -> tuple[Tensor, Tensor]:
    return (
        seed.new_empty([batch, patches, 2], dtype=torch.int64),
        seed.new_empty([batch, patches], dtype=torch.bool),
    )


def _crop_setup_context(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    images, offsets, flip, _, _, center, scale, _, numbers = inputs
    save_tensors(ctx, (offsets, flip, None if numbers is None else numbers[len(center) :]))
    ctx.size, ctx.scale = images.shape[2:], scale


def _crop_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    offsets, flip, numbers = ctx.saved_tensors
    return call_in_backward(_crop_backward, grad, offsets, flip, *ctx.size, ctx.scale, numbers), *(None,) * 8


register_autograd("crop", _crop_gradient, setup_context=_crop_setup_context)


def _crop_backward_setup_context(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    grad_patches, offsets, flip, _, _, scale, numbers = inputs
    save_tensors(ctx, (offsets, flip, numbers))
    ctx.size, ctx.scale = grad_patches.shape[2:], scale


def _crop_backward_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    offsets, flip, numbers = ctx.saved_tensors
    return call_in_backward(_crop, grad, offsets, flip, *ctx.size, [], ctx.scale, grad.dtype, numbers), *(None,) * 6


register_autograd("crop_backward", _crop_backward_gradient, setup_context=_crop_backward_setup_context)
