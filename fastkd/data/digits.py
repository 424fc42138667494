"""A task and an unlabeled collection out of the real images that scikit-learn ships: nothing to fetch.

The task is ``load_digits``: 1,797 handwritten digits of 8x8 pixels by 13 people (the test set of the UCI collection of
Alpaydin & Kaynak, 1998). They are split by seed into thirds with equal shares of every class, the same writers in each:
one with labels to train on, one whose labels are thrown away, one to test on.

The collection mixes relevant images, the unlabeled third rotated, scaled, shifted and with noise added, with irrelevant
ones: 8x8 patches of two photographs (``load_sample_images``, a Chinese temple and a dahlia), in grey, at four scales
from plain texture to a good part of the scene. So only 599 different digits are behind the relevant ones and two scenes
behind the others: enough to show the method at work, far smaller and easier than the collections of the paper.

:func:`image_sets` has the same digits as a data set like any other: labelled, to train and to test on.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fastkd.data.images import ImageSet, channel_statistics
from fastkd.data.splits import stratified_split

__all__ = ["Collection", "Labelled", "collection", "image_sets", "photo_patches", "split", "vary"]

SIZE = 8  # pixels on a side


class Labelled(NamedTuple):
    """Images float32 ``[N, 1, 8, 8]`` in [0, 1] and their classes, int64 ``[N]``."""

    images: Tensor
    target: Tensor

    def to(self, device: torch.device) -> Labelled:
        return Labelled(self.images.to(device), self.target.to(device))


class Collection(NamedTuple):
    """Images float32 ``[N, 1, 8, 8]`` in [0, 1]; ``relevant`` bool ``[N]`` serves to judge a method, never to train."""

    images: Tensor
    relevant: Tensor


def split(generator: torch.Generator) -> tuple[Labelled, Labelled, Labelled]:
    """The digits in three parts of 599: training, unlabeled (its targets are for curiosity only) and test."""
    images, target = _load()
    shuffled = torch.randperm(len(target), generator=generator, device="cpu")
    by_class = shuffled[torch.sort(target[shuffled], stable=True).indices]
    first, second, third = (Labelled(images[part], target[part]) for part in (by_class[i::3] for i in range(3)))
    return first, second, third


def image_sets(*, test_share: float = 0.2, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """The digits to train and to test on, uint8 ``[N, 1, 8, 8]``: ``test_share`` of each class is in the test set.

    The split depends on the seed alone. Crops reach one pixel outside, an eighth of the side as for CIFAR.
    """
    pixels, target = _load()
    images = (pixels * 255).round().to(torch.uint8)
    train, test = stratified_split(target, test_share, seed)
    mean, std = channel_statistics(images[train])
    whole = ImageSet(images, target, tuple("0123456789"), mean, std, flip=False, padding=1)
    return whole.subset(train), whole.subset(test)


def vary(digits: Labelled, count: int, generator: torch.Generator) -> Labelled:
    """``count`` variations, the digits in turn: +-15 degrees, 1 / (1 +- 0.15) of the size, +-1 pixel (of the digit, along
    each of its axes), then Gaussian noise of deviation 0.05, within [0, 1]."""
    source = torch.arange(count, device="cpu") % len(digits.images)
    angle = _within(math.radians(15), count, generator=generator)
    scale = 1 + _within(0.15, count, generator=generator)
    shift = _within(1.0, count, 2, generator=generator) * 2 / SIZE  # affine_grid's unit is half the image
    cos, sin = angle.cos() * scale, angle.sin() * scale
    matrix = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).reshape(count, 2, 3)
    grid = F.affine_grid(matrix, [count, 1, SIZE, SIZE], align_corners=False)
    images = F.grid_sample(digits.images[source], grid, align_corners=False)
    images = images + 0.05 * torch.randn(images.shape, generator=generator, device="cpu", dtype=images.dtype)
    return Labelled(images.clamp(0, 1), digits.target[source])


def photo_patches(count: int, generator: torch.Generator, size: int = SIZE) -> Tensor:
    """``count`` grey patches ``[N, 1, size, size]`` at random places of the photographs, reduced 1, 2, 4 and 8 times."""
    from sklearn.datasets import load_sample_images

    scenes = [
        F.avg_pool2d(torch.tensor(photo, dtype=torch.float32, device="cpu").mean(2)[None] / 255.0, reduction)[0]
        for photo in load_sample_images().images
        for reduction in (1, 2, 4, 8)
    ]
    pixel = torch.arange(size, device="cpu")
    patches = []
    for i, scene in enumerate(scenes):
        share = len(range(i, count, len(scenes)))
        top, left = (
            torch.randint(side - size + 1, (share, 1, 1), generator=generator, device="cpu") for side in scene.shape
        )
        patches.append(scene[top + pixel[:, None], left + pixel])
    return torch.cat(patches)[:, None]


def collection(unlabeled: Labelled, size: int, relevant_share: float, generator: torch.Generator) -> Collection:
    """``size`` images: ``relevant_share`` of them variations of the unlabeled digits, the others photo patches."""
    relevant = round(size * relevant_share)
    images = torch.cat([vary(unlabeled, relevant, generator).images, photo_patches(size - relevant, generator)])
    return Collection(images, torch.arange(size, device="cpu") < relevant)


def _load() -> tuple[Tensor, Tensor]:
    """Images float32 ``[1797, 1, 8, 8]`` in [0, 1], in steps of 1/16, and their classes, int64."""
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().reshape(-1, 1, SIZE, SIZE) / 16.0
    return images, torch.from_numpy(classes).long()


def _within(limit: float, *shape: int, generator: torch.Generator) -> Tensor:
    return (torch.rand(*shape, generator=generator, device="cpu", dtype=torch.float32) * 2 - 1) * limit
