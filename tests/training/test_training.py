"""The trainer: what it returns, writes, shows and refuses."""

from __future__ import annotations

import io
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from refusals import refuses
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader
from training_cases import (
    BATCH,
    BATCHES,
    CLASSES,
    Batches,
    evaluated,
    make_objective,
    make_settings,
    metrics,
    small,
    train,
)

from fastkd.methods import Baseline, Objective
from fastkd.training import Trainer, evaluate, evaluator, progress, read_metrics
from fastkd.training.figures import save_curves
from fastkd.training.metrics import Running
from fastkd.training.state import TrainingState

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]


def test_learns() -> None:
    trainer = Trainer(make_objective("baseline"), Batches(20), make_settings(epochs=4), evaluate=evaluated, show="off")
    history = trainer.fit()
    assert history[-1]["test_accuracy"] > 0.9
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert trainer.deployed is trainer.procedure.network()
    assert not trainer.deployed.training


def test_what_a_line_of_metrics_holds(tmp_path: Path) -> None:
    """Against one epoch by hand, with a learning rate too small to change anything."""
    settings = make_settings(epochs=1, learning_rate=1e-12, weight_decay=0.0)
    history = train("hinton", tmp_path, settings)._state.history  # type: ignore[union-attr]
    (line,) = metrics(tmp_path)
    assert history == read_metrics(tmp_path / "metrics.jsonl") == [line]
    names = ["epoch", "step", "learning_rate", "loss", "task_loss", "kd_loss", "accuracy", "test_accuracy", "seconds"]
    assert list(line) == names
    objective = make_objective("hinton")
    losses, terms, right = [], [], []
    for images, target, _ in Batches().epoch(0):
        loss, logits = objective(images, target)
        losses.append(loss.total.item())
        terms.append(loss.terms["kd_loss"].item())
        right.append((logits.argmax(1) == target).double().mean().item())
    assert line["loss"] == pytest.approx(sum(losses) / BATCHES, rel=1e-6)
    assert line["kd_loss"] == pytest.approx(sum(terms) / BATCHES, rel=1e-6)
    assert line["task_loss"] + line["kd_loss"] == pytest.approx(line["loss"], rel=1e-6)
    assert line["accuracy"] == pytest.approx(sum(right) / BATCHES)
    assert (line["epoch"], line["step"]) == (1, BATCHES)
    assert 0 < line["seconds"] < 60
    assert line["learning_rate"] < 1e-12  # of the last step


def test_terms_that_begin_and_end(tmp_path: Path) -> None:
    history = train("bss", None, make_settings(epochs=4))._state.history  # type: ignore[union-attr]
    assert ["boundary_loss" in line for line in history] == [True, True, True, False]
    running = Running(torch.device("cpu"))
    assert running.read() == {}
    running.add({}, 2)
    assert running.read() == {}
    running.add({"loss": torch.tensor(3.0), "accuracy": 0.25}, 2)
    running.add({"loss": torch.tensor(6.0), "late_loss": torch.ones(1), "accuracy": 1.0}, 4)
    assert running.read() == {"loss": 5.0, "late_loss": 4 / 6, "accuracy": 0.75}
    assert list(running.read()) == ["loss", "late_loss", "accuracy"]
    for wrong in ("high", torch.ones(2), None):
        refuses("the term loss of an iteration is", lambda w=wrong: running.add({"loss": w}, 1))


def test_evaluation_is_as_often_as_said_and_at_the_end() -> None:
    history = train("hinton", None, make_settings(epochs=5, evaluate_every=2))._state.history  # type: ignore[union-attr]
    assert ["test_accuracy" in line for line in history] == [False, True, False, True, True]


def test_callbacks_and_files(tmp_path: Path) -> None:
    steps: list[int] = []
    epochs: list[float] = []
    trainer = Trainer(
        make_objective("hinton"),
        Batches(),
        make_settings(epochs=2),
        folder=tmp_path / "made" / "here",
        on_step=steps.append,
        on_epoch=lambda line: epochs.append(line["epoch"]),
        show="off",
        evaluate=evaluated,
    )
    trainer.fit()
    assert steps == list(range(1, 2 * BATCHES + 1))
    assert epochs == [1, 2]
    folder = tmp_path / "made" / "here"
    assert {path.name for path in folder.iterdir()} == {"checkpoint.pt", "curves.png", "metrics.jsonl", "model.pt"}
    network = small(5)
    network.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    assert evaluated(network) == evaluated(trainer.deployed)
    picture = imread(folder / "curves.png")
    assert picture.shape[0] > 500
    assert picture.shape[1] > 1500
    assert len(set(map(tuple, picture.reshape(-1, picture.shape[2])[::97].tolist()))) > 20


def test_curves_of_many_epochs_and_of_none(tmp_path: Path) -> None:
    lines = [
        {"epoch": e, "loss": 2.0 / e, "kd_loss": 1.5 / e, "late": 0.5 / e, "accuracy": 1 - 1 / e, "learning_rate": 0.1}
        for e in range(1, 200)
    ]
    del lines[0]["late"]
    save_curves(lines, tmp_path / "x.png", "A title")
    assert imread(tmp_path / "x.png").shape[1] > 1500
    with pytest.raises(ValueError, match="fastkd: lines is empty"):
        save_curves([], tmp_path / "y.png")


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.filterwarnings("error")
def test_half_precision(amp: str) -> None:
    dtypes = set()

    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = small(0)

        def forward(self, images: Tensor) -> Tensor:
            logits = self.network(images)
            dtypes.add(logits.dtype)
            return logits

    objective = Objective(Baseline(), Seen())
    trainer = Trainer(objective, Batches(20), make_settings(amp=amp, gradient_clip=5.0), show="off")
    history = trainer.fit()
    assert dtypes == {torch.bfloat16 if amp == "bf16" else torch.float16}
    assert history[-1]["accuracy"] > 0.8
    assert next(objective.parameters()).dtype == torch.float32


class Broken(nn.Module):
    """Its logits are NaN from some call on."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.network, self.left = small(0), calls

    def forward(self, images: Tensor) -> Tensor:
        self.left -= 1
        return self.network(images) * (math.nan if self.left < 0 else 1.0)


def test_a_loss_that_is_no_number_stops(tmp_path: Path) -> None:
    objective = Objective(Baseline(), Broken(9))
    trainer = Trainer(objective, Batches(), make_settings(checkpoint_every=2), folder=tmp_path, show="off")
    with pytest.raises(
        FloatingPointError, match=r"fastkd: at step 10 loss is nan, task_loss is nan .*; accuracy 0"
    ) as caught:
        trainer.fit()
    assert "lower learning_rate" in str(caught.value)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert (state["epoch"], state["batch"]) == (1, 2)  # step 8: not one of what came after


def test_nothing_is_read_within_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu", "nonzero"):
        original = getattr(Tensor, name)

        def counted(self: Tensor, *args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            reads.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, counted)
    # looks at the values of labels on the CPU only
    monkeypatch.setattr("fastkd.methods.method.check_target", lambda logits, target: target)
    settings = make_settings(ema=0.9, warmup_epochs=1.0, gradient_clip=1.0)
    Trainer(make_objective("hinton"), Batches(), settings, show="off").fit()
    assert reads == ["tolist"] * settings.epochs
    reads.clear()

    shown: list[int] = []
    show = progress.Bar.show
    monkeypatch.setattr(progress.Bar, "show", lambda self, e, b, means: (shown.append(b), show(self, e, b, means)))
    console = Console(file=io.StringIO(), force_terminal=True)
    now = 0.0

    def on_step(_: int) -> None:
        nonlocal now
        now += 0.125

    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now))
    Trainer(make_objective("hinton"), Batches(20), settings, on_step=on_step, show="bar", console=console).fit()
    assert reads == ["tolist"] * len(shown)  # of them the bar's last of each epoch is the epoch's own reading
    # every 0.25 s, two steps
    assert shown == [*range(1, 20, 2), 20, *range(3, 20, 2), 20, *range(3, 20, 2), 20]


def test_progress_bar() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=140)
    train("hinton", None, make_settings(epochs=2), show="auto", console=console, on_step=lambda _: time.sleep(0.02))
    said = output.getvalue()
    assert "epoch 1/2" in said
    assert "batch 1/6" in said
    last = said[said.rindex("epoch") :]
    assert last.startswith("epoch 2/2")
    assert "batch 6/6" in last
    for part in ("loss 0.", "accuracy ", ", test ", " %"):
        assert part in last


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    train("hinton", None, make_settings(epochs=10), show="auto")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("epoch  1/10: step 6, learning rate 0.04")
    assert lines[9].startswith("epoch 10/10: step 60, ")
    assert ", task loss 0." in lines[9]
    assert ", test accuracy " in lines[9]
    train("hinton", None, make_settings(epochs=1), show="off")
    assert capsys.readouterr().out == ""


def test_without_rich_and_without_tensorboard(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    train("hinton", None, make_settings(epochs=1), show="auto")
    assert "epoch 1/1" in capsys.readouterr().out
    with pytest.raises(ModuleNotFoundError, match='show is "bar", which needs rich'):
        train("hinton", None, make_settings(epochs=1), show="bar")
    with pytest.raises(ModuleNotFoundError, match="tensorboard is True, which needs TensorBoard"):
        train("hinton", tmp_path, make_settings(), tensorboard=True)
    with pytest.raises(ValueError, match="tensorboard is True and folder None"):
        train("hinton", None, make_settings(), tensorboard=True)
    assert list(tmp_path.iterdir()) == []


def test_what_tensorboard_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By a stand-in for its writer."""
    calls: list[tuple[Any, ...]] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            calls.append(("open", folder, purge_step))

        def add_scalar(self, *scalar: Any) -> None:
            calls.append(scalar)

        def flush(self) -> None:
            pass

        def close(self) -> None:
            calls.append(("close",))

    stand_in = ModuleType("torch.utils.tensorboard")
    stand_in.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorboard", ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    train("hinton", tmp_path, make_settings(epochs=2), tensorboard=True, stop_at=11)
    train("hinton", tmp_path, make_settings(epochs=2), tensorboard=True, resume=True)
    assert [call[2] for call in calls if call[0] == "open"] == [1, BATCHES + 1]
    assert calls.count(("close",)) == 2
    assert [(call[1], call[2]) for call in calls if call[0] == "loss"] == [
        (line["loss"], line["step"]) for line in metrics(tmp_path)
    ]


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    train("hinton", tmp_path, make_settings(epochs=1), tensorboard=True)
    assert any(path.name.startswith("events") for path in tmp_path.iterdir())


def test_batches_that_are_not_as_many_as_said() -> None:
    class Off(Batches):
        def __init__(self, by: int) -> None:
            super().__init__()
            self.by = by

        def epoch(self, epoch: int, /, start: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            return (self.of(i) for i in range(self.batches + self.by))

    for by, message in ((1, "gives more than len"), (-1, r"gave 5 batches, must be len\(batches\), 6")):
        with pytest.raises(ValueError, match=message):
            train("hinton", None, make_settings(), batches=Off(by))
    with pytest.raises(ValueError, match="batches is empty"):
        train("hinton", None, make_settings(), batches=Batches(0))


REFUSED: list[tuple[str, dict[str, Any]]] = [
    *[("procedure is", {"procedure": value}) for value in (3, None, small(0), Baseline())],
    *[("batches is", {"batches": value}) for value in (3, None, [], DataLoader([0, 1]))],
    *[("settings is", {"settings": value}) for value in ({}, None, 3)],
    *[(name, {name: 3}) for name in ("evaluate", "on_step", "on_epoch", "folder", "description", "console")],
    *[("show is", {"show": value}) for value in ("loud", "", None, True)],
    *[(f"{name} is", {name: v}) for name in ("tensorboard", "find_unused_parameters") for v in ("no", 1, None)],
]


@pytest.mark.parametrize(("message", "changes"), REFUSED)
def test_a_trainer_refuses_at_once(message: str, changes: dict[str, Any]) -> None:
    arguments = {"procedure": make_objective("baseline"), "batches": Batches(), "settings": make_settings(), **changes}
    refuses(message, lambda: Trainer(**arguments))


def test_how_to_fit(tmp_path: Path) -> None:
    trainer = Trainer(make_objective("baseline"), Batches(), make_settings(epochs=1), folder=tmp_path / "a", show="off")
    for option, values in (("resume", ("yes", "True", 1, None)), ("overwrite", ("no", 1, None))):
        for value in values:
            refuses(f"{option} is", lambda o=option, v=value: trainer.fit(**{o: v}))
    assert not (tmp_path / "a").exists()
    assert len(trainer.fit(resume="auto", overwrite=np.False_)) == 1


def test_states_that_are_none_of_a_training() -> None:
    state = TrainingState(make_objective("baseline"), make_settings(), Batches())
    for given in (None, [], 3):
        refuses("state is", lambda g=given: state.load_state_dict(g))
    refuses("state has no .*networks", lambda: state.load_state_dict({"epoch": 1}))
    state.load_state_dict(state.state_dict())


def test_results_with_names_of_the_trainings_own() -> None:
    with pytest.raises(ValueError, match="evaluate returned accuracy, must be other names"):
        train("hinton", None, make_settings(), evaluate=lambda _: {"accuracy": 1.0})


def test_nothing_to_train() -> None:
    objective = make_objective("baseline").requires_grad_(False)
    with pytest.raises(ValueError, match="part 'student' has no parameter that requires a gradient"):
        Trainer(objective, Batches(), make_settings(), show="off").fit()


def test_evaluate() -> None:
    network = small(0).train()
    images, target, _ = Batches(batch=50).of(3)
    result = evaluate(network, images, target, batch_size=7)
    assert network.training
    network.eval()
    logits = network(images)
    assert result["test_accuracy"] == (logits.argmax(1) == target).double().mean().item()
    assert result["test_loss"] == pytest.approx(nn.functional.cross_entropy(logits, target).item(), rel=1e-5)
    assert evaluator(images, target)(network).keys() == result.keys()
    with pytest.raises(ValueError, match="there are 50 images and 49 in target"):
        evaluate(network, images, target[:-1])
    with pytest.raises(ValueError, match="there are 0 images"):
        evaluate(network, images[:0], target[:0])
    refuses("network is int", lambda: evaluate(3, images, target))
    for call in (lambda *given, **more: evaluate(network, *given, **more), evaluator):  # the latter before it is called
        for size in (0, -1, 1.5, True, None):
            refuses("batch_size is", lambda c=call, s=size: c(images, target, batch_size=s))
        refuses("there are 50 images and 3 in target", lambda c=call: c(images, target[:3]))
        refuses("images is list", lambda c=call: c([1.0], target))
        refuses("target is list", lambda c=call: c(images, [1]))
        refuses("target has dtype", lambda c=call: c(images, target.int()))


def test_the_objective_takes_its_teacher_along() -> None:
    objective = make_objective("hinton").double()
    images, target, _ = Batches().of(0)
    loss, logits = objective(images.double(), target)
    assert loss.total.isfinite()
    assert logits.shape == (BATCH, CLASSES)
    assert not any("teacher" in name for name in objective.state_dict())
