"""The training and test set of an experiment: a data set, or a part of it, with wrong labels or unequal classes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812

from fastkd.data import labels
from fastkd.data import registry as data_sets
from fastkd.data.images import ImageSet
from fastkd.data.seeds import mixed_generator

__all__ = ["DataSettings", "prepare"]


@dataclass(frozen=True)
class DataSettings:
    """Which images, how many, and what is wrong with them."""

    data: str = "cifar10"
    """cifar10, cifar100, mnist, fashion-mnist, kmnist, quickdraw or digits."""
    data_root: Path | None = None
    """The folder of the data sets; $FASTKD_DATA or ~/.cache/fastkd/data by default. Nothing is downloaded."""
    train_size: int = 0
    """Training images, the same number of each class, chosen by the seed; 0: all."""
    test_size: int = 0
    """Test images, chosen at random, the same for every seed; 0: all."""
    shrink: int = 1
    """Images are averaged over squares of so many pixels: 2 is half the size, and a quarter of the time."""
    label_noise: float = 0.0
    """Share of the training labels that are wrong."""
    noise: Literal["symmetric", "asymmetric"] = "symmetric"
    """Wrong labels: any other class, or one that is mistaken for it."""
    imbalance: float = 0.0
    """gamma of the power law of the classes' sizes; the smaller, the more unequal they are. 0: as they are."""
    imbalance_ratio: float = 20.0
    """With imbalance: the largest class is so many times as large as the smallest."""

    def __post_init__(self) -> None:
        for name, good, allowed in (
            ("train_size", self.train_size >= 0, "0 (all) or more"),
            ("test_size", self.test_size >= 0, "0 (all) or more"),
            ("shrink", self.shrink >= 1, "1 or more"),
            ("label_noise", 0.0 <= self.label_noise < 1.0, "from 0 to below 1"),
            ("imbalance", self.imbalance == 0.0 or 0.01 <= self.imbalance <= 100.0, "0 (off) or from 0.01 to 100"),
            ("imbalance_ratio", self.imbalance_ratio >= 1.0, "1 or more"),
        ):
            if not good:
                raise ValueError(f"fastkd: {name} is {getattr(self, name)}, must be {allowed}")


def prepare(settings: DataSettings, seed: int) -> tuple[ImageSet, ImageSet]:
    """Training and test set on the CPU; the seed says which images are taken and which labels are wrong.

    Raises:
        ValueError, FileNotFoundError: as :func:`fastkd.data.registry.load`; more images than there are.
    """
    train, test = data_sets.load(settings.data, settings.data_root)
    if settings.train_size:
        train = _equal_part(train, settings.train_size, seed)
    if settings.test_size:
        if settings.test_size > len(test):
            raise ValueError(f"fastkd: test_size is {settings.test_size}, must be at most the {len(test)} test images")
        # the same ones for every seed
        order = torch.randperm(len(test), generator=mixed_generator("test part", settings.test_size), device="cpu")
        test = test.subset(order[: settings.test_size].sort().values)
    if settings.imbalance:
        train = _imbalanced(train, settings, seed)
    if settings.label_noise:
        train = _mislabelled(train, settings, seed)
    return _shrunk(train, settings.shrink), _shrunk(test, settings.shrink)


def _equal_part(images: ImageSet, size: int, seed: int) -> ImageSet:
    share, rest = divmod(size, images.num_classes)
    smallest = int(torch.bincount(images.target, minlength=images.num_classes).min())
    if rest or share > smallest:
        raise ValueError(
            f"fastkd: train_size is {size}, must be a multiple of the {images.num_classes} classes "
            f"and at most {smallest * images.num_classes}"
        )
    return images.subset(labels.imbalanced(images.target, [share] * images.num_classes, seed))


def _imbalanced(images: ImageSet, settings: DataSettings, seed: int) -> ImageSet:
    largest = int(torch.bincount(images.target, minlength=images.num_classes).min())
    smallest = max(1, round(largest / settings.imbalance_ratio))
    counts = labels.power_law_counts(images.num_classes, settings.imbalance, largest, smallest)
    # which classes are the small ones is chosen by the seed
    places = torch.randperm(len(counts), generator=mixed_generator("class sizes", seed), device="cpu").tolist()
    return images.subset(labels.imbalanced(images.target, [counts[place] for place in places], seed))


def _mislabelled(images: ImageSet, settings: DataSettings, seed: int) -> ImageSet:
    rate, classes = settings.label_noise, images.num_classes
    if settings.noise == "symmetric":
        noisy, _ = labels.symmetric_noise(images.target, rate, classes, seed)
    else:
        mapping = labels.CIFAR10_CONFUSIONS if settings.data.lower() == "cifar10" else None
        noisy, _ = labels.asymmetric_noise(images.target, rate, classes, seed, mapping)
    return images.with_target(noisy)


def _shrunk(images: ImageSet, factor: int) -> ImageSet:
    if factor == 1:
        return images
    if min(images.images.shape[2:]) < factor:
        raise ValueError(f"fastkd: shrink is {factor}, must be at most the side of the images")
    pixels = torch.cat([F.avg_pool2d(part.float(), factor) for part in images.images.split(4096)])
    return replace(images, images=pixels.round().to(torch.uint8), padding=-(-images.padding // factor))
