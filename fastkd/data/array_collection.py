"""Collections that are one array: in memory, on a device, or memory-mapped."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkd._checks import check_choice, check_text
from fastkd.data.collection import (
    Collection,
    Gathered,
    Source,
    Unreadable,
    check_shape,
    digest,
    evenly_spaced,
    selected,
)
from fastkd.data.conforming import LAYOUTS, check_sizes, conformed, in_nchw, viewed
from fastkd.data.mapped_rows import MappedRows

__all__ = ["ArrayCollection", "open_array"]

_SAMPLED = 4096  # items that a fingerprint looks at
_SAMPLED_BYTES = 1 << 26  # or so many bytes of larger ones, but 16 of them
_LOADED_AT_ONCE = 1024

Array = np.ndarray[Any, Any]


class ArrayCollection(Collection):
    """uint8 images in one array.

    Its fingerprint is over their number, their shape, and the bytes of up to 4096 evenly spaced ones: the same for an array in
    memory, memory-mapped, on a GPU, and in either layout.

    Args:
        images: uint8 ``[N, C, H, W]``, or as ``layout`` says, or ``[N, H, W]`` of one channel: a tensor on any device, a numpy
            array, ``np.memmap`` among them, or the path of an ``.npy``, which is memory-mapped. They are not copied (but for
            arrays of negative strides). Arrays that are read-only are read as if they were memory-mapped.
        shape: (C, H, W) to read the images with, as :func:`fastkd.data.conformed` makes them, each time; their own if None.
        layout: "NCHW" or "NHWC".
        name: of the source; that of the file, or "images", if None.

    Raises:
        TypeError, ValueError: other dtypes and shapes, no image, a file that is no whole ``.npy``.
        FileNotFoundError: no such file.
    """

    def __init__(
        self,
        images: Tensor | Array | str | os.PathLike[str],
        shape: Sequence[int] | None = None,
        *,
        layout: str = "NCHW",
        name: str | None = None,
    ) -> None:
        check_choice("layout", layout, LAYOUTS)
        if isinstance(images, (str, os.PathLike)):
            name = Path(images).stem if name is None else name
            images = open_array(images)
        self._layout = layout
        self._rows: MappedRows | None = None
        self._tensor: Tensor | None = None
        if isinstance(images, np.ndarray) and (isinstance(images, np.memmap) or not images.flags.writeable):
            if images.dtype != np.uint8:
                raise TypeError(f"fastkd: images has dtype {images.dtype}, must be uint8")
            check_sizes("images", images.shape, layout)
            self._rows, own = MappedRows(images), _shape_in(images.shape, layout)
        else:
            self._tensor = in_nchw("images", images, layout)
            own = tuple(self._tensor.shape[1:])  # type: ignore[assignment]
        self._length = len(images)
        self.shape = own if shape is None else check_shape("shape", shape)
        if self.shape != own:  # says now what cannot be
            conformed(torch.zeros(1, *own, dtype=torch.uint8, device="cpu"), self.shape)
        self._fits = self.shape == own
        self.device = torch.device("cpu") if self._tensor is None else self._tensor.device
        self.sources = (Source("images" if name is None else check_text("name", name), 0, self._length),)
        self._fingerprint: str | None = None  # of what it was loaded from
        self._missing: dict[int, Unreadable] = {}

    @classmethod
    def loaded(cls, collection: Collection, device: torch.device | str = "cpu") -> ArrayCollection:
        """All of a collection in the memory of a device, with its sources, its fingerprint, and what of it cannot be read.

        Raises:
            ValueError: an item that cannot be read, where that is an error there.
        """
        images = torch.empty(len(collection), *collection.shape, dtype=torch.uint8, device=device)
        missing: dict[int, Unreadable] = {}
        for block in collection.blocks(_LOADED_AT_ONCE):
            images[block.start : block.start + len(block.images)].copy_(block.images)
            missing |= {item.index: item for item in block.unreadable}
        made = cls(images)
        made.sources, made._missing = collection.sources, missing
        made.unreadable = "skip" if missing else collection.unreadable
        made._fingerprint = collection.fingerprint()
        return made

    @classmethod
    def taken(cls, collection: Collection, index: Tensor, name: str) -> ArrayCollection:
        """Some items of a collection in memory, as one source.

        Args:
            index: int64 ``[n]``, in [0, N).

        Raises:
            ValueError: an item that cannot be read, where that is an error there.
        """
        images: list[Tensor] = []
        missing: dict[int, Unreadable] = {}
        indices = index.split(_LOADED_AT_ONCE)
        for chosen, gathered in zip(indices, collection.stream(indices), strict=True):
            for item in collection._skipped(gathered.unreadable):
                for place in (chosen == item.index).nonzero().flatten().tolist():
                    now = len(images) * _LOADED_AT_ONCE + place
                    missing[now] = replace(item, index=now)
            images.append(gathered.images)
        made = cls(torch.cat(images), name=name)
        made._missing = missing
        made.unreadable = "skip" if missing else collection.unreadable
        return made

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        where = "a file" if self._tensor is None else self.device
        return f"ArrayCollection({len(self)} images of {self.shape}, {where})"

    @property
    def resident(self) -> Tensor | None:
        return self._tensor if self._fits else None

    @property
    def missing(self) -> tuple[Unreadable, ...]:
        return tuple(self._missing.values())

    def to(self, device: torch.device | str) -> ArrayCollection:
        """The same images in the memory of a device; what is memory-mapped is read as a whole."""
        if self._tensor is None or not self._fits:
            return ArrayCollection.loaded(self, device)
        made = ArrayCollection(self._tensor.to(device))
        made.sources, made.unreadable, made._missing = self.sources, self.unreadable, self._missing
        made._fingerprint = self._fingerprint
        return made

    def fingerprint(self) -> str:
        if self._fingerprint is not None:
            return self._fingerprint
        count = max(16, min(_SAMPLED, _SAMPLED_BYTES // int(np.prod(self.shape))))
        chosen = self._own(evenly_spaced(len(self), count)).cpu().contiguous()
        header = f"array {len(self)} {tuple(chosen.shape[1:])} {self.shape}"
        return digest([header, chosen.numpy().tobytes()])

    def _gather(self, index: Tensor) -> Gathered:
        if self._tensor is None:
            return super()._gather(index)
        return self._load(index)  # in memory nothing is gained by an order

    def _load(self, index: Tensor) -> Gathered:
        images = self._own(index)
        missing = (
            tuple(self._missing[i] for i in sorted(set(index.tolist()) & set(self._missing))) if self._missing else ()
        )
        return Gathered(images if self._fits else conformed(images, self.shape), missing)

    def _own(self, index: Tensor) -> Tensor:
        """Copies of the images as they are stored, NCHW."""
        if self._tensor is not None:
            return selected(self._tensor, index)
        assert self._rows is not None
        return viewed(torch.from_numpy(self._rows[index.numpy()]), self._layout)


def open_array(path: str | os.PathLike[str]) -> np.memmap[Any, Any]:
    """An ``.npy``, memory-mapped.

    Raises:
        FileNotFoundError: it is not there. ValueError: it is no whole ``.npy``, or one in the order of Fortran.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"fastkd: {path} is not there") from None
    except (OSError, EOFError, ValueError, SyntaxError) as error:
        raise ValueError(f"fastkd: {path} is broken: no whole .npy file ({error})") from None
    if not isinstance(array, np.memmap):
        raise ValueError(f"fastkd: {path} is no .npy file, must hold one array")
    if not array.flags.c_contiguous:
        raise ValueError(
            f"fastkd: {path} is in Fortran's order, must be in C's: np.save(path, np.ascontiguousarray(x))"
        )
    return array


def _shape_in(sizes: Sequence[int], layout: str) -> tuple[int, int, int]:
    if len(sizes) == 3:
        return 1, sizes[1], sizes[2]
    return (sizes[1], sizes[2], sizes[3]) if layout == "NCHW" else (sizes[3], sizes[1], sizes[2])
