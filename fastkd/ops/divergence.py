"""Fused divergences of temperature-softmaxed logits: ``torch.ops.fastkd.divergence`` and ``logit_stats``.

The gradients are produced in the forward pass, where both rows are in registers or cache anyway, and are what is kept for
the backward pass, in the place of the logits. It scales them by the incoming gradient, in place where nobody can ask for
them again (no ``retain_graph``), and touches nothing where that is 1. For float16 the logits are kept, and the backward
pass computes the gradients: they must not be rounded before a loss scale (GradScaler) has multiplied them, as those of a
mean over a large batch are below its smallest number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import _library as _library  # registers the operators
from fastkd._checks import (
    check_choice,
    check_dim,
    check_dtype,
    check_ignore_index,
    check_positive,
    check_row_values,
)
from fastkd.ops._autograd import (
    call_in_backward,
    may_change_in_place,
    once,
    register_autograd,
    save_tensors,
    saved_by_hooks,
    transforms_active,
)
from fastkd.ops._fake import register_fake
from fastkd.ops._numbers import call_by_name
from fastkd.ops._rank_group import RankGroup, local_part

KINDS = {"forward": 0, "reverse": 1, "jensen_shannon": 2, "soft_cross_entropy": 3}
_OTHERS = ("teacher_logits", "target", "weight", "temperature")  # tensors beside the student's logits
REDUCTIONS = {"none": 0, "sum": 1, "batchmean": 2, "mean": 3}

_divergence = torch.ops.fastkd.divergence.default
_scale_in_place = torch.ops.fastkd.divergence_backward_.default


_ONCE = (
    "fastkd: the gradient of {} cannot be differentiated again (create_graph=True); "
    "use the plain-torch form in fastkd.reference.divergence for second derivatives"
)
_DIVERGENCE_ONCE = _ONCE.format("a fused divergence")
_LOGIT_STATS_ONCE = _ONCE.format("logit_stats")


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
    dim: int = -1,
    group: Any = None,
) -> tuple[Tensor, Tensor]:
    """``kd_scale * T^2 * D + task_scale * CE`` over one dimension, reduced; the core of every loss.

    Args:
        student_logits: ``[..., K]``, float32, float64, bfloat16 or float16; K is dimension ``dim``, see :func:`classes_last`.
        teacher_logits: the same shape; of two dtypes the wider one is taken for both.
        target: int64 ``[...]``, classes for the cross-entropy (at T = 1), or ``ignore_index``: such rows count nowhere.
        kind: one of ``forward``, ``reverse``, ``jensen_shannon``, ``soft_cross_entropy``.
        temperature: a positive number, or a tensor that broadcasts to ``[...]``.
        weight: ``[...]``, float32 or float64, factor of each row; rows of weight 0 are not looked at.
        reduction: ``none`` (``[...]``), ``sum``, ``batchmean`` (sum / valid rows) or ``mean`` (sum / valid rows / K).
        group: the ranks that have the other classes of these rows, see :mod:`fastkd.ops.divergence_shard`.

    Returns:
        loss: float32 (float64 for float64 logits); terms: ``[2]`` or ``[2, ...]``, task and distillation term,
        detached; the task term is 0 where ``task_scale`` is.
    """
    if group is not None:
        ranks = RankGroup.of(group)
        student_logits = local_part("student_logits", student_logits, group, dim)
        teacher_logits = local_part("teacher_logits", teacher_logits, group, dim)
    dim = check_logits("student_logits", student_logits, dim)
    check_logits("teacher_logits", teacher_logits, dim)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"fastkd: teacher_logits has shape {tuple(teacher_logits.shape)}, must be that of student_logits, "
            f"{tuple(student_logits.shape)}" + _vocabulary_hint(student_logits, teacher_logits, dim)
        )
    if student_logits.dtype != teacher_logits.dtype:  # under autocast, say, with a teacher outside of it
        wide = torch.promote_types(student_logits.dtype, teacher_logits.dtype)
        student_logits, teacher_logits = student_logits.to(wide), teacher_logits.to(wide)
    student_logits, teacher_logits = classes_last(student_logits, dim), classes_last(teacher_logits, dim)
    check_choice("kind", kind, KINDS)
    check_choice("reduction", reduction, REDUCTIONS)
    ignore_index = check_ignore_index(ignore_index)
    rows_shape = student_logits.shape[:-1]
    row_temperature = None
    if isinstance(temperature, Tensor):
        row_temperature, temperature = broadcast_to_rows("temperature", temperature, rows_shape), 1.0
    else:
        temperature = check_positive("temperature", temperature)
    if weight is not None:
        weight = broadcast_to_rows("weight", weight, rows_shape)
    if target is not None:
        target = check_target(target, rows_shape)
    flat = student_logits.dim() == 2
    check_devices(student_logits, _OTHERS, (teacher_logits, target, weight, row_temperature))
    if group is not None:  # each of several operators would copy them
        student_logits, teacher_logits = (
            x if x.stride(-1) == 1 else x.contiguous() for x in (student_logits, teacher_logits)
        )
        task_scale = task_scale if target is not None else 0.0
    arguments = (
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
    )
    if group is None:
        ahead = torch.is_grad_enabled() and student_logits.dtype != torch.float16
        gradients = ahead and student_logits.requires_grad, ahead and teacher_logits.requires_grad
        loss, terms, _, _ = call_by_name("divergence", *arguments, *gradients)
    else:
        loss, terms, *_ = call_by_name("divergence_shard", *arguments, *ranks)
    if reduction == "none" and not flat:
        return loss.reshape(rows_shape), terms.reshape(2, *rows_shape)
    return loss, terms


def check_logits(name: str, value: Tensor, dim: int = -1) -> int:
    """Floats with classes in this dimension, which is returned."""
    check_dtype(name, value)
    if value.dim() > 0 and (type(dim) is not int or dim != -1):
        dim = check_dim("dim", dim, name, value.shape)
    if value.dim() < 1 or value.shape[dim] == 0:
        where = "[..., classes]" if dim == -1 else f"classes in dimension {dim}"
        raise ValueError(f"fastkd: {name} has shape {tuple(value.shape)}, must be {where}, classes > 0")
    return dim


def classes_last(logits: Tensor, dim: int) -> Tensor:
    """The logits with their classes in the last dimension.

    A view where the classes of a row are neighbours in memory, as in channels-last maps ``[B, K, H, W]``, ``dim=1``: nothing is
    copied, and the gradient is a view of what the kernel wrote. Else, as of NCHW maps, a copy, and one of the gradient.
    """
    if dim in (-1, logits.dim() - 1):
        return logits
    rows = logits.movedim(dim, -1)
    if rows.is_contiguous() or not (torch.is_grad_enabled() and logits.requires_grad):
        return rows
    return _ClassesLast.apply(logits, dim)  # type: ignore[no-any-return, no-untyped-call]


class _ClassesLast(torch.autograd.Function):
    """A copy, whose gradient comes back in the order of the logits: that of torch's own would keep the copy's."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, dim: int) -> Tensor:
        return logits.movedim(dim, -1).clone(memory_format=torch.contiguous_format)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.dim = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.movedim(-1, ctx.dim).contiguous(), None


def check_target(target: Tensor, shape: torch.Size) -> Tensor:
    """Classes of the rows, flat."""
    check_dtype("target", target, (torch.int64,))
    if target.shape != shape:
        raise ValueError(f"fastkd: target has shape {tuple(target.shape)}, must be {tuple(shape)}")
    return target.reshape(-1)


def check_devices(student_logits: Tensor, names: Sequence[str], others: Sequence[Tensor | None]) -> None:
    """That tensors of these names are where the student's logits are."""
    device = student_logits.device
    for i, value in enumerate(others):
        if value is not None and value.device != device:
            name = names[i]
            raise ValueError(f"fastkd: {name} is on {value.device}, must be where student_logits is, on {device}")


def _vocabulary_hint(student_logits: Tensor, teacher_logits: Tensor, dim: int) -> str:
    if teacher_logits.select(dim, 0).shape == student_logits.select(dim, 0).shape:
        return "; where vocabularies are padded to different sizes, slice both to the common classes"
    return ""


def broadcast_to_rows(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """Numbers of the rows, flat, float32 or float64."""
    check_row_values(name, value)
    if value.dtype not in (torch.float32, torch.float64):
        value = value.float()
    try:
        return value.expand(shape).reshape(-1)
    except RuntimeError:
        raise ValueError(
            f"fastkd: {name} has shape {tuple(value.shape)}, must broadcast to the rows, {tuple(shape)}"
        ) from None


def check_labels(target: Tensor, counts: Tensor, classes: int, ignore_index: int) -> None:
    """That the target ``[N]`` of each row that counts is a class."""
    wrong = counts & ((target < 0) | (target >= classes))
    if wrong.any():
        r = int(wrong.nonzero()[0])
        raise RuntimeError(
            f"fastkd: target[{r}] is {int(target[r])}, must be in [0, {classes}) or ignore_index ({ignore_index})"
        )


def check_temperatures(temperatures: Tensor, counts: Tensor | None) -> None:
    """That the temperature ``[N]`` of each row that counts, or of all, can be one."""
    wrong = ~((temperatures > 0) & temperatures.isfinite())
    wrong = wrong if counts is None else wrong & counts
    if wrong.any():
        r = int(wrong.nonzero()[0])
        raise RuntimeError(f"fastkd: temperature[{r}] is {float(temperatures[r]):g}, must be positive and finite")


def reduced(terms: Tensor, reduction: int, valid: Tensor | None, classes: int | Tensor) -> tuple[Tensor, Tensor]:
    """Terms of each row ``[2, N]`` after the reduction, and what each row counts in it, float64 ``[]``.

    Args:
        valid: ``[N]``, whether a row is not ignored; None if none is.
    """
    share = terms.new_ones([], dtype=torch.float64)
    if reduction in (REDUCTIONS["batchmean"], REDUCTIONS["mean"]):
        share = share / (max(terms.shape[1], 1) if valid is None else valid.sum().clamp(min=1))
    if reduction == REDUCTIONS["mean"]:
        share = share / classes
    return (terms, share) if reduction == REDUCTIONS["none"] else (terms.double().sum(1) * share, share)


@register_fake("divergence")
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


@register_fake("divergence_")
def _divergence_in_place_fake(student_logits: Tensor, *_: Any) -> Tensor:
    dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    return student_logits.new_empty([2, student_logits.shape[0]], dtype=dtype)


@register_fake("divergence_backward_")
def _divergence_backward_fake(gradient: Tensor, grad_loss: Tensor) -> None:
    return None


def _divergence_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    loss, terms, *gradients = output
    ctx.set_materialize_grads(False)
    if transforms_active():  # an outer level must not take the gradients for constants
        ctx.mark_non_differentiable(terms)
        ctx.ahead = False
    else:
        ctx.mark_non_differentiable(terms, *gradients)
        student_logits, teacher_logits, *_, student_gradient, teacher_gradient, _ = inputs
        ctx.ahead = (student_gradient or not student_logits.requires_grad) and (
            teacher_gradient or not teacher_logits.requires_grad
        )
    if ctx.ahead:
        ctx.saved_by_hooks = saved_by_hooks()
        ctx.save_for_backward(*gradients, loss)
    else:
        ctx.scalars = inputs[5:12]
        save_tensors(ctx, (*inputs[:5], inputs[-1]))


def _divergence_backward(
    ctx: Any, grad_loss: Tensor | None, _terms: None, *second: Tensor | None
) -> tuple[Tensor | None, ...]:
    if any(g is not None for g in second):
        raise RuntimeError(_DIVERGENCE_ONCE)
    needed = ctx.needs_input_grad[:2]
    result: list[Tensor | None] = [None] * 15
    if grad_loss is None or not any(needed):
        return tuple(result)
    if ctx.ahead:
        *gradients, loss = ctx.saved_tensors
        for i in (0, 1):
            if needed[i]:
                result[i] = scaled(ctx, gradients[i], grad_loss, loss, _DIVERGENCE_ONCE)
        return tuple(result)
    # the incoming gradient is one more weight of the rows
    student_logits, teacher_logits, target, weight, temperatures, numbers = ctx.saved_tensors
    row_weight = grad_loss.expand(student_logits.shape[0])
    row_weight = row_weight if weight is None else row_weight * weight
    tensors = student_logits, teacher_logits, target, row_weight, temperatures
    with torch.set_grad_enabled(transforms_active()):  # outer levels want their graph
        gradients = _divergence(*tensors, *ctx.scalars, *needed, numbers)[2:]
    for i in (0, 1):
        if needed[i]:
            result[i] = once(_DIVERGENCE_ONCE, gradients[i], student_logits, teacher_logits, grad_loss)
    return tuple(result)


def scaled(ctx: Any, gradient: Tensor, grad_loss: Tensor, loss: Tensor, once_message: str) -> Tensor:
    """``gradient * grad_loss``, which may be differentiated with respect to grad_loss alone."""
    if may_change_in_place(ctx, gradient, grad_loss):
        _scale_in_place(gradient, grad_loss)
        return gradient
    rows = grad_loss.reshape(-1, 1)  # of two dimensions, so that its dtype counts
    return (once(once_message, gradient, loss) * rows).to(gradient.dtype)


register_autograd("divergence", _divergence_backward, setup_context=_divergence_setup_context)


def logit_stats(
    logits: Tensor, temperature: float = 1.0, dim: int = -1
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Statistics of ``z = logits / temperature`` over one dimension: max, argmax, mean, logsumexp, entropy."""
    logits = classes_last(logits, check_logits("logits", logits, dim))
    temperature = check_positive("temperature", temperature)
    shape = logits.shape[:-1]
    flat = logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])
    stats = call_by_name("logit_stats", flat, temperature)
    if logits.dim() == 2:
        return stats  # type: ignore[no-any-return]
    return tuple(value.reshape(shape) for value in stats)


@register_fake("logit_stats")
def _logit_stats_fake(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = logits.shape[0]
    values = [logits.new_empty([rows], dtype=dtype) for _ in range(4)]
    return values[0], logits.new_empty([rows], dtype=torch.int64), values[1], values[2], values[3]


@register_fake("logit_stats_backward")
def _logit_stats_backward_fake(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(list(logits.shape))


def _logit_stats_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, ctx.temperature, numbers = inputs
    _, argmax, _, logsumexp, entropy = output
    ctx.mark_non_differentiable(argmax)
    ctx.set_materialize_grads(False)
    save_tensors(ctx, (logits, argmax, logsumexp, entropy, numbers))


def _logit_stats_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None]:
    logits, argmax, logsumexp, entropy, numbers = ctx.saved_tensors
    grad_max, _, grad_mean, grad_logsumexp, grad_entropy = grads
    op = torch.ops.fastkd.logit_stats_backward.default
    grads = grad_max, grad_mean, grad_logsumexp, grad_entropy
    gradient = call_in_backward(op, logits, ctx.temperature, argmax, logsumexp, entropy, *grads, numbers)
    return gradient, None, None


def _no_second_derivative(*_: Any) -> None:
    raise RuntimeError(_LOGIT_STATS_ONCE)


register_autograd("logit_stats", _logit_stats_backward, setup_context=_logit_stats_setup_context)
register_autograd("logit_stats_backward", _no_second_derivative, setup_context=lambda *_: None)
