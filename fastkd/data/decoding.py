"""Whatever holds one image, as uint8 pixels of a shape."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["image_of", "open_image", "pillow", "pixels_of"]

_MODES = {1: "L", 3: "RGB"}  # Pillow's names, by number of channels


def pillow() -> ModuleType:
    """Pillow's module Image.

    Raises:
        ModuleNotFoundError: it is not installed; how to install it.
    """
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'fastkd: images of files, or of another size, need Pillow: pip install "fastkd[images]"'
        ) from None
    return Image


def image_of(item: Any) -> Any:
    """The image of an item of a data set: the item, the first of a tuple or a list, "image" or else the first of a mapping."""
    if isinstance(item, Mapping) and item:
        return item["image"] if "image" in item else next(iter(item.values()))
    if isinstance(item, (tuple, list)) and item:
        return item[0]
    return item


def pixels_of(image: Any, shape: tuple[int, int, int] | None) -> Tensor:
    """uint8 ``[C, H, W]`` of an image of PIL, an array ``[H, W]`` or ``[H, W, C]``, or a tensor ``[H, W]`` or ``[C, H, W]``.

    With a shape, other channels (1, 3, or 4 with transparency, which is dropped) and sizes (bilinear, with Pillow's
    antialiasing) are converted to it. Without one, images of PIL are grey where they are so, else of 3 channels.

    Raises:
        TypeError, ValueError: what is no image of uint8, or cannot be converted.
    """
    if not isinstance(image, (Tensor, np.ndarray)) and hasattr(image, "mode"):
        return _of_pillow(image, shape)
    if not isinstance(image, (Tensor, np.ndarray)):
        raise TypeError(f"is {type(image).__name__}, must be an image of PIL, an array or a tensor")
    if str(image.dtype).removeprefix("torch.") != "uint8":
        raise TypeError(f"is of {image.dtype}, must be uint8: leave out the transform to floats")
    if image.ndim not in (2, 3):
        raise ValueError(f"has shape {tuple(image.shape)}, must have 2 or 3 dimensions")
    pixels = image.cpu() if isinstance(image, Tensor) else torch.from_numpy(np.array(image))
    if pixels.dim() == 2:
        pixels = pixels[None]
    elif not isinstance(image, Tensor):
        pixels = pixels.permute(2, 0, 1)
    if shape is None or tuple(pixels.shape) == shape:
        return pixels
    if pixels.shape[0] not in (1, 3, 4) or 0 in pixels.shape:
        raise ValueError(f"has shape {tuple(pixels.shape)}, must have 1, 3 or 4 channels to be converted to {shape}")
    rows = pixels.permute(1, 2, 0).contiguous().numpy()
    return _of_pillow(pillow().fromarray(rows[:, :, 0] if rows.shape[2] == 1 else rows), shape)


def _of_pillow(image: Any, shape: tuple[int, int, int] | None) -> Tensor:
    if image.mode.startswith("I;16"):  # 16 bits: the upper ones
        image = pillow().fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"has Pillow's mode {image.mode}, must have values of 8 or 16 bits")
    if shape is None:
        mode = "L" if image.mode in ("1", "L") else "RGB"
    elif shape[0] in _MODES:
        mode = _MODES[shape[0]]
    else:
        raise ValueError(f"has Pillow's mode {image.mode}, must be converted to 1 or 3 channels, not {shape[0]}")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # which Pillow asks for
    if image.mode != mode:
        image = image.convert(mode)
    if shape is not None and image.size != (shape[2], shape[1]):
        image = image.resize((shape[2], shape[1]), pillow().Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)


def open_image(path: str) -> Any:
    """The image of a file, decoded; what is wrong with it is an error, not a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of metadata
        with pillow().open(path) as image:
            image.load()
            return image
