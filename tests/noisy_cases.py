"""Small trainings with noisy labels: 8 x 8 pixels, a third of the labels wrong, and every sample with an index of its own."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from training_cases import CLASSES, assert_same_end, evaluated, fit, make_settings, small, small_resnet
from training_cases import Batches as Patterns

from fastkd._seeding import seeded
from fastkd.data import Batch
from fastkd.methods import NoisyLabels
from fastkd.methods.registry import Given, create_procedure
from fastkd.training import Trainer, TrainingSettings, process_group

BATCH, BATCHES = 12, 6
ITEMS = BATCH * BATCHES
WRONG = 0.35


class Noisy:
    """The same samples in another order each epoch, two views each; rank r of two has every other batch."""

    def __init__(self, rank: int = 0, world_size: int = 1, *, views: int = 2, size: int = BATCH) -> None:
        self.rank, self.world_size, self.views, self.size = rank, world_size, views, size
        self.images, self.truth, _ = Patterns(batch=ITEMS).of(5)
        generator = torch.Generator().manual_seed(6)
        other = (self.truth + torch.randint(1, CLASSES, (ITEMS,), generator=generator)) % CLASSES
        self.wrong = torch.rand(ITEMS, generator=generator) < WRONG
        self.target = torch.where(self.wrong, other, self.truth)

    def __len__(self) -> int:
        return ITEMS // (self.size * self.world_size)

    def epoch(self, epoch: int, /, start: int = 0) -> Iterator[Batch]:
        order = torch.randperm(ITEMS, generator=torch.Generator().manual_seed(epoch))
        for number in range(start, len(self)):
            first = (number * self.world_size + self.rank) * self.size
            yield self.batch(order[first : first + self.size], epoch)

    def batch(self, index: Tensor, seed: int = 0) -> Batch:
        generator = torch.Generator().manual_seed(1000 + seed)
        images = self.images[index]
        views = [images + 0.2 * torch.randn(images.shape, generator=generator) for _ in range(self.views - 1)]
        return Batch(images, self.target[index], index, tuple(views))


def make(method: str, seed: int = 0, network: Any = None, **options: Any) -> NoisyLabels:
    """The weights are of the seed."""
    network = network or (small_resnet if method == "bldr" else small)
    with seeded(seed):
        given = Given(
            network(100 * seed),
            images=Noisy().images[:3],
            batch_size=BATCH,
            items=ITEMS,
            num_classes=CLASSES,
            make_student=lambda i: network(100 * seed + i),
        )
        made = create_procedure(method, given, **options)
    assert isinstance(made, NoisyLabels)
    return made


class Caught:
    """A step that keeps the losses of the parts and their gradients, and moves nothing."""

    epoch, epochs, iteration, iterations, rank, world_size, batches_per_step = 0, 10, 0, 4, 0, 1, 1

    def __init__(self, epoch: int = 0, **parameters: list[Tensor]) -> None:
        self.epoch, self.parameters = epoch, parameters
        self.progress = epoch / self.epochs
        self.losses: dict[str, Tensor] = {}
        self.gradients: dict[str, tuple[Tensor, ...]] = {}

    def update(self, loss: Tensor, *parts: str) -> None:
        for part in parts or self.parameters:
            self.losses[part] = loss.detach()
            self.gradients[part] = torch.autograd.grad(loss, self.parameters[part], retain_graph=True)


def caught(procedure: NoisyLabels, batch: Batch, epoch: int = 0) -> tuple[Caught, dict[str, Tensor]]:
    """An iteration of it in this epoch of ten, without a step; and its terms."""
    parameters = {name: list(part.parameters) for name, part in procedure.parts().items()}
    step = Caught(epoch, **parameters)
    terms = dict(procedure.iteration(batch, step))  # type: ignore[arg-type]
    return step, terms


def whole_and_in_parts(method: str, folder: Path, **options: Any) -> None:
    """A training that was stopped twice ends as one that was not, with the state of every sample."""
    settings = make_settings(epochs=4, learning_rate=0.02, checkpoint_every=2, ema=0.9)
    fit(make(method, **options), Noisy(), settings, folder / "whole", evaluate=evaluated)
    stops = sorted(random.Random(0).sample(range(1, 4 * BATCHES), 2))
    for i, stop in enumerate([*stops, None]):  # the weights of seed i are not those of the checkpoint
        there = (folder / "parts" / "checkpoint.pt").exists()
        procedure = make(method, i if there else 0, **options)
        fit(procedure, Noisy(), settings, folder / "parts", evaluate=evaluated, resume="auto", stop_at=stop)
    assert_same_end(folder / "whole", folder / "parts")


def in_two(rank: int, folder: Path, method: str, settings: TrainingSettings, options: dict[str, Any]) -> None:
    """One of two processes."""
    with process_group("cpu"):
        procedure = make(method, rank, **options)  # but those of rank 0 count
        batches = Noisy(rank, 2)
        Trainer(procedure, batches, settings, folder=folder / "two", show="off", evaluate=evaluated).fit()
        torch.save(procedure.state_dict(), folder / f"rank{rank}.pt")
