"""Losses of hidden states and a head, against a teacher that is known at a few classes of each row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd import functional
from fastkd._checks import check_choice, check_row_reduction, check_share
from fastkd.functional.divergence import DIRECTIONS, Direction, Reduction, RowReduction
from fastkd.functional.sparse import Tail
from fastkd.losses.linear import LinearLoss
from fastkd.ops import sparse as _ops


class _SparseLinearLoss(LinearLoss):
    """Of a teacher that is known at k classes of each row."""

    def __init__(
        self, temperature: float | Tensor, reduction: Reduction, ignore_index: int, tail: Tail, *chunks: Any
    ) -> None:
        super().__init__(temperature, reduction, ignore_index, *chunks)
        check_choice("tail", tail, _ops.TAILS)
        self.tail: Tail = tail

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "tail": self.tail}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, tail={self.tail!r}"


class SparseLinearKLDivLoss(_SparseLinearLoss):
    """``T^2 KL`` of a head from a sparse teacher. Arguments as in :func:`fastkd.functional.sparse_linear_kl_div`.

    >>> criterion = fastkd.SparseLinearKLDivLoss(temperature=2.0)
    >>> loss = criterion(student_hidden, student.lm_head, indices, log_probs, labels)
    """

    def __init__(
        self,
        temperature: float | Tensor = 1.0,
        reduction: Reduction = "batchmean",
        direction: Direction = "forward",
        tail: Tail = "bucket",
        ignore_index: int = -100,
        *,
        classes: int | None = None,
        logits_dtype: torch.dtype | None = None,
        memory_budget: int | None = None,
        skip_ignored: bool | None = None,
    ) -> None:
        chunks = classes, logits_dtype, memory_budget, skip_ignored
        super().__init__(temperature, reduction, ignore_index, tail, *chunks)
        check_choice("direction", direction, DIRECTIONS)
        self.direction: Direction = direction

    def forward(
        self,
        student_hidden: Tensor,
        student_head: object,
        teacher_indices: Tensor,
        teacher_log_probs: Tensor,
        target: Tensor | None = None,
        weight: Tensor | None = None,
        teacher_tail_log_prob: Tensor | None = None,
    ) -> Tensor:
        """The loss of hidden states ``[..., H]``, their head and entries ``[..., k]``; the others are ``[...]``."""
        return functional.sparse_linear_kl_div(
            student_hidden,
            student_head,
            teacher_indices,
            teacher_log_probs,
            self.temperature,
            direction=self.direction,
            target=target,
            weight=weight,
            teacher_tail_log_prob=teacher_tail_log_prob,
            **self._options(),
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, direction={self.direction!r}"


class SparseLinearJSDivLoss(_SparseLinearLoss):
    """``T^2`` times the Jensen-Shannon divergence. Arguments as in :func:`fastkd.functional.sparse_linear_js_div`."""

    def __init__(
        self,
        temperature: float | Tensor = 1.0,
        beta: float = 0.5,
        reduction: Reduction = "batchmean",
        tail: Tail = "bucket",
        ignore_index: int = -100,
        *,
        classes: int | None = None,
        logits_dtype: torch.dtype | None = None,
        memory_budget: int | None = None,
        skip_ignored: bool | None = None,
    ) -> None:
        chunks = classes, logits_dtype, memory_budget, skip_ignored
        super().__init__(temperature, reduction, ignore_index, tail, *chunks)
        self.beta = check_share("beta", beta)

    def forward(
        self,
        student_hidden: Tensor,
        student_head: object,
        teacher_indices: Tensor,
        teacher_log_probs: Tensor,
        target: Tensor | None = None,
        weight: Tensor | None = None,
        teacher_tail_log_prob: Tensor | None = None,
    ) -> Tensor:
        """The loss of hidden states ``[..., H]``, their head and entries ``[..., k]``; the others are ``[...]``."""
        return functional.sparse_linear_js_div(
            student_hidden,
            student_head,
            teacher_indices,
            teacher_log_probs,
            self.temperature,
            beta=self.beta,
            target=target,
            weight=weight,
            teacher_tail_log_prob=teacher_tail_log_prob,
            **self._options(),
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, beta={self.beta}"


class SparseLinearKDLoss(_SparseLinearLoss):
    """``(1 - alpha) CE + alpha T^2 KL`` of a head. Arguments as in :func:`fastkd.functional.sparse_linear_kd_loss`."""

    def __init__(
        self,
        temperature: float | Tensor = 1.0,
        alpha: float = 0.5,
        reduction: RowReduction = "batchmean",
        direction: Direction = "forward",
        tail: Tail = "bucket",
        ignore_index: int = -100,
        *,
        classes: int | None = None,
        logits_dtype: torch.dtype | None = None,
        memory_budget: int | None = None,
        skip_ignored: bool | None = None,
    ) -> None:
        chunks = classes, logits_dtype, memory_budget, skip_ignored
        super().__init__(temperature, reduction, ignore_index, tail, *chunks)
        check_row_reduction(reduction)
        check_choice("direction", direction, DIRECTIONS)
        self.alpha = check_share("alpha", alpha)
        self.direction: Direction = direction

    def forward(
        self,
        student_hidden: Tensor,
        student_head: object,
        teacher_indices: Tensor,
        teacher_log_probs: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        teacher_tail_log_prob: Tensor | None = None,
    ) -> Tensor:
        """The loss of hidden states ``[..., H]``, their head, entries ``[..., k]`` and classes ``[...]``."""
        loss: Tensor = functional.sparse_linear_kd_loss(
            student_hidden,
            student_head,
            teacher_indices,
            teacher_log_probs,
            target,
            self.temperature,
            self.alpha,
            direction=self.direction,
            weight=weight,
            teacher_tail_log_prob=teacher_tail_log_prob,
            **self._options(),
        )
        return loss

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha={self.alpha}, direction={self.direction!r}"
