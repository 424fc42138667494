"""Loss modules: drop-in for the losses that a distillation loop already has. Maths: :mod:`fastkd.functional`."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from fastkd import functional
from fastkd.functional import Direction, Reduction

__all__ = ["JSDivLoss", "KDLoss", "KLDivLoss"]


class KLDivLoss(nn.Module):
    """``T^2 KL`` between softmaxed teacher and student logits. Arguments as in :func:`fastkd.functional.kl_div`.

    >>> criterion = fastkd.KLDivLoss(temperature=4.0)
    >>> loss = criterion(student(x), teacher(x))
    """

    def __init__(
        self,
        temperature: float | Tensor = 1.0,
        reduction: Reduction = "batchmean",
        direction: Direction = "forward",
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.reduction: Reduction = reduction
        self.direction: Direction = direction
        self.ignore_index = ignore_index

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        return functional.kl_div(
            student_logits,
            teacher_logits,
            self.temperature,
            direction=self.direction,
            reduction=self.reduction,
            target=target,
            ignore_index=self.ignore_index,
            weight=weight,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}, direction={self.direction!r}"


class JSDivLoss(nn.Module):
    """``T^2`` times the generalised Jensen-Shannon divergence. Arguments as in :func:`fastkd.functional.js_div`."""

    def __init__(
        self,
        temperature: float | Tensor = 1.0,
        beta: float = 0.5,
        reduction: Reduction = "batchmean",
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.beta = beta
        self.reduction: Reduction = reduction
        self.ignore_index = ignore_index

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        return functional.js_div(
            student_logits,
            teacher_logits,
            self.temperature,
            beta=self.beta,
            reduction=self.reduction,
            target=target,
            ignore_index=self.ignore_index,
            weight=weight,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, beta={self.beta}, reduction={self.reduction!r}"


class KDLoss(nn.Module):
    """``(1 - alpha) CE + alpha T^2 KL`` in one pass. Arguments as in :func:`fastkd.functional.kd_loss`.

    >>> criterion = fastkd.KDLoss(temperature=4.0, alpha=0.9)
    >>> loss = criterion(student(x), teacher(x), y)
    """

    def __init__(
        self,
        temperature: float | Tensor = 4.0,
        alpha: float = 0.9,
        reduction: Literal["none", "sum", "batchmean"] = "batchmean",
        direction: Direction = "forward",
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.alpha = alpha
        self.reduction: Literal["none", "sum", "batchmean"] = reduction
        self.direction: Direction = direction
        self.ignore_index = ignore_index

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor, weight: Tensor | None = None
    ) -> Tensor:
        return functional.kd_loss(
            student_logits,
            teacher_logits,
            target,
            self.temperature,
            self.alpha,
            direction=self.direction,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            weight=weight,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, alpha={self.alpha}, reduction={self.reduction!r}, "
            f"direction={self.direction!r}"
        )
