"""Divergences of rows whose classes lie on several ranks: ``torch.ops.fastkd.divergence_shard``.

A rank has the logits of some classes, ``[N, V of this rank]``. Of a row the ranks exchange, in three all-reduces, both maxima;
the sums of exponentials relative to these; and the terms of the divergence, where the sums do not give them. Gradients are each
rank's own, and are computed in the backward from these numbers and the logits, without a word between the ranks.

The operators are made of our kernels and torch's functional collectives, in Python: a graph of torch.compile holds each as one
node.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd import _library as _library  # registers the operators
from fastkd.ops._autograd import once, register_autograd, save_tensors, transforms_active
from fastkd.ops._fake import register_fake
from fastkd.ops._numbers import take_numbers
from fastkd.ops._rank_group import RankGroup
from fastkd.ops.divergence import KINDS, REDUCTIONS, check_labels, check_temperatures, reduced

_ONCE = (
    "fastkd: the gradient of a divergence over several ranks cannot be differentiated again (create_graph=True); "
    "use the plain-torch form in fastkd.reference.divergence for second derivatives"
)
_SUMS, _TERMS = 6, 2  # numbers of a row, as in csrc/divergence_shard/kernel.h

_library_of_python = torch.library.Library("fastkd", "FRAGMENT")
_library_of_python.define(
    "divergence_shard(Tensor student_logits, Tensor teacher_logits, Tensor? target, Tensor? weight, Tensor? temperatures, "
    "float temperature, int kind, float beta, float kd_scale, float task_scale, SymInt ignore_index, int reduction, "
    "str group, int rank, int ranks, Tensor? numbers=None) "
    "-> (Tensor loss, Tensor terms, Tensor found, Tensor label, Tensor share)"
)
_library_of_python.define(
    "divergence_shard_backward(Tensor student_logits, Tensor teacher_logits, Tensor found, Tensor label, Tensor grad_loss, "
    "int kind, float beta, float kd_scale, float task_scale, bool student_gradient, bool teacher_gradient, "
    "Tensor? numbers=None) -> (Tensor student_gradient, Tensor teacher_gradient)"
)


class Rows(NamedTuple):
    """What a call knows of its rows ``[N]``, the same on all ranks; what is left out has weight 0 and any temperature."""

    target: Tensor | None
    weight: Tensor
    temperatures: Tensor

    @classmethod
    def of(
        cls,
        logits: Tensor,
        target: Tensor | None,
        weight: Tensor | None,
        temperatures: Tensor | None,
        temperature: float,
        ignore_index: int,
    ) -> Rows:
        n = logits.shape[0]
        made = torch.ones(n, dtype=torch.float64, device=logits.device) if weight is None else weight.double()
        if target is not None:
            made = torch.where(target != ignore_index, made, 0.0)
        if temperatures is None:
            return cls(target, made, torch.full_like(made, temperature))
        counts = made != 0
        if logits.device.type == "cpu":
            check_temperatures(temperatures, counts)
        wide = temperatures.double()
        good = (wide > 0) & wide.isfinite()
        # what the CPU refuses is NaN elsewhere, as values cannot be looked at on the host
        return cls(target, torch.where(good | ~counts, made, torch.nan), torch.where(good, wide, 1.0))


class Compared(NamedTuple):
    """What all ranks know of the rows after the exchange, and of the labels this one."""

    rows: Rows
    sums: Tensor
    terms: Tensor
    label: Tensor
    losses: Tensor
    """``[2, N]``, float64: task, kd, weighted."""
    classes: Tensor
    """``[]``: of all ranks."""


def compare(
    student_logits: Tensor,
    teacher_logits: Tensor,
    rows: Rows,
    kind: int,
    beta: float,
    kd_scale: float,
    task_scale: float,
    ignore_index: int,
    ranks: RankGroup,
) -> Compared:
    """Rows of logits ``[N, V of this rank]``, compared with the help of all ranks."""
    teacher_logits = teacher_logits if kd_scale != 0 else student_logits  # of weight 0: not looked at
    kind, task = _kind_of(kind, beta), rows.target is not None and task_scale != 0
    ops, jensen_shannon = torch.ops.fastkd, kind == KINDS["jensen_shannon"]
    weight, temperatures = rows.weight, rows.temperatures
    own = ops.divergence_shard_sums(student_logits, teacher_logits, weight, temperatures, kind, task)
    # the maxima, and how the classes are shared out
    n, v = student_logits.shape
    counts = weight.new_zeros(ranks.ranks)
    counts[ranks.rank] = v
    highest = ranks.reduce(torch.cat([own[:2].flatten(), counts]), "max")
    tops, counts = highest[: 2 * n].view(2, n), highest[2 * n :]
    classes = counts.sum()
    # sums relative to them, and the logit of the label relative to the student's, on the rank that has it
    student = 1 if kind == KINDS["reverse"] else 0  # x or y
    sums = weight.new_zeros(5, n)
    steepest = 2.0 ** (1000 if student_logits.dtype == torch.float64 else 100)
    inverse_temperatures = temperatures.reciprocal().clamp(1 / steepest, steepest)  # as the kernels have it
    sums[:4] = _relative(own, tops, inverse_temperatures, student, kind)
    label = torch.full_like(weight, -1, dtype=torch.int64)
    if rows.target is not None:
        if weight.device.type == "cpu":
            check_labels(rows.target, weight != 0, int(classes), ignore_index)
        else:
            bad = (rows.target < 0) | (rows.target >= classes)
            weight = torch.where(bad & (weight != 0), torch.nan, weight)
    if rows.target is not None and task:
        position = rows.target - counts[: ranks.rank].sum().long()
        here = (position >= 0) & (position < v) & (weight != 0)
        label = torch.where(here, position, -1)
        logit = student_logits.gather(1, label.clamp(min=0)[:, None])[:, 0].double()
        sums[4] = torch.where(here, logit - tops[student], 0.0)
    sums = ranks.reduce(sums, "sum")
    found = torch.cat([tops, sums[:4]])
    terms = ops.divergence_shard_terms(student_logits, teacher_logits, weight, temperatures, found, kind, beta)
    terms = ranks.reduce(terms, "sum")
    _, _, z_y, z_x, d, z_task = found
    if jensen_shannon:
        divergence = beta * terms[1] + (1.0 - beta) * terms[0]
    else:  # terms[1] counts the ranks for which sums are not enough, all or none
        c = 0.0 if kind == KINDS["soft_cross_entropy"] else 1.0
        divergence = torch.where(terms[1] == ranks.ranks, terms[0], d / z_x - c * z_x.log() + z_y.log())
        terms = torch.stack([divergence, terms[1]])
    nothing = divergence == 0 if kd_scale != 0 else torch.ones_like(divergence, dtype=torch.bool)
    kd = torch.where(nothing, 0.0, divergence * temperatures * temperatures)  # T^2 may be infinite
    losses = torch.stack([z_task.log() - sums[4] if task else torch.zeros_like(kd), kd])
    losses = torch.where(weight == 0, 0.0, losses * weight)
    return Compared(Rows(rows.target, weight, temperatures), found, terms, label, losses, classes)


def _relative(own: Tensor, tops: Tensor, inverse_temperatures: Tensor, student: int, kind: int) -> Tensor:
    """Sums of a rank, ``[4, N]``, which are relative to its own maxima, relative to those of all."""
    z, d, z_task = own[2:4], own[4], own[5]
    rise = tops - own[:2]
    steps = rise * inverse_temperatures
    factor = (-steps).exp()
    moved = z * factor
    c = 0.0 if kind == KINDS["soft_cross_entropy"] else 1.0
    d = torch.where(moved[1] == 0, 0.0, factor[1] * (d - (c * steps[1] - steps[0]) * z[1]))
    return torch.stack([*moved, d, z_task * (-rise[student]).exp()])


def divergence_in_place(
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
    student_gradient: bool,
    teacher_gradient: bool,
    ranks: RankGroup,
) -> Tensor:
    """``torch.ops.fastkd.divergence_`` of rows that lie on several ranks: terms ``[2, N]``, gradients where the logits were."""
    task_scale = task_scale if target is not None else 0.0
    rows = Rows.of(student_logits, target, weight, temperatures, temperature, ignore_index)
    made = compare(student_logits, teacher_logits, rows, kind, beta, kd_scale, task_scale, ignore_index, ranks)
    _write_gradients(
        student_logits,
        teacher_logits,
        made.rows,
        made.label,
        made.sums,
        made.terms,
        (kind, beta, kd_scale, task_scale),
        student_logits if student_gradient else None,
        teacher_logits if teacher_gradient else None,
    )
    return made.losses.to(torch.float64 if student_logits.dtype == torch.float64 else torch.float32)


def _kind_of(kind: int, beta: float) -> int:
    """Jensen-Shannon at its ends is one of the others, as GKD has it."""
    if kind != KINDS["jensen_shannon"] or 0 < beta < 1:
        return kind
    return KINDS["forward"] if beta == 0 else KINDS["reverse"]


def _write_gradients(
    student_logits: Tensor,
    teacher_logits: Tensor,
    rows: Rows,
    label: Tensor,
    sums: Tensor,
    terms: Tensor,
    scalars: tuple[int, float, float, float],
    student_gradient: Tensor | None,
    teacher_gradient: Tensor | None,
) -> None:
    if student_gradient is None and teacher_gradient is None:
        return
    kind, beta, kd_scale, task_scale = scalars
    if kd_scale == 0:
        if teacher_gradient is not None:
            teacher_gradient.zero_()
        teacher_logits, teacher_gradient = student_logits, None
    torch.ops.fastkd.divergence_shard_gradients_(
        student_logits,
        teacher_logits,
        rows.weight,
        rows.temperatures,
        label,
        sums,
        terms,
        _kind_of(kind, beta),
        beta,
        kd_scale,
        task_scale,
        student_gradient,
        teacher_gradient,
    )


@torch.library.impl(_library_of_python, "divergence_shard", "CompositeExplicitAutograd")
def _divergence_shard(*args: Any) -> tuple[Tensor, ...]:
    arguments = take_numbers("divergence_shard", args)
    student_logits, teacher_logits, target, weight, temperatures = arguments[:5]
    temperature, kind, beta, kd_scale, task_scale, ignore_index, reduction, *ranks, _ = arguments[5:]
    with torch.no_grad():
        rows = Rows.of(student_logits, target, weight, temperatures, temperature, ignore_index)
        over = RankGroup(*ranks)
        made = compare(student_logits, teacher_logits, rows, kind, beta, kd_scale, task_scale, ignore_index, over)
        valid = None if target is None else target != ignore_index
        sums, share = reduced(made.losses, reduction, valid, made.classes)
        loss = task_scale * sums[0] + (kd_scale * sums[1] if kd_scale != 0 else 0)
        found = torch.cat([made.sums, made.terms, made.rows.weight[None], made.rows.temperatures[None]])
        dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
        return loss.to(dtype), sums.to(dtype), found, made.label, share


@register_fake("divergence_shard")
def _divergence_shard_fake(student_logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    n = student_logits.shape[0]
    dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    shape = [n] if rest[10] == REDUCTIONS["none"] else []
    return (
        student_logits.new_empty(shape, dtype=dtype),
        student_logits.new_empty([2, *shape], dtype=dtype),
        student_logits.new_empty([_SUMS + _TERMS + 2, n], dtype=torch.float64),
        student_logits.new_empty([n], dtype=torch.int64),
        student_logits.new_empty([], dtype=torch.float64),
    )


@torch.library.impl(_library_of_python, "divergence_shard_backward", "CompositeExplicitAutograd")
def _divergence_shard_backward(*args: Any) -> tuple[Tensor, Tensor]:
    student_logits, teacher_logits, found, label, grad_loss, *scalars, student_gradient, teacher_gradient, _ = (
        take_numbers("divergence_shard_backward", args)
    )
    shape = student_logits.shape
    made = [student_logits.new_empty(shape if wanted else [0]) for wanted in (student_gradient, teacher_gradient)]
    sums, terms, (weight, temperatures) = found.split([_SUMS, _TERMS, 2])
    weight = torch.where(weight == 0, 0.0, weight * grad_loss)  # what comes in is one more weight
    rows = Rows(None, weight, temperatures)
    _write_gradients(
        student_logits,
        teacher_logits,
        rows,
        label,
        sums,
        terms,
        tuple(scalars),
        made[0] if student_gradient else None,
        made[1] if teacher_gradient else None,
    )
    return made[0], made[1]


@register_fake("divergence_shard_backward")
def _divergence_shard_backward_fake(student_logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = list(student_logits.shape)
    wanted = rest[8:10]
    return student_logits.new_empty(shape if wanted[0] else [0]), student_logits.new_empty(shape if wanted[1] else [0])


@register_fake("divergence_shard_sums")
def _sums_fake(student_logits: Tensor, *_: Any) -> Tensor:
    return student_logits.new_empty([_SUMS, student_logits.shape[0]], dtype=torch.float64)


@register_fake("divergence_shard_terms")
def _terms_fake(student_logits: Tensor, *_: Any) -> Tensor:
    return student_logits.new_empty([_TERMS, student_logits.shape[0]], dtype=torch.float64)


@register_fake("divergence_shard_gradients_")
def _gradients_fake(*_: Any) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, terms, found, label, share = output
    ctx.mark_non_differentiable(terms, found, label, share)
    ctx.set_materialize_grads(False)
    ctx.kind, ctx.beta, ctx.kd_scale, ctx.task_scale = inputs[6:10]
    save_tensors(ctx, (*inputs[:2], found, label, share, inputs[15]))


def _backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:2]
    result: list[Tensor | None] = [None] * 16
    if grad_loss is None or not any(needed):
        return tuple(result)
    student_logits, teacher_logits, found, label, share, numbers = ctx.saved_tensors
    numbers = None if numbers is None else numbers[1:]  # the temperature is in what was found
    scalars = ctx.kind, ctx.beta, ctx.kd_scale, ctx.task_scale
    factor = grad_loss * share
    with torch.set_grad_enabled(transforms_active()):  # outer levels want their graph
        made = torch.ops.fastkd.divergence_shard_backward(
            student_logits, teacher_logits, found, label, factor, *scalars, *needed, numbers
        )
    for i in (0, 1):
        if needed[i]:
            result[i] = once(_ONCE, made[i], student_logits, teacher_logits, grad_loss)
    return tuple(result)


register_autograd("divergence_shard", _backward, setup_context=_setup_context)


def _refuse(*_: Any) -> None:
    raise RuntimeError(_ONCE)


register_autograd("divergence_shard_backward", _refuse, setup_context=lambda *_: None)
