"""Settings, and what becomes of them: learning rates against closed formulas, the average against a loop."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import tyro
from torch import nn
from training_cases import BATCHES, Batches, make_objective, make_settings

from fastkd.models.average import Average
from fastkd.training import Trainer, TrainingSettings
from fastkd.training.optimization import make_optimizer, make_schedule

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs is 0, must be 1 or more"),
        ({"epochs": 10**9 + 1}, "epochs is 1000000001, must be 1 or more, and at most 1000000000"),
        ({"learning_rate": 10**400}, "learning_rate is 10+, must be a number that a float holds"),
        ({"milestones": (0.5, 10**400)}, "milestones is 10+, must be a number that a float holds"),
        ({"optimizer": "lion"}, "optimizer is 'lion', must be one of sgd, adam, adamw"),
        ({"betas": (0.9,)}, r"betas is \(0.9,\), must be two numbers in \[0, 1\)"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\), must be two numbers in \[0, 1\)"),
        ({"accumulate": 0}, "accumulate is 0, must be 1 or more"),
        ({"schedule": "linear"}, "schedule is 'linear', must be one of cosine, step, constant"),
        ({"amp": "fp8"}, "amp is 'fp8', must be one of off, bf16, fp16"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0, must be above 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"learning_rate": math.inf}, "learning_rate is inf"),
        ({"momentum": 1.0}, r"momentum is 1.0, must be in \[0, 1\)"),
        ({"momentum": 0.0}, "nesterov is True with momentum 0, must be False, or momentum above 0"),
        ({"weight_decay": -1e-4}, "weight_decay is -0.0001, must be 0 or more"),
        (
            {"milestones": (0.5, 0.5)},
            r"milestones is \(0.5, 0.5\), must be shares of the training in \(0, 1\), each above",
        ),
        ({"milestones": (0.5, 1.0)}, r"milestones is \(0.5, 1.0\)"),
        ({"milestones": (100.0, 150.0)}, r"milestones is \(100.0, 150.0\)"),
        ({"schedule": "step", "milestones": ()}, r"milestones is \(\), must be one share or more"),
        (
            {"schedule": "step", "milestones": (0.1,), "warmup_epochs": 20.0},
            "milestones begin at 0.1 of 200 epochs, must be",
        ),
        ({"decay": 0.0}, r"decay is 0.0, must be in \(0, 1\]"),
        ({"warmup_epochs": -1.0}, "warmup_epochs is -1.0, must be from 0 to less than epochs, 200"),
        ({"warmup_epochs": 200.0}, "warmup_epochs is 200.0"),
        ({"ema": 1.0}, r"ema is 1.0, must be in \[0, 1\)"),
        ({"gradient_clip": -1.0}, r"gradient_clip is -1.0, must be 0 \(off\) or more"),
        ({"seed": -1}, "seed is -1, must be from 0 to"),
        ({"checkpoint_every": -1}, "checkpoint_every is -1"),
        ({"evaluate_every": 0}, "evaluate_every is 0, must be 1 or more"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"fastkd: {message}"):
        TrainingSettings(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 2.0}, "epochs is 2.0, must be a whole number"),
        ({"epochs": True}, "epochs is True, must be a whole number"),
        ({"seed": True}, "seed is True, must be a whole number"),
        ({"learning_rate": True}, "learning_rate is True, must be a number"),
        ({"warmup_epochs": np.True_}, "warmup_epochs is .*True.*, must be a number"),
        ({"milestones": (0.5, True)}, "milestones is True, must be a number"),
        ({"nesterov": 1}, "nesterov is 1, must be True or False"),
        ({"learning_rate": "0.1"}, "learning_rate is '0.1', must be a number"),
        ({"learning_rate": torch.tensor(0.1)}, r"learning_rate is tensor\(0.1000\), must be a number"),
        ({"nesterov": "no"}, "nesterov is 'no', must be True or False"),
        ({"schedule": 3}, "schedule is 3, must be text"),
        ({"milestones": 0.5}, "milestones is 0.5, must be a tuple of numbers"),
        ({"milestones": ("a",)}, "milestones is 'a', must be a number"),
    ],
)
def test_settings_of_other_types(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"fastkd: {message}"):
        TrainingSettings(**changes)


def test_settings_become_plain() -> None:
    settings = TrainingSettings(
        learning_rate=np.float64(0.01),
        epochs=np.int64(3),  # type: ignore[arg-type]
        milestones=np.array([0.25, 0.5]),  # type: ignore[arg-type]
        warmup_epochs=1,
    )
    assert repr(settings) == repr(TrainingSettings(3, learning_rate=0.01, milestones=(0.25, 0.5), warmup_epochs=1.0))


def test_settings_are_options(capsys: pytest.CaptureFixture[str]) -> None:
    settings = tyro.cli(TrainingSettings, args=["--schedule", "step", "--milestones", "0.3", "0.6", "--no-nesterov"])
    assert (settings.schedule, settings.milestones, settings.nesterov) == ("step", (0.3, 0.6), False)
    with pytest.raises(SystemExit):
        tyro.cli(TrainingSettings, args=["--help"])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "half a cosine down to 0" in said


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("warmup", [0.0, 0.25, 1.0, 2.5])
@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_learning_rate_of_each_step(schedule: str, warmup: float) -> None:
    epochs, per_epoch, highest = 7, 4, 0.3
    settings = make_settings(
        epochs=epochs, learning_rate=highest, schedule=schedule, milestones=(0.5, 0.8), warmup_epochs=warmup, decay=0.2
    )
    optimizer = make_optimizer([nn.Parameter(torch.zeros(1))], settings)
    rates = make_schedule(optimizer, settings, per_epoch)
    n, w = epochs * per_epoch, round(warmup * per_epoch)
    for t in range(n):
        if t < w:
            expected = highest * (t + 1) / w
        elif schedule == "cosine":
            expected = highest * (1 + math.cos(math.pi * (t - w) / (n - w))) / 2
        elif schedule == "step":
            expected = highest * 0.2 ** sum(round(share * n) <= t for share in (0.5, 0.8))
        else:
            expected = highest
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-9, abs=1e-12), t
        optimizer.step()
        rates.step()


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_average_of_weights(decay: float) -> None:
    weights: list[dict[str, torch.Tensor]] = []
    objective = make_objective("hinton")
    student = objective.student.model
    initial = {name: value.clone() for name, value in student.state_dict().items()}
    trainer = Trainer(
        objective,
        Batches(),
        make_settings(ema=decay),
        show="off",
        on_step=lambda _: weights.append({name: value.clone() for name, value in student.state_dict().items()}),
    )
    trainer.fit()
    for name, value in trainer.deployed.state_dict().items():
        if not value.is_floating_point():
            assert torch.equal(value, weights[-1][name])
            continue
        expected = initial[name].double()
        for step, after in enumerate(weights, 1):
            share = min(decay, (1 + step) / (10 + step))
            expected = share * expected + (1 - share) * after[name].double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    assert trainer.deployed is not student
    assert len(weights) == 3 * BATCHES


def test_average_is_no_second_student() -> None:
    network = nn.Linear(2, 2)
    average = Average(network)
    assert not any(parameter.requires_grad for parameter in average.parameters())
    average.update(network, 0.9)
    assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("buffers", [True, False])
def test_average_of_buffers(buffers: bool) -> None:
    """Or its own, as it runs itself."""
    network = nn.BatchNorm1d(2)
    average = Average(network, buffers=buffers)
    network(torch.full((3, 2), 10.0) + torch.arange(3.0)[:, None])
    average.update(network, 0.5)
    assert average.network.running_mean.tolist() == pytest.approx([0.55, 0.55] if buffers else [0.0, 0.0])  # type: ignore[union-attr,operator]
    assert average.network.num_batches_tracked.item() == int(buffers)  # type: ignore[union-attr,operator]


def test_gradient_clip_and_optimizers() -> None:
    settings = make_settings(
        epochs=1,
        gradient_clip=0.5,
        momentum=0.0,
        nesterov=False,
        weight_decay=0.0,
        learning_rate=1.0,
        schedule="constant",
    )
    objective = make_objective("hinton")
    before = [parameter.detach().clone() for parameter in objective.parameters()]
    Trainer(objective, Batches(1), settings, show="off").fit()
    moved = torch.cat([(a - b).flatten() for a, b in zip(objective.parameters(), before, strict=True)])
    assert moved.norm().item() == pytest.approx(0.5, rel=1e-4)
    sgd = make_optimizer(objective.parameters(), make_settings(momentum=0.8, weight_decay=0.1, nesterov=False))
    assert isinstance(sgd, torch.optim.SGD)
    assert {name: sgd.defaults[name] for name in ("momentum", "weight_decay", "nesterov")} == {
        "momentum": 0.8,
        "weight_decay": 0.1,
        "nesterov": False,
    }
    assert isinstance(make_optimizer(objective.parameters(), make_settings(optimizer="adamw")), torch.optim.AdamW)
