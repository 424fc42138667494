"""Divergences of two heads from hidden states, without their logits: ``torch.ops.fastkd.linear_divergence``.

The gradients are made in the forward pass (:mod:`fastkd.ops.linear_chunks`), as those of :mod:`fastkd.ops.divergence` are,
and the backward scales them. Where losses come back unreduced and a head is trained, whose gradient is a sum over rows of what
comes in for each, they are made in the backward: logits are then computed twice.

The operator is made of torch's own GEMMs and ours, in Python: a graph of torch.compile holds it as one node.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd._checks import (
    check_choice,
    check_count,
    check_dtype,
    check_flag,
    check_ignore_index,
    check_positive,
)
from fastkd.ops._autograd import (
    may_change_in_place,
    once,
    register_autograd,
    save_tensors,
    saved_by_hooks,
    transforms_active,
)
from fastkd.ops._fake import register_fake
from fastkd.ops._numbers import call_by_name
from fastkd.ops.divergence import (
    KINDS,
    REDUCTIONS,
    broadcast_to_rows,
    check_labels,
    check_logits,
    check_target,
    check_temperatures,
    reduced,
)
from fastkd.ops.linear_chunks import HALF, Side, divergence_of_heads, empty_gradients
from fastkd.ops.linear_head import LinearHead, compute_dtype

CPU_BUDGET = 32 << 20
GPU_BUDGET = 512 << 20

_ONCE = (
    "fastkd: the gradient of a fused linear divergence cannot be differentiated again (create_graph=True); "
    "use the plain-torch form in fastkd.reference.linear for second derivatives"
)

_library = torch.library.Library("fastkd", "FRAGMENT")
_library.define(
    "linear_divergence(Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor teacher_hidden, "
    "Tensor? teacher_weight, Tensor? teacher_bias, Tensor? target, Tensor? weight, Tensor? temperatures, "
    "float temperature, int kind, float beta, float kd_scale, float task_scale, "
    "float student_scale, float student_softcap, float teacher_scale, float teacher_softcap, "
    "SymInt ignore_index, int reduction, SymInt classes, ScalarType logits_dtype, SymInt memory_budget, "
    "bool skip_ignored, bool student_entropy, bool[] wanted, Tensor? numbers=None) "
    "-> (Tensor loss, Tensor terms, Tensor entropy, Tensor share, Tensor student_hidden_gradient, "
    "Tensor student_weight_gradient, Tensor student_bias_gradient, Tensor teacher_hidden_gradient, "
    "Tensor teacher_weight_gradient, Tensor teacher_bias_gradient)"
)


def linear_divergence(
    student_hidden: Tensor,
    student_head: object,
    teacher_hidden: Tensor | None = None,
    teacher_head: object = None,
    target: Tensor | None = None,
    *,
    teacher_logits: Tensor | None = None,
    kind: str = "forward",
    temperature: float | Tensor = 1.0,
    beta: float = 0.5,
    weight: Tensor | None = None,
    kd_scale: float = 1.0,
    task_scale: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "batchmean",
    classes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    skip_ignored: bool | None = None,
    student_entropy: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``kd_scale * T^2 * D + task_scale * CE`` of two heads; the core of every linear loss.

    Arguments as in :func:`fastkd.functional.linear_kl_div` and :func:`fastkd.ops.divergence.divergence`.

    Returns:
        loss; terms, ``[2]`` or ``[2, ...]``: task and distillation term, detached; the entropy of the student's softmax at this
        temperature in each row, ``[...]``, 0 where ignored, detached (empty if not asked for, needs a number as temperature).
    """
    student_hidden, student = _side("student", student_hidden, student_head)
    shape = student_hidden.shape[:-1]
    teacher: LinearHead | None = None
    if teacher_logits is None:
        if teacher_hidden is None or teacher_head is None:
            raise TypeError("fastkd: give teacher_hidden and teacher_head, or teacher_logits")
        teacher_hidden, teacher = _side("teacher", teacher_hidden, teacher_head)
        name, theirs = "teacher_hidden", teacher.weight.shape[0]
    else:
        if teacher_hidden is not None or teacher_head is not None:
            raise TypeError("fastkd: teacher_logits are given, so teacher_hidden and teacher_head must be None")
        check_logits("teacher_logits", teacher_logits)
        name, teacher_hidden, theirs = "teacher_logits", teacher_logits, teacher_logits.shape[-1]
    if teacher_hidden.shape[:-1] != shape:
        raise ValueError(
            f"fastkd: {name} has shape {tuple(teacher_hidden.shape)}, must be {(*shape, '...')}, a row for each of "
            f"student_hidden, {tuple(student_hidden.shape)}".replace("'", "")
        )
    classes = _check_classes(classes, student.weight.shape[0], theirs)
    logits_dtype = _check_logits_dtype(logits_dtype, student_hidden, teacher_hidden)
    check_choice("kind", kind, KINDS)
    check_choice("reduction", reduction, REDUCTIONS)
    ignore_index = check_ignore_index(ignore_index)
    row_temperature = None
    if isinstance(temperature, Tensor):
        if student_entropy:
            raise TypeError("fastkd: temperature is a tensor, must be a number where the student's entropy is wanted")
        row_temperature, temperature = broadcast_to_rows("temperature", temperature, shape), 1.0
    else:
        temperature = check_positive("temperature", temperature)
    if weight is not None:
        weight = broadcast_to_rows("weight", weight, shape)
    if target is not None:
        target = check_target(target, shape)
    device = student_hidden.device
    for label, value in (
        (name, teacher_hidden),
        ("target", target),
        ("weight", weight),
        ("temperature", row_temperature),
    ):
        if value is not None and value.device != device:
            raise ValueError(f"fastkd: {label} is on {value.device}, must be where student_hidden is, on {device}")
    if memory_budget is None:
        memory_budget = GPU_BUDGET if device.type == "cuda" else CPU_BUDGET
    memory_budget = check_count("memory_budget", memory_budget, 1)
    skip_ignored = device.type != "cuda" if skip_ignored is None else check_flag("skip_ignored", skip_ignored)
    tensors = [
        student_hidden.reshape(-1, student_hidden.shape[-1]),
        student.weight,
        student.bias,
        teacher_hidden.reshape(-1, teacher_hidden.shape[-1]),
        None if teacher is None else teacher.weight,
        None if teacher is None else teacher.bias,
    ]
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors]
    if reduction == "none" and (wanted[1] or wanted[2] or wanted[4] or wanted[5]):
        wanted = [False] * 6  # in the backward
    loss, terms, entropy, *_ = call_by_name(
        "linear_divergence",
        *tensors,
        target,
        weight,
        row_temperature,
        temperature,
        KINDS[kind],
        beta,
        kd_scale,
        task_scale,
        student.scale,
        student.softcap or 0.0,
        1.0 if teacher is None else teacher.scale,
        0.0 if teacher is None else teacher.softcap or 0.0,
        ignore_index,
        REDUCTIONS[reduction],
        classes,
        logits_dtype,
        memory_budget,
        skip_ignored,
        student_entropy,
        wanted,
    )
    if student_entropy:
        entropy = entropy.reshape(shape)
    if reduction == "none":
        return loss.reshape(shape), terms.reshape(2, *shape), entropy
    return loss, terms, entropy


def _side(name: str, hidden: Tensor, head: object) -> tuple[Tensor, LinearHead]:
    """Hidden states and head, checked; under autocast in its dtype."""
    check_dtype(f"{name}_hidden", hidden)
    if hidden.dim() < 1 or hidden.shape[-1] == 0:
        raise ValueError(
            f"fastkd: {name}_hidden has shape {tuple(hidden.shape)}, must be [..., features], features > 0"
        )
    checked = LinearHead.of(f"{name}_head", head, hidden)
    dtype = compute_dtype(hidden)
    return hidden.to(dtype), checked.to(dtype)


def _check_classes(classes: int | None, ours: int, theirs: int) -> int:
    least = min(ours, theirs)
    if classes is None:
        if ours != theirs:
            raise ValueError(
                f"fastkd: the student's head has {ours} classes, the teacher's {theirs}; where one vocabulary is padded, "
                f"give classes={least}, the first that both have"
            )
        return ours
    return check_count("classes", classes, 1, least + 1)


def _check_logits_dtype(dtype: torch.dtype | None, student: Tensor, teacher: Tensor) -> torch.dtype:
    best = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    if dtype is None or dtype == best:
        return best
    if dtype in HALF and student.dtype == teacher.dtype == dtype:
        return dtype
    raise ValueError(
        f"fastkd: logits_dtype is {dtype}, must be {best}, or the dtype of both sides where that has 16 bits; "
        f"student_hidden has {student.dtype}, the teacher {teacher.dtype}"
    )


@torch.library.impl(_library, "linear_divergence", "CompositeExplicitAutograd")
def _linear_divergence(*args: Any) -> tuple[Tensor, ...]:
    numbers = args[26] if len(args) > 26 else None
    (target, weight, temperatures), floats = args[6:9], [args[9], *args[11:18]]
    if numbers is not None:
        floats = numbers.tolist()
    temperature, beta, kd_scale, task_scale, *head_numbers = floats
    kind, (ignore_index, reduction, classes, logits_dtype, memory_budget, skip, entropy, wanted) = args[10], args[18:26]
    device = args[0].device
    counts = valid = None
    if target is not None:
        valid = target != ignore_index
        counts = valid if weight is None else valid & (weight != 0)
        if device.type == "cpu":
            check_labels(target, counts, classes, ignore_index)
    elif weight is not None:
        counts = weight != 0
    if temperatures is not None and device.type == "cpu":
        check_temperatures(temperatures, counts)
    student = Side(args[0], args[1], args[2], head_numbers[:2], classes, logits_dtype, wanted[:3])
    teacher = Side(args[3], args[4], args[5], head_numbers[2:], classes, logits_dtype, wanted[3:])
    with torch.autocast(device.type, enabled=False), torch.no_grad():
        scalars = (temperature, kind, beta, kd_scale, task_scale, ignore_index)
        rows = (target, weight, temperatures, counts)
        terms, entropies = divergence_of_heads(student, teacher, *rows, skip, memory_budget, scalars, entropy)
        sums, share = reduced(terms, reduction, valid, classes)
        loss = task_scale * sums[0] + (kd_scale * sums[1] if kd_scale != 0 else 0)
        return (
            loss.to(terms.dtype),
            sums.to(terms.dtype),
            entropies,
            share,
            *student.finish(),
            *teacher.finish(),
        )


@register_fake("linear_divergence")
def _linear_divergence_fake(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    reduction, _, logits_dtype, _, _, entropy, wanted = rest[13:20]
    n = student_hidden.shape[0]
    dtype = torch.float64 if logits_dtype == torch.float64 else torch.float32
    shape = [n] if reduction == REDUCTIONS["none"] else []

    return (
        student_hidden.new_empty(shape, dtype=dtype),
        student_hidden.new_empty([2, *shape], dtype=dtype),
        student_hidden.new_empty([n if entropy else 0], dtype=dtype),
        student_hidden.new_empty([], dtype=torch.float64),
        *empty_gradients(student_hidden, student_weight, student_bias, wanted[:3]),
        *empty_gradients(teacher_hidden, teacher_weight, teacher_bias, wanted[3:]),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    loss, terms, entropy, share, *gradients = output
    ctx.set_materialize_grads(False)
    wanted = inputs[25]
    if transforms_active():  # an outer level must not take the gradients for constants
        ctx.mark_non_differentiable(terms, entropy, share)
        ctx.ahead = False
    else:
        ctx.mark_non_differentiable(terms, entropy, share, *gradients)
        ctx.ahead = all(w or x is None or not x.requires_grad for w, x in zip(wanted, inputs[:6], strict=True))
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:6]]
    if ctx.ahead:
        ctx.saved_by_hooks = saved_by_hooks()
        ctx.save_for_backward(*gradients, share, loss)
    else:
        ctx.scalars = inputs[9:26]
        save_tensors(ctx, (*inputs[:9], inputs[26], share))


def _backward(
    ctx: Any, grad_loss: Tensor | None, _terms: None, _entropy: None, _share: None, *second: Tensor | None
) -> tuple[Tensor | None, ...]:
    if any(g is not None for g in second):
        raise RuntimeError(_ONCE)
    needed = ctx.needs_input_grad[:6]
    result: list[Tensor | None] = [None] * 27
    if grad_loss is None or not any(needed):
        return tuple(result)
    if ctx.ahead:
        *gradients, share, loss = ctx.saved_tensors
        for i in range(6):
            if needed[i]:
                result[i] = _scaled(ctx, gradients[i], grad_loss, share, loss, ctx.dtypes[i])
        return tuple(result)
    # the incoming gradient is one more weight of the rows
    *tensors, target, weight, temperatures, numbers, share = ctx.saved_tensors
    row_weight = (grad_loss * share).expand(tensors[0].shape[0])
    row_weight = row_weight if weight is None else row_weight * weight
    scalars = list(ctx.scalars)
    scalars[10] = REDUCTIONS["sum"]
    scalars[-2:] = False, list(needed)
    with torch.set_grad_enabled(transforms_active()):  # outer levels want their graph
        made = torch.ops.fastkd.linear_divergence(*tensors, target, row_weight, temperatures, *scalars, numbers)[4:]
    for i in range(6):
        if needed[i]:
            inputs = [x for x in (*tensors, grad_loss) if x is not None]
            result[i] = once(_ONCE, made[i].to(ctx.dtypes[i]), *inputs)
    return tuple(result)


def _scaled(ctx: Any, kept: Tensor, grad_loss: Tensor, share: Tensor, loss: Tensor, dtype: torch.dtype) -> Tensor:
    """``kept * grad_loss * share``, which may be differentiated with respect to grad_loss alone."""
    factor = grad_loss * share
    if factor.dim() > 0:
        factor = factor[:, None]
    if may_change_in_place(ctx, kept, grad_loss):
        return kept.mul_(factor).to(dtype)
    return (once(_ONCE, kept, loss) * factor).to(dtype)


register_autograd("linear_divergence", _backward, setup_context=_setup_context)
