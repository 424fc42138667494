"""Label files: each kind, what is chosen of them, what is said of others; nothing of a pickle is run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastkd.data.label_files import read_labels

pytestmark = [pytest.mark.no_kernels, pytest.mark.filterwarnings("error")]

CLEAN = np.arange(50) % 10
WORSE, RANDOM = (CLEAN * 3) % 10, (CLEAN + 1) % 10
CIFAR10N = {
    "clean_label": CLEAN,
    "aggre_label": (CLEAN + 2) % 10,
    "worse_label": WORSE,
    "random_label1": RANDOM,
    "random_label2": (CLEAN + 4) % 10,
    "random_label3": (CLEAN + 5) % 10,
}
CIFAR100N = {
    "clean_label": CLEAN,
    "noisy_label": WORSE,
    "noisy_coarse_label": CLEAN // 5,
    "clean_coarse_label": CLEAN // 5,
}


def legacy(value: object, path: Path) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


def pickled(value: Any, path: Path) -> None:
    np.save(path, value, allow_pickle=True)


WRITERS: dict[str, tuple[str, Callable[[Any, Path], None]]] = {
    "pt": ("labels.pt", torch.save),
    "legacy pt": ("labels.pt", legacy),
    "npy": ("labels.npy", pickled),
}


@pytest.fixture(params=WRITERS.values(), ids=WRITERS)
def write(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Any], Path]:
    name, save = request.param

    def written(value: Any) -> Path:
        save(value, tmp_path / name)
        return tmp_path / name

    return written


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("worse_label", WORSE),
        ("worst", WORSE),
        ("worse", WORSE),
        ("Worst", WORSE),
        ("random1", RANDOM),
        ("rand1", RANDOM),
        ("clean", CLEAN),
        ("aggre", CIFAR10N["aggre_label"]),
        ("random3", CIFAR10N["random_label3"]),
    ],
)
def test_cifar10n(write: Callable[[Any], Path], key: str, expected: np.ndarray) -> None:
    labels = read_labels(write(CIFAR10N), key, num_classes=10, count=50, truth=torch.from_numpy(CLEAN))
    assert labels.dtype == torch.int64
    assert labels.tolist() == expected.tolist()


def test_cifar100n(write: Callable[[Any], Path]) -> None:
    path = write(CIFAR100N)
    assert read_labels(str(path), "noisy", truth=torch.from_numpy(CLEAN)).tolist() == WORSE.tolist()
    with pytest.raises(
        ValueError, match="key is None, must be one of clean_label, noisy_label, noisy_coarse_label, clean_"
    ):
        read_labels(path)


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.int16, ">i4"])
def test_the_only_labels_need_no_key(write: Callable[[Any], Path], kind: Any) -> None:
    assert read_labels(write({"clean_label": CLEAN, "mine": WORSE.astype(kind)})).tolist() == WORSE.tolist()
    assert read_labels(write(WORSE.astype(kind))).tolist() == WORSE.tolist()


@pytest.mark.parametrize("save", [torch.save, legacy])
def test_tensors(tmp_path: Path, save: Callable[[Any, Path], None]) -> None:
    save({"clean_label": CLEAN, "noisy_label": torch.from_numpy(WORSE).int()}, tmp_path / "a.pt")
    assert read_labels(tmp_path / "a.pt", truth=torch.from_numpy(CLEAN)).tolist() == WORSE.tolist()
    save(WORSE.tolist(), tmp_path / "b.PT")
    assert read_labels(tmp_path / "b.PT").tolist() == WORSE.tolist()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", json.dumps(WORSE.tolist())),
        ("a.json", json.dumps({"noise": WORSE.tolist()})),
        ("a.csv", "label\n" + "\n".join(map(str, WORSE))),
        ("a.txt", "\r\n".join(map(str, WORSE)) + "\r\n\r\n"),
        ("a.txt", "\ufeff" + "\n".join(map(str, WORSE)) + "\n"),
    ],
    ids=["json", "json by name", "csv with a heading", "Windows", "byte order mark"],
)
def test_text(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert read_labels(tmp_path / name, num_classes=10, count=50).tolist() == WORSE.tolist()


@pytest.mark.parametrize(
    ("key", "options", "message"),
    [
        (
            "wrost",
            {},
            r"key 'wrost' is unknown, did you mean worst.*must be one of clean_label, aggre_label, .*labels\.",
        ),
        ("noisy", {}, "key 'noisy' is unknown, .*must be one of clean_label, aggre_label, worse_label"),
        (None, {}, "key is None, must be one of clean_label, aggre_label, worse_label, random_label1, random"),
        ("worst", {"count": 49}, r"worse_label of .*labels.\w+ has 50 labels, must have 49, one a training image"),
        ("worst", {"num_classes": 9}, r"target\[3\] of worse_label of .*labels.\w+ is 9, must be in \[0, 9\)"),
        (
            "worst",
            {"truth": torch.from_numpy(WORSE)},
            "clean_label of .* differs from the true labels at 40 of 50 images, mu",
        ),
        (
            "clean",
            {"truth": torch.from_numpy(WORSE)},
            "clean_label of .* differs from the true labels at 40 of 50 images",
        ),
        (
            "worst",
            {"truth": torch.arange(3)},
            "clean_label of .* has 50 labels, and there are 3 images, must be the same",
        ),
    ],
)
def test_what_does_not_fit(
    write: Callable[[Any], Path], key: str | None, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match="^fastkd: " + message):
        read_labels(write(CIFAR10N), key, **options)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (WORSE.astype(float), r"has float64 \(50,\), must have integers \[N\]"),
        (WORSE.reshape(5, 10), r"has int64 \(5, 10\), must have integers \[N\]"),
        (WORSE > 3, r"has bool \(50,\), must have integers \[N\]"),
        (WORSE - 1, "has -1 as its least, must have labels of 0 or more"),
        ({"mine": 3}, "mine of .* has int, must have integers"),
    ],
)
def test_other_values(write: Callable[[Any], Path], value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r"^fastkd: .*labels\.\w+ " + message.removeprefix("mine of .* ")):
        read_labels(write(value))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[1, 2", "is broken: no JSON"),
        ("a.json", "[" * 100_000, "is broken: no JSON"),
        ("a.json", "[1, 2.0]", "has 2.0 of float, must have integers"),
        ("a.json", "[1, true]", "has True of bool, must have integers"),
        ("a.json", '["1"]', "has 1 of str, must have integers"),
        ("a.json", f"[1, {10**30}]", "must have integers of 64 bits"),
        ("a.json", "7", r"has int, must have integers \[N\]"),
        ("a.csv", "label\n1\n2.5\n", "has '2.5' as its label 2, must have one integer a line"),
        ("a.csv", "1.5\n2\n", "has '1.5' as its label 1, must have one integer a line"),
        ("a.csv", "index,label\n0,3\n", "has '0,3' as its label 1, must have one integer a line"),
        ("a.txt", "1\n-2\n", "has -2 as its least, must have labels of 0 or more"),
        ("a.pt", "junk", "is broken: torch.load cannot read it"),
        ("a.pt", "", "is broken: torch.load cannot read it"),
        ("a.npy", "junk", "is broken: no whole .npy file"),
        ("a.bin", "1", "must be a name that ends in .npy, .pt, .json, .csv, .txt"),
    ],
)
def test_other_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"^fastkd: .*{message}") as raised:
        read_labels(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^fastkd: there is no label file .*nowhere\.pt"):
        read_labels(tmp_path / "nowhere.pt")
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(ValueError, match=r"label file .*folder\.npy cannot be read: Is a directory"):
        read_labels(tmp_path / "folder.npy")
    np.save(tmp_path / "plain.npy", WORSE)
    with pytest.raises(
        ValueError, match=r"key is 'worst', must be None for .*plain\.npy, which has one list of labels"
    ):
        read_labels(tmp_path / "plain.npy", "worst")


def test_damaged_files(write: Callable[[Any], Path]) -> None:
    """Cut, or with a byte changed: labels or a ValueError of one line, nothing else."""
    path = write({"clean_label": CLEAN[:10], "mine": WORSE[:10]})
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 13):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"^fastkd: [^\n]*$"):
            read_labels(path)
    for i in range(0, len(whole), 7):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 0x41]) + whole[i + 1 :])
        with suppress(ValueError):
            read_labels(path, num_classes=10)


class Runs:
    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __reduce__(self) -> tuple[Any, tuple[object, ...]]:
        return os.mkdir, self.arguments


def test_nothing_is_run(write: Callable[[Any], Path], tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    path = write({"mine": Runs(str(proof))})
    with pytest.raises(ValueError, match=r"names (posix|nt)\.mkdir, which was not run: only arrays"):
        read_labels(path)
    assert not proof.exists()
    torch.load(path, weights_only=False) if path.suffix == ".pt" else np.load(path, allow_pickle=True)
    assert proof.exists()  # so it would have run
