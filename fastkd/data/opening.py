"""A collection by what somebody types."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from fastkd._checks import check_text
from fastkd._names import unknown_name
from fastkd.data import registry
from fastkd.data.array_collection import ArrayCollection
from fastkd.data.collection import Collection, check_shape
from fastkd.data.concat_collection import ConcatCollection
from fastkd.data.conforming import conformed
from fastkd.data.dataset_collection import FolderCollection

__all__ = ["open_collection"]

_NAMED = re.compile(r"([\w.-]+)=(.*)", re.DOTALL)


def open_collection(
    text: str,
    shape: Sequence[int] | None = None,
    *,
    root: str | Path | None = None,
    layout: str = "NCHW",
    workers: int = 0,
    unreadable: str = "error",
) -> Collection:
    """The collection of a text, for command lines: ``cifar10``, ``images.npy``, ``photos/``, ``near=photos/,far=mnist``.

    Args:
        text: the path of a folder of images, or of an ``.npy``, or a name of :func:`fastkd.data.load` (its training images); or
            several of these, with commas between, each with ``name=`` before it, if it is not to be called by the file, the
            folder or the set.
        shape: (C, H, W) of the images, which a folder needs. If None, that of the first array or set.
        root: of the sets, as of :func:`fastkd.data.load`.
        layout: "NCHW" or "NHWC", of each ``.npy``.
        workers, unreadable: as in :class:`fastkd.data.FolderCollection`.

    Raises:
        TypeError, ValueError: a text that names nothing, or the same name twice; a folder without a shape; what each of them
        raises.
        FileNotFoundError: a file or a set that is not there.
    """
    words = [word.strip() for word in check_text("text", text).split(",")]
    if not all(words):
        raise ValueError(
            f"fastkd: text is {text!r}, must be a folder, an .npy or the name of a set, or several with commas"
        )
    size = None if shape is None else check_shape("shape", shape)
    # arrays and sets know their shape, which folders then take
    parts: dict[str, Collection] = {}
    named = [_named(word) for word in words]
    for name, place in named:
        if name in parts or sum(name == other for other, _ in named) > 1:
            raise ValueError(
                f"fastkd: text is {text!r}, which has {name} twice, must have a name for each: other={place}"
            )
    for name, place in sorted(named, key=lambda pair: Path(pair[1]).is_dir()):
        parts[name] = _open(name, place, size, root, layout, workers, unreadable)
        size = size or parts[name].shape
    if len(named) == 1:
        return parts[named[0][0]]
    return ConcatCollection({name: parts[name] for name, _ in named})


def _named(word: str) -> tuple[str, str]:
    """Name and place."""
    found = _NAMED.fullmatch(word)
    if found and found[2] and not Path(word).exists():
        return found[1], found[2]
    if Path(word).is_dir():
        return Path(word).resolve().name, word
    return (Path(word).stem if _is_file(word) else word), word


def _is_file(place: str) -> bool:
    return place.endswith(".npy") or os.sep in place or Path(place).exists()


def _open(
    name: str,
    place: str,
    shape: tuple[int, int, int] | None,
    root: str | Path | None,
    layout: str,
    workers: int,
    unreadable: str,
) -> Collection:
    if Path(place).is_dir():
        if shape is None:
            raise ValueError(f"fastkd: shape is None, must be (channels, height, width) for the images of {place}")
        return FolderCollection(place, shape, workers=workers, unreadable=unreadable, name=name)
    if _is_file(place):
        return ArrayCollection(place, shape, layout=layout, name=name)
    if place.lower() not in registry.names():
        raise unknown_name("collection", place, registry.names(), "or the path of a folder or of an .npy")
    train, _ = registry.load(place, root)
    images = train.images if shape is None else conformed(train.images, shape)
    return ArrayCollection(images, name=name)
