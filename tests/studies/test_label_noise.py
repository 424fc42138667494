"""Experiments on wrong labels: those of a weak classifier, and those of a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import several_sets
from torch import Tensor

from fastkd.data import load
from fastkd.data.labels import instance_noise
from fastkd.data.weak_classifier import weak_classifier
from fastkd.studies import data as studies_data
from fastkd.studies import distillation
from fastkd.studies.data import DataSettings, check, check_label_file, prepare, wrong_labels
from fastkd.studies.settings import Distillation
from fastkd.studies.zoo import Zoo
from fastkd.training import Process, TrainingSettings

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread", "no_figures")]

HERE = Process(0, 1, torch.device("cpu"))
DIGITS = DataSettings(data="digits", train_size=100, test_size=40)
INSTANCE = replace(DIGITS, noise="instance", label_noise=0.4)
RUN = Distillation(
    teacher="resnet8",
    student="resnet8",
    batch_size=50,
    data=DIGITS,
    training=TrainingSettings(epochs=1, learning_rate=0.02),
)


@pytest.fixture(autouse=True)
def classified(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images the weak classifier was asked for, each time that it was."""
    asked: list[int] = []

    def counted(images: Tensor, *arguments: Any) -> Tensor:
        asked.append(len(images))
        return weak_classifier(images, *arguments)

    monkeypatch.setattr(studies_data, "weak_classifier", counted)
    studies_data._weak.clear()
    return asked


@pytest.fixture
def label_file(tmp_path: Path) -> Path:
    """Of the digits, in their order: every third label is wrong."""
    truth = load("digits")[0].target.numpy()
    wrong = (truth + (np.arange(len(truth)) % 3 == 0)) % 10
    torch.save({"clean_label": truth, "worse_label": wrong, "aggre_label": truth}, tmp_path / "labels.pt")
    return tmp_path / "labels.pt"


def of_file(path: Path, **changes: Any) -> DataSettings:
    return replace(DIGITS, noise="file", label_file=path, label_key="worst", **changes)


# ---- of a weak classifier ------------------------------------------------------------------------------


def test_noise_of_a_weak_classifier(classified: list[int]) -> None:
    """On the images as the task has them: a part, and smaller."""
    settings = replace(INSTANCE, shrink=2)
    clean, _ = prepare(replace(settings, noise="symmetric", label_noise=0.0), 3)
    noisy, _ = prepare(settings, 3)
    probabilities = weak_classifier(clean.images, clean.target, 10, 3)
    assert torch.equal(noisy.target, instance_noise(clean.target, probabilities, 0.4, 3)[0])
    assert torch.equal(noisy.images, clean.images)
    assert int((noisy.target != clean.target).sum()) == 40
    assert torch.equal(wrong_labels(settings, 3), noisy.target != clean.target)
    other, _ = prepare(settings, 4)
    assert not torch.equal(other.target, noisy.target)
    assert classified == [100, 100]


def test_it_runs_once_for_each_seed(tmp_path: Path, classified: list[int]) -> None:
    settings = replace(RUN, data=INSTANCE, teacher_seed=5)
    distillation.run(settings, tmp_path, HERE, show="off")
    for rate in (0.2, 0.4):
        wrong_labels(replace(INSTANCE, label_noise=rate), 0)
    assert classified == [100, 100]  # of the student's images and of the teacher's
    for seed in range(10):
        prepare(INSTANCE, seed)
    assert len(studies_data._weak) == 4


def test_noise_of_unequal_classes() -> None:
    settings = replace(INSTANCE, imbalance=1.0, imbalance_ratio=5.0)
    clean, _ = prepare(replace(settings, label_noise=0.2, noise="symmetric"), 0)
    assert int(wrong_labels(settings, 0).sum()) == round(0.4 * len(clean))


@pytest.mark.parametrize("noise", ["symmetric", "asymmetric"])
def test_which_labels_are_wrong(noise: Any) -> None:
    wrong = wrong_labels(replace(INSTANCE, noise=noise), 1)
    assert (wrong.dtype, wrong.shape, int(wrong.sum())) == (torch.bool, (100,), 40)
    assert not bool(wrong_labels(DIGITS, 1).any())
    assert not bool(wrong_labels(DataSettings(data="scenes", train_size=20), 1).any())
    assert wrong_labels(DataSettings(data="scenes", train_size=20), 1).shape == (20,)


def test_the_zoo_by_such_noise() -> None:
    """Its columns without noise have none of any kind."""
    study = Zoo(data=replace(DIGITS, noise="instance"))
    assert study.measure.student == "test_accuracy"
    kinds = {run.column: run.distillation.data.noise for run in study.grid(["baseline"], ["clean", "noise-0.4"], 1)}
    assert kinds == {"clean": "symmetric", "noise-0.4": "instance"}
    study = Zoo(data=replace(DIGITS, noise="asymmetric"))  # as their digests were
    assert {run.distillation.data.noise for run in study.grid(["baseline"], ["clean"], 1)} == {"asymmetric"}


# ---- of a file -----------------------------------------------------------------------------------------


def test_labels_of_a_file(label_file: Path) -> None:
    clean, _ = prepare(replace(DIGITS, train_size=0), 0)
    settings = of_file(label_file, train_size=0)
    given, test = prepare(settings, 0)
    wrong = torch.arange(len(clean)) % 3 == 0
    assert torch.equal(given.target, (clean.target + wrong) % 10)
    assert torch.equal(given.images, clean.images)
    assert torch.equal(wrong_labels(settings, 0), wrong)
    assert torch.equal(test.target, prepare(DIGITS, 0)[1].target)
    assert not bool(wrong_labels(replace(settings, label_key="aggre"), 0).any())


@pytest.mark.parametrize("changes", [{}, {"imbalance": 1.0, "imbalance_ratio": 5.0}, {"shrink": 2}])
def test_images_are_chosen_by_their_true_labels(label_file: Path, changes: dict[str, Any]) -> None:
    """As many of each class, and the labels of the file are those of the images that were chosen."""
    clean, _ = prepare(replace(DIGITS, **changes), 7)
    given, _ = prepare(of_file(label_file, **changes), 7)
    assert torch.equal(given.images, clean.images)
    whole, _ = prepare(replace(DIGITS, train_size=0, shrink=changes.get("shrink", 1)), 0)
    wrong = wrong_labels(of_file(label_file, **changes), 7)
    for image, true, label, differs in zip(given.images, clean.target, given.target, wrong, strict=True):
        places = (whole.images == image).flatten(1).all(1) & (whole.target == true)
        numbers = places.nonzero().flatten()
        assert any(int((true + (number % 3 == 0)) % 10) == int(label) for number in numbers)
        assert bool(differs) == (int(true) != int(label))


def test_classes_of_a_task_and_a_file(tmp_path: Path) -> None:
    root = several_sets(tmp_path / "data")
    whole, _ = load("cifar10", root)
    confused = whole.target.clone()
    pair = {3: 5, 5: 3, 0: 9}
    for i in range(0, len(confused), 2):
        confused[i] = pair.get(int(confused[i]), int(confused[i]))
    np.save(tmp_path / "a.npy", confused.numpy())
    settings = DataSettings(data_root=root, noise="file", label_file=tmp_path / "a.npy", classes=(5, 3))
    given, _ = prepare(settings, 0)
    mine = (whole.target == 5) | (whole.target == 3)
    expected = torch.where(confused[mine] == 5, 0, 1)
    assert torch.equal(given.target, expected)
    assert torch.equal(wrong_labels(settings, 0), (whole.target != confused)[mine])
    count = int((whole.target == 0).sum() + (whole.target == 1).sum())
    with pytest.raises(
        ValueError, match=rf"gives \d+ of the {count} training images a class that is not in classes, \(0, 1\)"
    ):
        prepare(replace(settings, classes=(0, 1)), 0)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path, truth: np.save(path, truth[:50]), r"\.npy has 50 labels, must have 1438, one a training image"),
        (lambda path, truth: np.save(path, truth + 1), r"target\[\d+\] of .*\.npy is 10, must be in \[0, 10\)"),
        (lambda path, truth: path.write_bytes(b"nothing"), r"\.npy is broken: no whole \.npy file"),
        (lambda path, truth: None, r"there is no label file .*\.npy"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, write: Callable[[Path, np.ndarray], None], message: str) -> None:
    path = tmp_path / "labels.npy"
    write(path, load("digits")[0].target.numpy())
    settings = replace(DIGITS, noise="file", label_file=path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        distillation.run(replace(RUN, data=settings), tmp_path / "run", HERE, show="off")
    assert not (tmp_path / "run").exists()


def test_files_are_looked_at_before_the_images(tmp_path: Path) -> None:
    """Which are not there."""
    np.save(tmp_path / "a.npy", np.zeros(7, np.int64))
    settings = DataSettings(data="cifar10", noise="file", label_file=tmp_path / "a.npy")
    with pytest.raises(ValueError, match="has 7 labels, must have 50000"):
        check_label_file(settings)
    with pytest.raises(ValueError, match="has 7 labels, must have 50000"):
        distillation.run(replace(RUN, data=settings), tmp_path / "run", HERE, show="off")


def test_another_order(label_file: Path) -> None:
    found = torch.load(label_file, weights_only=False)
    torch.save({name: value[::-1].copy() for name, value in found.items()}, label_file)
    with pytest.raises(ValueError, match=r"clean_label of .* differs from the true labels at .* in another order"):
        prepare(of_file(label_file), 0)


# ---- settings, and what a result depends on ------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise": "file"}, "label_file is None, must be given with the noise 'file'"),
        ({"label_file": Path("a.npy")}, "noise is 'symmetric', must be 'file' with a label_file"),
        ({"label_file": Path("a.npy"), "noise": "instance"}, "noise is 'instance', must be 'file' with a label_file"),
        ({"label_key": "worst"}, "noise is 'symmetric', must be 'file' with a label_key"),
        (
            {"noise": "file", "label_file": Path("a.npy"), "label_noise": 0.2},
            "label_noise is 0.2, must be 0 with the noise 'file'",
        ),
    ],
)
def test_what_does_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^fastkd: " + message):
        DataSettings(**changes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            DataSettings(data="digits", noise="instance"),
            "label_noise is 0.0, must be above 0 with the noise 'instance'",
        ),
        (DataSettings(data="scenes", noise="instance"), "noise is instance, must be symmetric for scenes, where each"),
        (DataSettings(data="scenes", noise="instance", label_noise=0.1), "label_noise is 0.1, must be 0.0 for scenes"),
        (
            DataSettings(data="scenes", noise="file", label_file=Path("a.npy")),
            "label_file is a.npy, must be None for scen",
        ),
    ],
)
def test_noise_that_cannot_be(settings: DataSettings, message: str) -> None:
    for call in (check, lambda one: prepare(one, 0), lambda one: wrong_labels(one, 0)):
        with pytest.raises(ValueError, match="^fastkd: " + message):
            call(settings)


def test_a_file_counts_by_what_is_in_it(label_file: Path) -> None:
    one = replace(RUN, data=of_file(label_file))
    copied = label_file.with_name("copy.pt")
    copied.write_bytes(label_file.read_bytes())
    assert replace(RUN, data=of_file(copied)).digest() == one.digest()
    assert replace(RUN, data=replace(one.data, label_key="aggre")).digest() != one.digest()
    torch.save({"worse_label": load("digits")[0].target.numpy()}, copied)
    assert replace(RUN, data=of_file(copied)).digest() != one.digest()
    assert one.digest() != RUN.digest() != replace(RUN, data=INSTANCE).digest()
    assert set(RUN.description()["data"]) & {"label_file", "label_key"} == set()
    assert one.of_teacher().description()["data"] == one.description()["data"]
