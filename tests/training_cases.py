"""Small trainings for the tests of the trainer: networks, batches, methods, and how to compare two of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastkd._seeding import seeded
from fastkd.methods import (
    AT,
    BSS,
    CRD,
    DIST,
    DKD,
    DML,
    ONE,
    RKD,
    SP,
    SRD,
    SSKD,
    Baseline,
    FitNet,
    Hinton,
    Method,
    Objective,
    Procedure,
)
from fastkd.models.convnet import ConvNet
from fastkd.models.resnet import resnet
from fastkd.training import Trainer, TrainingSettings, checkpoint

BATCHES, BATCH, CLASSES = 6, 12, 4
LAYER = "features.3"  # of a ConvNet of two stages: the first pooled maps, 4 channels for the student, 8 for the teacher


class Batches:
    """Batch b of epoch e of rank r: noise around a pattern for each class, by (e, b, r)."""

    def __init__(self, batches: int = BATCHES, batch: int = BATCH, rank: int = 0, pixels: int = 8) -> None:
        self.batches, self.batch, self.rank = batches, batch, rank
        self.patterns = torch.randn(CLASSES, 1, pixels, pixels, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return self.batches

    def epoch(self, epoch: int, /, start: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for batch in range(start, self.batches):
            yield self.of(epoch * 1000 + batch * 10 + self.rank)

    def of(self, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        target = torch.randint(CLASSES, (self.batch,), generator=generator)
        noise = torch.randn(self.batch, 1, *self.patterns.shape[2:], generator=generator)
        return self.patterns[target] + 0.8 * noise, target, torch.arange(self.batch)


class Linear(nn.Module):
    """A network whose gradient of a batch is the mean of those of its parts: no batch norm."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with seeded(seed):
            self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def small(seed: int, widths: tuple[int, ...] = (4, 8)) -> ConvNet:
    return ConvNet(widths, classes=CLASSES, seed=seed)


def small_resnet(seed: int) -> nn.Module:
    return resnet(8, in_channels=1, num_classes=CLASSES, seed=seed)


METHODS: dict[str, Callable[[], Method]] = {
    "baseline": Baseline,
    "hinton": Hinton,
    "logit-std": lambda: Hinton(standardize=True),
    "dkd": DKD,
    "dist": DIST,
    "srd": lambda: SRD(4, 8, (LAYER,)),
    "crd": lambda: CRD(BATCH, 4, 8, (LAYER,), negatives=20, embedding=6),
    "sskd": lambda: SSKD(4, 8, (LAYER,)),
    "fitnet": lambda: FitNet(4, 8, (LAYER,)),
    "at": lambda: AT((LAYER,)),
    "sp": lambda: SP((LAYER,)),
    "rkd-da": lambda: RKD(layers=(LAYER,)),
    "bss": lambda: BSS(attack_size=8, attack_steps=2),
    "dml": DML,
    "one": lambda: ONE(branches=2, branch_at="layer3"),
}


def make_objective(method: str, seed: int = 0, make: Callable[[int], nn.Module] = small) -> Objective:
    """The teacher is always the same; the student's weights, and the method's, are of the seed."""
    with seeded(seed):
        made = METHODS[method]()
        student = made.build_student(lambda i: make(100 * seed + i))  # the gate of ONE draws, too
    return Objective(made, student, small(77, (8, 8)) if made.needs_teacher else None)


def make_settings(**changes: Any) -> TrainingSettings:
    return TrainingSettings(**{"epochs": 3, "learning_rate": 0.05, "checkpoint_every": 4, **changes})


def evaluated(network: nn.Module) -> dict[str, float]:
    """On one batch."""
    images, target, _ = Batches(batch=64).of(99)
    network.eval()
    with torch.no_grad():
        return {"test_accuracy": (network(images).argmax(1) == target).double().mean().item()}


def train(
    method: str,
    folder: Path | None,
    settings: TrainingSettings,
    *,
    seed: int = 0,
    resume: Any = False,
    stop_at: int | None = None,
    **options: Any,
) -> Trainer:
    """A training to its end, or to a step at which it is interrupted."""

    def on_step(step: int) -> None:
        if step == stop_at:
            raise InterruptionError

    options = {"evaluate": evaluated, "show": "off", "on_step": on_step, **options}
    objective = make_objective(method, seed, options.pop("make", small))
    trainer = Trainer(objective, options.pop("batches", Batches()), settings, folder=folder, **options)
    try:
        trainer.fit(resume=resume)
    except InterruptionError:
        assert stop_at is not None
    else:
        assert stop_at is None
    return trainer


class InterruptionError(Exception):
    """What befalls a training."""


def fit(
    procedure: Procedure, batches: Any, settings: TrainingSettings, folder: Path | None = None, **how: Any
) -> Trainer:
    """Trains it to its end, or to the step ``stop_at``."""
    stop, resume = how.pop("stop_at", None), how.pop("resume", False)

    def on_step(step: int) -> None:
        if step == stop:
            raise InterruptionError

    trainer = Trainer(procedure, batches, settings, folder=folder, show="off", on_step=on_step, **how)
    try:
        trainer.fit(resume=resume)
    except InterruptionError:
        assert stop is not None
    return trainer


def differences(a: Any, b: Any, name: str = "") -> list[str]:
    """Where two states differ in a bit, times apart."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted({*a, *b} - {"seconds"}, key=str)
        return [x for key in keys for x in differences(a.get(key), b.get(key), f"{name}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [x for i, pair in enumerate(zip(a, b, strict=True)) for x in differences(*pair, f"{name}.{i}")]
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [name]
    return [] if type(a) is type(b) and a == b else [name]


def assert_same_end(a: Path, b: Path) -> None:
    """Whether two trainings have come to the same, in all that they keep."""
    found = differences(*(checkpoint.read(folder / "checkpoint.pt") for folder in (a, b)))
    assert not found, found
    assert not differences(*(torch.load(folder / "model.pt", weights_only=True) for folder in (a, b)))
    assert not differences(*(metrics(folder) for folder in (a, b)))


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
