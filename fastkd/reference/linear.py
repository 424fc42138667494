"""Plain-torch divergences of heads, differentiable any number of times: all logits in memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fastkd.reference.divergence import divergence
from fastkd.reference.sparse import sparse_divergence


def head_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """``softcap * tanh(z / softcap)`` of ``z = scale * (hidden @ weight.T + bias)``; without ``softcap``, ``z``."""
    z = F.linear(hidden, weight, bias) * scale
    return z if softcap is None else torch.tanh(z / softcap) * softcap


def linear_divergence(
    student_hidden: Tensor,
    student_head: tuple[Any, ...],
    teacher_hidden: Tensor | None = None,
    teacher_head: tuple[Any, ...] | None = None,
    target: Tensor | None = None,
    *,
    teacher_logits: Tensor | None = None,
    classes: int | None = None,
    **options: Any,
) -> Tensor:
    """:func:`fastkd.ops.linear.linear_divergence`, formula by formula; heads as (weight, bias, scale, softcap)."""
    student = head_logits(student_hidden, *student_head)
    if teacher_logits is None:
        assert teacher_hidden is not None
        assert teacher_head is not None
        teacher_logits = head_logits(teacher_hidden, *teacher_head)
    return divergence(student[..., :classes], teacher_logits[..., :classes], target, **options)


def sparse_linear_divergence(
    student_hidden: Tensor,
    student_head: tuple[Any, ...],
    teacher_indices: Tensor,
    teacher_log_probs: Tensor,
    target: Tensor | None = None,
    *,
    classes: int | None = None,
    **options: Any,
) -> Tensor:
    """:func:`fastkd.ops.sparse_linear.sparse_linear_divergence`, formula by formula; head as above."""
    logits = head_logits(student_hidden, *student_head)[..., :classes]
    return sparse_divergence(logits, teacher_indices, teacher_log_probs, target, **options)
