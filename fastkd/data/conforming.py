"""Images of another size or number of channels, made to fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fastkd._checks import check_choice, check_tensor
from fastkd.data.collection import check_shape

__all__ = ["LAYOUTS", "check_sizes", "conformed", "in_nchw", "viewed"]

LAYOUTS = ("NCHW", "NHWC")
_CHUNK = 1 << 26  # bytes of floats


def conformed(images: Tensor | np.ndarray[Any, Any], shape: Sequence[int], *, layout: str = "NCHW") -> Tensor:
    """uint8 images with other channels and of another size: 28x28x1 digits as ``(3, 32, 32)``, for instance.

    Grey images are repeated, colours weighted to grey by ITU-R 601 as Pillow does; then bilinear with antialiasing, in float32,
    rounded. A chunk at a time: beside the result it takes some 100 MB.

    Args:
        images: uint8 ``[N, C, H, W]``, or as ``layout`` says, or ``[N, H, W]`` of one channel.
        shape: (C, H, W) of the result; C as it is, from 1 to any number, or from 3 to 1.
        layout: "NCHW" or "NHWC".

    Returns:
        uint8 ``[N, C, H, W]``, on the device of the images; the images themselves where they fit.

    Raises:
        TypeError, ValueError: other dtypes and shapes, channels that there is no way to.
    """
    pixels, size = in_nchw("images", images, layout), check_shape("shape", shape)
    if tuple(pixels.shape[1:]) == size:
        return pixels
    channels = pixels.shape[1]
    if channels not in (1, size[0]) and (channels, size[0]) != (3, 1):
        raise ValueError(
            f"fastkd: shape is {size}, must have {channels} channels, as images has"
            + (", or 1" if channels == 3 else "")
        )
    out = torch.empty(len(pixels), *size, dtype=torch.uint8, device=pixels.device)
    largest = max(size[1] * size[2], pixels.shape[2] * pixels.shape[3]) * max(size[0], channels)
    chunk = max(1, _CHUNK // (4 * largest))
    for start in range(0, len(pixels), chunk):
        out[start : start + chunk] = _chunk_conformed(pixels[start : start + chunk], size)
    return out


def _chunk_conformed(pixels: Tensor, shape: tuple[int, int, int]) -> Tensor:
    if pixels.shape[1] == 3 and shape[0] == 1:
        red, green, blue = pixels.to(torch.int32).unbind(1)
        pixels = ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).to(torch.uint8)[:, None]
    if tuple(pixels.shape[2:]) != shape[1:]:
        resized = F.interpolate(pixels.float(), shape[1:], mode="bilinear", align_corners=False, antialias=True)
        pixels = resized.round_().clamp_(0, 255).to(torch.uint8)
    return pixels.expand(-1, shape[0], -1, -1)


def in_nchw(name: str, images: Any, layout: str = "NCHW") -> Tensor:
    """uint8 images as a tensor ``[N, C, H, W]``, a view of them where that can be.

    Raises:
        TypeError, ValueError: no uint8, no 4 dimensions (or 3, ``[N, H, W]``), an empty one, an unknown layout.
    """
    check_choice("layout", layout, LAYOUTS)
    if isinstance(images, np.ndarray):
        if images.dtype != np.uint8:
            raise TypeError(f"fastkd: {name} has dtype {images.dtype}, must be uint8")
        usable = images.flags.writeable and all(stride >= 0 for stride in images.strides)
        images = torch.from_numpy(images if usable else images.copy())
    if check_tensor(name, images).dtype != torch.uint8:
        raise TypeError(f"fastkd: {name} has dtype {images.dtype}, must be uint8")
    check_sizes(name, images.shape, layout)
    return viewed(images, layout)


def viewed(images: Tensor, layout: str) -> Tensor:
    """``[N, C, H, W]`` of a layout, or of ``[N, H, W]``."""
    if images.dim() == 3:
        return images[:, None]
    return images if layout == "NCHW" else images.permute(0, 3, 1, 2)


def check_sizes(name: str, shape: Sequence[int], layout: str) -> None:
    if len(shape) not in (3, 4) or 0 in shape:
        letters = ", ".join(layout)
        raise ValueError(
            f"fastkd: {name} has shape {tuple(shape)}, must be [{letters}], or [N, H, W], with at least one image"
        )
