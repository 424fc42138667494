"""Teachers of the linear losses, by what is known of them: :class:`fastkd.ops.linear_chunks.Teacher`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.ops.divergence import REDUCTIONS
from fastkd.ops.divergence_shard import divergence_in_place as over_ranks
from fastkd.ops.linear_chunks import Rows, RowValues, Scalars, Side

_divergence_in_place = torch.ops.fastkd.divergence_.default
_sparse_divergence = torch.ops.fastkd.sparse_divergence.default


class DenseTeacher(Side):
    """Hidden states and their head, or logits that are ready: all classes of each row, and gradients as the student has them.

    ``divergence_``, or its like over several ranks, puts the gradients of both sides in the place of their logits.
    """

    def __init__(self, student: Side, tensors: Sequence[Any], numbers: Sequence[float], wanted: Sequence[bool]) -> None:
        hidden, weight, bias = tensors
        super().__init__(hidden, weight, bias, numbers, student.classes, student.dtype, wanted, student.group)
        self.student_gradient = student.wants_any

    def compare(self, student_logits: Tensor, rows: Rows, values: RowValues, scalars: Scalars) -> tuple[Tensor, Tensor]:
        logits = self.logits(rows)
        arguments = student_logits, logits, *values.of(rows), *scalars, self.student_gradient, self.wants_any
        terms = _divergence_in_place(*arguments) if self.group is None else over_ranks(*arguments, self.group)
        self.take(logits, rows)
        return terms, student_logits


class SparseTeacher:
    """k classes of each row and the logarithms of their probabilities, without a gradient.

    The gradient of the student's logits is new memory, of the size of a chunk.
    """

    def __init__(self, student: Side, tensors: Sequence[Any], scalars: Sequence[int], _wanted: Sequence[bool]) -> None:
        self.indices, self.log_probs, self.tail_log_prob = tensors
        (self.tail,) = scalars
        self.classes, self.dtype, self.student_gradient = student.classes, student.dtype, student.wants_any

    @property
    def bytes_of_a_row(self) -> int:
        return self.classes * self.dtype.itemsize if self.student_gradient else 0

    def start(self, rows: int, all_rows: bool) -> None:
        pass

    def compare(self, student_logits: Tensor, rows: Rows, values: RowValues, scalars: Scalars) -> tuple[Tensor, Tensor]:
        try:
            return self._divergence(student_logits, rows, values, scalars, self.student_gradient)
        except RuntimeError as error:
            raise self._of_all_rows(error, values, scalars) from None

    def finish(self) -> list[Tensor]:
        return []

    def _divergence(
        self, student_logits: Tensor, rows: Rows, values: RowValues, scalars: Scalars, gradient: bool
    ) -> tuple[Tensor, Tensor]:
        entries = (None if x is None else rows.of(x) for x in (self.indices, self.log_probs, self.tail_log_prob))
        temperature, kind, *others = scalars
        numbers = temperature, kind, self.tail, *others, REDUCTIONS["none"], gradient
        return _sparse_divergence(student_logits, *entries, *values.of(rows), *numbers)[1:]  # type: ignore[no-any-return]

    def _of_all_rows(self, error: RuntimeError, values: RowValues, scalars: Scalars) -> RuntimeError:
        """What a chunk was refused for, with the number that the row has in the call: asked again of all rows at once."""
        count = len(self.indices)
        logits = self.log_probs.new_zeros([1, self.classes], dtype=self.dtype).expand(count, -1)
        try:
            self._divergence(logits, Rows(0, count, None, None), values, scalars, False)
        except RuntimeError as same:
            return same
        return error
