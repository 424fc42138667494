"""Strongly changed views of images, as methods take them that compare what a network says of a weak and a strong view.

In the spirit of RandAugment (Cubuk et al., NeurIPS 2020) and Cutout (DeVries & Taylor, 2017), which together are the strong
augmentation of UDA and FixMatch. Those draw two of many changes for an image; here each image gets all of a few, of its own
strength, which a whole batch goes through in a few passes where it is: a turn, a shift and shears in one resampling, then
saturation, contrast and brightness, then a square cut out.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fastkd._seeding import mixed_generator
from fastkd.data.images import ImageSet

__all__ = ["Changes", "changed", "draw_changes", "most_degrees"]

DEGREES = 30.0
UPRIGHT_DEGREES = 15.0  # where a mirrored image is of no class: digits and letters, which a turn makes others, too
SHIFT = 0.1  # of the side
SHEAR = 0.2
BRIGHTNESS, CONTRAST, SATURATION = 0.4, 0.4, 0.8  # around 1
CUT = 0.5  # of the side: 16 of 32
GREY = (0.299, 0.587, 0.114)  # of red, green and blue, ITU-R BT.601


class Changes(NamedTuple):
    """Of each image of a batch; floats on the CPU."""

    matrix: Tensor
    """``[B, 2, 2]``: a pixel at p = (x, y) from the middle, in pixels, is that of the image at ``matrix p + shift``. Turns and
    shears, its determinant is 1."""
    shift: Tensor
    """``[B, 2]``, (x, y), in sides of the image."""
    brightness: Tensor
    """``[B]``, factors of the pixels."""
    contrast: Tensor
    """``[B]``, factors of the distance to the image's mean grey."""
    saturation: Tensor
    """``[B]``, factors of the distance to the pixel's grey."""
    centre: Tensor
    """``[B, 2]``, (x, y) in [0, 1): where the square is cut out, in sides of the image. It may reach outside."""


def most_degrees(image_set: ImageSet) -> float:
    """How far images of a set are turned: 30 degrees, or 15 where a mirrored image is of no class."""
    return DEGREES if image_set.flip else UPRIGHT_DEGREES


def draw_changes(count: int, degrees: float, *place: int) -> Changes:
    """Changes of so many images, each drawn uniformly, by a hash of ``place`` (seed, epoch, batch, rank, view): the same for
    every device.

    Turns up to ``degrees``, shifts up to 0.1 of the side, shears along either axis up to 0.2, brightness and contrast within
    0.4 of 1, saturation within 0.8 of it.
    """
    generator = mixed_generator("strong view", *place)
    uniform = torch.rand(count, 10, generator=generator, dtype=torch.float32, device="cpu")
    angle, shear_x, shear_y, *shift, bright, contrast, saturation = (2 * uniform[:, :8] - 1).unbind(1)
    angle = angle * math.radians(degrees)
    x, y = shear_x * SHEAR, shear_y * SHEAR
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).reshape(-1, 2, 2)
    shears = torch.stack([1 + x * y, x, y, torch.ones_like(x)], 1).reshape(-1, 2, 2)
    return Changes(
        turn @ shears,
        torch.stack(shift, 1) * SHIFT,
        1 + bright * BRIGHTNESS,
        1 + contrast * CONTRAST,
        1 + saturation * SATURATION,
        uniform[:, 8:],
    )


def changed(images: Tensor, changes: Changes, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """The changed images, normalised.

    Pixels from outside the image are black, as in crops. Colours are changed together, and cut to [0, 1] once, in the end;
    saturation is of images of three channels, and grey otherwise the mean of the channels. The square, half as high and wide as
    the image, is 0 in the result: the mean.

    Args:
        images: float32 or float64 ``[B, C, H, W]`` in [0, 1], on any device.
        changes: of B images.
        mean, std: of each channel, as of :class:`fastkd.data.ImageSet`.

    Returns:
        ``[B, C, H, W]`` of the dtype of images.
    """

    def there(values: Tensor) -> Tensor:
        return values.to(images.device, images.dtype, non_blocking=True)

    matrix, shift, brightness, contrast, saturation, centre = map(there, changes)
    pixels = _moved(images.contiguous(), matrix, shift)
    brightness, contrast, saturation = (part[:, None, None, None] for part in (brightness, contrast, saturation))
    if pixels.shape[1] == 3:
        grey = GREY[0] * pixels[:, :1] + GREY[1] * pixels[:, 1:2] + GREY[2] * pixels[:, 2:]
        pixels = torch.lerp(grey, pixels, saturation)
    else:
        grey = pixels.mean(1, keepdim=True)
    middle = grey.mean((2, 3), keepdim=True)
    pixels.mul_(contrast * brightness).add_((1 - contrast) * brightness * middle).clamp_(0.0, 1.0)
    center, scale = (torch.tensor(values, dtype=torch.float64, device="cpu")[:, None, None] for values in (mean, std))
    pixels.sub_(there(center)).div_(there(scale))
    return pixels.masked_fill_(_square(centre, *pixels.shape[2:]), 0.0)


def _moved(images: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    height, width = images.shape[2:]
    # the unit of a grid is half the image, along each axis its own
    aspect = torch.tensor([[1.0, height / width], [width / height, 1.0]], dtype=torch.float64, device="cpu")
    theta = torch.cat([matrix * aspect.to(matrix), 2 * shift[:, :, None]], 2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _square(centre: Tensor, height: int, width: int) -> Tensor:
    """bool ``[B, 1, H, W]``, where it is."""
    inside = []
    for axis, side in ((1, height), (0, width)):
        cut = int(CUT * side)
        first = (centre[:, axis, None] * side).floor() - cut // 2
        place = torch.arange(side, dtype=centre.dtype, device=centre.device)
        inside.append((place >= first) & (place < first + cut))
    return (inside[0][:, :, None] & inside[1][:, None, :])[:, None]
