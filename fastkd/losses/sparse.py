"""Losses against a teacher that is known at a few classes of each row."""

from __future__ import annotations

from torch import Tensor

from fastkd import functional
from fastkd._checks import check_choice, check_row_reduction, check_share
from fastkd.functional.divergence import DIRECTIONS, Direction, Reduction, RowReduction
from fastkd.functional.sparse import Tail
from fastkd.losses.loss import Loss
from fastkd.ops import sparse as _ops


class _SparseLoss(Loss):
    """Of a teacher that is known at k classes of each row."""

    def __init__(self, temperature: float | Tensor, tail: Tail, reduction: Reduction, ignore_index: int) -> None:
        super().__init__(temperature, reduction, ignore_index)
        check_choice("tail", tail, _ops.TAILS)
        self.tail: Tail = tail

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, tail={self.tail!r}"


class SparseKLDivLoss(_SparseLoss):
    """``T^2 KL`` from a teacher that is known at k classes. Arguments as in :func:`fastkd.functional.sparse_kl_div`.

    >>> log_probs, indices = torch.log_softmax(teacher(x) / 2.0, -1).topk(64)  # once, to keep
    >>> criterion = fastkd.SparseKLDivLoss(temperature=2.0)
    >>> loss = criterion(student(x), indices, log_probs)
    """

    def __init__(
        self,
        temperature: float | Tensor = 1.0,
        reduction: Reduction = "batchmean",
        direction: Direction = "forward",
        tail: Tail = "bucket",
        ignore_index: int = -100,
    ) -> None:
        super().__init__(temperature, tail, reduction, ignore_index)
        check_choice("direction", direction, DIRECTIONS)
        self.direction: Direction = direction

    def forward(
        self,
        student_logits: Tensor,
        teacher_indices: Tensor,
        teacher_log_probs: Tensor,
        target: Tensor | None = None,
        weight: Tensor | None = None,
        teacher_tail_log_prob: Tensor | None = None,
    ) -> Tensor:
        """The loss of logits ``[..., K]`` and entries ``[..., k]``; the others are ``[...]``."""
        return functional.sparse_kl_div(
            student_logits,
            teacher_indices,
            teacher_log_probs,
            self.temperature,
            direction=self.direction,
            tail=self.tail,
            reduction=self.reduction,
            target=target,
            ignore_index=self.ignore_index,
            weight=weight,
            teacher_tail_log_prob=teacher_tail_log_prob,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, direction={self.direction!r}"


class SparseJSDivLoss(_SparseLoss):
    """``T^2`` times the generalised Jensen-Shannon divergence. Arguments as in :func:`fastkd.functional.sparse_js_div`."""

    def __init__(
        self,
        temperature: float | Tensor = 1.0,
        beta: float = 0.5,
        reduction: Reduction = "batchmean",
        tail: Tail = "bucket",
        ignore_index: int = -100,
    ) -> None:
        super().__init__(temperature, tail, reduction, ignore_index)
        self.beta = check_share("beta", beta)

    def forward(
        self,
        student_logits: Tensor,
        teacher_indices: Tensor,
        teacher_log_probs: Tensor,
        target: Tensor | None = None,
        weight: Tensor | None = None,
        teacher_tail_log_prob: Tensor | None = None,
    ) -> Tensor:
        """The loss of logits ``[..., K]`` and entries ``[..., k]``; the others are ``[...]``."""
        return functional.sparse_js_div(
            student_logits,
            teacher_indices,
            teacher_log_probs,
            self.temperature,
            beta=self.beta,
            tail=self.tail,
            reduction=self.reduction,
            target=target,
            ignore_index=self.ignore_index,
            weight=weight,
            teacher_tail_log_prob=teacher_tail_log_prob,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, beta={self.beta}"


class SparseKDLoss(_SparseLoss):
    """``(1 - alpha) CE + alpha T^2 KL`` in one pass. Arguments as in :func:`fastkd.functional.sparse_kd_loss`."""

    def __init__(
        self,
        temperature: float | Tensor = 1.0,
        alpha: float = 0.9,
        reduction: RowReduction = "batchmean",
        direction: Direction = "forward",
        tail: Tail = "bucket",
        ignore_index: int = -100,
    ) -> None:
        super().__init__(temperature, tail, reduction, ignore_index)
        check_row_reduction(reduction)
        check_choice("direction", direction, DIRECTIONS)
        self.alpha = check_share("alpha", alpha)
        self.direction: Direction = direction
        self.reduction: RowReduction

    def forward(
        self,
        student_logits: Tensor,
        teacher_indices: Tensor,
        teacher_log_probs: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        teacher_tail_log_prob: Tensor | None = None,
    ) -> Tensor:
        """The loss of logits ``[..., K]``, entries ``[..., k]`` and classes ``[...]``, as the others are."""
        return functional.sparse_kd_loss(
            student_logits,
            teacher_indices,
            teacher_log_probs,
            target,
            self.temperature,
            self.alpha,
            direction=self.direction,
            tail=self.tail,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            weight=weight,
            teacher_tail_log_prob=teacher_tail_log_prob,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha={self.alpha}, direction={self.direction!r}"
