"""Collections whose images are decoded one by one: any data set of torch, and folders of files."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastkd._checks import check_count, check_text
from fastkd._seeding import mixed_generator
from fastkd.data.array_collection import ArrayCollection
from fastkd.data.collection import (
    Collection,
    Gathered,
    Source,
    Unreadable,
    check_shape,
    check_unreadable,
    digest,
    evenly_spaced,
    put_back,
    sorted_once,
    unreadable_error,
)
from fastkd.data.decoding import image_of, open_image, pillow, pixels_of
from fastkd.data.read_ahead import on_host

__all__ = ["SUFFIXES", "DatasetCollection", "FolderCollection"]

SUFFIXES = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_SAMPLED = 64  # items that a fingerprint decodes


class DatasetCollection(Collection):
    """The images of a map-style data set of torch, decoded as they are needed, by processes of a DataLoader if there are any.

    The items must be the same each time: augmentation comes after. The fingerprint decodes 64 evenly spaced ones.

    Args:
        dataset: with ``len()`` and ``dataset[i]``, whose items are images (of PIL, arrays ``[H, W]`` or ``[H, W, C]``, tensors
            ``[H, W]`` or ``[C, H, W]``; uint8), or tuples whose first is one, or mappings with an "image", or whose first is
            one.
        shape: (C, H, W) that all are converted to, grey or RGB, by Pillow (bilinear, antialiased). If None, that of the first
            image that can be read, and others of another shape cannot.
        workers: processes that decode ahead in :meth:`stream` and :meth:`blocks`; 0 decodes in the process itself.
        unreadable: "error" or "skip", see :class:`fastkd.data.Collection`. Whatever the data set raises counts, as does an
            item that is no image.
        name: of the source.

    Raises:
        TypeError, ValueError: a data set without a length or without an item, other arguments out of range, no shape
        and no image that can be read.
    """

    device = torch.device("cpu")

    def __init__(
        self,
        dataset: Any,
        shape: Sequence[int] | None = None,
        *,
        workers: int = 0,
        unreadable: str = "error",
        name: str = "dataset",
    ) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise TypeError(
                f"fastkd: dataset is {type(dataset).__name__}, must be map-style, with len() and dataset[i]"
            )
        if len(dataset) == 0:
            raise ValueError("fastkd: dataset is empty, must have at least one image")
        self.dataset, self.workers = dataset, check_count("workers", workers, 0)
        self.unreadable = check_unreadable(unreadable)
        self.sources = (Source(check_text("name", name), 0, len(dataset)),)
        self.shape = self._first_shape() if shape is None else check_shape("shape", shape)
        self._decoder = _Decoder(dataset, self.shape, converts=shape is not None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} images of {self.shape}, workers={self.workers})"

    def to(self, device: torch.device | str) -> ArrayCollection:
        """All images, decoded, in the memory of a device."""
        return ArrayCollection.loaded(self, device)

    def fingerprint(self) -> str:
        images, _ = self._load(evenly_spaced(len(self), _SAMPLED))
        return digest([f"dataset {len(self)} {self.shape}", images.contiguous().numpy().tobytes()])

    def _first_shape(self) -> tuple[int, int, int]:
        for i in range(len(self)):
            try:
                return tuple(pixels_of(image_of(self.dataset[i]), None).shape)  # type: ignore[return-value]
            except Exception as error:
                missing = Unreadable(i, _name(self.dataset, i), _why(error))
                if self.unreadable == "error":
                    raise unreadable_error(missing) from error
        raise ValueError(f"fastkd: dataset has no image that can be read: {missing.name} {missing.why}")

    def _load(self, index: Tensor) -> Gathered:
        return self._decoder.__getitems__(index.tolist())

    def _stream(self, indices: Iterable[Tensor], prefetch: int) -> Generator[Gathered, None, None]:
        if self.workers == 0:
            yield from super()._stream(indices, 0)
            return
        places: deque[Tensor | None] = deque()
        failed: list[Exception] = []

        def wanted() -> Iterator[list[int]]:
            try:
                for index in map(on_host, indices):
                    distinct, place = sorted_once(self._checked(index()))
                    places.append(place)
                    yield distinct.tolist()
            except (
                Exception
            ) as error:  # a loader that is interrupted as it starts its workers leaves descriptors to be closed twice
                failed.append(error)

        loader = DataLoader(
            self._decoder,
            batch_sampler=wanted(),
            num_workers=self.workers,
            collate_fn=_itself,
            prefetch_factor=max(1, prefetch),
            generator=mixed_generator("workers", 0),  # the process's own stays where it is
        )
        with torch.device("cpu"):  # where the generator is
            loaded = iter(loader)
        for gathered in loaded:
            yield put_back(gathered, places.popleft())
        if failed:
            raise failed[0]


class FolderCollection(DatasetCollection):
    """The images below a folder, in the order of their paths, decoded by Pillow.

    The fingerprint is over the relative paths and the sizes of the files.

    Args:
        path: of the folder; all files below it that end in one of :data:`SUFFIXES` count, but those whose name, or a folder's,
            begins with a dot. Links to folders are followed.
        shape: (C, H, W), C = 1 or 3, that all are converted to.
        workers, unreadable: as in :class:`DatasetCollection`.
        name: of the source; that of the folder if None.

    Raises:
        TypeError, ValueError: arguments out of range; a folder without images.
        NotADirectoryError: no such folder. ModuleNotFoundError: Pillow is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        shape: Sequence[int],
        *,
        workers: int = 0,
        unreadable: str = "error",
        name: str | None = None,
    ) -> None:
        pillow()
        root = Path(path)
        if not root.is_dir():
            raise NotADirectoryError(f"fastkd: path is {root}, must be a folder of images")
        if check_shape("shape", shape)[0] not in (1, 3):
            raise ValueError(f"fastkd: shape is {tuple(shape)}, must have 1 or 3 channels")
        files = _Files(root)
        if not len(files):
            raise ValueError(f"fastkd: path is {root}, must hold at least one image ({', '.join(SUFFIXES)})")
        name = root.resolve().name if name is None else name
        super().__init__(files, shape, workers=workers, unreadable=unreadable, name=name)

    @property
    def files(self) -> Sequence[str]:
        """Their paths in the folder, in the order of the items."""
        return self.dataset.names  # type: ignore[no-any-return]

    def fingerprint(self) -> str:
        root: Path = self.dataset.root
        sizes = (f"{name}\0{_size(root / name)}" for name in self.files)
        return digest([f"folder {len(self)} {self.shape}", *sizes])


class _Files(Dataset[Any]):
    """The images below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names = sorted(_images_below(root))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Any:
        return open_image(os.path.join(self.root, self.names[i]))


class _Decoder(Dataset[Any]):
    """Several items at once: what a worker does."""

    def __init__(self, dataset: Any, shape: tuple[int, int, int], *, converts: bool) -> None:
        self.dataset, self.shape, self.target = dataset, shape, shape if converts else None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Gathered:
        return self.__getitems__([i])

    def __getitems__(self, index: list[int]) -> Gathered:
        images = torch.zeros(len(index), *self.shape, dtype=torch.uint8, device="cpu")
        unreadable = []
        for place, i in enumerate(index):
            try:
                pixels = pixels_of(image_of(self.dataset[i]), self.target)
                if tuple(pixels.shape) != self.shape:
                    raise ValueError(f"has shape {tuple(pixels.shape)}, must be {self.shape}, or shape= given")
                images[place] = pixels
            except Exception as error:
                unreadable.append(Unreadable(i, _name(self.dataset, i), _why(error)))
        return Gathered(images, tuple(unreadable))


def _images_below(root: Path) -> Iterator[str]:
    """Paths in the folder, with slashes."""
    seen: set[tuple[int, int]] = set()  # folders, as links may lead back
    for folder, folders, files in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield Path(folder, name).relative_to(root).as_posix()


def _size(path: Path) -> int:
    """Of a file; -1 of one that is not there any more."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _name(dataset: Any, i: int) -> str:
    return dataset.names[i] if isinstance(dataset, _Files) else f"dataset[{i}]"


def _why(error: Exception) -> str:
    return str(error) or type(error).__name__


def _itself(gathered: Any) -> Any:
    return gathered
