"""Loss modules: drop-in for the losses that a distillation loop already has. Maths: :mod:`fastkd.functional`."""

from __future__ import annotations

from torch import Tensor, nn

from fastkd import functional
from fastkd._checks import (
    check_choice,
    check_count,
    check_ignore_index,
    check_kept_temperature,
    check_not_negative,
    check_row_reduction,
    check_share,
)
from fastkd.functional.divergence import DIRECTIONS, Direction, Reduction, RowReduction
from fastkd.functional.sparse import Tail
from fastkd.ops import divergence as _ops
from fastkd.ops import sparse as _sparse_ops

__all__ = [
    "JSDivLoss",
    "KDLoss",
    "KLDivLoss",
    "RelationLoss",
    "SparseJSDivLoss",
    "SparseKDLoss",
    "SparseKLDivLoss",
]


class _RowLoss(nn.Module):
    """What all losses of logits are told; wrong values are found here, not at the first batch."""

    temperature: float | Tensor

    def __init__(self, temperature: float | Tensor, reduction: Reduction, ignore_index: int) -> None:
        super().__init__()
        temperature = check_kept_temperature(temperature)
        if isinstance(temperature, Tensor):
            self.register_buffer("temperature", temperature)  # moves with the module
        else:
            self.temperature = temperature
        check_choice("reduction", reduction, _ops.REDUCTIONS)
        self.reduction: Reduction = reduction
        self.ignore_index = check_ignore_index(ignore_index)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}"


class _Loss(_RowLoss):
    """Of two full distributions."""

    def __init__(self, temperature: float | Tensor, reduction: Reduction, ignore_index: int, dim: int) -> None:
        super().__init__(temperature, reduction, ignore_index)
        self.dim = check_count("dim", dim)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dim={self.dim}"


class KLDivLoss(_Loss):
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
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, direction={self.direction!r}"


class JSDivLoss(_Loss):
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
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, beta={self.beta}"


class KDLoss(_Loss):
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
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor, weight: Tensor | None = None
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
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha={self.alpha}, direction={self.direction!r}"


class _SparseLoss(_RowLoss):
    """Of a teacher that is known at k classes of each row."""

    def __init__(self, temperature: float | Tensor, tail: Tail, reduction: Reduction, ignore_index: int) -> None:
        super().__init__(temperature, reduction, ignore_index)
        check_choice("tail", tail, _sparse_ops.TAILS)
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


class RelationLoss(nn.Module):
    """Relational distillation of embeddings (RKD). Arguments as in :func:`fastkd.functional.relation_loss`.

    >>> criterion = fastkd.RelationLoss(distance_weight=25.0, angle_weight=50.0)
    >>> loss = task_loss + criterion(student_embedding, teacher_embedding)
    """

    def __init__(self, distance_weight: float = 25.0, angle_weight: float = 50.0) -> None:
        super().__init__()
        self.distance_weight = check_not_negative("distance_weight", distance_weight)
        self.angle_weight = check_not_negative("angle_weight", angle_weight)

    def forward(self, student_features: Tensor, teacher_features: Tensor) -> Tensor:
        """The loss of embeddings ``[B, ...]``, of any number of features each."""
        return functional.relation_loss(student_features, teacher_features, self.distance_weight, self.angle_weight)

    def extra_repr(self) -> str:
        return f"distance_weight={self.distance_weight}, angle_weight={self.angle_weight}"
