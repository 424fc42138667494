"""Distillation of dense networks, from scenes to mean IoU: methods with labels, without, without data; and what cannot be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refusals import refuses
from torch import nn

from fastkd.data import load
from fastkd.methods import Objective, Procedure, registry
from fastkd.methods.registry import Given
from fastkd.models import create
from fastkd.studies import distillation
from fastkd.studies.collected import CollectionSettings
from fastkd.studies.data import DataSettings, check, prepare, rest
from fastkd.studies.result import Result
from fastkd.studies.settings import Distillation
from fastkd.training import Process, Trainer, TrainingSettings, evaluate

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread", "no_figures")]

HERE = Process(0, 1, torch.device("cpu"))
TINY = Distillation(
    teacher="segmenter-6-8-8",
    student="segmenter-4-6",
    batch_size=6,
    data=DataSettings(data="scenes", train_size=24, test_size=8),
    training=TrainingSettings(epochs=2, learning_rate=0.02),
)
QUICK = {"latent": 6, "width": 4}
MOSAIC = {**QUICK, "patch_size": 6, "patches_per_image": 4, "discriminator_width": 4, "student_steps": 2}
OF_THE_LABELS: dict[str, dict[str, Any]] = {"hinton": {}, "at": {}, "one": {"branch_at": "layer2"}}
OPTIONS: dict[str, dict[str, Any]] = {
    **OF_THE_LABELS,
    "mosaic": MOSAIC,
    "ood-kd": {},
    "ood-crd": {"negatives": 4},
    "dafl": {**QUICK, "activation": 0.0},
    "ta-dfkd": {**QUICK, "student_steps": 2},
    "nayer": {**QUICK, "ask_classes": False, "generator_steps": 2, "student_steps": 2, "capacity": 24},
}
COLLECTED = [name for name in OPTIONS if "out-of-domain images" in registry.find(name).needs]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the teacher is trained into once."""
    return tmp_path_factory.mktemp("teachers")


@pytest.fixture
def collection(tmp_path: Path) -> CollectionSettings:
    """Images of another size and other channels."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 3, 16, 16), dtype=np.uint8)
    np.save(tmp_path / "other.npy", pixels)
    return CollectionSettings(collection=str(tmp_path / "other.npy"), draws=24)


def of(method: str, **changes: Any) -> Distillation:
    return replace(TINY, **{"method": method, "options": OPTIONS.get(method, {}), **changes})


def run(settings: Distillation, folder: Path, teachers: Path, **options: Any) -> Result:
    return distillation.run(settings, folder, HERE, teachers=teachers, show="off", **options)


@pytest.mark.parametrize("method", OPTIONS)
def test_from_scenes_to_mean_iou(method: str, tmp_path: Path, teachers: Path, collection: CollectionSettings) -> None:
    settings = of(method, iterations=0 if registry.find(method).needs_images else 2)
    if method in COLLECTED:
        settings = replace(settings, collection=collection)
    result = run(settings, tmp_path, teachers)
    network = create("segmenter-4-6", in_channels=1, num_classes=11)
    network.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    _, test = prepare(settings.data, 0)
    found = evaluate(network, test.normalised(), test.target, class_dim=1)
    assert result.accuracy == result.figures["test_accuracy"] == pytest.approx(found["test_accuracy"])
    assert result.figures["test_mean_iou"] == pytest.approx(found["test_mean_iou"])
    assert "frechet_distance" not in result.figures  # a teacher without a linear layer has no latents
    assert (result.teacher_accuracy is None) == (method == "one")
    if result.teacher_accuracy is not None:
        assert 0.0 < result.figures["teacher_mean_iou"] < result.teacher_accuracy
    document = json.loads((tmp_path / "result.json").read_text())
    assert document["figures"] == result.figures
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [0.0 <= line["test_mean_iou"] <= 1.0 for line in lines] == [True, True]
    assert all("accuracy" in line for line in lines) == (method in OF_THE_LABELS)


def test_a_teacher_of_a_file(tmp_path: Path, teachers: Path) -> None:
    settings = of("hinton")
    trained = run(settings, tmp_path / "trained", teachers)
    weights = teachers / f"teacher-segmenter-6-8-8-{settings.of_teacher().digest()}" / "model.pt"
    assert run(replace(settings, teacher_weights=weights), tmp_path / "given", tmp_path) == trained
    assert list(tmp_path.glob("teacher-*")) == []


class KilledError(Exception):
    """What befalls a training."""


def test_one_that_is_killed_goes_on(
    tmp_path: Path, teachers: Path, collection: CollectionSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, with generator and discriminator."""
    settings = of("mosaic", collection=collection, training=replace(TINY.training, epochs=3, checkpoint_every=1))
    expected = run(settings, tmp_path / "whole", teachers)

    def die(step: int) -> None:
        if step == 4:
            raise KilledError

    class Killed(Trainer):
        def __init__(self, *given: Any, **options: Any) -> None:
            super().__init__(*given, **options, on_step=die)

    with monkeypatch.context() as patch:
        patch.setattr(distillation, "Trainer", Killed)
        with pytest.raises(KilledError):
            run(settings, tmp_path / "killed", teachers)
    assert (tmp_path / "killed" / "checkpoint.pt").exists()
    assert not (tmp_path / "killed" / "result.json").exists()
    assert run(settings, tmp_path / "killed", teachers) == expected
    states = [torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("whole", "killed")]
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["mosaic", "ta-dfkd"])
def test_pictures(method: str, tmp_path: Path, teachers: Path, collection: CollectionSettings) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    settings = of(method, iterations=2 * (method == "ta-dfkd"), training=replace(TINY.training, epochs=1))
    if method == "mosaic":
        settings = replace(settings, collection=collection)
    run(settings, tmp_path, teachers, pictures_every=1)
    drawn = {path.name.rpartition("-")[0] for path in (tmp_path / "pictures").iterdir()}
    assert drawn == {"images", "losses", *(("out-of-domain", "classes") if method == "mosaic" else ())}


# ---- the images -------------------------------------------------------------------------------------


def test_any_number_of_scenes_by_the_seed() -> None:
    settings = DataSettings(data="scenes", train_size=37, test_size=11)
    whole, whole_test = load("scenes")
    (train, test), (same, _), (other, same_test) = (prepare(settings, seed) for seed in (3, 3, 4))
    assert (train.images.shape, train.target.shape) == ((37, 1, 32, 32), (37, 32, 32))
    assert torch.equal(train.target, same.target)
    assert not torch.equal(train.images, other.images)
    assert torch.equal(test.images, same_test.images)
    assert len(test) == 11
    left = rest(settings, 3)
    assert len(left) == len(whole) - 37
    every = torch.cat([train.images, left]).flatten(1).long()
    places = torch.arange(1, 1 + every.shape[1])  # sums with which no two scenes agree by chance
    assert torch.equal((every * places).sum(1).sort().values, (whole.images.flatten(1) * places).sum(1).sort().values)
    assert torch.equal(prepare(DataSettings(data="scenes"), 0)[1].images, whole_test.images)


def test_their_outline() -> None:
    assert check(DataSettings(data="scenes", train_size=37)) == ((1, 32, 32), 11, 37, None, 1000, True)
    assert check(DataSettings(data="digits")).dense is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_size": 4001}, "train_size is 4001, must be at most the 4000 training images"),
        ({"test_size": 1001}, "test_size is 1001, must be at most the 1000 test images"),
        ({"shrink": 2}, "shrink is 2, must be 1 for scenes, where each pixel has a class"),
        ({"label_noise": 0.2}, "label_noise is 0.2, must be 0.0 for scenes, where"),
        ({"imbalance": 1.0}, "imbalance is 1.0, must be 0.0 for scenes, where"),
        ({"classes": (0, 1)}, r"classes is \(0, 1\), must be \(\) for scenes, where"),
    ],
)
def test_images_that_cannot_be(change: dict[str, Any], message: str) -> None:
    settings = DataSettings(data="scenes", **change)
    refuses(message, lambda: check(settings))
    refuses(message, lambda: prepare(settings, 0))


# ---- what does not go together ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"padding": 2},
            "padding is 2, must be 0 for scenes, where each pixel has a class: crops would move the images",
        ),
        (
            {"student": "resnet8"},
            "student 'resnet8' is a classifier, must be a dense network, as segmenter-8-16-16, where",
        ),
        ({"teacher": "resnet8"}, "teacher 'resnet8' is a classifier, must be a dense network"),
        ({"student": "segmenter-8"}, "student 'segmenter-8' is unknown, did you mean segmenter-8-16-16"),
        (
            {"data": DataSettings(data="digits")},
            "student 'segmenter-4-6' is a dense network, must be a classifier where each image has a class",
        ),
        ({"data": replace(TINY.data, shrink=2)}, "shrink is 2, must be 1 for scenes"),
        ({"method": "bss"}, r"must be \[B, K\] for BSS, which moves whole images"),
        ({"method": "fsp"}, "FSP needs equal numbers of channels"),
        ({"method": "fixed-linear"}, "the logits of Segmenter come out of none of its linear layers"),
        (
            {"method": "dafl", "options": QUICK},
            "activation is asked of a Segmenter whose logits come out of no linear layer, must be 0 for it",
        ),
        ({"method": "cmi", "options": QUICK}, "ask_classes is True, must be False for dense networks"),
    ],
)
def test_what_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    settings = replace(of("hinton"), **change)
    refuses(message, lambda: distillation.run(settings, tmp_path, HERE, show="off"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"iqpr": 5.0},
            "iqpr is 5.0, must be 1.0 for scenes: its teacher has a class for each pixel, and images are scored",
        ),
        ({"lowest_share": 0.5, "score": "entropy"}, "lowest_share is 0.5, must be 1.0 for scenes"),
        ({"balanced": True}, "balanced is True, must be False for scenes"),
        ({"scores": Path("scores.npy")}, "scores is scores.npy, must be None for scenes"),
    ],
)
def test_no_scores_of_a_dense_teacher(
    change: dict[str, Any], message: str, tmp_path: Path, collection: CollectionSettings
) -> None:
    settings = of("ood-kd", collection=replace(collection, **change))
    refuses(message, lambda: distillation.run(settings, tmp_path / "out", HERE, show="off"))
    assert not (tmp_path / "out").exists()  # before the teacher is trained


# ---- what is given to a method ------------------------------------------------------------------------


def networks() -> tuple[nn.Module, nn.Module]:
    student, teacher = (
        create(f"segmenter-{width}-{width}", in_channels=1, num_classes=5, seed=width) for width in (4, 6)
    )
    return student, teacher


def test_an_objective_of_maps() -> None:
    """Each pixel counts the same, whatever makes the objective."""
    student, teacher = networks()
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    target = torch.arange(3 * 64).view(3, 8, 8) % 5
    made = registry.create_procedure("hinton", Given(student, teacher, images, class_dim=1), temperature=1.0)
    assert isinstance(made, Objective)
    loss, logits = made(images, target)
    rows = [network(images).movedim(1, -1).reshape(-1, 5) for network in (student, teacher)]
    torch.testing.assert_close(logits.reshape(-1, 5), rows[0])
    task = nn.functional.cross_entropy(rows[0], target.flatten())
    kl = (rows[1].softmax(1) * (rows[1].log_softmax(1) - rows[0].log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(loss.total, 0.1 * task + 0.9 * kl)


def test_a_procedure_is_told_where_the_classes_are() -> None:
    class Told(Procedure):
        def __init__(self, student: nn.Module, class_dim: int) -> None:
            super().__init__()
            self.student, self.class_dim = student, class_dim

    student, _ = networks()
    assert Told.build(Given(student, class_dim=1)).class_dim == 1
    assert Told.build(Given(student)).class_dim == -1
