"""Small distillations from out-of-domain images: of 8 x 8 pixels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datafree_cases import QUICK, teacher
from torch import Tensor
from training_cases import CLASSES, Batches, evaluated, small

from fastkd._seeding import seeded
from fastkd.data import Batch
from fastkd.methods import Mosaic
from fastkd.methods.registry import Given, create_procedure
from fastkd.training import Trainer, TrainingSettings, process_group

BATCH, STEPS, SIDE = 6, 2, 8
MEAN, STD = 0.4, 0.3
CHANGES: dict[str, Any] = {
    **QUICK,
    "student_steps": STEPS,
    "patch_size": 4,
    "patches_per_image": 3,
    "discriminator_width": 4,
}


class Foreign:
    """Out-of-domain images: stripes, normalised. Batch b of epoch e of rank r is by (e, b, r)."""

    def __init__(self, batches: int = 5, rank: int = 0, images: int = BATCH * STEPS) -> None:
        self.batches, self.rank, self.images = batches, rank, images

    def __len__(self) -> int:
        return self.batches

    def epoch(self, epoch: int, /, start: int = 0) -> Iterator[Batch]:
        for batch in range(start, self.batches):
            yield Batch(foreign(epoch * 1000 + batch * 10 + self.rank, self.images))


def foreign(seed: int, images: int = BATCH * STEPS) -> Tensor:
    """Such images, ``[N, 1, 8, 8]``."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(images, 1, 1, SIDE, generator=generator).expand(-1, -1, SIDE, -1)
    return (pixels - MEAN) / STD


def mosaic(seed: int = 0, *, padding: int = 2, flip: bool = True, **options: Any) -> Mosaic:
    """The student, and what makes the images, are of the seed; the teacher is always the same."""
    of_images: dict[str, Any] = {
        "num_classes": CLASSES,
        "mean": (MEAN,),
        "std": (STD,),
        "padding": padding,
        "flip": flip,
    }
    with seeded(seed):
        few = Batches().of(0)[0]
        given = Given(small(seed), teacher(), few, BATCH, **of_images)
        made = create_procedure("mosaic", given, **{**CHANGES, **options})
    assert isinstance(made, Mosaic)
    return made


def in_two(rank: int, folder: Path, settings: TrainingSettings) -> None:
    """One of two processes."""
    with process_group("cpu"):
        procedure = mosaic(rank)
        batches = Foreign(rank=rank)
        Trainer(procedure, batches, settings, folder=folder / "two", show="off", evaluate=evaluated).fit()
        torch.save(procedure.state_dict(), folder / f"rank{rank}.pt")
