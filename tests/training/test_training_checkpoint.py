"""What is wrong with a checkpoint is said in one line, and changes nothing."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from training_cases import Batches, differences, make_objective, make_settings, small, train

from fastkd.methods import Hinton, Objective
from fastkd.training import Trainer, checkpoint

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread", "no_figures")]

SETTINGS = make_settings(epochs=1, ema=0.9)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastkd.training.figures.save_curves", lambda *_: None)
        train("hinton", folder, SETTINGS)
    return (folder / "checkpoint.pt").read_bytes()


@pytest.fixture
def folder(trained: bytes, tmp_path: Path) -> Path:
    """With a checkpoint, metrics of old, and nothing else."""
    (tmp_path / "checkpoint.pt").write_bytes(trained)
    (tmp_path / "metrics.jsonl").write_text("of old\n")
    return tmp_path


def refused(trainer: Trainer, folder: Path, error: type[Exception], **how: Any) -> str:
    """The one line of the error; files and weights stay as they are."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    weights = {name: value.clone() for name, value in trainer.procedure.state_dict().items()}
    with pytest.raises(error) as caught:
        trainer.fit(**(how or {"resume": True}))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert not differences(weights, trainer.procedure.state_dict())
    said = str(caught.value)
    assert said.startswith("fastkd: ")
    assert "\n" not in said
    assert str(folder) in said or how.get("overwrite")
    return said


def trainer_in(folder: Path, **changes: Any) -> Trainer:
    settings = make_settings(**{"epochs": 1, "ema": 0.9, **changes})
    return Trainer(make_objective("hinton", 1), Batches(), settings, folder=folder, show="off")


def test_truncated(folder: Path, trained: bytes) -> None:
    draw = random.Random(0)
    for length in (0, 1, 3, 4, 100, 4096, *(draw.randrange(len(trained)) for _ in range(10)), len(trained) - 1):
        (folder / "checkpoint.pt").write_bytes(trained[:length])
        said = refused(trainer_in(folder), folder, ValueError)
        assert "checkpoint.pt is damaged" in said
        assert "begin again with overwrite=True, or put an older copy there" in said


def test_flipped_bytes_are_noticed_or_change_nothing(folder: Path, trained: bytes) -> None:
    """The archive has bytes that mean nothing: those that fill up to the next boundary."""
    whole = checkpoint.read(folder / "checkpoint.pt")
    draw = random.Random(1)
    noticed = 0
    for _ in range(150):
        damaged = bytearray(trained)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        (folder / "checkpoint.pt").write_bytes(damaged)
        try:
            read = checkpoint.read(folder / "checkpoint.pt")
        except ValueError:
            noticed += 1
        else:
            assert not differences(whole, read)
    assert noticed > 75


def with_network(state: dict[str, Any], network: str, name: str, value: Tensor) -> dict[str, Any]:
    networks = state["networks"]
    return state | {"networks": {**networks, network: {**networks[network], name: value}}}


def changed(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda state: state | values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(version=1), "is of format version 1, this fastkd reads version 2"),
        (changed(format="other"), "is no checkpoint of a training with fastkd"),
        (lambda state: [1, 2], "is no checkpoint of a training with fastkd"),
        (changed(ranks=2), "ranks is 2 there, 1 here"),
        (changed(steps_per_epoch=5), "steps_per_epoch is 5 there, 6 here"),
        (lambda state: state | {"settings": {**state["settings"], "epochs": 9}}, "settings.epochs is 9 there, 1 here"),
        (
            lambda state: state | {"settings": {**state["settings"], "lookahead": 9}},
            "settings.lookahead is 9 there, missing here",
        ),
        (
            lambda state: with_network(state, "student", "classifier.bias", torch.zeros(7)),
            r"student.classifier.bias is float32 \[7\] there, float32 \[4\] here",
        ),
        (
            lambda state: with_network(state, "student", "head", torch.zeros(7, dtype=torch.int64)),
            r"student.head is int64 \[7\] there, missing here",
        ),
        (
            lambda state: with_network(state, "method", "w", torch.zeros(1)),
            r"method.w is float32 \[1\] there, missing here",
        ),
    ],
)
def test_other_checkpoints(change: Callable[[dict[str, Any]], Any], message: str, folder: Path) -> None:
    path = folder / "checkpoint.pt"
    torch.save(change(checkpoint.read(path)), path)
    said = refused(trainer_in(folder), folder, ValueError)
    assert re.search(message, said), said


def test_other_trainings(folder: Path) -> None:
    said = refused(trainer_in(folder, learning_rate=0.1, ema=0.0), folder, ValueError)
    assert "settings.learning_rate is 0.05 there, 0.1 here; settings.ema is 0.9 there, 0.0 here." in said
    assert "Train as there, or begin again with overwrite=True" in said
    wide = Objective(Hinton(), small(0, (5, 8)), small(1))
    said = refused(Trainer(wide, Batches(), SETTINGS, folder=folder, show="off"), folder, ValueError)
    assert "student.features.0.weight is float32 [4, 1, 3, 3] there, float32 [5, 1, 3, 3] here" in said
    assert "more" in said
    warm = Objective(Hinton(temperature=9.0), small(0), small(1))
    said = refused(Trainer(warm, Batches(), SETTINGS, folder=folder, show="off"), folder, ValueError)
    assert "temperature=4.0" in said
    assert "temperature=9.0" in said
    said = refused(Trainer(warm, Batches(5), SETTINGS, folder=folder, show="off"), folder, ValueError)
    assert "steps_per_epoch is 6 there, 5 here" in said


def test_other_descriptions(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    def described(where: Path, **description: Any) -> Trainer:
        objective = make_objective("hinton", 1)
        return Trainer(objective, Batches(), SETTINGS, folder=where, show="off", description=description)

    said = refused(described(folder, data="cifar100"), folder, ValueError)
    assert "description.data is missing there, 'cifar100' here" in said
    mine = tmp_path_factory.mktemp("mine")
    described(mine, data="cifar10", share=np.float64(0.5), classes=np.int64(10)).fit()
    described(mine, data="cifar10", share=0.5, classes=10).fit(resume=True)
    said = refused(described(mine, data="cifar100", share=0.5, teacher="a"), mine, ValueError)
    assert (
        "description.data is 'cifar10' there, 'cifar100' here; description.teacher is missing there, 'a' here; " in said
    )
    assert "description.classes is 10 there, missing here." in said
    with pytest.raises(TypeError, match=r"fastkd: description\['data'\] is of type list, must be text, a number"):
        described(mine, data=[1])


def test_numbers_of_numpy_and_torch_are_read_back(tmp_path: Path) -> None:
    def results(_: object) -> dict[str, Any]:
        return {"a": np.float64(0.25), "b": torch.tensor(0.5), "c": np.float32(0.75), "d": 1}

    settings = make_settings(epochs=1, learning_rate=np.float64(0.05), seed=np.int64(1), nesterov=np.bool_(True))
    train("hinton", tmp_path, settings, evaluate=results)
    (line,) = checkpoint.read(tmp_path / "checkpoint.pt")["history"]
    assert [line[name] for name in "abcd"] == [0.25, 0.5, 0.75, 1.0]
    assert all(type(line[name]) is float for name in "abcd")
    train("hinton", tmp_path, make_settings(epochs=1, seed=1), resume=True, evaluate=results)
    for wrong in ("high", torch.zeros(2), None):
        with pytest.raises(TypeError, match=r"fastkd: evaluate returned a of type .*, must be a number"):
            train("hinton", None, settings, evaluate=lambda _, wrong=wrong: {"a": wrong})


@pytest.mark.parametrize(("kind", "fused"), [("sgd", True), ("adamw", True), ("adamw", False)])
def test_kernels_of_the_optimizer_are_those_of_the_device(kind: str, fused: bool, tmp_path: Path) -> None:
    """A checkpoint of another device says what was right there."""
    settings = make_settings(epochs=1, optimizer=kind)
    train("hinton", tmp_path, settings, stop_at=5)
    path = tmp_path / "checkpoint.pt"
    state = checkpoint.read(path)
    state["parts"]["student"]["optimizer"]["param_groups"][0]["fused"] = fused
    torch.save(state, path)
    trainer = train("hinton", tmp_path, settings, resume=True)
    assert trainer._state is not None
    assert [group["fused"] for group in trainer._state.parts["student"].optimizer.param_groups] == [None]


def test_code_in_a_checkpoint_is_not_run(folder: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (folder / "was-here",))

    path = folder / "checkpoint.pt"
    torch.save(checkpoint.read(path) | {"seconds": Evil()}, path)
    said = refused(trainer_in(folder), folder, ValueError)
    assert "is damaged (Unsupported" in said
    assert "\x1b" not in said
    assert "weights_only" not in said.partition(":")[2][:120]  # no advice to run the code
    assert not (folder / "was-here").exists()


def test_fresh_and_resumed_are_not_mixed_up(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    said = refused(trainer_in(folder), folder, FileExistsError, resume=False)
    assert "holds a checkpoint: fit(resume=True) goes on from it, fit(overwrite=True) begins anew" in said
    refused(trainer_in(folder), folder, ValueError, resume=True, overwrite=True)
    empty = tmp_path_factory.mktemp("empty")
    assert "there is no checkpoint" in refused(trainer_in(empty), empty, FileNotFoundError)
    with pytest.raises(ValueError, match="resume is True and folder None"):
        Trainer(make_objective("hinton"), Batches(), SETTINGS).fit(resume=True)


def test_overwrite_begins_anew(folder: Path) -> None:
    """Also where it does not come to a checkpoint: that of old would be taken for its own."""
    path = folder / "checkpoint.pt"

    def stop(step: int) -> None:
        assert not path.exists()
        raise KeyboardInterrupt

    trainer = trainer_in(folder)
    trainer._on_step = stop
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(overwrite=True)
    assert not path.exists()
    assert trainer_in(folder).fit()[0]["epoch"] == 1
    trainer_in(folder, learning_rate=0.1).fit(overwrite=True)
    assert checkpoint.read(path)["settings"]["learning_rate"] == 0.1


def test_holds_the_students_weights(folder: Path) -> None:
    weights = torch.load(folder / "checkpoint.pt", weights_only=True)["networks"]["student"]
    small(3).load_state_dict(weights)
