"""Small trainings with noisy labels: 8 x 8 pixels, some labels wrong, every sample with an index of its own."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from training_cases import (
    CLASSES,
    Batches,
    assert_same_end,
    evaluated,
    fit,
    make_settings,
    small,
    small_resnet,
)

from fastkd._seeding import mixed_generator, seeded
from fastkd.data import Batch
from fastkd.methods import NoisyLabels
from fastkd.methods.registry import Given, create_procedure
from fastkd.training import Trainer, TrainingSettings, process_group

BATCH, ITEMS = 12, 72
STAGED = ("bldr", "dividemix", "pes")  # methods that are tried on a network with stages
QUICK: dict[str, dict[str, Any]] = {
    "dividemix": {"warmup_share": 0.25, "ramp_share": 0.5},
    "pes": {"warmup_share": 0.25, "refine_share": 0.25, "ramp_share": 0.5},
}
"""Shares of a training of four epochs or so."""


class Noisy:
    """All samples in each epoch, in another order; the first view is the image itself. A part for each rank."""

    def __init__(
        self,
        items: int = ITEMS,
        *,
        size: int = BATCH,
        rate: float = 0.4,
        noise: float = 0.8,
        rank: int = 0,
        world_size: int = 1,
        views: int = 2,
        seed: int = 5,
    ) -> None:
        self.size, self.rank, self.world_size, self.views = size, rank, world_size, views
        generator = torch.Generator().manual_seed(seed)
        self.truth = torch.arange(items) % CLASSES
        patterns = Batches().patterns
        self.images = patterns[self.truth] + noise * torch.randn(items, *patterns.shape[1:], generator=generator)
        self.wrong = torch.zeros(items, dtype=torch.bool)
        self.wrong[torch.randperm(items, generator=generator)[: round(rate * items)]] = True
        other = torch.randint(1, CLASSES, (items,), generator=generator)
        self.target = (self.truth + self.wrong * other) % CLASSES

    def __len__(self) -> int:
        return len(self.truth) // (self.size * self.world_size)

    def epoch(self, epoch: int, /, start: int = 0) -> Iterator[Batch]:
        order = torch.randperm(len(self.truth), generator=mixed_generator("order", epoch))
        for number in range(start, len(self)):
            first = (number * self.world_size + self.rank) * self.size
            yield self.batch(order[first : first + self.size], epoch, number, self.rank)

    def batch(self, index: Tensor, *place: int) -> Batch:
        generator = mixed_generator("views", *place)
        images = self.images[index]
        views = [images + 0.1 * torch.randn(images.shape, generator=generator) for _ in range(self.views - 1)]
        return Batch(images, self.target[index], index, tuple(views))


def make(method: str, seed: int = 0, *, items: int = ITEMS, network: Any = None, **options: Any) -> NoisyLabels:
    """The weights are of the seed."""
    network = network or (small_resnet if method in STAGED else small)
    with seeded(seed):
        given = Given(
            network(100 * seed),
            images=Noisy().images[:3],
            batch_size=BATCH,
            items=items,
            num_classes=CLASSES,
            make_student=lambda i: network(100 * seed + i),
        )
        made = create_procedure(method, given, **{**QUICK.get(method, {}), **options})
    assert isinstance(made, NoisyLabels)
    return made


class Caught:
    """A step that keeps each loss and its gradients in the parts that it was for, and changes no weight."""

    rank, world_size, batches_per_step = 0, 1, 1

    def __init__(self, procedure: NoisyLabels, epoch: int = 0, epochs: int = 8, iteration: int = 0) -> None:
        self.epoch, self.epochs, self.iteration, self.iterations = epoch, epochs, iteration, 4
        self.progress = epoch / epochs
        self._parts = procedure.parts()
        self.losses: list[Tensor] = []
        self.parts: list[tuple[str, ...]] = []
        self.gradients: list[tuple[Tensor, ...]] = []
        self.restarted: list[str] = []

    def update(self, loss: Tensor, *parts: str) -> None:
        parameters = [p for name in parts or self._parts for p in self._parts[name].parameters]
        self.gradients.append(torch.autograd.grad(loss, parameters))
        self.losses.append(loss.detach())
        self.parts.append(parts or tuple(self._parts))

    def restart(self, *parts: str) -> None:
        self.restarted += parts


def caught(procedure: NoisyLabels, batch: Batch, epoch: int = 0) -> tuple[Caught, dict[str, Tensor]]:
    """An iteration of it in this epoch of ten, without a step; and its terms."""
    step = Caught(procedure, epoch, 10)
    terms = dict(procedure.iteration(batch, step))
    return step, terms


def assert_gradients(ours: tuple[Tensor, ...], loss: Tensor, parameters: Any, **how: Any) -> None:
    """Whether these are the gradients of another loss in these parameters, or in all of a module."""
    parameters = list(parameters.parameters() if hasattr(parameters, "parameters") else parameters)
    theirs = torch.autograd.grad(loss, parameters)
    assert len(ours) == len(theirs)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, **how)


def whole_and_in_parts(method: str, folder: Path, **options: Any) -> dict[str, Any]:
    """A training that was stopped twice ends as one that was not, with the state of every sample; its last checkpoint."""
    settings = make_settings(epochs=4, learning_rate=0.02, checkpoint_every=2, ema=0.9)
    fit(make(method, **options), Noisy(), settings, folder / "whole", evaluate=evaluated)
    stops = sorted(random.Random(0).sample(range(1, 4 * ITEMS // BATCH), 2))
    for i, stop in enumerate([*stops, None]):  # the weights of seed i are not those of the checkpoint
        there = (folder / "parts" / "checkpoint.pt").exists()
        procedure = make(method, i if there else 0, **options)
        fit(procedure, Noisy(), settings, folder / "parts", evaluate=evaluated, resume="auto", stop_at=stop)
    assert_same_end(folder / "whole", folder / "parts")
    state: dict[str, Any] = torch.load(folder / "parts" / "checkpoint.pt", weights_only=True)
    return state


def in_two(rank: int, folder: Path, method: str, settings: TrainingSettings, options: dict[str, Any]) -> None:
    """One of two processes."""
    with process_group("cpu"):
        procedure = make(method, rank, **options)  # but those of rank 0 count
        batches = Noisy(rank=rank, world_size=2)
        Trainer(procedure, batches, settings, folder=folder / "two", show="off", evaluate=evaluated).fit()
        torch.save(procedure.state_dict(), folder / f"rank{rank}.pt")
