"""The experiment: one teacher, one unlabeled collection, three ways to train the same small student.

The teacher learns the digits from a labelled third of them. Its students see either those labelled digits (the
reference; not to be had where the method is needed) or only the unlabeled collection, by biased or by uniform draws.
All students start from the same weights, take the same number of steps and see the same number of images. Each kind is
trained several times: with 599 test images, one run of each says little.

Everything random comes from the seed, by generators of its own, and the CPU part runs on one thread (networks this
small lose more by waiting for threads than they gain): the same seed gives the same results, and torch's global
generator and number of threads are left as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fastkd import scores
from fastkd._threads import one_thread
from fastkd.alias_table import AliasTable
from fastkd.data import digits
from fastkd.losses import KDLoss, KLDivLoss
from fastkd.models.convnet import ConvNet, count_parameters
from fastkd.studies.demo.loop import distill, optimize
from fastkd.training.inference import predict

TEACHER_WIDTHS = (32, 64, 64)
STUDENT_WIDTHS = (8, 16)
CURVE_POINTS = 30
ALPHA = 0.9  # weight of the teacher against the labels, for the students that have labels


@dataclass(frozen=True)
class Settings:
    """What the experiment can vary."""

    seed: int = 0
    """Of everything random: split, collection, initial weights, draws."""
    iqpr: float = 5.0
    """How many times as often an image at the third quartile of scores is drawn as one at the first; 1 = uniform."""
    steps: int = 1000
    """Optimisation steps of each student."""
    batch_size: int = 128
    """Images in each batch."""
    collection_size: int = 20_000
    """Images in the unlabeled collection."""
    relevant_share: float = 0.16
    """Share of the collection that are digits (as in the paper's "ori + irrel"); the others are photo patches."""
    temperature: float = 2.0
    """Temperature T of the distillation loss."""
    repeats: int = 3
    """Students of each kind, each from its own initial weights; the results are means over them."""
    teacher_steps: int = 400
    """Optimisation steps of the teacher."""


class Progress(Protocol):
    """Shows how far a phase is: ``with progress("teacher", 400) as advance: ... advance()``."""

    def __call__(self, phase: str, steps: int, /) -> AbstractContextManager[Callable[[], None]]: ...


class Source(NamedTuple):
    """What a student learns from: images ``[N, 1, 8, 8]``, teacher's logits ``[N, K]``, classes ``[N]`` if known.

    The images are where the networks run, the others where the operators do.
    """

    images: Tensor
    logits: Tensor
    target: Tensor | None = None


@dataclass
class Arm:
    """One way to train the student, and what came of it: an entry for each repeat in each list, all on the CPU."""

    name: str
    iqpr: float | None = None
    """None: trained on the labelled digits."""
    inverse_temperature: float | None = None
    """lambda, where there is an IQPR."""
    probabilities: Tensor | None = None
    """Of each image of the collection to be drawn, float64 ``[N]``, where there is an IQPR."""
    curves: list[list[float]] = field(default_factory=list)
    """Test accuracy at ``Results.curve_steps``."""
    agreement: list[float] = field(default_factory=list)
    """Share of test images to which student and teacher give the same class."""
    counts: list[Tensor] = field(default_factory=list)
    """How often each image was drawn, int64 ``[N]``."""


@dataclass
class Results:
    """All that report and figure show."""

    settings: Settings
    collection: digits.Collection
    scores: Tensor
    """T1000 of each image of the collection, float64 ``[N]``, on the CPU."""
    test_size: int
    teacher_accuracy: float
    teacher_parameters: int
    student_parameters: int
    curve_steps: list[int]
    labelled: Arm
    biased: Arm
    uniform: Arm

    @property
    def arms(self) -> tuple[Arm, Arm, Arm]:
        return self.labelled, self.biased, self.uniform

    def accuracy(self, arm: Arm, share_of_steps: float = 1.0) -> list[float]:
        """Test accuracy of each repeat at (the first evaluation after) a share of the steps."""
        due = share_of_steps * self.settings.steps
        point = next(i for i, step in enumerate(self.curve_steps) if step >= due)
        return [curve[point] for curve in arm.curves]


class Devices(NamedTuple):
    """Where the networks run, and where fastkd's operators do: there too, or on the CPU for want of CUDA kernels."""

    networks: torch.device
    operators: torch.device


def run(settings: Settings, devices: Devices, progress: Progress) -> Results:
    """Trains the teacher and all students."""
    with one_thread():
        return _run(settings, devices, progress)


def _run(settings: Settings, devices: Devices, progress: Progress) -> Results:
    device = devices.networks
    seeds = _seeds(settings.seed)
    generator = torch.Generator().manual_seed(next(seeds))
    labelled, unlabeled, test = digits.split(generator)
    collection = digits.collection(unlabeled, settings.collection_size, settings.relevant_share, generator)
    # as many variations of the labelled digits as the collection has of the unlabeled ones, and each at least once
    training = digits.vary(labelled, max(int(collection.relevant.sum()), len(labelled.target)), generator)
    training, test = training.to(device), test.to(device)

    teacher = ConvNet(TEACHER_WIDTHS, seed=next(seeds)).to(device)
    _train_teacher(teacher, training, settings, next(seeds), progress)
    images = collection.images.to(device)
    labelled_logits, collection_logits = (predict(teacher, x).to(devices.operators) for x in (training.images, images))
    labelled_source = Source(training.images, labelled_logits, training.target.to(devices.operators))
    collection_source = Source(images, collection_logits)
    teacher_classes = predict(teacher, test.images).argmax(1)
    u = scores.t1000(collection_source.logits)

    curve_steps = _curve_steps(settings.steps)
    arms = (Arm("labelled digits"), Arm("biased draws", settings.iqpr), Arm("uniform draws", 1.0))
    for repeat in range(settings.repeats):
        initial_weights = next(seeds)
        for arm in arms:
            student = ConvNet(STUDENT_WIDTHS, seed=initial_weights).to(device)
            if arm.iqpr is None:
                source = labelled_source
                table = AliasTable(u.new_zeros(len(training.target)), inverse_temperature=0.0, seed=next(seeds))
            else:
                source = collection_source
                table = AliasTable(u, iqpr=arm.iqpr, seed=next(seeds))
                arm.inverse_temperature = table.inverse_temperature.item()
                arm.probabilities = table.probabilities().cpu()
            phase = f"student {repeat + 1} of {settings.repeats}, {arm.name}"
            with progress(phase, settings.steps) as advance:
                curve, counts = _train_student(student, source, table, settings, test, curve_steps, advance)
            arm.curves.append(curve)
            arm.counts.append(counts)
            arm.agreement.append(_share_equal(predict(student, test.images).argmax(1), teacher_classes))
    return Results(
        settings,
        collection,
        u.cpu(),
        len(test.target),
        _share_equal(teacher_classes, test.target),
        count_parameters(teacher),
        count_parameters(student),
        curve_steps,
        *arms,
    )


def _train_teacher(
    teacher: nn.Module, training: digits.Labelled, settings: Settings, seed: int, progress: Progress
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def loss_of_batch() -> Tensor:
        drawn = torch.randint(len(training.target), (settings.batch_size,), generator=generator)
        drawn = drawn.to(training.target.device)
        return F.cross_entropy(teacher(training.images[drawn]), training.target[drawn])

    with progress("teacher", settings.teacher_steps) as advance:
        optimize(
            teacher, loss_of_batch, steps=settings.teacher_steps, learning_rate=2e-3, on_step=lambda _step: advance()
        )


def _train_student(
    student: nn.Module,
    source: Source,
    table: AliasTable,
    settings: Settings,
    test: digits.Labelled,
    curve_steps: list[int],
    advance: Callable[[], None],
) -> tuple[list[float], Tensor]:
    """The test accuracies at ``curve_steps``, and how often each image was drawn, on the CPU."""
    criterion = KLDivLoss(settings.temperature) if source.target is None else KDLoss(settings.temperature, alpha=ALPHA)
    due = set(curve_steps)
    curve = []

    def on_step(step: int) -> None:
        if step in due:
            curve.append(_share_equal(predict(student, test.images).argmax(1), test.target))
        advance()

    counts = distill(
        student,
        source.images,
        source.logits,
        table,
        criterion,
        steps=settings.steps,
        batch_size=settings.batch_size,
        target=source.target,
        on_step=on_step,
    )
    return curve, counts.cpu()


def _curve_steps(steps: int) -> list[int]:
    """Evenly spaced step numbers, the last one included."""
    points = min(CURVE_POINTS, steps)
    return [steps * (i + 1) // points for i in range(points)]


def _share_equal(a: Tensor, b: Tensor) -> float:
    return (a == b).double().mean().item()


def _seeds(seed: int) -> Iterator[int]:
    """Many seeds out of one."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield int(torch.randint(2**62, (), generator=generator))
