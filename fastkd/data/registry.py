"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fastkd._checks import check_text
from fastkd._names import unknown_name
from fastkd.data import cifar, digits, idx, quickdraw, segmentation
from fastkd.data.images import ImageSet

__all__ = ["Outline", "load", "names", "outline"]


class Outline(NamedTuple):
    """What is known of a set before its files are read; None where only they tell."""

    shape: tuple[int, int, int]
    """[C, H, W] of its images."""
    num_classes: int | None
    train_size: int | None
    """Training images."""
    smallest_class: int | None
    """Of the training images."""
    test_size: int | None
    """Test images."""
    dense: bool = False
    """Whether each pixel has a class, and not each image."""


class _Set(NamedTuple):
    read: Callable[[str | Path | None], tuple[ImageSet, ImageSet]]
    outline: Outline


_SCENES = 4_000, 1_000  # to train and to test on; made anew in half a second

_SETS: dict[str, _Set] = {
    "cifar10": _Set(cifar.cifar10, Outline((3, 32, 32), 10, 50_000, 5_000, 10_000)),
    "cifar100": _Set(cifar.cifar100, Outline((3, 32, 32), 100, 50_000, 500, 10_000)),
    "mnist": _Set(idx.mnist, Outline((1, 28, 28), 10, 60_000, 5_421, 10_000)),
    "fashion-mnist": _Set(idx.fashion_mnist, Outline((1, 28, 28), 10, 60_000, 6_000, 10_000)),
    "kmnist": _Set(idx.kmnist, Outline((1, 28, 28), 10, 60_000, 6_000, 10_000)),
    "quickdraw": _Set(quickdraw.quickdraw, Outline((1, 28, 28), None, None, None, None)),
    # inside scikit-learn
    "digits": _Set(lambda root: digits.image_sets(), Outline((1, digits.SIZE, digits.SIZE), 10, None, None, None)),
    "scenes": _Set(
        lambda root: segmentation.scene_sets(*_SCENES),
        Outline(
            (1, segmentation.SIDE, segmentation.SIDE), segmentation.CLASSES, _SCENES[0], None, _SCENES[1], dense=True
        ),
    ),
}


def names() -> tuple[str, ...]:
    """The names that :func:`load` takes."""
    return tuple(_SETS)


def load(name: str, root: str | Path | None = None) -> tuple[ImageSet, ImageSet]:
    """Training and test set of a name: cifar10, cifar100, mnist, fashion-mnist, kmnist, quickdraw, digits or, with a class for
    each pixel, scenes.

    Args:
        name: of the set.
        root: the folder that torchvision downloads into, too; ``$FASTKD_DATA``, else ``~/.cache/fastkd/data``, if None.
            Nothing is downloaded.

    Returns:
        Both sets on the CPU, normalised by the mean and deviation of the training images.

    Raises:
        TypeError: a root that is no path, where files are read.
        ValueError: an unknown name, answered with the nearest right ones; a broken file.
        FileNotFoundError: the set, or a file of it, is not there.
    """
    return _named(name).read(root)


def outline(name: str) -> Outline:
    """What is known of the set of a name without its files.

    Raises:
        ValueError: an unknown name, as by :func:`load`.
    """
    return _named(name).outline


def _named(name: str) -> _Set:
    found = _SETS.get(check_text("name", name).lower())
    if found is None:
        raise unknown_name("name", name, names())
    return found
