"""Tiny data sets in the formats of the real ones, for the tests of the readers."""

from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np

PIXELS = 3072
CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def records(count: int, num_classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 ``[count, 3072]`` and labels, each class as often."""
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (count, PIXELS), np.uint8), np.arange(count) % num_classes


def cifar10_binary(root: Path, count: int = 10) -> Path:
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        pixels, labels = records(count, 10, i)
        (folder / f"{name}.bin").write_bytes(np.column_stack([labels.astype(np.uint8), pixels]).tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(CIFAR10_NAMES) + "\n\n")  # as the original: an empty line
    return folder


def cifar10_pickled(root: Path, count: int = 10, *, python2: bool = True) -> Path:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        pixels, labels = records(count, 10, i)
        batch = {"batch_label": f"batch {i}", "labels": labels.tolist(), "data": pixels}
        (folder / name).write_bytes(python2_pickle(batch) if python2 else pickle.dumps(batch, protocol=2))
    meta = {"num_cases_per_batch": count, "label_names": CIFAR10_NAMES, "num_vis": PIXELS}
    (folder / "batches.meta").write_bytes(python2_pickle(meta) if python2 else pickle.dumps(meta))
    return folder


def cifar100_binary(root: Path) -> Path:
    folder = root / "cifar-100-binary"
    folder.mkdir(parents=True)
    for i, name in enumerate(["train", "test"]):
        pixels, labels = records(200, 100, i)
        both = np.column_stack([labels // 5, labels]).astype(np.uint8)  # coarse, fine
        (folder / f"{name}.bin").write_bytes(np.column_stack([both, pixels]).tobytes())
    (folder / "fine_label_names.txt").write_text("\n".join(f"fine_{i}" for i in range(100)) + "\n")
    return folder


def cifar100_pickled(root: Path) -> Path:
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for i, name in enumerate(["train", "test"]):
        pixels, labels = records(200, 100, i)
        batch = {"fine_labels": labels.tolist(), "coarse_labels": (labels // 5).tolist(), "data": pixels}
        (folder / name).write_bytes(python2_pickle(batch))
    meta = {"fine_label_names": [f"fine_{i}" for i in range(100)], "coarse_label_names": ["coarse"]}
    (folder / "meta").write_bytes(python2_pickle(meta))
    return folder


def idx(array: np.ndarray) -> bytes:
    return (
        bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()
    )


def idx_set(folder: Path, *, packed: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """30 training and 20 test images of 28x28; returns those to train on and their labels."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    parts = {}
    for prefix, count in (("train", 30), ("t10k", 20)):
        parts[prefix] = random.integers(0, 256, (count, 28, 28), np.uint8), np.arange(count) % 10
        for kind, array in zip(("images-idx3", "labels-idx1"), parts[prefix], strict=True):
            name = f"{prefix}-{kind}-ubyte"
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
            else:
                (folder / name).write_bytes(idx(array))
    return parts["train"]


def quickdraw(root: Path) -> tuple[np.ndarray, np.ndarray]:
    """Three classes of ten, one after the other."""
    folder = root / "quickdraw"
    folder.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (30, 28, 28), np.uint8)
    labels = np.arange(30) // 10
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", labels)
    (folder / "names.txt").write_text("The Mona Lisa\nant\nzebra\n")
    return images, labels


def several_sets(root: Path) -> Path:
    """CIFAR-10 of 100 + 20 images, and digits, clothes and sketches."""
    cifar10_binary(root, 20)
    idx_set(root / "mnist" / "raw")
    idx_set(root / "fashion-mnist" / "raw")
    quickdraw(root)
    return root


def python2_pickle(value: object) -> bytes:
    """What cPickle of Python 2 writes at protocol 2: text as bytes, arrays by the old module of numpy."""
    return b"\x80\x02" + _python2(value) + b"."


def _python2(value: object) -> bytes:
    if isinstance(value, str):
        return b"U" + bytes([len(value)]) + value.encode("latin1")
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(_python2, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(_python2(x) for item in value.items() for x in item) + b"u"
    assert isinstance(value, np.ndarray)
    assert value.dtype == np.uint8
    shape = b"(" + b"".join(_python2(side) for side in value.shape) + b"t"
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    content = b"T" + struct.pack("<i", value.nbytes) + value.tobytes()
    return empty + b"(K\x01" + shape + dtype + b"\x89" + content + b"tb"
