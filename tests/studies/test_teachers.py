"""Teachers with a seed, learning rate and batch size of their own, and what a course of accuracies comes to."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastkd.__main__ import main
from fastkd.methods import registry
from fastkd.studies import distillation
from fastkd.studies.collected import CollectionSettings
from fastkd.studies.data import DataSettings
from fastkd.studies.distillation import Experiment
from fastkd.studies.result import Result
from fastkd.studies.settings import Distillation
from fastkd.studies.study import Run, run_all
from fastkd.training import Process, TrainingSettings

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread", "no_figures")]

PLUGIN = Path(__file__).parents[2] / "examples" / "adversarial.py"
HERE = Process(0, 1, torch.device("cpu"))
TINY = Distillation(
    teacher="resnet8",
    student="resnet8",
    batch_size=50,
    data=DataSettings(data="digits", train_size=100, test_size=40, shrink=2),
    training=TrainingSettings(epochs=1, learning_rate=0.02),
)


@pytest.fixture
def adversarial() -> Iterator[Distillation]:
    """A method without images."""
    registry.load_plugin(PLUGIN)
    yield replace(TINY, plugin=PLUGIN, method="adversarial", batch_size=8, teacher_batch_size=50, iterations=1)
    registry._entries.pop("adversarial")
    sys.modules.pop(f"fastkd_plugin_{PLUGIN.stem}")


def seeded(settings: Distillation, seed: int, teacher_seed: int = -1) -> Distillation:
    return replace(settings, teacher_seed=teacher_seed, training=replace(settings.training, seed=seed))


def test_digests_are_those_of_before() -> None:
    """Of trainings that say nothing new of their teacher: computed before anything could be said."""
    whole = replace(TINY, data=replace(TINY.data, shrink=1), training=replace(TINY.training, epochs=2))
    plateau = replace(whole, training=TrainingSettings(epochs=2, schedule="plateau"))
    rest = replace(whole, method="fixed-linear", collection=CollectionSettings(collection="rest"))
    for settings, digest in (
        (Distillation(), "e501680c0d"),
        (Distillation(method="baseline"), "4ac7e516a4"),
        (whole, "5fe6b1def2"),
        (whole.of_teacher(), "3cb75ecba7"),
        (replace(whole, teacher_epochs=7), "6a8959d54f"),
        (replace(whole, teacher_epochs=7).of_teacher(), "788f9d1b7e"),
        (seeded(whole, 3), "a644612b6b"),
        (rest, "f9f29f3b79"),
        (plateau.of_teacher(), "f17dee0fb1"),
    ):
        assert settings.digest() == digest


@pytest.mark.parametrize(
    "said",
    [{"teacher_seed": 0}, {"teacher_learning_rate": 0.5}, {"teacher_batch_size": 25}],
    ids=lambda said: next(iter(said)),
)
def test_what_is_said_of_the_teacher_is_in_the_digest(said: dict[str, Any]) -> None:
    assert replace(TINY, **said).digest() != TINY.digest()
    baseline = replace(TINY, method="baseline")  # which has no teacher
    assert replace(baseline, **said).digest() == baseline.digest()


def test_the_training_of_the_teacher() -> None:
    own = replace(seeded(TINY, 1, 3), teacher_learning_rate=1, teacher_batch_size=25, teacher_epochs=4).of_teacher()
    training = replace(TINY.training, seed=3, learning_rate=1.0, epochs=4)
    assert own == replace(TINY, teacher="", method="baseline", batch_size=25, training=training)
    # one teacher for students of all seeds, and that of the student of its own seed
    assert {seeded(TINY, seed, 3).of_teacher().digest() for seed in range(4)} == {seeded(TINY, 3).of_teacher().digest()}
    assert len({seeded(TINY, 0, teacher).of_teacher().digest() for teacher in (-1, 1, 2)}) == 3
    plateau = replace(
        TINY, teacher_learning_rate=0.3, training=TrainingSettings(schedule="plateau", learning_rate=0.01)
    )
    assert plateau.of_teacher().training.learning_rate == 0.3


def test_students_of_all_seeds_learn_from_the_teacher_of_its_own(tmp_path: Path) -> None:
    """Bit for bit: its weights, images and order are those of the teacher of a student of that seed."""
    settings = replace(TINY, data=replace(TINY.data, label_noise=0.4))
    results = {}
    for name, one in (
        ("own", seeded(settings, 2)),
        ("of another", seeded(settings, 0, 2)),
        ("other", seeded(settings, 0)),
    ):
        results[name] = distillation.run(one, tmp_path / name, HERE, show="off")
    teachers = {name: next((tmp_path / name).glob("teacher-*")) for name in results}
    states = {name: torch.load(folder / "model.pt", weights_only=True) for name, folder in teachers.items()}
    assert results["own"].teacher_accuracy == results["of another"].teacher_accuracy
    assert all(torch.equal(value, states["of another"][name]) for name, value in states["own"].items())
    assert not torch.equal(states["own"]["conv1.weight"], states["other"]["conv1.weight"])
    assert teachers["own"].name == teachers["of another"].name != teachers["other"].name


def test_a_study_trains_each_teacher_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[tuple[int, int]] = []
    train = Experiment._train

    def counted(self: Experiment, *arguments: Any, **more: Any) -> Result:
        if self.settings.method == "baseline":
            trained.append((self.settings.training.seed, arguments[-1]))
        return train(self, *arguments, **more)

    monkeypatch.setattr(Experiment, "_train", counted)
    runs = [Run("hinton", f"T{t}", seed, seeded(TINY, seed, t)) for t in (4, 5) for seed in (0, 1)]
    results = {(run.column, run.seed): result for run, result in run_all(runs, tmp_path, HERE.device, 1)}
    assert trained == [(4, (1 << 20) + 4), (5, (1 << 20) + 5)]
    assert len(list((tmp_path / "teachers").iterdir())) == 2
    found = {place: result.teacher_accuracy for place, result in results.items() if isinstance(result, Result)}
    assert len(found) == 4
    assert found["T4", 0] == found["T4", 1]
    assert found["T5", 0] == found["T5", 1]


def test_the_rest_of_a_collection_is_what_its_teacher_has_not_seen() -> None:
    settings = replace(TINY, method="fixed-linear", collection=CollectionSettings(collection="rest"))
    of_seed = {name: Experiment(one) for name, one in (("own", seeded(settings, 2)), ("other", seeded(settings, 0, 2)))}
    assert torch.equal(of_seed["own"]._load().train.images, of_seed["other"]._load().train.images)
    collections = [one._scored(one._load(), None, Path(), ()).collection for one in of_seed.values()]
    assert len({made.fingerprint() for made in collections}) == 1


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            {"teacher_seed": -2},
            r"teacher_seed is -2, must be -1 \(that of the student\) or more, and at most 2\^63 - 1",
        ),
        ({"teacher_seed": 2**63}, "teacher_seed is 9223372036854775808, must be -1"),
        ({"teacher_learning_rate": -0.1}, r"teacher_learning_rate is -0.1, must be 0 \(that of the student\) or more"),
        ({"teacher_learning_rate": float("nan")}, "teacher_learning_rate is nan"),
        ({"teacher_learning_rate": float("inf")}, "teacher_learning_rate is inf"),
        ({"teacher_batch_size": 1}, r"teacher_batch_size is 1, must be 0 \(as the student\) or 2 or more"),
        ({"teacher_batch_size": -3}, "teacher_batch_size is -3"),
        ({"teacher_batch_size": 101}, "teacher_batch_size is 101, must be at most the 100 images"),
    ],
)
def test_what_cannot_be_said_of_a_teacher(said: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Experiment(replace(TINY, **said)).check(step=False)


def test_a_teacher_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "distill",
        "--data",
        "digits",
        "--train-size",
        "100",
        "--test-size",
        "40",
        "--shrink",
        "2",
        "--device",
        "cpu",
    ]
    command += ["--teacher", "resnet8", "--epochs", "1", "--batch-size", "50", "--teacher-seed", "3"]
    assert main([*command, "--teacher-learning-rate", "0.02", "--output", str(tmp_path)]) == 0
    settings = json.loads(next(tmp_path.glob("teacher-*/result.json")).read_text())["settings"]
    assert (settings["training"]["seed"], settings["training"]["learning_rate"]) == (3, 0.02)
    capsys.readouterr()


def test_images_that_are_made_may_be_more_than_those_of_the_set(adversarial: Distillation, tmp_path: Path) -> None:
    more = replace(adversarial, batch_size=120)
    assert distillation.run(more, tmp_path, HERE, show="off").figures["loss"] > 0
    for said in ({"iterations": 0}, {"teacher_batch_size": 0}):
        with pytest.raises(ValueError, match="batch_size is 120, must be at most the 100 images"):
            Experiment(replace(more, **said)).check(step=False)


def test_few_updates_are_tried(adversarial: Distillation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many small steps, of a large batch; what is wrong among them is refused all the same."""
    tried: list[tuple[int, int]] = []
    kind = registry.find("adversarial").kind
    iteration = kind.iteration  # type: ignore[union-attr]

    def seen(self: Any, *arguments: Any) -> Any:
        tried.append((self.batch_size, self.student_steps))
        return iteration(self, *arguments)

    monkeypatch.setattr(kind, "iteration", seen)
    for options in ({}, {"student_steps": 500}, {"student_steps": 1}):
        Experiment(replace(adversarial, options=options)).check()
    assert tried == [(4, 1)] * 3
    with pytest.raises(ValueError, match="adversarial's option 'student_step' is unknown"):
        Experiment(replace(adversarial, options={"student_step": 500})).check()


def test_figures_of_a_course(adversarial: Distillation, tmp_path: Path) -> None:
    training = replace(adversarial.training, epochs=40, evaluate_every=3)
    result = distillation.run(replace(adversarial, training=training, teacher_epochs=1), tmp_path, HERE, show="off")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    accuracies = {line["epoch"]: line["test_accuracy"] for line in lines if "test_accuracy" in line}
    assert len(accuracies) == 14
    last = list(accuracies.values())[-10:]
    assert result.figures["peak_accuracy"] == max(accuracies.values())
    assert result.figures["converging_accuracy"] == pytest.approx(sum(last) / 10)
    assert result.figures["instability"] == pytest.approx(max(accuracies.values()) - sum(last) / 10)
    assert result.teacher_accuracy is not None
    assert result.figures["teacher_gap"] == result.teacher_accuracy - max(accuracies.values())
    course = {name: value for name, value in result.figures.items() if name.startswith("test_accuracy_at_")}
    # at multiples of 5 %, where it was evaluated: epochs 6, 12, 18, ... of 40, and the last
    assert course == {f"test_accuracy_at_{e * 100 // 40}": accuracies[e] for e in (6, 12, 18, 24, 30, 36, 40)}
    # where there is no teacher, there is no gap to it, and no course without that of a whole epoch
    alone = distillation.run(replace(TINY, method="baseline"), tmp_path / "alone", HERE, show="off")
    assert alone.figures["peak_accuracy"] == alone.figures["converging_accuracy"] == alone.accuracy
    assert not any(name.startswith(("teacher_gap", "test_accuracy_at")) for name in alone.figures)
