"""MNIST and the sets made in its format, IDX: a magic number, the sizes, then bytes; plain or compressed by gzip.

LeCun, Cortes & Burges, "The MNIST database of handwritten digits" (1998), describes the format on its page.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastkd.data.files import data_root, find_folder, read_bytes, torchvision_downloads
from fastkd.data.images import ImageSet, channel_statistics, check_labels

__all__ = ["fashion_mnist", "kmnist", "mnist", "read_idx"]

UBYTE = 0x08  # the type code of bytes, the only one that these sets use
FASHION = "T-shirt/top, Trouser, Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Bag, Ankle boot"
KUZUSHIJI = "o, ki, su, tsu, na, ha, ma, ya, re, wo"


def mnist(root: str | Path | None = None) -> tuple[ImageSet, ImageSet]:
    """MNIST, training and test set, from ``mnist/raw`` or torchvision's ``MNIST/raw``: 28x28, not to be mirrored."""
    return _sets(root, "MNIST", ("mnist/raw", "MNIST/raw"), tuple("0123456789"), flip=False)


def fashion_mnist(root: str | Path | None = None) -> tuple[ImageSet, ImageSet]:
    """Fashion-MNIST (Xiao et al., 2017), from ``fashion-mnist/raw`` or torchvision's ``FashionMNIST/raw``: 28x28."""
    return _sets(root, "FashionMNIST", ("fashion-mnist/raw", "FashionMNIST/raw"), tuple(FASHION.split(", ")), flip=True)


def kmnist(root: str | Path | None = None) -> tuple[ImageSet, ImageSet]:
    """Kuzushiji-MNIST (Clanuwat et al., 2018), from ``kmnist/raw`` or torchvision's ``KMNIST/raw``: 28x28, letters."""
    return _sets(root, "KMNIST", ("kmnist/raw", "KMNIST/raw"), tuple(KUZUSHIJI.split(", ")), flip=False)


def read_idx(path: str | Path) -> Tensor:
    """The bytes of an IDX file, uint8, in its shape; ``<path>.gz`` is read where path is not there.

    Raises:
        FileNotFoundError: neither is there.
        ValueError: a file of another format or type, too short or too long for its header, or broken gzip.
    """
    path = Path(path)
    packed = path.with_name(path.name + ".gz")
    if not path.exists() and packed.exists():
        path = packed
    content = read_bytes(path)
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"fastkd: {path} is broken: not whole gzip ({error})") from None
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != UBYTE:
        raise ValueError(
            f"fastkd: {path} starts with {content[:4].hex() or 'nothing'}, must start with 000008 and the number of "
            "dimensions, as IDX files of bytes do"
        )
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise ValueError(f"fastkd: {path} is broken: its header has {len(content)} bytes of {start}")
    shape = struct.unpack(f">{content[3]}I", content[4:start])
    if len(content) != start + math.prod(shape):
        raise ValueError(
            f"fastkd: {path} is broken: it has {len(content)} bytes, must have {start + math.prod(shape)} "
            f"for the shape {shape} in its header"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).copy()).reshape(shape)


def _sets(
    root: str | Path | None, title: str, folders: tuple[str, ...], names: tuple[str, ...], *, flip: bool
) -> tuple[ImageSet, ImageSet]:
    folder = find_folder(data_root(root), folders, title, torchvision_downloads(title))
    train, test = (_part(folder, prefix, len(names)) for prefix in ("train", "t10k"))
    mean, std = channel_statistics(train[0])
    return ImageSet(*train, names, mean, std, flip), ImageSet(*test, names, mean, std, flip)


def _part(folder: Path, prefix: str, num_classes: int) -> tuple[Tensor, Tensor]:
    image_file, label_file = folder / f"{prefix}-images-idx3-ubyte", folder / f"{prefix}-labels-idx1-ubyte"
    images, labels = read_idx(image_file), read_idx(label_file)
    if images.dim() != 3:
        raise ValueError(f"fastkd: {image_file} has the shape {tuple(images.shape)}, must be [N, H, W]")
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"fastkd: {label_file} has the shape {tuple(labels.shape)}, must be ({len(images)},), one label an image"
        )
    target = labels.long()
    check_labels(target, num_classes, str(label_file))
    return images[:, None], target
