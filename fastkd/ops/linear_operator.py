"""Operators of a student's head and a teacher: what they have in common, whatever is known of the teacher.

The gradients are made in the forward pass (:mod:`fastkd.ops.linear_chunks`), as those of :mod:`fastkd.ops.divergence` are,
and the backward scales them. Where losses come back unreduced and a head is trained, whose gradient is a sum over rows of what
comes in for each, they are made in the backward: logits are then computed twice.

The operators are made of torch's own GEMMs and our kernels, in Python: a graph of torch.compile holds each as one node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from fastkd.ops._numbers import call_by_name, take_numbers
from fastkd.ops._rank_group import RankGroup, local_part
from fastkd.ops.divergence import (
    REDUCTIONS,
    broadcast_to_rows,
    check_labels,
    check_target,
    check_temperatures,
    reduced,
)
from fastkd.ops.linear_chunks import (
    HALF,
    RowValues,
    Scalars,
    Side,
    Teacher,
    divergence_in_chunks,
    empty_gradients,
)
from fastkd.ops.linear_head import LinearHead, compute_dtype

CPU_BUDGET = 32 << 20
GPU_BUDGET = 512 << 20

_ONCE = (
    "fastkd: the gradient of a fused linear divergence cannot be differentiated again (create_graph=True); "
    "use the plain-torch form in fastkd.reference.linear for second derivatives"
)
_SIDE = 3  # tensors of one: hidden states, weight, bias
_SCHEMA = (
    "{name}(Tensor student_hidden, Tensor student_weight, Tensor? student_bias, {tensors}, "
    "Tensor? target, Tensor? weight, Tensor? temperatures, "
    "float temperature, int kind, float beta, float kd_scale, float task_scale, "
    "float student_scale, float student_softcap, {scalars}, "
    "SymInt ignore_index, int reduction, SymInt classes, ScalarType logits_dtype, SymInt memory_budget, "
    "bool skip_ignored, bool student_entropy, str group, int rank, int ranks, bool[] wanted, Tensor? numbers=None) "
    "-> (Tensor loss, Tensor terms, Tensor entropy, Tensor share, {gradients})"
)
_COMMON = -11  # where the scalars behind the teacher's begin
_REDUCTION = -10
_ENTROPY = -5
_ALONE = RankGroup("", 0, 1)
_library = torch.library.Library("fastkd", "FRAGMENT")


class LinearOperator:
    """``torch.ops.fastkd.<name>``, for teachers of one kind, with its fake and its autograd formula.

    Args:
        tensors: the teacher's, as they stand in the schema, ``Tensor`` or ``Tensor?``.
        scalars: the teacher's.
        trained: whether the teacher is a side too, hidden states, weight and bias, with a gradient of each.
        make_teacher: of the student, the teacher's tensors, its scalars, and which of its gradients are wanted (none where it
            is not trained).
    """

    def __init__(
        self,
        name: str,
        tensors: Sequence[str],
        scalars: Sequence[str],
        trained: bool,
        make_teacher: Callable[[Side, Sequence[Any], Sequence[Any], Sequence[bool]], Teacher],
    ) -> None:
        self.name, self.make_teacher = name, make_teacher
        self.tensors = _SIDE + len(tensors)  # so many arguments are those of both sides
        self.inputs = 2 * _SIDE if trained else _SIDE  # so many of them, the first, have a gradient
        sides = ("student", "teacher") if trained else ("student",)
        gradients = (f"Tensor {side}_{of}_gradient" for side in sides for of in ("hidden", "weight", "bias"))
        words = {"tensors": tensors, "scalars": scalars, "gradients": tuple(gradients)}
        _library.define(_SCHEMA.format(name=name, **{key: ", ".join(value) for key, value in words.items()}))
        _library.impl(name, self._run, "CompositeExplicitAutograd")
        register_fake(name)(self._fake)
        register_autograd(name, self._backward, setup_context=self._setup_context)

    def __call__(
        self,
        student_hidden: Tensor,
        student: LinearHead,
        teacher: Mapping[str, Tensor | None],
        teacher_scalars: Sequence[Any],
        target: Tensor | None,
        *,
        kind: int,
        temperature: float | Tensor,
        beta: float,
        weight: Tensor | None,
        kd_scale: float,
        task_scale: float,
        ignore_index: int,
        reduction: str,
        classes: int,
        logits_dtype: torch.dtype,
        memory_budget: int | None,
        skip_ignored: bool | None,
        student_entropy: bool = False,
        group: RankGroup | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, terms and entropy, as :func:`fastkd.ops.linear.linear_divergence` returns them.

        Args:
            student_hidden, student: from :func:`check_side`.
            teacher: tensors of its own in the order of the schema, ``[N, ...]`` where they are of rows, by the names that the
                caller knows them by.
            Others as in the losses; ``classes`` and ``logits_dtype`` are checked.
        """
        shape, device = student_hidden.shape[:-1], student_hidden.device
        check_choice("reduction", reduction, REDUCTIONS)
        ignore_index = check_ignore_index(ignore_index)
        row_temperature = None
        if isinstance(temperature, Tensor):
            if student_entropy:
                raise TypeError(
                    "fastkd: temperature is a tensor, must be a number where the student's entropy is wanted"
                )
            row_temperature, temperature = broadcast_to_rows("temperature", temperature, shape), 1.0
        else:
            temperature = check_positive("temperature", temperature)
        if weight is not None:
            weight = broadcast_to_rows("weight", weight, shape)
        if target is not None:
            target = check_target(target, shape)
        for label, value in {**teacher, "target": target, "weight": weight, "temperature": row_temperature}.items():
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
            *teacher.values(),
        ]
        wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors[: self.inputs]]
        if reduction == "none" and any(wanted[1:_SIDE] + wanted[_SIDE + 1 :]):  # of a head
            wanted = [False] * self.inputs  # in the backward
        loss, terms, entropy, *_ = call_by_name(
            self.name,
            *tensors,
            target,
            weight,
            row_temperature,
            temperature,
            kind,
            beta,
            kd_scale,
            task_scale,
            student.scale,
            student.softcap or 0.0,
            *teacher_scalars,
            ignore_index,
            REDUCTIONS[reduction],
            classes,
            logits_dtype,
            memory_budget,
            skip_ignored,
            student_entropy,
            *(group or _ALONE),
            wanted,
        )
        if student_entropy:
            entropy = entropy.reshape(shape)
        if reduction == "none":
            return loss.reshape(shape), terms.reshape(2, *shape), entropy
        return loss, terms, entropy

    def _run(self, *args: Any) -> tuple[Tensor, ...]:
        args = tuple(take_numbers(self.name, args)[:-1])
        hidden, head_weight, head_bias = args[:_SIDE]
        target, weight, temperatures = values = RowValues(*args[self.tensors : self.tensors + 3])
        temperature, kind, beta, kd_scale, task_scale, scale, softcap, *theirs = args[self.tensors + 3 : _COMMON]
        ignore_index, reduction, classes, logits_dtype, memory_budget, skip, entropy, *ranks, wanted = args[_COMMON:]
        group = RankGroup(*ranks) if ranks[0] else None
        device = hidden.device
        head = head_weight, head_bias, (scale, softcap)
        student = Side(hidden, *head, classes, logits_dtype, wanted[:_SIDE], group)
        teacher = self.make_teacher(student, args[_SIDE : self.tensors], theirs, wanted[_SIDE:])
        row_bytes, total = student.bytes_of_a_row + teacher.bytes_of_a_row, classes
        if group is not None:  # chunks and exchanges must be the same on all ranks
            alike = {"rows": len(hidden), "skip_ignored": int(skip)}
            alike |= {"requires_grad of hidden states and heads": sum(w << i for i, w in enumerate(wanted))}
            rows_bytes, sizes, budgets, *others = group.gather(
                [row_bytes, classes, memory_budget, *alike.values()], device
            )
            for what, found in zip(alike, others, strict=True):
                if len(set(found)) > 1:
                    raise ValueError(f"fastkd: {what}: must be the same on all ranks of group")
            row_bytes, total, memory_budget = max(rows_bytes), sum(sizes), min(budgets)
        counts = valid = None
        if target is not None:
            valid = target != ignore_index
            counts = valid if weight is None else valid & (weight != 0)
            if device.type == "cpu":
                check_labels(target, counts, total, ignore_index)
        elif weight is not None:
            counts = weight != 0
        if temperatures is not None and device.type == "cpu":
            check_temperatures(temperatures, counts)
        with torch.autocast(device.type, enabled=False), torch.no_grad():
            scalars = Scalars(temperature, kind, beta, kd_scale, task_scale, ignore_index)
            most_rows = memory_budget // row_bytes
            terms, entropies = divergence_in_chunks(student, teacher, values, counts, skip, most_rows, scalars, entropy)
            sums, share = reduced(terms, reduction, valid, total)
            loss = task_scale * sums[0] + (kd_scale * sums[1] if kd_scale != 0 else 0)
            return (
                loss.to(terms.dtype),
                sums.to(terms.dtype),
                entropies,
                share,
                *student.finish(),
                *teacher.finish(),
            )

    def _fake(self, *args: Any) -> tuple[Tensor, ...]:
        reduction, _, logits_dtype, _, _, entropy, *_, wanted = args[_REDUCTION:]
        hidden = args[0]
        n = hidden.shape[0]
        dtype = torch.float64 if logits_dtype == torch.float64 else torch.float32
        shape = [n] if reduction == REDUCTIONS["none"] else []
        gradients: list[Tensor] = []
        for i in range(0, self.inputs, _SIDE):
            of, weight, bias = args[i : i + _SIDE]
            gradients += empty_gradients(of, weight, bias, wanted[i : i + _SIDE])
        return (
            hidden.new_empty(shape, dtype=dtype),
            hidden.new_empty([2, *shape], dtype=dtype),
            hidden.new_empty([n if entropy else 0], dtype=dtype),
            hidden.new_empty([], dtype=torch.float64),
            *gradients,
        )

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        loss, terms, entropy, share, *gradients = output
        ctx.set_materialize_grads(False)
        wanted = inputs[-2]
        trained = inputs[: self.inputs]
        if transforms_active():  # an outer level must not take the gradients for constants
            ctx.mark_non_differentiable(terms, entropy, share)
            ctx.ahead = False
        else:
            ctx.mark_non_differentiable(terms, entropy, share, *gradients)
            ctx.ahead = all(w or x is None or not x.requires_grad for w, x in zip(wanted, trained, strict=True))
        ctx.dtypes = [None if x is None else x.dtype for x in trained]
        ctx.count = len(inputs)
        if ctx.ahead:
            ctx.saved_by_hooks = saved_by_hooks()
            ctx.save_for_backward(*gradients, share, loss)
        else:
            ctx.scalars = inputs[self.tensors + 3 : -1]
            save_tensors(ctx, (*inputs[: self.tensors + 3], inputs[-1], share))

    def _backward(
        self, ctx: Any, grad_loss: Tensor | None, _terms: None, _entropy: None, _share: None, *second: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if any(g is not None for g in second):
            raise RuntimeError(_ONCE)
        needed = ctx.needs_input_grad[: self.inputs]
        result: list[Tensor | None] = [None] * ctx.count
        if grad_loss is None or not any(needed):
            return tuple(result)
        if ctx.ahead:
            *gradients, share, loss = ctx.saved_tensors
            for i in range(self.inputs):
                if needed[i]:
                    result[i] = _scaled(ctx, gradients[i], grad_loss, share, loss, ctx.dtypes[i])
            return tuple(result)
        # the incoming gradient is one more weight of the rows
        *tensors, target, weight, temperatures, numbers, share = ctx.saved_tensors
        row_weight = (grad_loss * share).expand(tensors[0].shape[0])
        row_weight = row_weight if weight is None else row_weight * weight
        scalars = list(ctx.scalars)
        scalars[_REDUCTION] = REDUCTIONS["sum"]
        scalars[_ENTROPY], scalars[-1] = False, list(needed)
        op = getattr(torch.ops.fastkd, self.name).default
        with torch.set_grad_enabled(transforms_active()):  # outer levels want their graph
            made = op(*tensors, target, row_weight, temperatures, *scalars, numbers)[4:]
        for i in range(self.inputs):
            if needed[i]:
                inputs = [x for x in (*tensors, grad_loss) if x is not None]
                result[i] = once(_ONCE, made[i].to(ctx.dtypes[i]), *inputs)
        return tuple(result)


def check_side(name: str, hidden: Tensor, head: object, group: Any = None) -> tuple[Tensor, LinearHead]:
    """Hidden states and head, checked; under autocast in its dtype. With a group, what this rank has of the head."""
    if group is not None:
        hidden = local_part(f"{name}_hidden", hidden, group, None)
    check_dtype(f"{name}_hidden", hidden)
    if hidden.dim() < 1 or hidden.shape[-1] == 0:
        raise ValueError(
            f"fastkd: {name}_hidden has shape {tuple(hidden.shape)}, must be [..., features], features > 0"
        )
    checked = LinearHead.of(f"{name}_head", head, hidden, group)
    dtype = compute_dtype(hidden)
    return hidden.to(dtype), checked.to(dtype)


def check_logits_dtype(dtype: torch.dtype | None, sides: Mapping[str, Tensor]) -> torch.dtype:
    """Of the chunks' logits, which are made of these tensors."""
    given = {x.dtype for x in sides.values()}
    best = torch.float64 if torch.float64 in given else torch.float32
    if dtype is None or dtype == best:
        return best
    if dtype in HALF and given == {dtype}:
        return dtype
    theirs = ", ".join(f"{name} has {x.dtype}" for name, x in sides.items())
    raise ValueError(
        f"fastkd: logits_dtype is {dtype}, must be {best}, or the dtype of {' and '.join(sides)} where that has 16 bits; "
        f"{theirs}"
    )


def _scaled(ctx: Any, kept: Tensor, grad_loss: Tensor, share: Tensor, loss: Tensor, dtype: torch.dtype) -> Tensor:
    """``kept * grad_loss * share``, which may be differentiated with respect to grad_loss alone."""
    factor = grad_loss * share
    if factor.dim() > 0:
        factor = factor[:, None]
    if may_change_in_place(ctx, kept, grad_loss):
        return kept.mul_(factor).to(dtype)
    return (once(_ONCE, kept, loss) * factor).to(dtype)
