"""Divergences of two heads from hidden states, whose logits never exist as a whole."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from fastkd._checks import check_choice, check_row_reduction, check_share, check_tensor, is_zero
from fastkd.functional.divergence import DIRECTIONS, Direction, Group, Reduction, RowReduction
from fastkd.ops import linear as _ops


def linear_kl_div(
    student_hidden: Tensor,
    student_head: object,
    teacher_hidden: Tensor | None = None,
    teacher_head: object = None,
    temperature: float | Tensor = 1.0,
    *,
    teacher_logits: Tensor | None = None,
    direction: Direction = "forward",
    reduction: Reduction = "batchmean",
    target: Tensor | None = None,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    classes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    skip_ignored: bool | None = None,
    group: Group | None = None,
) -> Tensor:
    """:func:`kl_div` of the logits of two heads, from hidden states: ``[..., V]`` is never in memory.

    Rows are taken in chunks, with all classes of a row: a GEMM for each side, the divergence with its gradient in the place of
    the logits, and a GEMM for each gradient of what it came from. That is four GEMMs in all for a student that learns from a
    fixed teacher, as with logits in memory; nothing is computed twice, unless ``reduction="none"`` meets a head that is
    trained. What needs no gradient takes none: a frozen head has no gradient in memory.

    Args:
        student_hidden: ``[..., Hs]``, float32, float64, bfloat16 or float16. Under autocast, it and the heads are cast.
        student_head: weight ``[V, Hs]``, an ``nn.Linear``, or a :class:`fastkd.LinearHead` where there is more to it.
        teacher_hidden: ``[..., Ht]``, in the dtype of its head, with a gradient where it requires one. So has the head: call
            ``teacher.requires_grad_(False)``, or detach its weight.
        teacher_head: as ``student_head``.
        teacher_logits: ``[..., V]``, in the place of both, where the teacher's logits are ready. Read in place, with any stride
            from row to row.
        classes: so many of both vocabularies take part, the first: for those that are padded to different sizes.
        logits_dtype: of the chunks. None is float32 (float64 with float64 inputs): what a GEMM of 16-bit numbers adds up is not
            rounded before the softmax. The inputs' own 16 bits halve the chunks' memory traffic on a GPU; logits then carry
            errors of 2^-9 (bfloat16) of their size, and so does each log-probability; near the teacher, where the gradient
            is a difference of almost equal probabilities, that can outweigh it.
        memory_budget: bytes for the chunks' logits; None is 32 MiB on a CPU, 512 MiB on a GPU. Beside it there is the gradient
            of the head, in float32 until it is scaled.
        skip_ignored: leave ignored rows out of the GEMMs. None does so on a CPU. On a GPU their number is known to the device
            alone: True waits for it, once a call, which spares their share of the time but cannot be captured in a CUDA graph;
            with False they are computed, and count nowhere.
        group: the ranks that hold the other classes of both heads, where the vocabulary is sharded, as in :func:`kl_div`:
            weights are ``[V of this rank, H]``, or DTensors, of which that is what is here. Hidden states are the same on all
            ranks, and their gradient is that of the classes of all: nothing else must add it up. ``classes`` are of this
            rank. The ranks agree on the size of chunks, by the least budget, which on a GPU waits for the device once a call.
        temperature, direction, reduction, target, ignore_index, weight: as in :func:`kl_div`.

    Returns:
        float32 (float64 for float64 inputs), scalar or ``[...]``. Same hidden states and heads on both sides give exactly 0.

    Raises:
        TypeError, ValueError, RuntimeError: hidden states that do not fit the head, heads of different vocabularies without
            ``classes``, and as in :func:`kl_div`.
    """
    check_choice("direction", direction, DIRECTIONS)
    return _ops.linear_divergence(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        target,
        teacher_logits=teacher_logits,
        kind=direction,
        temperature=temperature,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        classes=classes,
        logits_dtype=logits_dtype,
        memory_budget=memory_budget,
        skip_ignored=skip_ignored,
        group=group,
    )[0]


def linear_js_div(
    student_hidden: Tensor,
    student_head: object,
    teacher_hidden: Tensor | None = None,
    teacher_head: object = None,
    temperature: float | Tensor = 1.0,
    *,
    teacher_logits: Tensor | None = None,
    beta: float = 0.5,
    reduction: Reduction = "batchmean",
    target: Tensor | None = None,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    classes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    skip_ignored: bool | None = None,
    group: Group | None = None,
) -> Tensor:
    """:func:`js_div` of the logits of two heads, from hidden states. Other arguments as in :func:`linear_kl_div`."""
    beta = check_share("beta", beta)
    return _ops.linear_divergence(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        target,
        teacher_logits=teacher_logits,
        kind="jensen_shannon",
        temperature=temperature,
        beta=beta,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        classes=classes,
        logits_dtype=logits_dtype,
        memory_budget=memory_budget,
        skip_ignored=skip_ignored,
        group=group,
    )[0]


@overload
def linear_kd_loss(
    student_hidden: Tensor,
    student_head: object,
    teacher_hidden: Tensor | None,
    teacher_head: object,
    target: Tensor,
    temperature: float | Tensor = ...,
    alpha: float = ...,
    *,
    teacher_logits: Tensor | None = ...,
    direction: Direction = ...,
    reduction: RowReduction = ...,
    ignore_index: int = ...,
    weight: Tensor | None = ...,
    classes: int | None = ...,
    logits_dtype: torch.dtype | None = ...,
    memory_budget: int | None = ...,
    skip_ignored: bool | None = ...,
    group: Group | None = ...,
    return_terms: Literal[False] = ...,
) -> Tensor: ...


@overload
def linear_kd_loss(
    student_hidden: Tensor,
    student_head: object,
    teacher_hidden: Tensor | None,
    teacher_head: object,
    target: Tensor,
    temperature: float | Tensor = ...,
    alpha: float = ...,
    *,
    teacher_logits: Tensor | None = ...,
    direction: Direction = ...,
    reduction: RowReduction = ...,
    ignore_index: int = ...,
    weight: Tensor | None = ...,
    classes: int | None = ...,
    logits_dtype: torch.dtype | None = ...,
    memory_budget: int | None = ...,
    skip_ignored: bool | None = ...,
    group: Group | None = ...,
    return_terms: Literal[True],
) -> tuple[Tensor, dict[str, Tensor]]: ...


def linear_kd_loss(
    student_hidden: Tensor,
    student_head: object,
    teacher_hidden: Tensor | None,
    teacher_head: object,
    target: Tensor,
    temperature: float | Tensor = 1.0,
    alpha: float = 0.5,
    *,
    teacher_logits: Tensor | None = None,
    direction: Direction = "forward",
    reduction: RowReduction = "batchmean",
    ignore_index: int = -100,
    weight: Tensor | None = None,
    classes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    skip_ignored: bool | None = None,
    group: Group | None = None,
    return_terms: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """:func:`kd_loss` of the logits of two heads, from hidden states. Other arguments as in :func:`linear_kl_div`.

    Its defaults are those of language models, temperature 1 and half of each term. With ``teacher_logits``, ``teacher_hidden``
    and ``teacher_head`` are None.
    """
    check_tensor("target", target)
    check_choice("direction", direction, DIRECTIONS)
    alpha = check_share("alpha", alpha)
    check_row_reduction(reduction)
    if is_zero(alpha):
        temperature = 1.0  # of a term that is not there
    loss, terms, _ = _ops.linear_divergence(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        target,
        teacher_logits=teacher_logits,
        kind=direction,
        temperature=temperature,
        weight=weight,
        kd_scale=alpha,
        task_scale=1.0 - alpha,
        ignore_index=ignore_index,
        reduction=reduction,
        classes=classes,
        logits_dtype=logits_dtype,
        memory_budget=memory_budget,
        skip_ignored=skip_ignored,
        group=group,
    )
    return (loss, {"cross_entropy": terms[0], "kl_div": terms[1]}) if return_terms else loss
