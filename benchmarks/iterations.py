"""Iterations of methods that train several networks in turn: what makes their updates, and by what contenders are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from benchmarks.bench_training import settle
from benchmarks.case import Settings, Work, relative_error
from benchmarks.trainer import Source
from fastkd.models import create
from fastkd.models.heads import linear_head

AUTHORS = "authors' way"
STUDENT = "student"
SURE = 3.0  # times the logits of first weights: a teacher that is sure of most images, as a trained one is
LEARNING_RATE = 1e-5  # images, and the share that is selected, stay as they are over all rounds
LEAST_LOSS = 0.01  # differences are relative to losses, but a sum of terms may be 0
SEED = 1  # of the noise on which contenders are compared
BYTES_OF_AN_IMAGE = 4 << 20  # activations, and images of all rounds

# teacher and student, images, batch, maps of the generator, steps of the student
LENET = ("lenet5", "lenet5-half", (1, 28, 28))
RESNET = ("resnet14", "resnet8", (3, 32, 32))
WHOLE_QUICK = ((*LENET, 64, 16, 5), (*RESNET, 32, 16, 3))
WHOLE_FULL = ((*LENET, 256, 128, 10), (*RESNET, 64, 16, 10))
WHOLE_GPU = ((*LENET, 256, 128, 10), (*RESNET, 256, 128, 10))

Shape = tuple[int, int, int]
Trained = dict[str, list[nn.Parameter]]  # by the name of a part, what an update of it trains


class First(NamedTuple):
    """Of the first updates of all parts, from the first weights and the random numbers that all contenders share."""

    losses: Tensor
    gradients: Tensor
    """Of each update, of norm 1, one after the other."""


class Done(NamedTuple):
    """What an iteration returns."""

    loss: Tensor
    """Of the student."""
    first: First
    alike: bool = True
    """Whether the images are the reference's; on others losses are nearly the same, and gradients are not."""


def compared(
    settings: Settings,
    ours: Callable[[], Done],
    theirs: Callable[[], Done],
    truth: First,
    tolerance: float,
    *,
    peer_tolerance: float | None = None,
    target: float | None = None,
) -> Work:
    """fastkd and the authors' way; the target is of a CPU, and both have the same tolerance unless told otherwise."""

    def error(done: Done) -> float:
        if not done.loss.isfinite():
            return float("nan")
        losses, gradients = done.first
        found = [((losses - truth.losses).abs() / truth.losses.abs().clamp(min=LEAST_LOSS)).max()]
        if done.alike:
            found.append(torch.tensor(relative_error(gradients, truth.gradients)))
        return float(torch.stack([x.cpu().double() for x in found]).max())  # NaN if one of them is

    targets = {} if target is None or settings.device.type == "cuda" else {AUTHORS: target}
    peer_tolerance = tolerance if peer_tolerance is None else peer_tolerance
    return Work(ours, {AUTHORS: theirs}, error, tolerance, peer_tolerance, targets=targets, latency=True)


def student_and_teacher(
    settings: Settings, student_name: str, teacher_name: str, images: Tensor
) -> tuple[nn.Module, nn.Module]:
    """Networks for images; the teacher is sure of most of these, and frozen."""
    teacher, student = (
        create(name, in_channels=images.shape[1], seed=seed).to(settings.device)
        for seed, name in enumerate((teacher_name, student_name))
    )
    settle(teacher, images)
    with torch.no_grad():
        for parameter in linear_head(teacher.eval(), images).layer.parameters():
            parameter.mul_(SURE)
    return student, teacher.requires_grad_(False)


def parameters_of(**parts: nn.Module) -> Trained:
    """What is trained of networks."""
    return {name: list(part.parameters()) for name, part in parts.items()}


class Updates:
    """What makes the updates of an iteration, a :class:`fastkd.methods.Step`: here gradients, and no step down them, as where
    what networks return is given."""

    epoch, epochs, iteration, iterations, rank, world_size, progress = 0, 1, 0, 1, 0, 1, 0.0
    batches_per_step = 1
    source: Source = None
    """Of the crops of contenders, where all are to have the same; else each draws its own."""

    def __init__(self, trained: Trained) -> None:
        self.trained = trained

    def update(self, loss: Tensor, *parts: str) -> None:
        """Of one part."""
        (name,) = parts
        torch.autograd.grad(loss, self.trained[name])

    def run(self, *_: Any, **__: Any) -> Any:
        """Not asked for."""
        raise NotImplementedError

    def restart(self, *_: str) -> None:
        """Not asked for."""
        raise NotImplementedError


class Steps(Updates):
    """Makes a step of an optimizer in each update: the student's is SGD, the others' are Adam."""

    def __init__(self, trained: Trained) -> None:
        super().__init__(trained)
        self.optimizers: dict[str, Optimizer] = {
            name: SGD(parameters, LEARNING_RATE, momentum=0.9, weight_decay=5e-4)
            if name == STUDENT
            else Adam(parameters, LEARNING_RATE)
            for name, parameters in trained.items()
        }

    def update(self, loss: Tensor, *parts: str) -> None:
        """A step of one part."""
        (name,) = parts
        torch.autograd.backward(loss, inputs=self.trained[name])
        self.optimizers[name].step()
        self.optimizers[name].zero_grad()


class FirstSteps(Updates):
    """Makes no step, and keeps what each part's first one would be."""

    def __init__(self, trained: Trained) -> None:
        super().__init__(trained)
        self.source = default_generator(trained[STUDENT][0].device)
        self.losses: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}

    def update(self, loss: Tensor, *parts: str) -> None:
        """As it says."""
        (name,) = parts
        if name not in self.losses:
            self.losses[name] = loss.detach()
            self.gradients[name] = unit(*torch.autograd.grad(loss, self.trained[name]))

    def found(self) -> First:
        """Of all parts, in the order of their updates."""
        return First(torch.stack(list(self.losses.values())), torch.cat(list(self.gradients.values())))


def default_generator(device: torch.device) -> torch.Generator:
    """Of random numbers on a device, where none is named."""
    if device.type == "cpu":
        return torch.default_generator
    generator: torch.Generator = torch.cuda.default_generators[device.index or 0]
    return generator


def unit(*tensors: Tensor) -> Tensor:
    """All values side by side, of norm 1: the student's gradients count no less than the generator's."""
    values = torch.cat([x.detach().flatten() for x in tensors])
    return values / values.norm()


class Iterations:
    """An iteration at each call.

    Args:
        trained: the parts.
        iteration: to a loss of the student.
        updates: what makes its updates.
        alike: as of :class:`Done`.
    """

    def __init__(
        self,
        trained: Trained,
        iteration: Callable[[Any], Tensor],
        *,
        updates: type[Updates] = Steps,
        alike: bool = True,
    ) -> None:
        self._iteration, self._updates, self._alike = iteration, updates(trained), alike
        first = FirstSteps(trained)
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            iteration(first)
        self.first = first.found()

    def __call__(self) -> Done:
        return Done(self._iteration(self._updates), self.first, self._alike)
