"""Divergences of a head from a sparse teacher, whose logits never exist as a whole."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from fastkd._checks import check_choice, check_row_reduction, check_share, check_tensor, is_zero
from fastkd.functional.divergence import DIRECTIONS, Direction, Reduction, RowReduction
from fastkd.functional.sparse import Tail
from fastkd.ops import sparse_linear as _ops


def sparse_linear_kl_div(
    student_hidden: Tensor,
    student_head: object,
    teacher_indices: Tensor,
    teacher_log_probs: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    direction: Direction = "forward",
    tail: Tail = "bucket",
    reduction: Reduction = "batchmean",
    target: Tensor | None = None,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    teacher_tail_log_prob: Tensor | None = None,
    classes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    skip_ignored: bool | None = None,
) -> Tensor:
    """:func:`sparse_kl_div` of a head's logits, from hidden states: ``[..., V]`` is never in memory.

    Rows are taken in chunks, as in :func:`linear_kl_div`: a GEMM makes the student's logits, and two GEMMs take their gradient
    on to the hidden states and the head. Of the teacher there is what a cache or a server gives, so it takes no GEMM.

    Args:
        student_hidden: ``[..., H]``, float32, float64, bfloat16 or float16. Under autocast, it and the head are cast.
        student_head: weight ``[V, H]``, an ``nn.Linear``, or a :class:`fastkd.LinearHead` where there is more to it.
        teacher_indices: ``[..., k]``, int64 or int32: classes, all different within a row; 1 <= k <= V.
        teacher_log_probs: ``[..., k]``, a float dtype: their log-probabilities at this temperature. -inf is padding.
        temperature, direction, tail, reduction, target, ignore_index, weight, teacher_tail_log_prob: as in
            :func:`sparse_kl_div`.
        classes: so many of the head's vocabulary take part, the first: for one that is padded.
        logits_dtype, skip_ignored: as in :func:`linear_kl_div`.
        memory_budget: bytes for the chunks' logits and their gradient; None is 32 MiB on a CPU, 512 MiB on a GPU. Beside it
            there is the gradient of the head, in float32 until it is scaled.

    Returns:
        float32 (float64 for float64 inputs), scalar or ``[...]``. Hidden states and head alone have gradients.

    Raises:
        TypeError, ValueError, RuntimeError: hidden states that do not fit the head, and as in :func:`sparse_kl_div`.
    """
    check_choice("direction", direction, DIRECTIONS)
    return _ops.sparse_linear_divergence(
        student_hidden,
        student_head,
        teacher_indices,
        teacher_log_probs,
        target,
        kind=direction,
        tail=tail,
        temperature=temperature,
        weight=weight,
        teacher_tail_log_prob=teacher_tail_log_prob,
        ignore_index=ignore_index,
        reduction=reduction,
        classes=classes,
        logits_dtype=logits_dtype,
        memory_budget=memory_budget,
        skip_ignored=skip_ignored,
    )[0]


def sparse_linear_js_div(
    student_hidden: Tensor,
    student_head: object,
    teacher_indices: Tensor,
    teacher_log_probs: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    beta: float = 0.5,
    tail: Tail = "bucket",
    reduction: Reduction = "batchmean",
    target: Tensor | None = None,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    teacher_tail_log_prob: Tensor | None = None,
    classes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    skip_ignored: bool | None = None,
) -> Tensor:
    """:func:`sparse_js_div` of a head's logits, from hidden states. Other arguments as in :func:`sparse_linear_kl_div`."""
    beta = check_share("beta", beta)
    return _ops.sparse_linear_divergence(
        student_hidden,
        student_head,
        teacher_indices,
        teacher_log_probs,
        target,
        kind="jensen_shannon",
        tail=tail,
        temperature=temperature,
        beta=beta,
        weight=weight,
        teacher_tail_log_prob=teacher_tail_log_prob,
        ignore_index=ignore_index,
        reduction=reduction,
        classes=classes,
        logits_dtype=logits_dtype,
        memory_budget=memory_budget,
        skip_ignored=skip_ignored,
    )[0]


@overload
def sparse_linear_kd_loss(
    student_hidden: Tensor,
    student_head: object,
    teacher_indices: Tensor,
    teacher_log_probs: Tensor,
    target: Tensor,
    temperature: float | Tensor = ...,
    alpha: float = ...,
    *,
    direction: Direction = ...,
    tail: Tail = ...,
    reduction: RowReduction = ...,
    ignore_index: int = ...,
    weight: Tensor | None = ...,
    teacher_tail_log_prob: Tensor | None = ...,
    classes: int | None = ...,
    logits_dtype: torch.dtype | None = ...,
    memory_budget: int | None = ...,
    skip_ignored: bool | None = ...,
    return_terms: Literal[False] = ...,
) -> Tensor: ...


@overload
def sparse_linear_kd_loss(
    student_hidden: Tensor,
    student_head: object,
    teacher_indices: Tensor,
    teacher_log_probs: Tensor,
    target: Tensor,
    temperature: float | Tensor = ...,
    alpha: float = ...,
    *,
    direction: Direction = ...,
    tail: Tail = ...,
    reduction: RowReduction = ...,
    ignore_index: int = ...,
    weight: Tensor | None = ...,
    teacher_tail_log_prob: Tensor | None = ...,
    classes: int | None = ...,
    logits_dtype: torch.dtype | None = ...,
    memory_budget: int | None = ...,
    skip_ignored: bool | None = ...,
    return_terms: Literal[True],
) -> tuple[Tensor, dict[str, Tensor]]: ...


def sparse_linear_kd_loss(
    student_hidden: Tensor,
    student_head: object,
    teacher_indices: Tensor,
    teacher_log_probs: Tensor,
    target: Tensor,
    temperature: float | Tensor = 1.0,
    alpha: float = 0.5,
    *,
    direction: Direction = "forward",
    tail: Tail = "bucket",
    reduction: RowReduction = "batchmean",
    ignore_index: int = -100,
    weight: Tensor | None = None,
    teacher_tail_log_prob: Tensor | None = None,
    classes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    skip_ignored: bool | None = None,
    return_terms: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """:func:`sparse_kd_loss` of a head's logits, from hidden states. Other arguments as in :func:`sparse_linear_kl_div`.

    Its defaults are those of :func:`linear_kd_loss`, temperature 1 and half of each term.
    """
    check_tensor("target", target)
    check_choice("direction", direction, DIRECTIONS)
    alpha = check_share("alpha", alpha)
    check_row_reduction(reduction)
    if is_zero(alpha):
        temperature = 1.0  # of a term that is not there
    loss, terms = _ops.sparse_linear_divergence(
        student_hidden,
        student_head,
        teacher_indices,
        teacher_log_probs,
        target,
        kind=direction,
        tail=tail,
        temperature=temperature,
        weight=weight,
        teacher_tail_log_prob=teacher_tail_log_prob,
        kd_scale=alpha,
        task_scale=1.0 - alpha,
        ignore_index=ignore_index,
        reduction=reduction,
        classes=classes,
        logits_dtype=logits_dtype,
        memory_budget=memory_budget,
        skip_ignored=skip_ignored,
    )
    return (loss, {"cross_entropy": terms[0], "kl_div": terms[1]}) if return_terms else loss
