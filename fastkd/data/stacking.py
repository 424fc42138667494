"""Any torch Dataset of small images as two tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["stacked"]


def stacked(dataset: Any) -> tuple[Tensor, Tensor]:
    """Images uint8 ``[N, C, H, W]`` and classes int64 ``[N]`` of a sequence of (image, label) pairs.

    An image is a PIL image, an array ``[H, W]`` or ``[H, W, C]``, or a tensor ``[H, W]`` or ``[C, H, W]``; its values are
    uint8: a transform that makes floats has to be left out.

    Raises:
        TypeError: a data set without a length, other values, a palette image.
        ValueError: an empty data set, images of several sizes, other numbers of dimensions.
    """
    try:
        count = len(dataset)
    except TypeError:
        raise TypeError(f"fastkd: dataset is a {type(dataset).__name__} without a length, must have one") from None
    if count == 0:
        raise ValueError("fastkd: dataset is empty, must have at least one image")
    target = torch.empty(count, dtype=torch.int64, device="cpu")
    images = torch.empty(0, device="cpu")
    for i in range(count):
        image, label = dataset[i]
        pixels = _pixels(image, i)
        if i == 0:
            images = torch.empty(count, *pixels.shape, dtype=torch.uint8, device="cpu")
        elif pixels.shape != images.shape[1:]:
            raise ValueError(
                f"fastkd: dataset[{i}] has an image of shape {tuple(pixels.shape)}, must be that of dataset[0], "
                f"{tuple(images.shape[1:])}"
            )
        images[i] = pixels
        target[i] = int(label)
    return images, target


def _pixels(image: Any, index: int) -> Tensor:
    if getattr(image, "mode", None) == "P":  # its values are places in a palette
        raise TypeError(f"fastkd: dataset[{index}] has a palette image, must be converted, by image.convert('RGB')")
    channels_first = isinstance(image, Tensor)
    pixels = image if isinstance(image, Tensor) else torch.from_numpy(np.array(image))
    if pixels.dtype != torch.uint8:
        raise TypeError(
            f"fastkd: dataset[{index}] has an image of {pixels.dtype}, must be uint8: leave out the transform to floats"
        )
    if pixels.dim() not in (2, 3):
        raise ValueError(
            f"fastkd: dataset[{index}] has an image of shape {tuple(pixels.shape)}, must have 2 or 3 dimensions"
        )
    if pixels.dim() == 2:
        return pixels[None]
    return pixels if channels_first else pixels.permute(2, 0, 1)
