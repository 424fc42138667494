"""A collection by what somebody types."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fastkd._checks import check_text
from fastkd._names import unknown_name
from fastkd.data import registry
from fastkd.data.array_collection import ArrayCollection
from fastkd.data.collection import Collection, check_shape, evenly_spaced
from fastkd.data.concat_collection import ConcatCollection
from fastkd.data.conforming import conformed
from fastkd.data.dataset_collection import FolderCollection

__all__ = ["Place", "open_collection", "places_of"]

_NAMED = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)
_COUNTED = re.compile(r"(.+):(\d+)", re.DOTALL)


class Place(NamedTuple):
    """A part of a collection, as it is typed."""

    name: str
    """Of the source."""
    place: str
    """A folder, an ``.npy``, or the name of a set."""
    images: int | None
    """How many images of it; None: all."""


def places_of(text: str) -> list[Place]:
    """What a text names; nothing is opened.

    Raises:
        TypeError, ValueError: a text that names nothing, or the same name twice.
    """
    words = [word.strip() for word in check_text("collection", text).split(",")]
    if not all(words):
        raise ValueError(
            f"fastkd: collection is {text!r}, must be a folder, an .npy or the name of a set, or several with commas"
        )
    places = [_place(word) for word in words]
    names = [place.name for place in places]
    for place in places:
        if names.count(place.name) > 1:
            raise ValueError(
                f"fastkd: collection is {text!r}, which has {place.name} twice, must have a name for each: "
                f"other={place.place}"
            )
    return places


def open_collection(
    text: str,
    shape: Sequence[int] | None = None,
    *,
    root: str | Path | None = None,
    layout: str = "NCHW",
    workers: int = 0,
    unreadable: str = "error",
    known: Mapping[str, Callable[[str], Collection]] | None = None,
) -> Collection:
    """The collection of a text, for command lines: ``cifar10``, ``images.npy``, ``photos/``, ``near=photos/,far=mnist:1000``.

    Args:
        text: the path of a folder of images, or of an ``.npy``, or a name of :func:`fastkd.data.load` (its training images); or
            several of these, with commas between, each with ``name=`` before it, if it is not to be called by the file, the
            folder or the set, and ``:N`` behind it, if only N images of it are wanted: evenly spaced ones, in memory.
        shape: (C, H, W) of the images, which a folder needs. If None, that of the first array or set.
        root: of the sets, as of :func:`fastkd.data.load`.
        layout: "NCHW" or "NHWC", of each ``.npy``.
        workers, unreadable: as in :class:`fastkd.data.FolderCollection`.
        known: collections of the caller's by the name of their place, which comes before folders and sets; each is made where
            it is asked for, given the name of its source.

    Raises:
        TypeError, ValueError: a text that names nothing, or the same name twice; a folder without a shape; more images than
        there are; what each of them raises.
        FileNotFoundError: a file or a set that is not there.
    """
    places = places_of(text)
    known = known or {}
    size = None if shape is None else check_shape("shape", shape)
    parts: dict[str, Collection] = {}
    # arrays and sets know their shape, which folders then take
    for name, place, count in sorted(places, key=lambda part: Path(part.place).is_dir()):
        part = (
            known[place](name) if place in known else _open(name, place, size, root, layout, workers, unreadable, known)
        )
        if count is not None:
            if count > len(part):
                raise ValueError(f"fastkd: collection is {text!r}, but {place} has {len(part)} images")
            part = ArrayCollection.taken(part, evenly_spaced(len(part), count), name)
        parts[name] = part
        size = size or part.shape
    if len(places) == 1:
        return parts[places[0].name]
    return ConcatCollection({name: parts[name] for name, _, _ in places})


def _place(word: str) -> Place:
    name, count = None, None
    if not Path(word).exists() and (found := _NAMED.fullmatch(word)):
        name, word = found[1], found[2]
    if not Path(word).exists() and (found := _COUNTED.fullmatch(word)):
        word, count = found[1], int(found[2])
        if count < 1:
            raise ValueError(f"fastkd: collection has {count} images of {word}, must be 1 or more")
    if name is None:
        name = Path(word).resolve().name if Path(word).is_dir() else Path(word).stem if _is_file(word) else word
    return Place(name, word, count)


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
    known: Iterable[str],
) -> Collection:
    if Path(place).is_dir():
        if shape is None:
            raise ValueError(f"fastkd: shape is None, must be (channels, height, width) for the images of {place}")
        return FolderCollection(place, shape, workers=workers, unreadable=unreadable, name=name)
    if _is_file(place):
        return ArrayCollection(place, shape, layout=layout, name=name)
    if place.lower() not in registry.names():
        raise unknown_name("collection", place, (*known, *registry.names()), "or the path of a folder or of an .npy")
    train, _ = registry.load(place, root)
    images = train.images if shape is None else conformed(train.images, shape)
    return ArrayCollection(images, name=name)
