"""The same images as collections of every kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from fastkd.data import ArrayCollection, Collection, ConcatCollection, DatasetCollection, FolderCollection

ITEMS, SHAPE = 60, (3, 8, 8)
PIXELS = torch.randint(256, (ITEMS, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
FORKS = ("workers", "folder with workers", "mixed")  # kinds with processes


class Images(Dataset[Any]):
    """Pairs of an image and a label, as most data sets have them."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        return Image.fromarray(self.images[i].permute(1, 2, 0).numpy()), i % 3


def saved(folder: Path, images: Tensor = PIXELS) -> Path:
    """As PNG, which loses nothing, in two folders, whose order is that of the images."""
    for i, image in enumerate(images):
        path = folder / ("a" if i < 40 else "b") / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return folder


def saved_array(path: Path, images: Tensor = PIXELS) -> Path:
    np.save(path, images.numpy())
    return path


def _channels_last() -> Tensor:
    return PIXELS.permute(0, 2, 3, 1).contiguous()


KINDS: dict[str, Callable[[Path], Collection]] = {
    "tensor": lambda tmp: ArrayCollection(PIXELS),
    "array": lambda tmp: ArrayCollection(PIXELS.numpy()),
    "channels last": lambda tmp: ArrayCollection(_channels_last(), layout="NHWC"),
    "mapped": lambda tmp: ArrayCollection(saved_array(tmp / "images.npy")),
    "mapped channels last": lambda tmp: ArrayCollection(saved_array(tmp / "last.npy", _channels_last()), layout="NHWC"),
    "dataset": lambda tmp: DatasetCollection(Images(PIXELS)),
    "workers": lambda tmp: DatasetCollection(Images(PIXELS), workers=2),
    "folder": lambda tmp: FolderCollection(saved(tmp / "folder"), SHAPE),
    "folder with workers": lambda tmp: FolderCollection(saved(tmp / "folder"), SHAPE, workers=2),
    "loaded": lambda tmp: FolderCollection(saved(tmp / "folder"), SHAPE).to("cpu"),
    "concatenated": lambda tmp: ConcatCollection(
        first=ArrayCollection(PIXELS[:25]), second=ArrayCollection(PIXELS[25:])
    ),
    "mixed": lambda tmp: ConcatCollection(
        first=ArrayCollection(saved_array(tmp / "first.npy", PIXELS[:25])),
        second=DatasetCollection(Images(PIXELS[25:40]), workers=2),
        third=ConcatCollection({"x-1": ArrayCollection(PIXELS[40:50]), "x-2": ArrayCollection(PIXELS[50:])}),
    ),
}
