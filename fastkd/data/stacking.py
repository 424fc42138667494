"""Any torch Dataset of small images as two tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkd._checks import check_count

__all__ = ["stacked"]


def stacked(dataset: Any) -> tuple[Tensor, Tensor]:
    """Images uint8 ``[N, C, H, W]`` and classes int64 ``[N]`` of a sequence of (image, label) pairs.

    An image is a PIL image, an array ``[H, W]`` or ``[H, W, C]``, or a tensor ``[H, W]`` or ``[C, H, W]``; its values are
    uint8: a transform that makes floats has to be left out. A label is an int, or a tensor or an array of one.

    Raises:
        TypeError: a data set without a length, one whose items are no pairs, other values, a palette image.
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
        item = dataset[i]
        try:
            image, label = item
        except (TypeError, ValueError):
            raise TypeError(f"fastkd: dataset[{i}] is {type(item).__name__}, must be an image and a label") from None
        pixels = _pixels(image, i)
        if i == 0:
            images = torch.empty(count, *pixels.shape, dtype=torch.uint8, device="cpu")
        elif pixels.shape != images.shape[1:]:
            raise ValueError(
                f"fastkd: dataset[{i}] has an image of shape {tuple(pixels.shape)}, must be that of dataset[0], "
                f"{tuple(images.shape[1:])}"
            )
        images[i] = pixels
        if isinstance(label, (Tensor, np.ndarray)) and label.shape == (1,):
            label = label[0]
        target[i] = check_count(f"the label of dataset[{i}]", label, -(2**63), 2**63)
    return images, target


def _pixels(image: Any, index: int) -> Tensor:
    if getattr(image, "mode", None) == "P":  # its values are places in a palette
        raise TypeError(f"fastkd: dataset[{index}] has a palette image, must be converted, by image.convert('RGB')")
    channels_first = isinstance(image, Tensor)
    try:
        pixels = image if isinstance(image, Tensor) else torch.from_numpy(np.array(image))
    except (TypeError, ValueError):
        raise TypeError(
            f"fastkd: dataset[{index}] has an image that is {type(image).__name__}, must be of PIL, an array or a tensor"
        ) from None
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
