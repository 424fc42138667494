"""Small trainings by MixMatch with wrong labels, on images of 8 x 8 pixels; and what authors' code does row by row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from training_cases import CLASSES, Batches, evaluated, small_resnet

from fastkd._seeding import mixed_generator, seeded
from fastkd.data import Batch
from fastkd.methods.noisy import NoisyLabels, terms
from fastkd.methods.registry import Given, create_procedure
from fastkd.training import Trainer, TrainingSettings, process_group

ITEMS, BATCH = 48, 12
QUICK: dict[str, dict[str, Any]] = {
    "dividemix": {"warmup_share": 0.25, "ramp_share": 0.5},
    "pes": {"warmup_share": 0.25, "refine_share": 0.25, "ramp_share": 0.5},
}


class Views:
    """A set with wrong labels, all of it in each epoch, its order and views by (epoch, batch, rank); a part for each rank."""

    def __init__(
        self,
        items: int = ITEMS,
        batch: int = BATCH,
        *,
        rate: float = 0.4,
        noise: float = 0.8,
        rank: int = 0,
        world_size: int = 1,
        views: int = 2,
        seed: int = 5,
    ) -> None:
        self.batch, self.rank, self.world_size, self.views = batch, rank, world_size, views
        generator = torch.Generator().manual_seed(seed)
        self.truth = torch.arange(items) % CLASSES
        patterns = Batches().patterns
        self.images = patterns[self.truth] + noise * torch.randn(items, *patterns.shape[1:], generator=generator)
        wrong = torch.zeros(items).index_fill(0, torch.randperm(items, generator=generator)[: round(rate * items)], 1.0)
        other = torch.randint(1, CLASSES, (items,), generator=generator)
        self.target = (self.truth + wrong.long() * other) % CLASSES

    def __len__(self) -> int:
        return len(self.truth) // (self.batch * self.world_size)

    def epoch(self, epoch: int, /, start: int = 0) -> Iterator[Batch]:
        order = torch.randperm(len(self.truth), generator=mixed_generator("order", epoch))
        for number in range(start, len(self)):
            first = (number * self.world_size + self.rank) * self.batch
            index = order[first : first + self.batch]
            generator = mixed_generator("views", epoch, number, self.rank)
            images = self.images[index]
            views = [images + 0.1 * torch.randn(images.shape, generator=generator) for _ in range(self.views)]
            yield Batch(views[0], self.target[index], index, tuple(views[1:]))


def semi(method: str, seed: int = 0, *, items: int = ITEMS, make: Any = small_resnet, **options: Any) -> Any:
    """The student, and what is beside it, are of the seed."""
    with seeded(seed):
        given = Given(
            make(seed),
            images=Batches().of(0)[0],
            items=items,
            num_classes=CLASSES,
            make_student=lambda i: make(100 * seed + i),
        )
        made = create_procedure(method, given, **{**QUICK[method], **options})
    assert isinstance(made, NoisyLabels)
    return made


class Gradients:
    """A step that keeps each loss and its gradients in the parts that it was for, and changes no weight."""

    rank, world_size, batches_per_step = 0, 1, 1

    def __init__(self, procedure: NoisyLabels, epoch: int = 0, epochs: int = 8, iteration: int = 0) -> None:
        self.epoch, self.epochs, self.iteration, self.iterations = epoch, epochs, iteration, 4
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


def mixing(seed: int, rows: int, alpha: float) -> tuple[Tensor, float]:
    """The order and the share that a MixMatch draws after this seed."""
    torch.manual_seed(seed)
    mixed = terms.mixup(torch.zeros(rows, 1), torch.zeros(rows, 1), alpha)
    return mixed.order, mixed.share


def cut_mixmatch(
    network: nn.Module, views: list[Tensor], labels: Tensor, labelled: Tensor, order: Tensor, share: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of all mixed rows; of the labelled ones logarithms of probabilities and labels; the mean squared error of the
    others. Rows are cut out as authors' code has them."""
    images, targets = torch.cat(views), torch.cat([labels] * len(views))
    images = share * images + (1 - share) * images[order]
    targets = share * targets + (1 - share) * targets[order]
    logits = network(images)
    rows = torch.cat([labelled] * len(views)).bool()
    log_p = logits[rows].log_softmax(1)
    squared = ((logits[~rows].softmax(1) - targets[~rows]) ** 2).mean()
    return logits, log_p, targets[rows], squared


def sharp(p: Tensor, temperature: float = 0.5) -> Tensor:
    powers = p ** (1 / temperature)
    return powers / powers.sum(1, keepdim=True)


def assert_gradients(ours: tuple[Tensor, ...], loss: Tensor, module: Any) -> None:
    """Whether these are the gradients of another loss in the parameters of a module, or in some."""
    parameters = list(module.parameters()) if isinstance(module, nn.Module) else module
    theirs = torch.autograd.grad(loss, parameters)
    assert len(ours) == len(theirs)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other)


def in_two(rank: int, folder: Path, settings: TrainingSettings, method: str) -> None:
    """One of two processes."""
    with process_group("cpu"):
        procedure = semi(method, rank)
        batches = Views(rank=rank, world_size=2, batch=6)
        Trainer(procedure, batches, settings, folder=folder / "two", show="off", evaluate=evaluated).fit()
        torch.save(procedure.state_dict(), folder / f"rank{rank}.pt")
