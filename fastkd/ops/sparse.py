"""Fused divergences from a sparse teacher, k classes of each row: ``torch.ops.fastkd.sparse_divergence``.

The student's gradient is produced in the forward pass, and scaled in the backward pass, as in :mod:`fastkd.ops.divergence`; for
float16 it is computed there, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd import _library as _library  # registers the operators
from fastkd._checks import FLOATS, check_choice, check_dtype, check_ignore_index, check_positive
from fastkd.ops._autograd import once, register_autograd, save_tensors, saved_by_hooks, transforms_active
from fastkd.ops._fake import register_fake
from fastkd.ops._numbers import call_by_name
from fastkd.ops.divergence import (
    REDUCTIONS,
    broadcast_to_rows,
    check_devices,
    check_logits,
    check_target,
    scaled,
)

KINDS = {"forward": 0, "reverse": 1, "jensen_shannon": 2}
TAILS = {"bucket": 0, "renormalize": 1, "drop": 2}

_OTHERS = ("teacher_indices", "teacher_log_probs", "teacher_tail_log_prob", "target", "weight", "temperature")
_sparse_divergence = torch.ops.fastkd.sparse_divergence.default
_ONCE = (
    "fastkd: the gradient of a sparse divergence cannot be differentiated again (create_graph=True); "
    "use the plain-torch form in fastkd.reference.sparse for second derivatives"
)


def sparse_divergence(
    student_logits: Tensor,
    teacher_indices: Tensor,
    teacher_log_probs: Tensor,
    target: Tensor | None = None,
    *,
    kind: str = "forward",
    tail: str = "bucket",
    temperature: float | Tensor = 1.0,
    beta: float = 0.5,
    weight: Tensor | None = None,
    teacher_tail_log_prob: Tensor | None = None,
    kd_scale: float = 1.0,
    task_scale: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "batchmean",
) -> tuple[Tensor, Tensor]:
    """``kd_scale * T^2 * D + task_scale * CE``, reduced, where k classes of the teacher are known; the core of every loss.

    Args:
        student_logits: ``[..., K]``, float32, float64, bfloat16 or float16.
        teacher_indices: ``[..., k]``, int64 or int32, classes that differ within a row, 1 <= k <= K.
        teacher_log_probs: ``[..., k]``, a float dtype, log softmax of the teacher's logits / T. An entry of -inf is padding,
            whose index is not looked at: its class, if any, belongs to the tail.
        kind: one of ``forward``, ``reverse``, ``jensen_shannon``.
        tail: ``bucket``, ``renormalize`` or ``drop``.
        teacher_tail_log_prob: ``[...]``, a float dtype, of all other classes together, where it is known; for ``bucket``.
        Other arguments, and what is returned, as in :func:`fastkd.ops.divergence.divergence`.
    """
    check_logits("student_logits", student_logits)
    check_choice("kind", kind, KINDS)
    check_choice("reduction", reduction, REDUCTIONS)
    ignore_index = check_ignore_index(ignore_index)
    rows_shape, classes = student_logits.shape[:-1], student_logits.shape[-1]
    check_entries(
        "student_logits", rows_shape, classes, teacher_indices, teacher_log_probs, tail, teacher_tail_log_prob
    )
    if teacher_tail_log_prob is not None:
        teacher_tail_log_prob = teacher_tail_log_prob.reshape(-1)
    row_temperature = None
    if isinstance(temperature, Tensor):
        row_temperature, temperature = broadcast_to_rows("temperature", temperature, rows_shape), 1.0
    else:
        temperature = check_positive("temperature", temperature)
    if weight is not None:
        weight = broadcast_to_rows("weight", weight, rows_shape)
    if target is not None:
        target = check_target(target, rows_shape)
    others = teacher_indices, teacher_log_probs, teacher_tail_log_prob, target, weight, row_temperature
    check_devices(student_logits, _OTHERS, others)
    flat = student_logits.dim() == 2
    loss, terms, _ = call_by_name(
        "sparse_divergence",
        *(x if flat else x.reshape(-1, x.shape[-1]) for x in (student_logits, teacher_indices, teacher_log_probs)),
        teacher_tail_log_prob,
        target,
        weight,
        row_temperature,
        temperature,
        KINDS[kind],
        TAILS[tail],
        beta,
        kd_scale,
        task_scale,
        ignore_index,
        REDUCTIONS[reduction],
        torch.is_grad_enabled() and student_logits.requires_grad and student_logits.dtype != torch.float16,
    )
    if reduction == "none" and not flat:
        return loss.reshape(rows_shape), terms.reshape(2, *rows_shape)
    return loss, terms


def sample_teacher(teacher_logits: Tensor, seed: Tensor, draws: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """``draws`` classes of each row of ``softmax(teacher_logits / T)``, with replacement, repeated ones merged.

    By Philox4x32-10, keyed by the seed, counted by row and draw, through weights in fixed point: the same on every device.

    Args:
        teacher_logits: ``[..., K]``, float32, float64, bfloat16 or float16.
        seed: int64, one element, on the same device.

    Returns:
        indices: int64 ``[..., draws]``, classes in increasing order, then zeros; log_probs: float32, log(count / draws), then
        -inf.
    """
    check_logits("teacher_logits", teacher_logits)
    temperature = check_positive("temperature", temperature)
    rows_shape = teacher_logits.shape[:-1]
    flat = teacher_logits.detach().reshape(-1, teacher_logits.shape[-1])
    indices, log_probs = call_by_name("sample_teacher", flat, seed, draws, temperature)
    return indices.reshape(*rows_shape, draws), log_probs.reshape(*rows_shape, draws)


@register_fake("sample_teacher")
def _sample_teacher_fake(teacher_logits: Tensor, seed: Tensor, draws: int, temperature: float) -> tuple[Tensor, Tensor]:
    shape = [teacher_logits.shape[0], draws]
    return (
        teacher_logits.new_empty(shape, dtype=torch.int64),
        teacher_logits.new_empty(shape, dtype=torch.float32),
    )


def check_entries(
    whose: str,
    rows_shape: torch.Size,
    classes: int,
    teacher_indices: Tensor,
    teacher_log_probs: Tensor,
    tail: str,
    teacher_tail_log_prob: Tensor | None,
) -> None:
    """That a sparse teacher fits rows of so many classes, those of a tensor of the name ``whose``."""
    check_choice("tail", tail, TAILS)
    check_dtype("teacher_indices", teacher_indices, (torch.int64, torch.int32))
    if teacher_indices.dim() == 0 or teacher_indices.shape[:-1] != rows_shape:
        raise ValueError(
            f"fastkd: teacher_indices has shape {tuple(teacher_indices.shape)}, must be {_shape(rows_shape, 'k')}, the rows "
            f"of {whose}"
        )
    entries = teacher_indices.shape[-1]
    if entries == 0 or entries > classes:
        raise ValueError(
            f"fastkd: teacher_indices has shape {tuple(teacher_indices.shape)}, must have 1 to {classes} classes for each row"
        )
    _check_logarithms("teacher_log_probs", teacher_log_probs, teacher_indices.shape)
    if teacher_tail_log_prob is not None:
        if tail != "bucket":
            raise ValueError(f"fastkd: teacher_tail_log_prob is given, must be None where tail is {tail!r}")
        _check_logarithms("teacher_tail_log_prob", teacher_tail_log_prob, rows_shape)


def _check_logarithms(name: str, value: Tensor, shape: torch.Size) -> None:
    check_dtype(name, value, FLOATS)
    if value.shape != shape:
        raise ValueError(f"fastkd: {name} has shape {tuple(value.shape)}, must be {tuple(shape)}")
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"fastkd: {name} requires grad, but has no gradient here; pass {name}.detach()")


def _shape(rows: torch.Size, last: str) -> str:
    return f"({', '.join([*(str(n) for n in rows), last])})"


@register_fake("sparse_divergence")
def _sparse_divergence_fake(
    student_logits: Tensor,
    teacher_indices: Tensor,
    teacher_log_probs: Tensor,
    teacher_tail_log_prob: Tensor | None,
    target: Tensor | None,
    weight: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    kind: int,
    tail: int,
    beta: float,
    kd_scale: float,
    task_scale: float,
    ignore_index: int,
    reduction: int,
    student_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, classes = student_logits.shape
    dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    shape = [rows] if reduction == REDUCTIONS["none"] else []
    return (
        student_logits.new_empty(shape, dtype=dtype),
        student_logits.new_empty([2, *shape], dtype=dtype),
        student_logits.new_empty([rows, classes] if student_gradient else [0]),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    loss, terms, gradient = output
    ctx.set_materialize_grads(False)
    *tensors, student_gradient, numbers = inputs
    if transforms_active():  # an outer level must not take the gradient for a constant
        ctx.mark_non_differentiable(terms)
        ctx.ahead = False
    else:
        ctx.mark_non_differentiable(terms, gradient)
        ctx.ahead = student_gradient
    if ctx.ahead:
        ctx.saved_by_hooks = saved_by_hooks()
        ctx.save_for_backward(gradient, loss)
    else:
        ctx.scalars = tensors[7:]
        save_tensors(ctx, (*tensors[:7], numbers))


def _backward(
    ctx: Any, grad_loss: Tensor | None, _terms: None, second: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    if second is not None:
        raise RuntimeError(_ONCE)
    rest = (None,) * 16
    if grad_loss is None or not ctx.needs_input_grad[0]:
        return None, *rest
    if ctx.ahead:
        gradient, loss = ctx.saved_tensors
        return scaled(ctx, gradient, grad_loss, loss, _ONCE), *rest
    # the incoming gradient is one more weight of the rows
    student_logits, *entries, target, weight, temperatures, numbers = ctx.saved_tensors
    row_weight = grad_loss.expand(student_logits.shape[0])
    row_weight = row_weight if weight is None else row_weight * weight
    tensors = student_logits, *entries, target, row_weight, temperatures
    with torch.set_grad_enabled(transforms_active()):  # outer levels want their graph
        gradient = _sparse_divergence(*tensors, *ctx.scalars, True, numbers)[2]
    return once(_ONCE, gradient, student_logits, grad_loss), *rest


register_autograd("sparse_divergence", _backward, setup_context=_setup_context)
