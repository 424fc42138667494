"""An iteration of TA-DFKD against the same one as its authors' code makes it: a step of the generator, then several of the
student on images that the teacher is sure of.

Theirs runs the teacher three times on a batch: for the images, in slices of 32 for the losses, which go to the host and to
scikit-learn, and on what was selected. Each step of the student has rounds of its own, two or more, cut to a batch. Ours
runs it once and fits all batches in one call; what one step leaves, the next one takes.

Both make as many updates of the student, on as many images, down the same losses: the Jensen-Shannon divergence is the exact
one, where the published code clamps predictions to [.01, .99] (``js-published``) at the same cost. The published hooks measure
a batch norm's input whenever the teacher runs; here only where a loss wants it, in favour of the peer.

Iterations are there whole and, of larger batches, without their networks, where what these return is given.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from benchmarks import floors
from benchmarks.bench_training import OTHER_MASK, Select, at_most, reference_select, sklearn_select
from benchmarks.case import Case, Contest, Settings, Work
from benchmarks.iterations import (
    BYTES_OF_AN_IMAGE,
    WHOLE_FULL,
    WHOLE_GPU,
    WHOLE_QUICK,
    Done,
    First,
    Iterations,
    Shape,
    Updates,
    compared,
    parameters_of,
    student_and_teacher,
)
from fastkd.methods.datafree import DataFree, terms
from fastkd.methods.datafree.judged import glance, judge
from fastkd.methods.datafree.lessons import Lessons
from fastkd.methods.datafree.watched_teacher import Seen, WatchedTeacher
from fastkd.methods.registry import Given, create_procedure

LATENT = 1000  # of the method
SLICE = 32  # images of which the authors' code takes the losses at once
LEAST_ROUNDS = 2  # of which it selects a batch
ENOUGH_ROUNDS = 50  # theirs has no end
SMALLEST = 1e-12  # of a probability, before its logarithm
UNSURE = 0.3  # share of images, where logits are given
TOLERANCE = 1e-4
WHOLE_TARGET, BETWEEN_TARGET = 1.3, 10.0  # on a CPU
COPIES = (
    "Most of fastkd's time goes into copying images to fresh memory. It reads those that are not selected, too, so as not to "
    "wait for their number; the peer copies the others alone."
)
NO_IMAGE = (1, 1, 1)  # selection and losses alone
# batch, classes, images, steps of the student
BETWEEN = ((1024, 10, NO_IMAGE, 10), (1024, 10, (1, 28, 28), 10), (1024, 100, (3, 32, 32), 10))


def cases(settings: Settings) -> Iterator[Case]:
    """Iterations, and what of them is no network."""
    for size in settings.pick(WHOLE_QUICK, WHOLE_FULL, WHOLE_GPU):
        yield _whole(settings, *size)
    for between in settings.pick(BETWEEN, (), BETWEEN):
        yield _between(settings, *between)


# Losses as they are written in plain torch.


def plain_js(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Jensen-Shannon divergence over ln 2, mean over the rows of ``[B, K]``."""
    p, q = (logits.softmax(1).clamp(SMALLEST, 1.0) for logits in (student_logits, teacher_logits))
    middle = (0.5 * (p + q)).clamp(SMALLEST, 1.0).log()
    nats = F.kl_div(middle, p, reduction="batchmean") + F.kl_div(middle, q, reduction="batchmean")
    return 0.5 * nats / math.log(2.0)


def plain_statistics(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """Distance of mean and variance of what goes into a batch norm to those that it keeps."""
    mean, running_mean, running_var = x.mean((0, 2, 3)), norm.running_mean, norm.running_var
    var = x.permute(1, 0, 2, 3).contiguous().view(x.shape[1], -1).var(1, unbiased=False)
    assert running_mean is not None
    assert running_var is not None
    return (mean - running_mean).norm() + (var - running_var).norm()


def plain_total_variation(images: Tensor) -> Tensor:
    """Norms of the differences of neighbours in four directions."""
    right = (images[:, :, :, :-1] - images[:, :, :, 1:]).norm()
    down = (images[:, :, :-1] - images[:, :, 1:]).norm()
    falling = (images[:, :, :-1, :-1] - images[:, :, 1:, 1:]).norm()
    rising = (images[:, :, 1:, :-1] - images[:, :, :-1, 1:]).norm()
    return right + down + falling + rising


# An iteration with its networks.


class Theirs:
    """The authors' way.

    Args:
        weights: of the generator's terms, by name.
        select: losses to a mask.
        sees_all: whether the student, whose batch norms look at the batch, sees all of the generator's images, as ours does,
            before those that are selected count; else these alone.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        generator: nn.Module,
        batch: int,
        steps: int,
        weights: dict[str, float],
        select: Select,
        *,
        sees_all: bool = False,
    ) -> None:
        self.student, self.teacher, self.generator = student, teacher, generator
        self.batch, self.steps, self.weights, self.select, self.sees_all = batch, steps, weights, select, sees_all
        self.statistics: list[Tensor] | None = None  # of the batch norms, where they are asked for
        if weights["bn_statistics"]:
            for module in teacher.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.register_forward_pre_hook(self._measure)

    def iteration(self, step: Updates) -> Tensor:
        """One of the generator and all of the student; the student's mean loss."""
        step.update(self.generator_loss(), "generator")
        losses = []
        for _ in range(self.steps):
            images = self.clean_images()
            with torch.no_grad():
                teacher_logits = self.teacher(images)
            loss = F.l1_loss(self.student(images), teacher_logits)
            step.update(loss, "student")
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    def generator_loss(self) -> Tensor:
        """The sum of its terms."""
        images = self.made()
        self.statistics = []
        self.teacher(images)
        statistics, self.statistics = self.statistics, None
        mask = self.clean(images.detach())
        student_logits = self.student(images)[mask] if self.sees_all else self.student(images[mask])
        loss = self.weights["adversarial"] * (1.0 - plain_js(student_logits, self.teacher(images[mask])))
        loss = loss + self.weights["total_variation"] * plain_total_variation(images)
        loss = loss + self.weights["l2"] * images.norm()
        return loss + self.weights["bn_statistics"] * sum(statistics)

    @torch.no_grad()
    def clean_images(self) -> Tensor:
        """A batch for the student.

        Raises:
            RuntimeError: next to none are selected.
        """
        kept: list[Tensor] = []
        while len(kept) < LEAST_ROUNDS or sum(map(len, kept)) < self.batch:
            if len(kept) == ENOUGH_ROUNDS:
                raise RuntimeError(f"no {self.batch} images are selected of {ENOUGH_ROUNDS} batches")
            images = self.made()
            self.teacher(images)
            kept.append(images[self.clean(images)])
        return torch.cat(kept)[: self.batch]

    @torch.no_grad()
    def clean(self, images: Tensor) -> Tensor:
        """Which images the teacher is sure of."""
        return selected_in_slices([self.teacher(part) for part in images.split(SLICE)], self.select)

    def made(self) -> Tensor:
        """A batch, of new noise."""
        noise = torch.randn(self.batch, LATENT, device=next(self.generator.parameters()).device)
        return self.generator(noise)  # type: ignore[no-any-return]

    def _measure(self, norm: nn.Module, inputs: tuple[Tensor]) -> None:
        if self.statistics is not None:
            assert isinstance(norm, nn.BatchNorm2d)
            self.statistics.append(plain_statistics(inputs[0], norm))


def selected_in_slices(logits: Sequence[Tensor], select: Select) -> Tensor:
    """Which samples have a loss of the lower component, of logits ``[slice, K]`` each; the losses go to the host one by one."""
    losses = [F.cross_entropy(part, part.argmax(1), reduction="none").cpu() for part in logits]
    return select(torch.cat(losses)).to(logits[0].device)


def _whole(
    settings: Settings, teacher_name: str, student_name: str, shape: Shape, most: int, most_width: int, steps: int
) -> Case:
    batch, width = at_most(settings, most), at_most(settings, most_width)

    def build() -> Work:
        images = torch.randn(batch, *shape, device=settings.device)
        student, teacher = student_and_teacher(settings, student_name, teacher_name, images)
        options: dict[str, Any] = {"width": width, "student_steps": steps}
        if not any(isinstance(module, nn.BatchNorm2d) for module in teacher.modules()):
            options["bn_statistics"] = 0.0
        given = Given(copy.deepcopy(student), copy.deepcopy(teacher), images, batch)
        procedure = create_procedure("ta-dfkd", given, **options)
        assert isinstance(procedure, DataFree)
        procedure.to(settings.device)
        generator = procedure.maker.generator
        assert generator is not None
        first = student, teacher, copy.deepcopy(generator)

        def as_authors(select: Select, *, sees_all: bool = False) -> Iterations:
            networks = copy.deepcopy(first)
            theirs = Theirs(*networks, batch, steps, procedure.weights, select, sees_all=sees_all)
            trained = parameters_of(student=networks[0], generator=networks[2])
            return Iterations(trained, theirs.iteration, alike=False)

        ours = Iterations(
            parameters_of(student=procedure.student, generator=generator),
            lambda step: procedure.iteration(None, step)["loss"],
        )
        procedure.after_epoch(Updates({}))  # as many rounds from now on as the images want
        truth = as_authors(reference_select, sees_all=True).first
        theirs = as_authors(sklearn_select)  # which starts elsewhere: it takes other images at the border
        return compared(settings, ours, theirs, truth, TOLERANCE, peer_tolerance=OTHER_MASK, target=WHOLE_TARGET)

    name = f"TA-DFKD {teacher_name} to {student_name}, {batch}x{'x'.join(map(str, shape))}, {steps} steps"
    return Case(name, build, batch * BYTES_OF_AN_IMAGE)


# What of an iteration is no network.


class Returned(NamedTuple):
    """By networks, in an iteration of S steps of the student."""

    images: list[Tensor]
    """``[B, C, H, W]`` each: of the generator's step, then two batches for each of the student's."""
    teacher_logits: list[Tensor]
    """``[B, K]`` for each of them; the first require a gradient."""
    student_logits: list[Tensor]
    """``[B, K]``, which require a gradient: of the generator's step, then of each of the student's."""


class GivenTeacher(WatchedTeacher):
    """Says the same to whatever it sees."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits

    def __call__(self, _: Tensor) -> Tensor:
        return self._logits

    def look(self, _: Tensor) -> Seen:
        return Seen(self._logits, {}, [], [], None, None)


Outcome = tuple[Tensor, list[Tensor]]  # losses of generator and student, gradients in their order


def our_part(of: Returned, lessons: Lessons) -> Outcome:
    """By fastkd."""
    (images, *others), (logits, *other_logits), (student, *students) = of
    made = judge(GivenTeacher(logits), images)
    weight = terms.shares(lessons.mask([made])[0])
    losses = [1.0 - terms.divergence("js", student, made.logits, weight)]
    gradients = [*torch.autograd.grad(losses[0], (student, logits))]
    pairs = zip(others, other_logits, strict=True)
    batches = [glance(GivenTeacher(theirs), x) for x, theirs in pairs]
    for lesson, own in zip(lessons(batches), students, strict=True):
        losses.append(terms.divergence("l1", own, lesson.logits, lesson.weight))
        gradients += torch.autograd.grad(losses[-1], own)
    return torch.stack(losses).detach(), gradients


def their_part(of: Returned, select: Select) -> Outcome:
    """As the authors have it; the teacher's logits of a batch are taken, where theirs runs it again."""
    (_, *others), (logits, *other_logits), (student, *students) = of
    mask = selected_in_slices(logits.detach().split(SLICE), select)
    losses = [1.0 - plain_js(student[mask], logits[mask])]
    gradients = [*torch.autograd.grad(losses[0], (student, logits))]
    batches = iter(zip(others, other_logits, strict=True))
    for own in students:
        kept = []
        for _ in range(LEAST_ROUNDS):
            images, theirs = next(batches)
            mask = selected_in_slices(theirs.split(SLICE), select)
            kept.append((images[mask], theirs[mask]))
        _, target = (torch.cat(parts)[: len(own)] for parts in zip(*kept, strict=True))
        losses.append(F.l1_loss(own, target))
        gradients += torch.autograd.grad(losses[-1], own)
    return torch.stack(losses).detach(), gradients


def _between(settings: Settings, most: int, classes: int, shape: Shape, steps: int) -> Case:
    batch = at_most(settings, most)
    rounds = LEAST_ROUNDS * steps

    def build() -> Work:
        def random(*size: int) -> Tensor:
            return torch.randn(*size, device=settings.device)

        of = Returned(
            [random(batch, *shape) for _ in range(1 + rounds)],
            [confident(random(batch, classes)) for _ in range(1 + rounds)],
            [random(batch, classes).requires_grad_() for _ in range(1 + steps)],
        )
        of.teacher_logits[0].requires_grad_()
        lessons = Lessons(batch, steps, select=True).to(settings.device)

        work = compared(
            settings,
            lambda: done(our_part(of, lessons)),
            lambda: done(their_part(of, sklearn_select), alike=False),
            done(their_part(of, reference_select)).first,
            TOLERANCE,
            peer_tolerance=OTHER_MASK,
            target=BETWEEN_TARGET,
        )
        work.reason = "" if shape == NO_IMAGE else COPIES
        work.floor_bytes = floors.lessons(rounds * batch, steps * batch, math.prod(shape), classes, 4)
        work.floor_bytes += floors.divergence(batch, classes, 4, teacher_gradient=True)
        return work

    of_images = "" if shape == NO_IMAGE else "x" + "x".join(map(str, shape))
    left_out = "networks, no images" if shape == NO_IMAGE else "networks"
    name = f"TA-DFKD {batch}{of_images} K={classes}, {steps} steps, no {left_out}"
    return Case(name, build, 8 * (1 + rounds + steps) * batch * (math.prod(shape) + 3 * classes))


def done(outcome: Outcome, *, alike: bool = True) -> Done:
    """The student's later images are not compared: what one step leaves goes to the next one, or is lost."""
    losses, gradients = outcome
    return Done(losses.sum(), First(losses[:2], torch.cat(gradients[:3])), alike)


def confident(logits: Tensor) -> Tensor:
    """Of a teacher that is sure of most images ``[B, K]``, and cannot tell two classes of the others."""
    sure = logits.argmax(1, keepdim=True)
    other = (sure + 1) % logits.shape[1]
    unsure = torch.randperm(len(logits), device=logits.device)[:, None] < UNSURE * len(logits)
    return logits.scatter(1, sure, 15.0).scatter(1, other, torch.where(unsure, 15.0, 0.0))


def test_datafree(case: Case, contest: Contest) -> None:
    """Each case."""
    contest(case)
