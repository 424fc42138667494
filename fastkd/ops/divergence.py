"""Fused divergences of temperature-softmaxed logits: ``torch.ops.fastkd.divergence`` and ``logit_stats``.

The gradients are produced in the forward pass, where both rows are in registers or cache anyway; the backward pass
scales them by the incoming gradient, in place, and touches nothing where that is 1. In-place is safe because each
gradient is handed out once: a second backward through the same graph (``retain_graph=True``) computes it anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd import _library as _library  # registers the operators
from fastkd.ops._autograd import register_autograd

KINDS = {"forward": 0, "reverse": 1, "jensen_shannon": 2, "soft_cross_entropy": 3}
REDUCTIONS = {"none": 0, "sum": 1, "batchmean": 2, "mean": 3}

_divergence = torch.ops.fastkd.divergence.default
_logit_stats = torch.ops.fastkd.logit_stats.default


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    kind: str = "forward",
    temperature: float | Tensor = 1.0,
    beta: float = 0.5,
    weight: Tensor | None = None,
    kd_scale: float = 1.0,
    task_scale: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "batchmean",
) -> tuple[Tensor, Tensor]:
    """``kd_scale * T^2 * D + task_scale * CE`` over the last dimension, reduced; the core of every loss.

    Args:
        student_logits: ``[..., K]``, float32, float64, bfloat16 or float16.
        teacher_logits: the same shape and dtype.
        target: int64 ``[...]``, classes for the cross-entropy (at T = 1), or ``ignore_index``: such rows count nowhere.
        kind: one of ``forward``, ``reverse``, ``jensen_shannon``, ``soft_cross_entropy``.
        temperature: a positive number, or a tensor that broadcasts to ``[...]``.
        weight: ``[...]``, float32 or float64, factor of each row; rows of weight 0 are not looked at.
        reduction: ``none`` (``[...]``), ``sum``, ``batchmean`` (sum / valid rows) or ``mean`` (sum / valid rows / K).

    Returns:
        loss: float32 (float64 for float64 logits); terms: ``[2]`` or ``[2, ...]``, task and distillation term, detached.
    """
    if student_logits.dim() < 1:
        raise ValueError(f"fastkd: student_logits has shape {tuple(student_logits.shape)}, must be [..., classes]")
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"fastkd: teacher_logits has shape {tuple(teacher_logits.shape)}, must be that of student_logits, "
            f"{tuple(student_logits.shape)}" + _vocabulary_hint(student_logits, teacher_logits)
        )
    if kind not in KINDS:
        raise ValueError(f"fastkd: kind is {kind!r}, must be one of {', '.join(KINDS)}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"fastkd: reduction is {reduction!r}, must be one of {', '.join(REDUCTIONS)}")
    rows_shape = student_logits.shape[:-1]
    row_temperature = None
    if isinstance(temperature, Tensor):
        _no_gradient("temperature", temperature)
        row_temperature, temperature = _rows("temperature", temperature, rows_shape), 1.0
    if weight is not None:
        _no_gradient("weight", weight)
        weight = _rows("weight", weight, rows_shape)
    if target is not None:
        if target.shape != rows_shape:
            raise ValueError(f"fastkd: target has shape {tuple(target.shape)}, must be {tuple(rows_shape)}")
        target = target.reshape(-1)
    flat = student_logits.dim() == 2
    grad_enabled = torch.is_grad_enabled()
    loss, terms, _, _ = _divergence(
        student_logits if flat else student_logits.reshape(-1, student_logits.shape[-1]),
        teacher_logits if flat else teacher_logits.reshape(-1, student_logits.shape[-1]),
        target,
        weight,
        row_temperature,
        temperature,
        KINDS[kind],
        beta,
        kd_scale,
        task_scale,
        ignore_index,
        REDUCTIONS[reduction],
        grad_enabled and student_logits.requires_grad,
        grad_enabled and teacher_logits.requires_grad,
    )
    if reduction == "none" and not flat:
        return loss.reshape(rows_shape), terms.reshape(2, *rows_shape)
    return loss, terms


def _vocabulary_hint(student_logits: Tensor, teacher_logits: Tensor) -> str:
    if teacher_logits.dim() == student_logits.dim() and teacher_logits.shape[:-1] == student_logits.shape[:-1]:
        return "; where vocabularies are padded to different sizes, slice both to the common classes"
    return ""


def _rows(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    if not value.is_floating_point():
        raise TypeError(f"fastkd: {name} has dtype {value.dtype}, must be a float dtype")
    if value.dtype not in (torch.float32, torch.float64):
        value = value.float()
    try:
        return value.expand(shape).reshape(-1)
    except RuntimeError:
        raise ValueError(
            f"fastkd: {name} has shape {tuple(value.shape)}, must broadcast to the rows, {tuple(shape)}"
        ) from None


def _no_gradient(name: str, value: Tensor) -> None:
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"fastkd: {name} requires grad, but the loss is not differentiable in it; pass {name}.detach()")


@torch.library.register_fake("fastkd::divergence")
def _divergence_fake(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    kind: int,
    beta: float,
    kd_scale: float,
    task_scale: float,
    ignore_index: int,
    reduction: int,
    student_gradient: bool,
    teacher_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, classes = student_logits.shape
    dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    shape = [rows] if reduction == REDUCTIONS["none"] else []
    return (
        student_logits.new_empty(shape, dtype=dtype),
        student_logits.new_empty([2, *shape], dtype=dtype),
        student_logits.new_empty([rows, classes] if student_gradient else [0]),
        student_logits.new_empty([rows, classes] if teacher_gradient else [0]),
    )


@torch.library.register_fake("fastkd::divergence_backward_")
def _divergence_backward_fake(gradient: Tensor, grad_loss: Tensor) -> None:
    return None


def _divergence_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, terms, student_gradient, teacher_gradient = output
    ctx.mark_non_differentiable(terms, student_gradient, teacher_gradient)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5])  # for a second backward only
    ctx.scalars = inputs[5:12]
    # detached aliases: an output kept on its own node would be a reference cycle
    ctx.gradients = (student_gradient.detach(), teacher_gradient.detach())


def _divergence_backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "fastkd: the gradient of a fused divergence cannot be differentiated again (create_graph=True); "
            "use the plain-torch form in fastkd.reference.divergence for second derivatives"
        )
    need_student, need_teacher = ctx.needs_input_grad[:2]
    if grad_loss is None or not (need_student or need_teacher):
        return (None,) * 14
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None:
        gradients = _divergence(*ctx.saved_tensors, *ctx.scalars, need_student, need_teacher)[2:]
    result: list[Tensor | None] = [None] * 14
    for i, (name, needed) in enumerate((("student", need_student), ("teacher", need_teacher))):
        if not needed:
            continue
        if gradients[i].dim() != 2:
            raise RuntimeError(f"fastkd: {name}_logits requires grad, so call the operator with {name}_gradient=True")
        result[i] = _scale(gradients[i], grad_loss)
    return tuple(result)


def _scale(gradient: Tensor, grad_loss: Tensor) -> Tensor:
    if type(gradient) is not Tensor:  # being traced: the functional form, which a compiler fuses with what follows
        rows = grad_loss if grad_loss.dim() == 0 else grad_loss[:, None]
        return (gradient * rows).to(gradient.dtype)
    torch.ops.fastkd.divergence_backward_.default(gradient, grad_loss)
    return gradient


register_autograd("divergence", _divergence_backward, setup_context=_divergence_setup_context)


def logit_stats(logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Statistics of ``z = logits / temperature`` over the last dimension: max, argmax, mean, logsumexp, entropy."""
    if logits.dim() < 1:
        raise ValueError(f"fastkd: logits has shape {tuple(logits.shape)}, must be [..., classes]")
    shape = logits.shape[:-1]
    stats = _logit_stats(logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1]), temperature)
    if logits.dim() == 2:
        return stats  # type: ignore[no-any-return]
    return tuple(value.reshape(shape) for value in stats)  # type: ignore[return-value]


@torch.library.register_fake("fastkd::logit_stats")
def _logit_stats_fake(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = logits.shape[0]
    values = [logits.new_empty([rows], dtype=dtype) for _ in range(4)]
    return values[0], logits.new_empty([rows], dtype=torch.int64), values[1], values[2], values[3]


@torch.library.register_fake("fastkd::logit_stats_backward")
def _logit_stats_backward_fake(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(list(logits.shape))


def _logit_stats_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, ctx.temperature = inputs
    _, argmax, _, logsumexp, entropy = output
    ctx.mark_non_differentiable(argmax)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, argmax, logsumexp, entropy)


def _logit_stats_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "fastkd: the gradient of logit_stats cannot be differentiated again (create_graph=True); "
            "use the plain-torch form in fastkd.reference.divergence for second derivatives"
        )
    logits, argmax, logsumexp, entropy = ctx.saved_tensors
    grad_max, _, grad_mean, grad_logsumexp, grad_entropy = grads
    gradient = torch.ops.fastkd.logit_stats_backward.default(
        logits, ctx.temperature, argmax, logsumexp, entropy, grad_max, grad_mean, grad_logsumexp, grad_entropy
    )
    return gradient, None


register_autograd("logit_stats", _logit_stats_backward, setup_context=_logit_stats_setup_context)
