"""Divergences of a head from a sparse teacher, without the logits: ``torch.ops.fastkd.sparse_linear_divergence``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd._checks import check_choice, check_count
from fastkd.ops.linear_operator import LinearOperator, check_logits_dtype, check_side
from fastkd.ops.linear_teachers import SparseTeacher
from fastkd.ops.sparse import KINDS, TAILS, check_entries

_sparse_linear_divergence = LinearOperator(
    "sparse_linear_divergence",
    ("Tensor teacher_indices", "Tensor teacher_log_probs", "Tensor? teacher_tail_log_prob"),
    ("int tail",),
    trained=False,
    make_teacher=SparseTeacher,
)


def sparse_linear_divergence(
    student_hidden: Tensor,
    student_head: object,
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
    classes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    skip_ignored: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`fastkd.ops.sparse.sparse_divergence` of a head's logits; the core of every sparse linear loss.

    Arguments as there and in :func:`fastkd.functional.sparse_linear_kl_div`, and what is returned as there.
    """
    student_hidden, student = check_side("student", student_hidden, student_head)
    size = student.weight.shape[0]
    classes = size if classes is None else check_count("classes", classes, 1, size + 1)
    check_choice("kind", kind, KINDS)
    shape = student_hidden.shape[:-1]
    check_entries("student_hidden", shape, classes, teacher_indices, teacher_log_probs, tail, teacher_tail_log_prob)
    return _sparse_linear_divergence(
        student_hidden,
        student,
        {
            "teacher_indices": teacher_indices.reshape(-1, teacher_indices.shape[-1]),
            "teacher_log_probs": teacher_log_probs.reshape(-1, teacher_log_probs.shape[-1]),
            "teacher_tail_log_prob": None if teacher_tail_log_prob is None else teacher_tail_log_prob.reshape(-1),
        },
        (TAILS[tail],),
        target,
        kind=KINDS[kind],
        temperature=temperature,
        beta=beta,
        weight=weight,
        kd_scale=kd_scale,
        task_scale=task_scale,
        ignore_index=ignore_index,
        reduction=reduction,
        classes=classes,
        logits_dtype=check_logits_dtype(logits_dtype, {"student_hidden": student_hidden}),
        memory_budget=memory_budget,
        skip_ignored=skip_ignored,
    )[:2]
