"""Unlabeled images of one size, from ten thousand to a billion, wherever they lie."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd._checks import check_choice, check_count, check_dtype, index_of
from fastkd.data.read_ahead import on_host, read_ahead

__all__ = [
    "Block",
    "Collection",
    "Gathered",
    "Source",
    "Unreadable",
    "check_collection",
    "check_shape",
    "check_unreadable",
    "digest",
    "evenly_spaced",
    "put_back",
    "put_rows",
    "selected",
    "sorted_once",
    "unreadable_error",
]

PREFETCH = 2
_UNREADABLE = ("error", "skip")


class Source(NamedTuple):
    """Where the items ``[start, stop)`` of a collection come from."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Unreadable:
    """An item that cannot be read: its index, its file or another name, and why not."""

    index: int
    name: str
    why: str


class Gathered(NamedTuple):
    """Images uint8 ``[n, C, H, W]``, with zeros in the place of those that cannot be read; and these."""

    images: Tensor
    unreadable: tuple[Unreadable, ...] = ()


class Block(NamedTuple):
    """Successive items of a collection, from ``start`` on: images uint8 ``[n, C, H, W]``, and which of them cannot be read.

    The images of those are zeros. Who scores a collection gives them ``-inf``, so that they are never drawn.
    """

    start: int
    images: Tensor
    unreadable: tuple[Unreadable, ...] = ()


class Collection(ABC):
    """Unlabeled images, uint8, all of one shape: what is scored, drawn from and distilled on.

    Another kind of collection says how many items it has, loads some, and has a fingerprint; all else follows.

    Attributes:
        shape: (C, H, W) of the images.
        device: where :meth:`read` puts them.
        sources: what the collection is put together from, in the order of its items; one for a plain collection.
        unreadable: what :meth:`blocks` does about items that cannot be read: "error" raises one that names the item, "skip"
            lists it.
        workers: processes that read ahead, 0 where it is a thread or nothing.
    """

    shape: tuple[int, int, int]
    device: torch.device
    sources: tuple[Source, ...]
    unreadable: str = "error"
    workers: int = 0

    @abstractmethod
    def __len__(self) -> int:
        """Items."""

    @abstractmethod
    def _load(self, index: Tensor) -> Gathered:
        """Items of an ascending index without repetitions, int64 ``[n]`` on the CPU, which is in range; a copy of them."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hex digest of what the collection is, cheap for any size: of the number and shape of its images, and of some of
        them or their names. Not a checksum: a change of a few items may not show."""

    @property
    def resident(self) -> Tensor | None:
        """All images, ``[N, C, H, W]``, where they are in memory as they are read; None where they have to be loaded."""
        return None

    @property
    def missing(self) -> tuple[Unreadable, ...]:
        """Items of a resident collection that could not be read, and are zeros."""
        return ()

    def read(self, index: Tensor) -> Tensor:
        """The items of an index, in its order.

        Args:
            index: int64 ``[n]``, in [0, N), on any device; repetitions are allowed.

        Returns:
            uint8 ``[n, C, H, W]`` on the device of the collection, in memory of its own.

        Raises:
            TypeError, ValueError: an index of another dtype or shape or out of range; an item that cannot be read, by name.
        """
        images, unreadable = self._gather(self._checked(index))
        if unreadable:
            raise unreadable_error(unreadable[0])
        return images

    def stream(self, indices: Iterable[Tensor], prefetch: int = PREFETCH) -> Generator[Gathered, None, None]:
        """The items of one index after the other, read ahead by ``prefetch`` of them where reading takes time.

        Indices are taken by the thread that iterates, that many ahead. No thread and no process outlives the iterator.
        """
        prefetch = check_count("prefetch", prefetch, 0)
        return self._stream(indices, 0 if self.resident is not None else prefetch)

    def blocks(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[Block]:
        """The items ``[start, stop)`` in order, ``batch_size`` at a time, read ahead: for one pass of a network.

        The images may be a part of the collection's own memory: they are to be read only.

        Raises:
            TypeError, ValueError: at once, numbers out of range; as it is met, an item that cannot be read, by name, where
            ``unreadable`` is "error".
        """
        batch_size = check_count("batch_size", batch_size, 1)
        stop = len(self) if stop is None else check_count("stop", stop, 0, len(self) + 1)
        start = check_count("start", start, 0, stop + 1)
        return self._blocks(batch_size, start, stop)

    def _blocks(self, batch_size: int, start: int, stop: int) -> Iterator[Block]:
        firsts = range(start, stop, batch_size)
        resident = self.resident
        if resident is not None:
            for first in firsts:
                images = resident[first : min(first + batch_size, stop)]
                missing = tuple(item for item in self.missing if first <= item.index < first + len(images))
                yield Block(first, images, self._skipped(missing))
            return
        indices = (torch.arange(i, min(i + batch_size, stop), device="cpu") for i in firsts)
        with closing(self._stream(indices, PREFETCH)) as stream:
            for first, (images, unreadable) in zip(firsts, stream, strict=True):
                yield Block(first, images, self._skipped(unreadable))

    def _stream(self, indices: Iterable[Tensor], prefetch: int) -> Generator[Gathered, None, None]:
        return read_ahead(lambda index: self._gather(self._checked(index())), map(on_host, indices), prefetch)

    def _gather(self, index: Tensor) -> Gathered:
        """By sorted reads, each item once."""
        distinct, place = sorted_once(index.cpu())
        return put_back(self._load(distinct), place)

    def _skipped(self, unreadable: tuple[Unreadable, ...]) -> tuple[Unreadable, ...]:
        """These, if they may be left out."""
        for item in unreadable:
            if not self._skips(item.index):
                raise unreadable_error(item)
        return unreadable

    def _skips(self, index: int) -> bool:
        return self.unreadable == "skip"

    def _checked(self, index: Tensor) -> Tensor:
        check_dtype("index", index, (torch.int64,))
        if index.dim() != 1:
            raise ValueError(f"fastkd: index has shape {tuple(index.shape)}, must be [n]")
        if index.numel():
            least, most = (int(end) for end in index.aminmax())
            if least < 0 or most >= len(self):
                raise ValueError(f"fastkd: index holds {least} to {most}, must be in [0, {len(self)})")
        return index


def sorted_once(index: Tensor) -> tuple[Tensor, Tensor | None]:
    """An index ascending and without repetitions, and where each entry is in it; None if it is so already."""
    if index.numel() < 2 or bool((index[1:] > index[:-1]).all()):
        return index, None
    return torch.unique(index, return_inverse=True)  # type: ignore[no-any-return]


def put_back(gathered: Gathered, place: Tensor | None) -> Gathered:
    """What was loaded in the order of :func:`sorted_once`, in that of the index."""
    if place is None:
        return gathered
    return Gathered(selected(gathered.images, place), gathered.unreadable)


def selected(images: Tensor, index: Tensor) -> Tensor:
    """Copies of these images, in their memory format."""
    index = index.to(images.device)
    if not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last):
        return _rows(images.permute(0, 2, 3, 1), index).permute(0, 3, 1, 2)
    return _rows(images, index)


def _rows(images: Tensor, index: Tensor) -> Tensor:
    if images.device.type != "cpu":
        return images.index_select(0, index)  # indexing would take 14 times as long
    return torch.from_numpy(images.numpy()[index.numpy()])  # on one thread: index_select's wait for one another


def put_rows(images: Tensor, chosen: Tensor, rows: Tensor) -> None:
    """``images[chosen] = rows``, which on the CPU torch does byte by byte."""
    if images.device.type != "cpu":
        images[chosen.to(images.device)] = rows
    else:
        images.numpy()[chosen.numpy()] = rows.numpy()


def check_collection(name: str, value: object) -> Collection:
    if not isinstance(value, Collection):
        raise TypeError(f"fastkd: {name} is {type(value).__name__}, must be a Collection")
    return value


def check_shape(name: str, value: Sequence[int]) -> tuple[int, int, int]:
    """(C, H, W), each at least 1."""
    sizes = [index_of(size) for size in value] if isinstance(value, Sequence) and not isinstance(value, str) else []
    if len(sizes) != 3 or any(size is None or size < 1 for size in sizes):
        raise ValueError(f"fastkd: {name} is {value!r}, must be (channels, height, width), three ints of at least 1")
    return tuple(sizes)  # type: ignore[return-value]


def check_unreadable(value: str) -> str:
    return check_choice("unreadable", value, _UNREADABLE)


def unreadable_error(item: Unreadable) -> ValueError:
    return ValueError(
        f"fastkd: image {item.index} of the collection, {item.name}, cannot be read: {item.why}; must be a whole image, or "
        "left out: unreadable='skip', and a score of -inf"
    )


def digest(parts: Iterable[str | bytes]) -> str:
    """sha256 over all parts, each with its length: hex."""
    made = hashlib.sha256()
    for part in parts:
        content = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        made.update(len(content).to_bytes(8, "little"))
        made.update(content)
    return made.hexdigest()


def evenly_spaced(items: int, count: int) -> Tensor:
    """``min(items, count)`` indices from the first item on: int64, ascending."""
    count = min(items, count)
    return torch.tensor([i * items // count for i in range(count)], dtype=torch.int64, device="cpu")
