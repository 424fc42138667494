"""Small data-free distillations: every method, on images of 8 x 8 pixels."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from training_cases import CLASSES, Batches, evaluated, small, small_resnet

from fastkd._seeding import seeded
from fastkd.data import NoBatches
from fastkd.methods.datafree import DataFree
from fastkd.methods.registry import Given, create_procedure, find, names
from fastkd.training import Trainer, TrainingSettings, process_group

METHODS = tuple(name for name in names() if find(name).family == "data-free")
BATCH, ITERATIONS = 12, 5
QUICK: dict[str, Any] = {"latent": 6, "width": 4}
CHANGES: dict[str, dict[str, Any]] = {
    "deep-inversion": {"generator_steps": 3, "student_steps": 2},
    "cmi": {"generator_steps": 3, "student_steps": 2, "capacity": 32},
    "nayer": {"generator_steps": 3, "student_steps": 2, "renew": 2},
    "ta-dfkd": {"student_steps": 3},
}


def datafree(method: str, seed: int = 0, **options: Any) -> DataFree:
    """The student, and what makes the images, are of the seed; the teacher is always the same."""
    make = small_resnet if method == "zskt" else small
    with seeded(seed):
        given = Given(
            make(seed), teacher(make), Batches().of(0)[0], BATCH, num_classes=CLASSES, mean=(0.4,), std=(0.3,)
        )
        made = create_procedure(method, given, **{**QUICK, **CHANGES.get(method, {}), **options})
    assert isinstance(made, DataFree)
    return made


def teacher(make: Any = small) -> nn.Module:
    """With statistics of images that are not 0 and 1."""
    network: nn.Module = make(77)
    network.train()
    with torch.no_grad():
        for i in range(3):
            network(0.5 + 2.0 * Batches().of(i)[0])
    return network.eval()


def broken(images: Tensor, rows: Any, value: float) -> Tensor:
    images = images.clone()
    images[rows, 0, 1, 2] = value
    return images


def in_two(rank: int, folder: Path, settings: TrainingSettings, method: str) -> None:
    """One of two processes."""
    with process_group("cpu"):
        procedure = datafree(method, rank)
        Trainer(procedure, NoBatches(ITERATIONS), settings, folder=folder / "two", show="off", evaluate=evaluated).fit()
        torch.save(procedure.state_dict(), folder / f"rank{rank}.pt")


class Steps:
    """What a procedure is given, that makes no step; it counts."""

    epoch, epochs, iteration, iterations, rank, world_size, progress = 0, 1, 0, 1, 0, 1, 0.0
    batches_per_step = 1

    def __init__(self) -> None:
        self.updated: Counter[str] = Counter()

    def update(self, loss: Tensor, *parts: str) -> None:
        assert loss.requires_grad
        assert loss.isfinite()
        self.updated.update(parts)

    def restart(self, *parts: str) -> None:
        self.updated.update(f"restart {part}" for part in parts)
