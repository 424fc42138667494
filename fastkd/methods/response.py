"""Distillation of responses: the student's logits become like the teacher's, on the images (Hinton; :mod:`.logits`
has more of them), and where the teacher's decision boundary runs (BSS). And the baseline, which has labels alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fastkd import _checks, functional
from fastkd._seeding import drawing
from fastkd.methods.features import FeatureTap, Outputs
from fastkd.methods.given import Given
from fastkd.methods.method import (
    Loss,
    Method,
    WeightedMethod,
    check_logits,
    check_progress,
    check_teacher_logits,
    cross_entropy,
    response,
)
from fastkd.methods.registry import register
from fastkd.models.modes import evaluating

__all__ = ["BSS", "Attacked", "Baseline", "Hinton", "LogitMethod"]


@register("baseline", family="response", needs=("labels",))
class Baseline(WeightedMethod):
    """Cross-entropy with the labels: training without a teacher."""

    needs_teacher: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__(1.0, 0.0, 0.0, 1.0)


@register(
    "logit-std",
    family="response",
    paper="Sun et al., CVPR 2024",
    standardize=True,
    temperature=2.0,
    task_weight=0.1,
    kd_weight=9.0,
)
@register(  # in Eq. 2.14 there is no T^2, nor are there labels
    "vanilla",
    family="collections",
    needs=("images", "teacher"),
    paper="Begon & Geurts, 2021",
    temperature=2.0,
    task_weight=0.0,
    kd_weight=0.25,
)
@register("hinton", family="response", paper="Hinton et al., 2015")
class Hinton(WeightedMethod):
    """``r CE + a T^2 KL(softmax(t / T) || softmax(s / T))``.

    Hinton et al., "Distilling the Knowledge in a Neural Network" (2015, arXiv:1503.02531), section 2. With ``standardize``,
    a = 9 and T = 2 it is what Sun et al., "Logit Standardization in Knowledge Distillation" (CVPR 2024) train with.
    """

    def __init__(
        self,
        temperature: float = 4.0,
        *,
        task_weight: float = 0.1,
        kd_weight: float = 0.9,
        standardize: bool = False,
    ) -> None:
        super().__init__(task_weight, kd_weight, 0.0, temperature, standardize=standardize)


class LogitMethod(Method):
    """``r CE``, and terms that both networks' logits make.

    Args:
        task_weight: r >= 0, of the cross-entropy with the labels.
        temperature: T > 0.
    """

    weights: ClassVar[tuple[str, ...]]
    """The other terms' weights, by name."""

    def __init__(self, temperature: float, task_weight: float) -> None:
        super().__init__()
        self.temperature = _checks.check_positive("temperature", temperature)
        self.task_weight = _checks.check_not_negative("task_weight", task_weight)

    @property
    def reads_teacher(self) -> bool:
        return any(getattr(self, name) != 0.0 for name in self.weights)

    def forward(self, student: Outputs, teacher: Outputs | None, target: Tensor | None, progress: float = 0.0) -> Loss:
        check_progress(progress)
        loss = response(student.logits, None, target, self.task_weight, 0.0, 1.0)
        if not self.reads_teacher:
            return loss
        if teacher is None:
            raise ValueError(f"fastkd: teacher is None, must be its outputs for {type(self).__name__}")
        logits = check_logits("student.logits", student.logits)
        for name, term in self.compare(logits, check_teacher_logits(logits, teacher.logits), target, progress).items():
            loss = loss.with_term(name, term)
        return loss

    def compare(self, student: Tensor, teacher: Tensor, target: Tensor | None, progress: float) -> dict[str, Tensor]:
        """The other terms by name, with their weights, of logits ``[B, ..., K]``."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        names = ("temperature", "task_weight", *self.weights)
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


class Attacked(NamedTuple):
    """Samples moved towards another class, until the teacher takes them for it."""

    images: Tensor
    """``[n, C, H, W]``."""
    weight: Tensor
    """float32 ``[n]``: 1, or 0 for a row that only fills the batch and counts nowhere."""


@register("bss", family="response", paper="Heo et al., AAAI 2019")
class BSS(Method):
    """``CE + rho softCE + rho_a softCE on boundary supporting samples``, with soft cross-entropies at temperature T.

    Heo et al., "Knowledge Distillation with Adversarial Samples Supporting Decision Boundary" (AAAI 2019), Eq. 8 and the
    authors' schedule: with e the share of the training that is done, ``rho = 3 (1 - e) + 1`` and
    ``rho_a = max(2 (1 - 4/3 e), 0)``. As there, soft cross-entropies are not multiplied by T^2.

    Base samples are those that teacher and student both get right, at most ``attack_size`` of them, where their
    probabilities of the other classes differ most. Each is moved in ``attack_steps`` steps towards a class drawn by the
    teacher's probabilities, until the teacher's answer changes. All is done on the device, without waiting for it and without
    a loop over samples: the number of attacked samples is fixed. Where fewer qualify, they are repeated with weight 0: the
    loss does not see the repeats, and a batch norm of the student sees qualifying samples only. Where none qualifies, the
    batch is of samples that do not, and its loss is 0; the student runs on it all the same, and the running statistics of
    its batch norms move.

    ``step`` does all of this. In a loop of your own: ``attacked = method.attack(...)``, both networks on
    ``attacked.images``, ``method.loss(...)``.

    Args:
        temperature: T, from 1e-18 to 1e18, so that T^2 times a cross-entropy stays in the range of float32.
        attack_size: samples of a batch that are attacked, at most. By name, a quarter of a batch, the authors' share.
        attack_steps: steps of the attack.
        step_size: length of a step, over the difference of the two logits.
        bounds: of the normalised pixels, which the attack does not leave.
    """

    def __init__(
        self,
        temperature: float = 3.0,
        *,
        attack_size: int = 64,
        attack_steps: int = 10,
        step_size: float = 0.3,
        bounds: tuple[float, float] = (-2.5, 2.5),
    ) -> None:
        super().__init__()
        self.temperature = _checks.check_positive("temperature", temperature)
        if not 1e-18 <= self.temperature <= 1e18:  # losses are divided by its square
            raise ValueError(f"fastkd: temperature is {temperature}, must be from 1e-18 to 1e18 for BSS")
        self.step_size = _checks.check_positive("step_size", step_size)
        self.attack_size = _checks.check_count("attack_size", attack_size, 1)
        self.attack_steps = _checks.check_count("attack_steps", attack_steps, 1)
        self.bounds = _bounds(bounds)

    @classmethod
    def build(cls, given: Given, **options: Any) -> BSS:
        if given.batch_size is not None:
            options = {"attack_size": max(1, given.batch_size // 4), **options}
        return super().build(given, **options)

    def step(
        self,
        student: FeatureTap,
        teacher: FeatureTap | None,
        images: Tensor,
        target: Tensor | None,
        progress: float = 0.0,
    ) -> tuple[Loss, Tensor]:
        teacher_outputs = self.teacher_outputs(teacher, images)
        student_outputs = student(images)
        loss = self(student_outputs, teacher_outputs, target, progress)
        logits = check_logits("student.logits", student_outputs.logits)
        if (
            teacher is not None
            and teacher_outputs is not None
            and target is not None
            and self.attack_weight(progress) > 0.0
        ):
            given = check_logits("teacher.logits", teacher_outputs.logits)
            attacked = self.attack(teacher, images, logits, given, target)
            with torch.no_grad():
                teacher_logits = teacher(attacked.images).logits
            term = self.boundary_loss(student(attacked.images).logits, teacher_logits, attacked.weight)
            loss = loss.with_term("boundary_loss", self.attack_weight(progress) * term)
        return loss, logits

    def forward(self, student: Outputs, teacher: Outputs | None, target: Tensor | None, progress: float = 0.0) -> Loss:
        """The loss without the boundary supporting samples: ``CE + rho softCE``."""
        check_progress(progress)
        if teacher is None:
            raise ValueError("fastkd: teacher is None, must be its outputs for BSS")
        logits = _of_images("student.logits", student.logits)
        given = check_teacher_logits(logits, teacher.logits)
        task = cross_entropy(logits, target)
        kd = self._soft_cross_entropy(logits, given)
        return Loss(task, {"task_loss": task.detach()}).with_term("kd_loss", (3.0 * (1.0 - progress) + 1.0) * kd)

    def attack_weight(self, progress: float) -> float:
        """``rho_a``, of a progress in [0, 1]; from 0 on there is nothing to attack for."""
        return max(2.0 * (1.0 - 4.0 / 3.0 * check_progress(progress)), 0.0)

    def boundary_loss(self, student_logits: Tensor, teacher_logits: Tensor, weight: Tensor) -> Tensor:
        """Soft cross-entropy on attacked samples: its mean over those that count, 0 where none does."""
        rows = self._soft_cross_entropy(student_logits, teacher_logits, weight)
        return rows * (len(weight) / weight.sum().clamp(min=1.0))

    def attack(
        self,
        teacher: FeatureTap,
        images: Tensor,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor,
    ) -> Attacked:
        """Boundary supporting samples of a batch (Heo et al., section 3.1 and 3.2).

        Args:
            images: ``[B, C, H, W]``, normalised.
            student_logits, teacher_logits: ``[B, K]``, on the images.
            target: int64 ``[B]``.
        """
        student_logits = _of_images("student_logits", student_logits)
        teacher_logits = _of_images("teacher_logits", teacher_logits)
        with torch.no_grad():
            exact = torch.promote_types(teacher_logits.dtype, torch.float32)  # 16 bits are too few to draw by
            p, q = teacher_logits.softmax(1, dtype=exact), student_logits.softmax(1, dtype=exact)
            right = (teacher_logits.argmax(1) == target) & (student_logits.argmax(1) == target)
            others = torch.ones_like(p).scatter_(1, target[:, None], 0.0)
            score = ((p - q).square() * others).sum(1).masked_fill(~right, -1.0)
            score, base = score.topk(min(self.attack_size, len(images)))
            qualifies = score >= 0.0
            # those that qualify are the first n, and are repeated from there on; n stays on the device
            row = torch.arange(len(base), device=base.device)
            base = base[row % qualifies.sum().clamp(min=1)]
            # a little keeps the draw defined where the teacher is so sure that all others are 0
            towards = _draw(((p + 1e-30) * others)[base])
            away = target[base, None]
            moved = images[base]
        with evaluating(teacher):  # batch statistics would couple the samples, and the attack must not move them
            for _ in range(self.attack_steps):
                moved = self._move(teacher, moved, away, towards)
        return Attacked(moved, qualifies.float())

    def _move(self, teacher: FeatureTap, images: Tensor, away: Tensor, towards: Tensor) -> Tensor:
        with torch.enable_grad():
            images = images.detach().requires_grad_()
            logits = teacher(images).logits
            gap = logits.gather(1, away) - logits.gather(1, towards)  # [n, 1]
            (gradient,) = torch.autograd.grad(gap.sum(), images)
        with torch.no_grad():
            still = logits.argmax(1, keepdim=True) == away
            length = torch.where(still, self.step_size * (gap + 1e-4), 0.0).to(images.dtype)  # [n, 1]
            moved: Tensor = images - (length * F.normalize(gradient.flatten(1))).view_as(images)
            return moved.clamp(*self.bounds)

    def _soft_cross_entropy(
        self, student_logits: Tensor, teacher_logits: Tensor, weight: Tensor | None = None
    ) -> Tensor:
        loss = functional.soft_cross_entropy(student_logits, teacher_logits, self.temperature, weight=weight)
        return loss / self.temperature**2

    def extra_repr(self) -> str:
        size = f"attack_size={self.attack_size}, attack_steps={self.attack_steps}"
        return f"temperature={self.temperature}, {size}, step_size={self.step_size}, bounds={self.bounds}"


def _of_images(name: str, logits: object) -> Tensor:
    one = check_logits(name, logits)
    if one.dim() != 2:
        raise ValueError(
            f"fastkd: {name} has shape {tuple(one.shape)}, must be [B, K] for BSS, which moves whole images"
        )
    return one


def _bounds(bounds: tuple[float, float]) -> tuple[float, float]:
    if not isinstance(bounds, Sequence) or isinstance(bounds, str) or len(bounds) != 2:
        raise TypeError(f"fastkd: bounds is {bounds!r}, must be a pair of numbers, a lower and a higher")
    low, high = (_checks.check_number("bounds", bound) for bound in bounds)
    if not low < high:  # infinite ones bound nothing
        raise ValueError(f"fastkd: bounds is {bounds}, must be a lower and a higher number")
    return low, high


def _draw(odds: Tensor) -> Tensor:
    """A column of each row, ``[n, 1]``, by odds ``[n, K]``: ``torch.multinomial``, which may wait for the device."""
    with drawing(odds.device):
        waits = torch.empty_like(odds).exponential_()
    return (odds / waits).argmax(1, keepdim=True)
