"""Losses of logits."""

from __future__ import annotations

from torch import Tensor

from fastkd import functional
from fastkd._checks import check_choice, check_count, check_row_reduction, check_share
from fastkd.functional.divergence import DIRECTIONS, Direction, Group, Reduction, RowReduction
from fastkd.losses.loss import Loss


class _DenseLoss(Loss):
    def __init__(self, temperature: float | Tensor, reduction: Reduction, ignore_index: int, dim: int) -> None:
        super().__init__(temperature, reduction, ignore_index)
        self.dim = check_count("dim", dim)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dim={self.dim}"


class KLDivLoss(_DenseLoss):
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
        *,
        dim: int = -1,
    ) -> None:
        super().__init__(temperature, reduction, ignore_index, dim)
        check_choice("direction", direction, DIRECTIONS)
        self.direction: Direction = direction

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor | None = None,
        weight: Tensor | None = None,
        *,
        group: Group | None = None,
    ) -> Tensor:
        """The loss of logits ``[..., K]``, or of ``[B, K, H, W]`` with ``dim=1``; ``target`` and ``weight`` are ``[...]``."""
        return functional.kl_div(
            student_logits,
            teacher_logits,
            self.temperature,
            direction=self.direction,
            reduction=self.reduction,
            target=target,
            ignore_index=self.ignore_index,
            weight=weight,
            dim=self.dim,
            group=group,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, direction={self.direction!r}"


class JSDivLoss(_DenseLoss):
    """``T^2`` times the generalised Jensen-Shannon divergence. Arguments as in :func:`fastkd.functional.js_div`."""

    def __init__(
        self,
        temperature: float | Tensor = 1.0,
        beta: float = 0.5,
        reduction: Reduction = "batchmean",
        ignore_index: int = -100,
        *,
        dim: int = -1,
    ) -> None:
        super().__init__(temperature, reduction, ignore_index, dim)
        self.beta = check_share("beta", beta)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor | None = None,
        weight: Tensor | None = None,
        *,
        group: Group | None = None,
    ) -> Tensor:
        """The loss of logits ``[..., K]``, or of ``[B, K, H, W]`` with ``dim=1``; ``target`` and ``weight`` are ``[...]``."""
        return functional.js_div(
            student_logits,
            teacher_logits,
            self.temperature,
            beta=self.beta,
            reduction=self.reduction,
            target=target,
            ignore_index=self.ignore_index,
            weight=weight,
            dim=self.dim,
            group=group,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, beta={self.beta}"


class KDLoss(_DenseLoss):
    """``(1 - alpha) CE + alpha T^2 KL`` in one pass. Arguments as in :func:`fastkd.functional.kd_loss`.

    >>> criterion = fastkd.KDLoss(temperature=4.0, alpha=0.9)
    >>> loss = criterion(student(x), teacher(x), y)
    """

    def __init__(
        self,
        temperature: float | Tensor = 4.0,
        alpha: float = 0.9,
        reduction: RowReduction = "batchmean",
        direction: Direction = "forward",
        ignore_index: int = -100,
        *,
        dim: int = -1,
    ) -> None:
        super().__init__(temperature, reduction, ignore_index, dim)
        check_row_reduction(reduction)
        check_choice("direction", direction, DIRECTIONS)
        self.alpha = check_share("alpha", alpha)
        self.direction: Direction = direction
        self.reduction: RowReduction

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        *,
        group: Group | None = None,
    ) -> Tensor:
        """The loss of logits ``[..., K]``, or of ``[B, K, H, W]`` with ``dim=1``, and classes ``[...]``, as ``weight`` is."""
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
            dim=self.dim,
            group=group,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha={self.alpha}, direction={self.direction!r}"
