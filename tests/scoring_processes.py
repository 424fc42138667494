"""What the tests of scoring run in processes of their own."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
from torch import nn

from fastkd.data import ArrayCollection
from fastkd.models.resnet import resnet
from fastkd.scores import make_scorer
from fastkd.scoring import ScoreFile, score_collection
from fastkd.training import process_group

ITEMS, BATCH, CHUNK = 205, 8, 16


def images() -> torch.Tensor:
    return torch.randint(256, (ITEMS, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def teacher(seed: int = 1) -> nn.Module:
    return resnet(8, seed=seed)


def score(path: Path, name: str = "t1000", *, die_after: int = 0, seed: int = 1) -> ScoreFile:
    """All of them, or as many images as it is to live for."""
    scorer = make_scorer(name, teacher(seed))
    if die_after:
        whole = scorer._scores

        def mortal(batch: torch.Tensor) -> torch.Tensor:
            mortal.seen += len(batch)  # type: ignore[attr-defined]
            if mortal.seen > die_after:  # type: ignore[attr-defined]
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(batch)

        mortal.seen = 0  # type: ignore[attr-defined]
        scorer._scores = mortal  # type: ignore[method-assign]
    return score_collection(
        scorer, ArrayCollection(images()), path, name=name, mean=0.5, std=0.25, batch_size=BATCH, chunk=CHUNK
    )


def score_alone(path: str, name: str, die_after: int) -> None:
    torch.set_num_threads(1)
    score(Path(path), name, die_after=die_after)


def score_in_ranks(_rank: int, path: Path, name: str) -> None:
    with process_group("cpu"):
        score(path, name)
