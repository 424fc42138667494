"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastkd._names import unknown_name
from fastkd.data import cifar, digits, idx, quickdraw
from fastkd.data.images import ImageSet

__all__ = ["load", "names"]

_SETS: dict[str, Callable[[str | Path | None], tuple[ImageSet, ImageSet]]] = {
    "cifar10": cifar.cifar10,
    "cifar100": cifar.cifar100,
    "mnist": idx.mnist,
    "fashion-mnist": idx.fashion_mnist,
    "kmnist": idx.kmnist,
    "quickdraw": quickdraw.quickdraw,
    "digits": lambda root: digits.image_sets(),  # inside scikit-learn
}


def names() -> tuple[str, ...]:
    """The names that :func:`load` takes."""
    return tuple(_SETS)


def load(name: str, root: str | Path | None = None) -> tuple[ImageSet, ImageSet]:
    """Training and test set of a name: cifar10, cifar100, mnist, fashion-mnist, kmnist, quickdraw or digits.

    Args:
        name: of the set.
        root: the folder that torchvision downloads into, too; ``$FASTKD_DATA``, else ``~/.cache/fastkd/data``, if None.
            Nothing is downloaded.

    Returns:
        Both sets on the CPU, normalised by the mean and deviation of the training images.

    Raises:
        ValueError: an unknown name, answered with the nearest right ones; a broken file.
        FileNotFoundError: the set, or a file of it, is not there.
    """
    reader = _SETS.get(name.lower())
    if reader is None:
        raise unknown_name("name", name, names())
    return reader(root)
