"""Teachers of the linear losses, by what is known of them: :class:`fastkd.ops.linear_chunks.Teacher`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import _library as _library  # registers the operators
from fastkd.ops.linear_chunks import Rows, RowValues, Scalars, Side

_divergence_in_place = torch.ops.fastkd.divergence_.default


class DenseTeacher(Side):
    """Hidden states and their head, or logits that are ready: all classes of each row, and gradients as the student has them.

    ``divergence_`` puts the gradients of both sides in the place of their logits.
    """

    def __init__(self, student: Side, tensors: Sequence[Any], numbers: Sequence[float], wanted: Sequence[bool]) -> None:
        hidden, weight, bias = tensors
        super().__init__(hidden, weight, bias, numbers, student.classes, student.dtype, wanted)
        self.student_gradient = student.wants_any

    def compare(self, student_logits: Tensor, rows: Rows, values: RowValues, scalars: Scalars) -> tuple[Tensor, Tensor]:
        logits = self.logits(rows)
        wanted = self.student_gradient, self.wants_any
        terms = _divergence_in_place(student_logits, logits, *values.of(rows), *scalars, *wanted)
        self.take(logits, rows)
        return terms, student_logits
