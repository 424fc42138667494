"""Divergences of two heads from hidden states, without their logits: ``torch.ops.fastkd.linear_divergence``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd._checks import check_choice, check_count
from fastkd.ops._rank_group import RankGroup, local_part
from fastkd.ops.divergence import KINDS, check_logits
from fastkd.ops.linear_head import LinearHead
from fastkd.ops.linear_operator import LinearOperator, check_logits_dtype, check_side
from fastkd.ops.linear_teachers import DenseTeacher

_linear_divergence = LinearOperator(
    "linear_divergence",
    ("Tensor teacher_hidden", "Tensor? teacher_weight", "Tensor? teacher_bias"),
    ("float teacher_scale", "float teacher_softcap"),
    trained=True,
    make_teacher=DenseTeacher,
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
    group: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``kd_scale * T^2 * D + task_scale * CE`` of two heads; the core of every linear loss.

    Arguments as in :func:`fastkd.functional.linear_kl_div` and :func:`fastkd.ops.divergence.divergence`.

    Returns:
        loss; terms, ``[2]`` or ``[2, ...]``: task and distillation term, detached; the entropy of the student's softmax at this
        temperature in each row, ``[...]``, 0 where ignored, detached (empty if not asked for, needs a number as temperature).
    """
    ranks = None if group is None else RankGroup.of(group)
    if ranks is not None and student_entropy:
        raise ValueError("fastkd: group is given, must be None where the student's entropy is wanted")
    student_hidden, student = check_side("student", student_hidden, student_head, group)
    shape = student_hidden.shape[:-1]
    teacher: LinearHead | None = None
    if teacher_logits is None:
        if teacher_hidden is None or teacher_head is None:
            raise TypeError("fastkd: give teacher_hidden and teacher_head, or teacher_logits")
        teacher_hidden, teacher = check_side("teacher", teacher_hidden, teacher_head, group)
        name, theirs = "teacher_hidden", teacher.weight.shape[0]
    else:
        if teacher_hidden is not None or teacher_head is not None:
            raise TypeError("fastkd: teacher_logits are given, so teacher_hidden and teacher_head must be None")
        teacher_logits = teacher_logits if group is None else local_part("teacher_logits", teacher_logits, group)
        check_logits("teacher_logits", teacher_logits)
        name, teacher_hidden, theirs = "teacher_logits", teacher_logits, teacher_logits.shape[-1]
    if teacher_hidden.shape[:-1] != shape:
        raise ValueError(
            f"fastkd: {name} has shape {tuple(teacher_hidden.shape)}, must be {(*shape, '...')}, a row for each of "
            f"student_hidden, {tuple(student_hidden.shape)}".replace("'", "")
        )
    check_choice("kind", kind, KINDS)
    return _linear_divergence(
        student_hidden,
        student,
        {
            name: teacher_hidden.reshape(-1, teacher_hidden.shape[-1]),
            "teacher_head.weight": None if teacher is None else teacher.weight,
            "teacher_head.bias": None if teacher is None else teacher.bias,
        },
        (1.0 if teacher is None else teacher.scale, 0.0 if teacher is None else teacher.softcap or 0.0),
        target,
        kind=KINDS[kind],
        temperature=temperature,
        beta=beta,
        weight=weight,
        kd_scale=kd_scale,
        task_scale=task_scale,
        ignore_index=ignore_index,
        reduction=reduction,
        classes=_check_classes(classes, student.weight.shape[0], theirs, group is not None),
        logits_dtype=check_logits_dtype(logits_dtype, {"student_hidden": student_hidden, name: teacher_hidden}),
        memory_budget=memory_budget,
        skip_ignored=skip_ignored,
        student_entropy=student_entropy,
        group=ranks,
    )


def _check_classes(classes: int | None, ours: int, theirs: int, sharded: bool) -> int:
    least = min(ours, theirs)
    if sharded and ours != theirs:
        raise ValueError(
            f"fastkd: this rank has {ours} classes of the student's head, {theirs} of the teacher's; with group, both must be "
            "sharded alike"
        )
    if classes is None:
        if ours != theirs:
            raise ValueError(
                f"fastkd: the student's head has {ours} classes, the teacher's {theirs}; where one vocabulary is padded, "
                f"give classes={least}, the first that both have"
            )
        return ours
    return check_count("classes", classes, 1, least + 1)
