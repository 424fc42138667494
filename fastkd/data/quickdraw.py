"""A part of Quick, Draw! (Ha & Eck, 2017): sketches of 345 things, 100 of each, 28x28, as numpy files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastkd.data.files import data_root, find_folder, read_bytes
from fastkd.data.images import ImageSet, channel_statistics, check_labels
from fastkd.data.splits import stratified_split

__all__ = ["quickdraw"]


def quickdraw(root: str | Path | None = None, *, test_share: float = 0.2, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """Training and test set, ``test_share`` of each class to test on, from a folder ``quickdraw``.

    It holds ``images.npy`` (uint8 ``[N, H, W]``), ``labels.npy`` (integers ``[N]``) and ``names.txt`` (a name a line). The
    set has no split of its own: this one depends on the seed alone. Not mirrored.

    Raises:
        FileNotFoundError, ValueError: a file that is not there, not whole, or of another dtype or shape.
    """
    how = "save the sketches as images.npy (uint8 [N, 28, 28]), labels.npy and names.txt there"
    folder = find_folder(data_root(root), ("quickdraw",), "Quick, Draw!", how)
    pixels, labels = _array(folder / "images.npy"), _array(folder / "labels.npy")
    names = tuple(read_bytes(folder / "names.txt").decode("utf-8", "replace").splitlines())
    if pixels.dtype != np.uint8 or pixels.ndim != 3:
        raise ValueError(f"fastkd: {folder / 'images.npy'} has {_found(pixels)}, must have uint8 [N, H, W]")
    if labels.dtype.kind not in "iu" or labels.shape != pixels.shape[:1]:
        raise ValueError(f"fastkd: {folder / 'labels.npy'} has {_found(labels)}, must have integers ({len(pixels)},)")
    images, target = torch.from_numpy(pixels)[:, None], torch.from_numpy(labels.astype(np.int64))
    check_labels(target, len(names), str(folder / "labels.npy"))
    train, test = stratified_split(target, test_share, seed)
    mean, std = channel_statistics(images[train])
    whole = ImageSet(images, target, names, mean, std)
    return whole.subset(train), whole.subset(test)


def _array(path: Path) -> np.ndarray[Any, Any]:
    content = read_bytes(path)
    try:
        return np.asarray(np.load(io.BytesIO(content), allow_pickle=False))
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"fastkd: {path} is broken: no whole .npy file ({error})") from None


def _found(array: np.ndarray[Any, Any]) -> str:
    return f"{array.dtype} {array.shape}"
