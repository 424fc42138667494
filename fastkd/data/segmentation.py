"""A small segmentation task out of the real images that scikit-learn ships: nothing to fetch.

Handwritten digits (:mod:`fastkd.data.digits`) lie at random places on patches of photographs; each pixel of ink has the
class of its digit, every other one is background. Digits to train on are none of those to test on; the two photographs are
the same.

:func:`scene_sets` has the same scenes as a data set like any other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastkd._checks import check_count
from fastkd._seeding import mixed_generator
from fastkd.data.digits import SIZE, image_sets, photo_patches
from fastkd.data.images import ImageSet, channel_statistics

__all__ = ["BACKGROUND", "CLASSES", "LARGEST", "SIDE", "Scenes", "scene_sets", "scenes"]

BACKGROUND = 10  # after the digits, which keep their numbers
CLASSES = 11
SIDE = 32  # pixels, by default
LARGEST = 53  # pixels on a side: of the smallest photograph that patches are cut from
_INK = 64  # of 255: from there on a pixel is of its digit
_LIGHT = 0.3  # of the photographs, so that ink stands out


class Scenes(NamedTuple):
    """Images and the class of each of their pixels."""

    images: Tensor
    """uint8 ``[N, 1, H, W]``."""
    target: Tensor
    """int64 ``[N, H, W]``, 0 to 9 and :data:`BACKGROUND`."""

    def to(self, device: torch.device) -> Scenes:
        return Scenes(self.images.to(device), self.target.to(device))

    def normalised(self) -> Tensor:
        """The images as float32, ``x / 127.5 - 1``."""
        return self.images.float() / 127.5 - 1.0


def scenes(
    train_size: int = 512, test_size: int = 128, *, side: int = SIDE, digits: int = 6, seed: int = 0
) -> tuple[Scenes, Scenes]:
    """Scenes to train and to test on, by the seed alone.

    Args:
        train_size, test_size: how many, 0 or more.
        side: H = W, from 8 to 53.
        digits: in each scene, 0 or more, all within it; where ink of two meets, the class is that of the later one.

    Raises:
        TypeError, ValueError: numbers that are no ints, or out of range.
    """
    sizes = check_count("train_size", train_size, 0), check_count("test_size", test_size, 0)
    side, digits = check_count("side", side, SIZE, LARGEST + 1), check_count("digits", digits, 0)
    parts = enumerate(zip(image_sets(seed=seed), sizes, strict=True))
    train, test = (_compose(pool, n, side, digits, mixed_generator("scenes", seed, i)) for i, (pool, n) in parts)
    return train, test


def scene_sets(train_size: int, test_size: int) -> tuple[ImageSet, ImageSet]:
    """So many scenes of :func:`scenes` to train and to test on, 1 or more of each, in sets with a class for each pixel."""
    parts = scenes(train_size, test_size)
    mean, std = channel_statistics(parts[0].images)
    names = (*map(str, range(BACKGROUND)), "background")
    train, test = (ImageSet(*part, names, mean, std, flip=False, padding=0) for part in parts)
    return train, test


def _compose(pool: ImageSet, count: int, side: int, digits: int, generator: torch.Generator) -> Scenes:
    images = (photo_patches(count, generator, side)[:, 0] * (255 * _LIGHT)).round().to(torch.uint8)
    target = torch.full_like(images, BACKGROUND, dtype=torch.int64)
    scene, pixel = torch.arange(count, device="cpu")[:, None, None], torch.arange(SIZE, device="cpu")
    for _ in range(digits):
        chosen = torch.randint(len(pool), (count,), generator=generator, device="cpu")
        top, left = torch.randint(side - SIZE + 1, (2, count, 1, 1), generator=generator, device="cpu")
        place = scene, top + pixel[:, None], left + pixel
        ink = pool.images[chosen, 0]
        images[place] = images[place].maximum(ink)
        target[place] = torch.where(ink >= _INK, pool.target[chosen, None, None], target[place])
    return Scenes(images[:, None], target)
