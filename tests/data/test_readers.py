"""The readers of data sets: layouts, values, what is said of files that are missing, broken, or not what they say."""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import image_files
import numpy as np
import pytest
import torch

from fastkd import data
from fastkd.data.idx import read_idx
from fastkd.data.pickles import load_pickle
from fastkd.data.quickdraw import quickdraw
from fastkd.data.splits import stratified_split

pytestmark = [pytest.mark.no_kernels, pytest.mark.filterwarnings("error")]


@pytest.mark.parametrize(
    "write",
    [
        image_files.cifar10_binary,
        image_files.cifar10_pickled,
        lambda root: image_files.cifar10_pickled(root, python2=False),
    ],
    ids=["binary", "pickled", "pickled by Python 3"],
)
def test_cifar10(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    write(tmp_path)
    train, test = data.load("cifar10", tmp_path)
    assert train.class_names == tuple(image_files.CIFAR10_NAMES) == test.class_names
    assert (len(train), len(test)) == (50, 10)
    for i, part in enumerate([*(train.subset(range(10 * i, 10 * i + 10)) for i in range(5)), test]):
        pixels, labels = image_files.records(10, 10, i)
        assert np.array_equal(part.images.numpy(), pixels.reshape(10, 3, 32, 32))  # the channels one after the other
        assert part.target.tolist() == labels.tolist()
    channels = train.images.double().transpose(0, 1).flatten(1) / 255
    assert train.mean == pytest.approx(channels.mean(1).tolist(), abs=5.1e-5)
    assert train.std == pytest.approx(channels.std(1, correction=0).tolist(), abs=5.1e-5)
    assert (test.mean, test.std) == (train.mean, train.std)
    assert train.flip
    assert test.flip


@pytest.mark.parametrize("write", [image_files.cifar100_binary, image_files.cifar100_pickled])
def test_cifar100_has_fine_labels(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    write(tmp_path)
    train, test = data.load("cifar100", tmp_path)
    for i, part in enumerate([train, test]):
        pixels, labels = image_files.records(200, 100, i)
        assert np.array_equal(part.images.numpy(), pixels.reshape(-1, 3, 32, 32))
        assert part.target.tolist() == labels.tolist()
    assert train.num_classes == 100
    assert train.class_names[7] == "fine_7"


@pytest.mark.parametrize(
    ("name", "folder", "flip", "third"),
    [
        ("mnist", "mnist/raw", False, "2"),
        ("mnist", "MNIST/raw", False, "2"),
        ("fashion-mnist", "fashion-mnist/raw", True, "Pullover"),
        ("fashion-mnist", "FashionMNIST/raw", True, "Pullover"),
        ("kmnist", "KMNIST/raw", False, "su"),
    ],
)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_idx_sets(tmp_path: Path, name: str, folder: str, flip: bool, third: str, packed: bool) -> None:
    pixels, labels = image_files.idx_set(tmp_path / folder, packed=packed)
    train, test = data.load(name, tmp_path)
    assert np.array_equal(train.images[:, 0].numpy(), pixels)
    assert train.target.tolist() == labels.tolist()
    assert test.images.shape == (20, 1, 28, 28)
    assert (train.flip, test.flip) == (flip, flip)
    assert train.num_classes == 10
    assert train.class_names[2] == third
    assert train.class_names[9] == {"mnist": "9", "fashion-mnist": "Ankle boot", "kmnist": "wo"}[name]


def test_idx_of_any_shape(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(image_files.idx(np.arange(24).reshape(2, 3, 4)))
    assert read_idx(tmp_path / "a").tolist() == np.arange(24).reshape(2, 3, 4).tolist()
    (tmp_path / "b").write_bytes(image_files.idx(np.zeros((0, 3))))
    assert read_idx(str(tmp_path / "b")).shape == (0, 3)


def test_quickdraw(tmp_path: Path) -> None:
    images, labels = image_files.quickdraw(tmp_path)
    train, test = data.load("quickdraw", tmp_path)
    assert train.class_names == ("The Mona Lisa", "ant", "zebra")
    assert train.target.bincount().tolist() == [8, 8, 8]
    assert test.target.bincount().tolist() == [2, 2, 2]
    both = torch.cat([train.images, test.images])[:, 0].numpy()
    where = [int((images == image).all((1, 2)).nonzero()[0][0]) for image in both]
    assert sorted(where) == list(range(30))  # every image once
    assert torch.cat([train.target, test.target]).tolist() == labels[where].tolist()
    again, other = quickdraw(tmp_path)[1], quickdraw(tmp_path, seed=1)[1]
    assert torch.equal(test.images, again.images)
    assert not torch.equal(test.images, other.images)
    assert len(quickdraw(tmp_path, test_share=0.5)[1]) == 15
    assert not train.flip


def test_digits() -> None:
    from sklearn.datasets import load_digits

    train, test = data.load("digits")
    assert (len(train), len(test)) == (1438, 359)
    pixels, labels = load_digits(return_X_y=True)
    known = {tuple(row): label for row, label in zip(pixels.astype(int).tolist(), labels.tolist(), strict=True)}
    both = torch.cat([train.images, test.images]).flatten(1)
    sixteenths = (both.double() * 16 / 255).round().int()
    assert {tuple(row) for row in sixteenths.tolist()} == set(known)
    assert [known[tuple(row)] for row in sixteenths.tolist()] == torch.cat([train.target, test.target]).tolist()
    assert (int(both.max()), int(both.min())) == (255, 0)
    shares = test.target.bincount() / (train.target.bincount() + test.target.bincount())
    assert bool(((shares - 0.2).abs() < 0.003).all())
    assert (train.flip, train.padding) == (False, 1)


def test_stratified_split() -> None:
    target = torch.tensor([2] * 10 + [0] * 5 + [7])
    train, test = stratified_split(target, 0.2, 0)
    assert target[test].tolist() == [2, 2, 0]
    assert sorted(torch.cat([train, test]).tolist()) == list(range(16))
    assert len({tuple(stratified_split(target, 0.2, seed)[1].tolist()) for seed in range(20)}) > 10
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match=rf"test_share is {share}, must be in \(0, 1\)"):
            stratified_split(target, share, 0)


def test_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """$FASTKD_DATA names the folder, and root= another; without either it is in the cache."""
    image_files.idx_set(tmp_path / "here" / "mnist/raw")
    monkeypatch.setenv("FASTKD_DATA", str(tmp_path / "here"))
    assert len(data.load("MNIST")[0]) == 30
    with pytest.raises(FileNotFoundError, match="there"):
        data.load("mnist", tmp_path / "there")
    monkeypatch.delenv("FASTKD_DATA")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=str(tmp_path / ".cache/fastkd/data/mnist/raw")):
        data.load("mnist")


@pytest.mark.parametrize(
    ("name", "folders", "how"),
    [
        (
            "cifar10",
            ["cifar-10-batches-bin", "cifar-10-batches-py"],
            "torchvision.datasets.CIFAR10(root, download=True)",
        ),
        ("cifar100", ["cifar-100-binary", "cifar-100-python"], "torchvision.datasets.CIFAR100(root, download=True)"),
        ("mnist", ["mnist/raw", "MNIST/raw"], "torchvision.datasets.MNIST(root, download=True)"),
        ("fashion-mnist", ["fashion-mnist/raw", "FashionMNIST/raw"], "torchvision.datasets.FashionMNIST(root, "),
        ("kmnist", ["kmnist/raw", "KMNIST/raw"], "torchvision.datasets.KMNIST(root, download=True) brings it"),
        (
            "quickdraw",
            ["quickdraw"],
            "save the sketches as images.npy (uint8 [N, 28, 28]), labels.npy and names.txt there",
        ),
    ],
)
def test_missing_set(tmp_path: Path, name: str, folders: list[str], how: str) -> None:
    with pytest.raises(FileNotFoundError) as error:
        data.load(name, tmp_path)
    message = str(error.value)
    assert message.startswith("fastkd: ")
    assert ", ".join(str(tmp_path / folder) for folder in folders) in message
    assert how in message
    assert "FASTKD_DATA" in message


@pytest.mark.parametrize(
    ("name", "near"),
    [("cifar-10", "cifar10"), ("fashionmnist", "fashion-mnist"), ("digit", "digits"), ("CIFAR", "cifar10")],
)
def test_unknown_set(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=rf"fastkd: name '{name}' is unknown, did you mean .*{near}"):
        data.load(name)


def test_unknown_set_like_none() -> None:
    with pytest.raises(
        ValueError, match="must be one of cifar10, cifar100, mnist, fashion-mnist, kmnist, quickdraw, digits"
    ):
        data.load("xyzzy")


@pytest.mark.parametrize(
    ("write", "name", "file"),
    [
        (image_files.cifar10_binary, "cifar10", "data_batch_3.bin"),
        (image_files.cifar10_binary, "cifar10", "batches.meta.txt"),
        (image_files.cifar10_pickled, "cifar10", "test_batch"),
        (image_files.cifar100_pickled, "cifar100", "meta"),
    ],
)
def test_missing_file(tmp_path: Path, write: Callable[[Path], Path], name: str, file: str) -> None:
    path = write(tmp_path) / file
    path.unlink()
    with pytest.raises(
        FileNotFoundError, match=f"fastkd: {path} is not there, must be with the other files of its set"
    ):
        data.load(name, tmp_path)


def test_missing_idx_and_quickdraw_files(tmp_path: Path) -> None:
    image_files.idx_set(tmp_path / "mnist/raw")
    image_files.quickdraw(tmp_path)
    for name, path in (("mnist", "mnist/raw/t10k-labels-idx1-ubyte"), ("quickdraw", "quickdraw/labels.npy")):
        (tmp_path / path).unlink()
        with pytest.raises(FileNotFoundError, match=f"{path} is not there"):
            data.load(name, tmp_path)


def changed(path: Path, change: Callable[[bytes], bytes]) -> Path:
    path.write_bytes(change(path.read_bytes()))
    return path


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "data_batch_2.bin",
            lambda b: b[:-1],
            r"{} is broken: it has 30729 bytes, must have 3073 for each image \(1 of l",
        ),
        ("data_batch_2.bin", lambda b: b"", r"{} is broken: it has 0 bytes"),
        ("data_batch_2.bin", lambda b: b[:3073], r"{} has 1 images, must have as many as data_batch_1.bin, 10"),
        (
            "test_batch.bin",
            lambda b: b[: 2 * 3073] + b"\x0b" + b[2 * 3073 + 1 :],
            r"target\[2\] of {} is 11, must be in \[0, 10\)",
        ),
        ("batches.meta.txt", lambda b: b[:-7], r"{} has 9 names, must have 10"),
    ],
)
def test_broken_cifar_binary(tmp_path: Path, file: str, change: Callable[[bytes], bytes], message: str) -> None:
    path = changed(image_files.cifar10_binary(tmp_path) / file, change)
    with pytest.raises(ValueError, match="fastkd: " + message.format(path)):
        data.load("cifar10", tmp_path)


def test_broken_cifar100_binary(tmp_path: Path) -> None:
    path = changed(image_files.cifar100_binary(tmp_path) / "train.bin", lambda b: b[:-3])
    with pytest.raises(
        ValueError, match=rf"{path} is broken: it has 614797 bytes, must have 3074 .*\(2 of labels, 3072 "
    ):
        data.load("cifar100", tmp_path)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([1], "has list, must have a dict"),
        ({"labels": [0]}, r"has NoneType as 'data', must have an array of uint8 \[N, 3072\]"),
        ({"data": np.zeros((2, 5), np.uint8)}, r"has uint8 \(2, 5\) as 'data', must"),
        ({"data": np.zeros((2, 3072), np.float32)}, r"has float32 \(2, 3072\) as 'data', must"),
        ({"data": np.zeros((2, 3072), np.uint8)}, "has NoneType as 'labels', must have a list of 2 ints"),
        (
            {"data": np.zeros((2, 3072), np.uint8), "labels": [1]},
            "has a list of 1 as 'labels', must have a list of 2 ints",
        ),
        (
            {"data": np.zeros((2, 3072), np.uint8), "labels": [1, "x"]},
            "has a list of 2 as 'labels', must have a list of 2",
        ),
        (
            {"data": np.zeros((2, 3072), np.uint8), "labels": [1, -1]},
            r"target\[1\] of .*test_batch is -1, must be in \[0, 10",
        ),
    ],
)
def test_pickles_of_other_things(tmp_path: Path, batch: object, message: str) -> None:
    path = image_files.cifar10_pickled(tmp_path) / "test_batch"
    path.write_bytes(pickle.dumps(batch, protocol=4))
    with pytest.raises(ValueError, match=f"fastkd: .*{message}"):
        data.load("cifar10", tmp_path)


def test_pickled_names(tmp_path: Path) -> None:
    path = image_files.cifar10_pickled(tmp_path) / "batches.meta"
    path.write_bytes(pickle.dumps({"label_names": "cat"}))
    with pytest.raises(ValueError, match=f"{path} has str as 'label_names', must have a list"):
        data.load("cifar10", tmp_path)
    path.write_bytes(pickle.dumps({"label_names": ["cat"]}))
    with pytest.raises(ValueError, match=f"{path} has 1 names, must have 10"):
        data.load("cifar10", tmp_path)


class Runs:
    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_run_nothing(tmp_path: Path, protocol: int) -> None:
    path, proof = tmp_path / "data", tmp_path / "proof"
    harm = pickle.dumps({"data": Runs(os.mkdir, str(proof))}, protocol)
    path.write_bytes(harm)
    with pytest.raises(ValueError, match=rf"fastkd: {path} names (posix|nt)\.mkdir, which was not run: only arrays"):
        load_pickle(path)
    assert not proof.exists()
    pickle.loads(harm)
    assert proof.exists()  # so it would have run


@pytest.mark.parametrize("function", [eval, getattr, np.load, __import__])
def test_pickles_name_no_other_function(tmp_path: Path, function: Callable[..., object]) -> None:
    path = tmp_path / "data"
    path.write_bytes(pickle.dumps(Runs(function, "1")))
    with pytest.raises(ValueError, match="which was not run"):
        load_pickle(path)


@pytest.mark.parametrize("protocol", range(5))
def test_pickles_of_plain_values(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "data"
    value = {"a": [1, 2.5, None, True], "b": (b"\x00\xff", "text"), "c": np.arange(6).reshape(2, 3).T}
    value["d"] = np.array([1.5, -2], ">f4")
    path.write_bytes(pickle.dumps(value, protocol))
    loaded = load_pickle(path)
    for name in ("c", "d"):
        assert loaded[name].dtype == value[name].dtype
        assert np.array_equal(loaded.pop(name), value.pop(name))
    assert loaded == value


def test_broken_pickles(tmp_path: Path) -> None:
    """At every length but the whole one, and with any one byte changed: a value or a ValueError, nothing else."""
    path = tmp_path / "data"
    whole = image_files.python2_pickle({"labels": [1, 2], "data": np.zeros((2, 3), np.uint8)})
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"fastkd: {path} (is broken: no whole pickle \(|names )"):
            load_pickle(path)
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 0x41]) + whole[i + 1 :])
        with suppress(ValueError):
            load_pickle(path)
    path.write_bytes(pickle.dumps(np.array([[]], object), protocol=4))
    with pytest.raises(ValueError, match=r"is broken: no whole pickle \(an array of object"):
        load_pickle(path)
    path.write_bytes(pickle.dumps(Runs(__import__("_codecs").encode, "x", "rot13")))
    with pytest.raises(ValueError, match=r"is broken: no whole pickle \(bytes in rot13"):
        load_pickle(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "starts with nothing, must start with 000008 and the number of dimensions, as IDX files of bytes do"),
        (b"\x1f\x8b\x08\x00", "starts with 1f8b0800, must start with 000008"),
        (b"\0\0\x0d\x01" + bytes(8), "starts with 00000d01, must start with 000008"),  # floats
        (b"\0\0\x08\x03" + bytes(8), "is broken: its header has 12 bytes of 16"),
        (
            image_files.idx(np.zeros((2, 3)))[:-1],
            r"is broken: it has 17 bytes, must have 18 for the shape \(2, 3\) in its",
        ),
        (image_files.idx(np.zeros((2, 3))) + b"x", r"is broken: it has 19 bytes, must have 18 for the shape \(2, 3\)"),
        (
            b"\0\0\x08\x02" + struct.pack(">2I", 2**32 - 1, 2**32 - 1),
            "is broken: it has 12 bytes, must have 184467440",
        ),
    ],
)
def test_broken_idx(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=f"fastkd: {tmp_path / 'file'} {message}"):
        read_idx(tmp_path / "file")


@pytest.mark.parametrize("change", [lambda b: b[:-9], lambda b: b"x" + b[1:], lambda b: b[:20] + b"\xff" * 20 + b[40:]])
def test_broken_gzip(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    folder = tmp_path / "mnist/raw"
    image_files.idx_set(folder, packed=True)
    path = changed(folder / "train-images-idx3-ubyte.gz", change)
    with pytest.raises(ValueError, match=f"fastkd: {path} is broken: not whole gzip"):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("file", "array", "message"),
    [
        ("train-images-idx3-ubyte", np.zeros((30, 784)), r"{} has the shape \(30, 784\), must be \[N, H, W\]"),
        ("t10k-labels-idx1-ubyte", np.zeros(19), r"{} has the shape \(19,\), must be \(20,\), one label an image"),
        ("train-labels-idx1-ubyte", np.arange(30), r"target\[10\] of {} is 10, must be in \[0, 10\)"),
    ],
)
def test_idx_files_that_do_not_fit(tmp_path: Path, file: str, array: np.ndarray, message: str) -> None:
    folder = tmp_path / "mnist/raw"
    image_files.idx_set(folder)
    (folder / file).write_bytes(image_files.idx(array))
    with pytest.raises(ValueError, match="fastkd: " + message.format(folder / file)):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("file", "array", "message"),
    [
        ("images.npy", np.zeros((30, 28, 28)), r"{} has float64 \(30, 28, 28\), must have uint8 \[N, H, W\]"),
        ("images.npy", np.zeros((30, 784), np.uint8), r"{} has uint8 \(30, 784\), must have uint8 \[N, H, W\]"),
        ("labels.npy", np.zeros(30), r"{} has float64 \(30,\), must have integers \(30,\)"),
        ("labels.npy", np.zeros(29, int), r"{} has int64 \(29,\), must have integers \(30,\)"),
        ("labels.npy", np.arange(30) // 9, r"target\[27\] of {} is 3, must be in \[0, 3\): there are 3 classes"),
        ("labels.npy", np.array([None] * 30), r"{} is broken: no whole .npy file \(Object arrays"),
    ],
)
def test_quickdraw_files_that_do_not_fit(tmp_path: Path, file: str, array: np.ndarray, message: str) -> None:
    image_files.quickdraw(tmp_path)
    path = tmp_path / "quickdraw" / file
    np.save(path, array)
    with pytest.raises(ValueError, match="fastkd: " + message.format(path)):
        data.load("quickdraw", tmp_path)


@pytest.mark.parametrize("change", [lambda b: b[:-5], lambda b: b[:50], lambda b: b"", lambda b: b"x" + b[1:]])
def test_broken_quickdraw(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    image_files.quickdraw(tmp_path)
    path = changed(tmp_path / "quickdraw/images.npy", change)
    with pytest.raises(ValueError, match=f"fastkd: {path} is broken: no whole .npy file"):
        data.load("quickdraw", tmp_path)
