"""Procedures: several optimizers, several updates, state, hooks; the adversarial example, killed and in two processes."""

from __future__ import annotations

import copy
import random
import signal
from collections.abc import Mapping
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refuses
from torch import Tensor, nn
from training_cases import (
    BATCHES,
    Batches,
    Linear,
    assert_same_end,
    differences,
    evaluated,
    fit,
    make_objective,
    make_settings,
    metrics,
    small,
    train,
)
from training_processes import PATIENCE, adversarial, adversarial_in_two, start, start_ranks, state_in_two, until_killed

from fastkd.data import NoBatches
from fastkd.data.batch import Batches as Given
from fastkd.functional import kl_div
from fastkd.methods import Objective, Part, Procedure, Step
from fastkd.methods.method import cross_entropy
from fastkd.training import Trainer, checkpoint, read_metrics

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread", "no_figures")]


# ---- the adversarial example --------------------------------------------------------------------------


def test_the_student_learns_without_data() -> None:
    trainer = fit(adversarial(), NoBatches(12), make_settings(epochs=4, learning_rate=0.05), evaluate=evaluated)
    history = trainer._state.history  # type: ignore[union-attr]
    names = ["epoch", "step", "student_learning_rate", "generator_learning_rate", "loss", "generator_loss"]
    assert list(history[0])[:6] == names
    assert history[0]["student_learning_rate"] > 10 * history[0]["generator_learning_rate"]
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert trainer.deployed is trainer.procedure.network()


CASES: dict[str, dict[str, Any]] = {
    "sgd": {},
    "ema": {"ema": 0.9, "gradient_clip": 0.5, "warmup_epochs": 1.0},
    "fp16": {"amp": "fp16"},
    "bf16": {"amp": "bf16", "schedule": "step"},
}


@pytest.mark.parametrize("case", CASES)
def test_as_if_it_had_not_been_interrupted(case: str, tmp_path: Path) -> None:
    settings = make_settings(epochs=2, learning_rate=0.02, checkpoint_every=2, **CASES[case])
    fit(adversarial(), NoBatches(7), settings, tmp_path / "whole", evaluate=evaluated)
    stops = sorted(random.Random(case).sample(range(1, 14), 3))
    for i, stop in enumerate([*stops, None]):  # the weights of seed i are not those of the checkpoint
        found = (tmp_path / "parts" / "checkpoint.pt").exists()
        procedure = adversarial(seed=i if found else 0)
        fit(procedure, NoBatches(7), settings, tmp_path / "parts", evaluate=evaluated, resume="auto", stop_at=stop)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.forks
def test_twenty_kills(tmp_path: Path) -> None:
    """Each goes on from what the one before left, and is killed at a random iteration."""
    settings = make_settings(epochs=5, learning_rate=0.02, checkpoint_every=1)
    fit(adversarial(), NoBatches(9), settings, tmp_path / "whole")
    draw, path = random.Random(0), tmp_path / "parts" / "checkpoint.pt"
    for kill in range(20):
        process = start(until_killed, tmp_path / "parts", settings, kill if path.exists() else 0, draw.randint(1, 3))
        process.join(PATIENCE)
        assert process.exitcode == -signal.SIGKILL
    assert checkpoint.read(path)["epoch"] < 5
    fit(adversarial(seed=30), NoBatches(9), settings, tmp_path / "parts", resume=True)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.forks
@pytest.mark.parametrize("find_unused_parameters", [False, True])
def test_two_processes_are_as_one(find_unused_parameters: bool, tmp_path: Path) -> None:
    """Each with its part of the noise; no network has batch statistics."""
    settings = make_settings(epochs=2, learning_rate=0.05, momentum=0.5, gradient_clip=1.0)
    start_ranks(adversarial_in_two, tmp_path, settings, find_unused_parameters)
    fit(adversarial(ranks=1, make=Linear), NoBatches(5), settings, tmp_path / "one")
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert not differences(first, second)
    one = checkpoint.read(tmp_path / "one" / "checkpoint.pt")["networks"]
    flat = {f"{network}.{name}": value for network, its in one.items() for name, value in its.items()}
    assert set(flat) == set(first)
    for name, value in flat.items():
        torch.testing.assert_close(first[name], value, rtol=0, atol=2e-6, msg=name)
    ours, theirs = read_metrics(tmp_path / "two" / "metrics.jsonl"), read_metrics(tmp_path / "one" / "metrics.jsonl")
    for line, other in zip(ours, theirs, strict=True):
        for name in set(line) - {"seconds", "unequal_loss"}:  # which is of the mean over the noise of a process
            assert line[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name


# ---- updates ------------------------------------------------------------------------------------------


class Two(Procedure):
    """Two networks; each update is of one of them, but the loss is of both."""

    def __init__(self, seed: int = 0, **of_second: Any) -> None:
        super().__init__()
        self.first, self.second = Linear(seed), Linear(seed + 1)
        self.of_second = of_second
        self.seen: list[Any] = []

    def parts(self) -> Mapping[str, Part]:
        return {"first": Part(self.first), "second": Part(self.second, **self.of_second)}

    def network(self) -> nn.Module:
        return self.first

    def difference(self, images: Tensor) -> Tensor:
        return kl_div(self.first(images), self.second(images))

    def iteration(self, batch: Given, step: Step) -> dict[str, Tensor]:
        before = [copy.deepcopy(network.state_dict()) for network in (self.first, self.second)]
        loss = self.difference(batch.images)  # type: ignore[union-attr]
        step.update(loss, "first")
        self.seen.append(
            [
                bool(differences(old, network.state_dict()))
                for old, network in zip(before, (self.first, self.second), strict=True)
            ]
        )
        assert all(p.grad is None for p in self.parameters())
        step.update(-self.difference(batch.images), "second")  # type: ignore[union-attr]
        return {"loss": loss}


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_updates_against_a_loop_by_hand(amp: str) -> None:
    """An update changes its part alone, and what comes after it in an iteration sees the new weights, in 16 bits, too."""
    settings = make_settings(epochs=1, schedule="constant", amp=amp)
    procedure = Two(optimizer="adam", learning_rate=0.01, betas=(0.5, 0.9), weight_decay=0.0)
    fit(procedure, Batches(), settings)
    assert procedure.seen == [[True, False]] * BATCHES
    by_hand = Two()
    first = torch.optim.SGD(by_hand.first.parameters(), 0.05, 0.9, weight_decay=5e-4, nesterov=True)
    second = torch.optim.Adam(by_hand.second.parameters(), 0.01, (0.5, 0.9))
    for images, *_ in Batches().epoch(0):
        for optimizer, sign in ((first, 1), (second, -1)):
            by_hand.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=amp != "off"):
                loss = sign * by_hand.difference(images)
            loss.backward()
            optimizer.step()
    assert not differences(procedure.state_dict(), by_hand.state_dict())


def test_an_optimizer_of_ones_own() -> None:
    class Own(Two):
        def parts(self) -> Mapping[str, Part]:
            make = lambda parameters: torch.optim.RMSprop(parameters, 1e-3)  # noqa: E731
            return {"first": Part(self.first), "second": Part(self.second.parameters(), make_optimizer=make)}

    trainer = fit(Own(), Batches(), make_settings(epochs=1))
    state = trainer._state
    assert state is not None
    assert type(state.parts["second"].optimizer) is torch.optim.RMSprop
    assert state.parts["second"].learning_rate < 1e-6  # the schedule is the settings'
    assert trainer._state.history[0]["second_learning_rate"] < 1e-3  # type: ignore[union-attr]


class Broken(Two):
    """One that makes a mistake."""

    def __init__(self, mistake: str) -> None:
        super().__init__()
        self.mistake = mistake

    def parts(self) -> Any:
        if self.mistake == "frozen":
            self.first.requires_grad_(False)
        return {
            "none": {},
            "no mapping": [Part(self)],
            "no part": {"first": self.first},
            "shared": {"first": Part(self.first), "all": Part(self)},
            "frozen": {"first": Part(self.first), "second": Part(self.second)},
            "setting": {"first": Part(self, learning_rte=0.1)},
            "idle": {"first": Part(self.first)},
            "value": {"first": Part(self, learning_rate=-1.0)},
        }.get(self.mistake, super().parts())

    def iteration(self, batch: Given, step: Step) -> dict[str, Tensor]:
        loss = self.difference(batch.images)  # type: ignore[union-attr]
        if self.mistake == "unknown":
            step.update(loss, "frist")
        step.update(
            {"rows": self.first(batch.images), "detached": loss.detach(), "number": 3.0}.get(self.mistake, loss)
        )  # type: ignore[arg-type,union-attr]
        if self.mistake == "nothing":
            return None  # type: ignore[return-value]
        return {"loss": "low"} if self.mistake == "term" else {"loss": loss}  # type: ignore[dict-item]

    def after_epoch(self, step: Step) -> dict[str, Any]:
        return {"loss": 1.0} if self.mistake == "twice" else {"more": "much"} if self.mistake == "no number" else {}


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("none", r"Broken.parts\(\) is empty, must be one part or more"),
        ("no mapping", r"Broken.parts\(\) returned .*, must be a dict of names to Part"),
        ("no part", r"Broken.parts\(\) returned .*, must be a dict of names to Part"),
        ("shared", "parts 'first' and 'all' share parameters"),
        ("frozen", "part 'first' has no parameter that requires a gradient"),
        ("setting", "part 'first''s setting 'learning_rte' is unknown, did you mean learning_rate"),
        (
            "idle",
            r"4 parameters of Broken are in no part \(second.layers.1.weight, ...\): networks that are not trained",
        ),
        ("nothing", "Broken.iteration returned NoneType, must be a dict of terms by name"),
        ("value", "learning_rate is -1.0, must be above 0"),
        ("unknown", "part 'frist' is unknown, did you mean first"),
        ("rows", r"the loss of an update of first, second is of shape \(12, 4\), must be a scalar with a gradient"),
        ("detached", "the loss of an update of first, second is without a gradient"),
        ("number", "the loss of an update of first, second is float"),
        ("term", "the term loss of an iteration is str, must be a number"),
        ("twice", "after_epoch returned loss, must be other names"),
        ("no number", "after_epoch returned more of type str, must be a number"),
    ],
)
def test_mistakes(mistake: str, message: str) -> None:
    refuses(message, lambda: fit(Broken(mistake), Batches(), make_settings(epochs=1)))


# ---- state and hooks ----------------------------------------------------------------------------------


class Counting(Procedure):
    """Keeps what it has seen: in a buffer, in plain types, and in the order of its calls."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.learner = small(seed)
        self.register_buffer("weights", torch.ones(6))
        self.calls: list[str] = []

    def parts(self) -> dict[str, Part]:
        return {"learner": Part(self.learner)}

    def network(self) -> nn.Module:
        return self.learner

    def before_epoch(self, step: Step) -> None:
        self.calls.append(f"before {step.epoch} of {step.epochs}")
        self.weights = torch.rand(6)  # from the generator that a checkpoint keeps

    def iteration(self, batch: Given, step: Step) -> dict[str, Tensor]:
        self.calls.append(f"{step.epoch} {step.iteration}")
        rows = cross_entropy(self.learner(batch.images), batch.target)  # type: ignore[union-attr]
        loss = rows * self.weights[step.iteration]
        step.update(loss)
        return {"loss": loss, "weight": self.weights[step.iteration]}

    def after_epoch(self, step: Step) -> dict[str, float]:
        return {"calls_made": len(self.calls), "share_accuracy": 0.5}

    def get_extra_state(self) -> list[str]:
        return self.calls

    def set_extra_state(self, state: list[str]) -> None:
        self.calls = list(state)


@pytest.mark.parametrize("stops", [(2, 6, 9), (5, 11, 13), (6, 12)])
def test_state_and_hooks_go_on(stops: tuple[int, ...], tmp_path: Path) -> None:
    settings = make_settings(checkpoint_every=1)
    whole = fit(Counting(), Batches(), settings, tmp_path / "whole")
    for i, stop in enumerate([*stops, None]):
        parts = fit(Counting(i), Batches(), settings, tmp_path / "parts", resume="auto", stop_at=stop)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    # what was done after the last checkpoint is done again; a call of before_epoch, too, if it comes after it
    assert parts.procedure.calls == whole.procedure.calls  # type: ignore[attr-defined]
    expected = [f"before {e} of 3" if i == 0 else f"{e} {i - 1}" for e in range(3) for i in range(BATCHES + 1)]
    assert whole.procedure.calls == expected  # type: ignore[attr-defined]
    line = metrics(tmp_path / "whole")[1]
    assert line["calls_made"] == 2 * (BATCHES + 1)
    assert list(line)[-3:] == ["calls_made", "share_accuracy", "seconds"]
    state = checkpoint.read(tmp_path / "whole" / "checkpoint.pt")
    small(0).load_state_dict(state["networks"]["learner"])
    assert set(state["procedure"]) == {"weights", "_extra_state"}


@pytest.mark.forks
def test_buffers_of_each_process_are_its_own(tmp_path: Path) -> None:
    """What a process knows of its samples is not another's, through checkpoints, too; batch norm's statistics are shared."""
    start_ranks(state_in_two, tmp_path)
    whole, parts = ([torch.load(tmp_path / f"{name}{rank}.pt") for rank in range(2)] for name in ("whole", "parts"))
    assert not differences(whole, parts)
    assert torch.equal(whole[0]["seen"], torch.tensor([18.0, 0.0]))
    assert torch.equal(whole[1]["seen"], torch.tensor([0.0, 18.0]))
    norm = "learner.features.1.running_mean"
    assert torch.equal(whole[0][norm], whole[1][norm])


def test_a_procedure_moves_and_is_copied_with_its_teacher() -> None:
    procedure = adversarial().double()
    assert next(procedure.frozen["teacher"].parameters()).dtype == torch.float64
    assert not any("teacher" in name for name in procedure.state_dict())
    twin = copy.deepcopy(procedure)
    assert twin.frozen["teacher"] is not procedure.frozen["teacher"]
    procedure.train()
    assert not procedure.frozen["teacher"].training
    with pytest.raises(TypeError, match=r"teacher is int, must be a torch.nn.Module"):
        procedure.freeze("teacher", 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"again shares \d+ parameters with what is trained \(student"):
        procedure.freeze("again", procedure.network())


# ---- accumulation -------------------------------------------------------------------------------------


class Halves:
    """The batches of another source in two parts each."""

    def __init__(self, whole: Batches) -> None:
        self.whole = whole

    def __len__(self) -> int:
        return 2 * len(self.whole)

    def epoch(self, epoch: int, /, start: int = 0) -> Any:
        parts = [tuple(part[half::2] for part in batch) for batch in self.whole.epoch(epoch) for half in range(2)]
        return iter(parts[start:])


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    common = {"epochs": 2, "warmup_epochs": 0.5, "gradient_clip": 0.5}
    whole = train("hinton", None, make_settings(**common), make=Linear, evaluate=None)
    parts = train(
        "hinton", None, make_settings(**common, accumulate=2), make=Linear, batches=Halves(Batches()), evaluate=None
    )
    for (name, ours), theirs in zip(parts.deployed.state_dict().items(), whole.deployed.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=1e-6, msg=name)
    assert parts._state.history[0]["loss"] == pytest.approx(whole._state.history[0]["loss"], rel=1e-6)  # type: ignore[union-attr]


@pytest.mark.parametrize("accumulate", [4, 5, 100])
def test_what_is_left_of_an_epoch_is_a_smaller_batch(accumulate: int, tmp_path: Path) -> None:
    """Six batches; and a checkpoint waits until no gradient does."""
    settings = make_settings(epochs=2, accumulate=accumulate, checkpoint_every=1, amp="fp16")
    train("hinton", tmp_path / "whole", settings)
    for i, stop in enumerate((3, 5, 11, None)):
        found = (tmp_path / "parts" / "checkpoint.pt").exists()
        train("hinton", tmp_path / "parts", settings, seed=i if found else 0, resume="auto", stop_at=stop)
        if stop == 5 and accumulate == 4:
            assert checkpoint.read(tmp_path / "parts" / "checkpoint.pt")["batch"] == 4
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    by_hand = make_objective("hinton")
    optimizer = torch.optim.SGD(by_hand.parameters(), 0.05, 0.9, weight_decay=5e-4, nesterov=True)
    first = min(accumulate, BATCHES)
    for i, (images, target, _) in enumerate(Batches().epoch(0)):
        (by_hand(images, target)[0].total / (first if i < first else BATCHES - first)).backward()
        if i + 1 in (first, BATCHES):
            optimizer.step()
            optimizer.zero_grad()
    trained = make_objective("hinton")
    Trainer(trained, Batches(), make_settings(epochs=1, schedule="constant", accumulate=accumulate), show="off").fit()
    for ours, theirs in zip(trained.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_several_updates_of_a_part_cannot_be_accumulated() -> None:
    refuses(
        "accumulate is 2, must be 1 for a procedure that updates student more than once in an iteration",
        lambda: fit(adversarial(), NoBatches(4), make_settings(epochs=1, accumulate=2)),
    )


@pytest.mark.compiles
def test_compiled_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights keep their names, also those of the average; and the training goes on."""
    # all but the machine code, which takes a C++ compiler half a minute
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    settings = make_settings(epochs=2, compile=True, ema=0.5, checkpoint_every=1)
    train("hinton", tmp_path, settings, make=Linear, stop_at=8)
    trainer = train("hinton", tmp_path, settings, make=Linear, resume=True)
    Linear(0).load_state_dict(trainer.deployed.state_dict())
    plain = train("hinton", None, make_settings(epochs=2, ema=0.5), make=Linear)
    for ours, theirs in zip(trainer.deployed.parameters(), plain.deployed.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert isinstance(trainer.procedure, Objective)
