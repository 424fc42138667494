"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009): the binary files, and the pickles that torchvision downloads."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastkd.data.files import data_root, find_folder, read_bytes, torchvision_downloads
from fastkd.data.images import ImageSet, channel_statistics, check_labels
from fastkd.data.pickles import load_pickle

__all__ = ["cifar10", "cifar100"]

PIXELS = 3 * 32 * 32


def cifar10(root: str | Path | None = None) -> tuple[ImageSet, ImageSet]:
    """CIFAR-10, training and test set, 32x32x3, from ``cifar-10-batches-bin`` or ``cifar-10-batches-py``."""
    return _sets(root, "CIFAR10", _CIFAR10, 10)


def cifar100(root: str | Path | None = None) -> tuple[ImageSet, ImageSet]:
    """CIFAR-100 with its 100 fine labels, 32x32x3, from ``cifar-100-binary`` or ``cifar-100-python``."""
    return _sets(root, "CIFAR100", _CIFAR100, 100)


def _binary(path: Path, place: int) -> tuple[Tensor, Tensor]:
    """Images and labels of records of bytes: the label stands at ``place``, last before the pixels."""
    record = place + 1 + PIXELS
    content = read_bytes(path)
    if not content or len(content) % record:
        raise ValueError(
            f"fastkd: {path} is broken: it has {len(content)} bytes, must have {record} for each image "
            f"({place + 1} of labels, {PIXELS} of pixels)"
        )
    records = torch.from_numpy(np.frombuffer(content, np.uint8).reshape(-1, record).copy())
    return records[:, place + 1 :].reshape(-1, 3, 32, 32), records[:, place].long()


def _text_names(path: Path) -> tuple[str, ...]:
    return tuple(read_bytes(path).decode("utf-8", "replace").split())


def _pickled(path: Path, key: str) -> tuple[Tensor, Tensor]:
    """Images and labels of a dict: the labels are at ``key``."""
    batch = _dict(path)
    data, labels = batch.get("data"), batch.get(key)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != PIXELS:
        found = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise ValueError(f"fastkd: {path} has {found} as 'data', must have an array of uint8 [N, {PIXELS}]")
    if not isinstance(labels, list) or len(labels) != len(data) or not all(isinstance(i, int) for i in labels):
        found = f"a list of {len(labels)}" if isinstance(labels, list) else type(labels).__name__
        raise ValueError(f"fastkd: {path} has {found} as {key!r}, must have a list of {len(data)} ints")
    return torch.from_numpy(data.copy()).reshape(-1, 3, 32, 32), torch.tensor(labels, dtype=torch.int64, device="cpu")


def _pickled_names(path: Path, key: str) -> tuple[str, ...]:
    names = _dict(path).get(key)
    if not isinstance(names, list):
        raise ValueError(f"fastkd: {path} has {type(names).__name__} as {key!r}, must have a list")
    return tuple(map(str, names))


def _dict(path: Path) -> dict[object, object]:
    content = load_pickle(path)
    if not isinstance(content, dict):
        raise ValueError(f"fastkd: {path} has {type(content).__name__}, must have a dict")
    return content


class _Layout(NamedTuple):
    """One of the two forms that a set is distributed in: its files, and how to read images with labels, and names."""

    folder: str
    train: tuple[str, ...]
    test: str
    names: str
    read: Callable[[Path], tuple[Tensor, Tensor]]
    read_names: Callable[[Path], tuple[str, ...]]


_CIFAR10 = (
    _Layout(
        "cifar-10-batches-bin",
        tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        "test_batch.bin",
        "batches.meta.txt",
        partial(_binary, place=0),
        _text_names,
    ),
    _Layout(
        "cifar-10-batches-py",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        "test_batch",
        "batches.meta",
        partial(_pickled, key="labels"),
        partial(_pickled_names, key="label_names"),
    ),
)
_CIFAR100 = (
    _Layout(
        "cifar-100-binary",
        ("train.bin",),
        "test.bin",
        "fine_label_names.txt",
        partial(_binary, place=1),  # after the coarse label
        _text_names,
    ),
    _Layout(
        "cifar-100-python",
        ("train",),
        "test",
        "meta",
        partial(_pickled, key="fine_labels"),
        partial(_pickled_names, key="fine_label_names"),
    ),
)


def _sets(
    root: str | Path | None, title: str, layouts: tuple[_Layout, ...], num_classes: int
) -> tuple[ImageSet, ImageSet]:
    folders = [layout.folder for layout in layouts]
    folder = find_folder(data_root(root), folders, title, torchvision_downloads(title))
    layout = layouts[folders.index(folder.name)]
    names = layout.read_names(folder / layout.names)
    if len(names) != num_classes:
        raise ValueError(f"fastkd: {folder / layout.names} has {len(names)} names, must have {num_classes}")
    train, test = (_joined(folder, files, layout, num_classes) for files in (layout.train, (layout.test,)))
    mean, std = channel_statistics(train[0])
    return ImageSet(*train, names, mean, std, flip=True), ImageSet(*test, names, mean, std, flip=True)


def _joined(folder: Path, files: tuple[str, ...], layout: _Layout, num_classes: int) -> tuple[Tensor, Tensor]:
    parts: list[tuple[Tensor, Tensor]] = []
    for file in files:
        images, target = layout.read(folder / file)
        if parts and len(target) != len(parts[0][1]):
            raise ValueError(
                f"fastkd: {folder / file} has {len(target)} images, must have as many as {files[0]}, {len(parts[0][1])}"
            )
        check_labels(target, num_classes, str(folder / file))
        parts.append((images, target))
    return torch.cat([images for images, _ in parts]), torch.cat([target for _, target in parts])
