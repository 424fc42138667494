"""A head and a divergence, one chunk of rows after another: the work of :mod:`fastkd.ops.linear_operator`.

Of a chunk there are the student's logits, whole rows of them, in a buffer that every chunk uses anew: a GEMM makes them, a
teacher (:mod:`fastkd.ops.linear_teachers`) compares itself with them and says what their gradient is, and two more GEMMs take
that on to the hidden states and into the gradient of the head. Nothing is computed twice.

Gradients are those of the sum over rows, in float32 or better: a reduction's denominator and the incoming gradient are
numbers of size 1e-4 or a loss scale of 1e5, which 16 bits should see only in the end, together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastkd.ops._rank_group import RankGroup

HALF = (torch.bfloat16, torch.float16)
_TILE = 1024  # classes whose weights are widened at a time, on a CPU

_logit_stats = torch.ops.fastkd.logit_stats.default


@dataclass(frozen=True)
class Rows:
    """A chunk: rows ``begin`` to ``end``, or so many of ``chosen``."""

    begin: int
    end: int
    chosen: Tensor | None
    present: Tensor | None
    """Where rows that do not count are computed nevertheless: ``[N]``, whether a row counts."""

    def of(self, values: Tensor) -> Tensor:
        if self.chosen is None:
            return values[self.begin : self.end]
        return values.index_select(0, self.chosen[self.begin : self.end])

    def put(self, values: Tensor, part: Tensor) -> None:
        if self.chosen is None:
            values[self.begin : self.end].copy_(part)
        else:
            values.index_copy_(0, self.chosen[self.begin : self.end], part.to(values.dtype))


class RowValues(NamedTuple):
    """What is known of each row beside both sides, ``[N]`` or of a chunk; None where it is not given."""

    target: Tensor | None
    weight: Tensor | None
    temperatures: Tensor | None

    def of(self, rows: Rows) -> RowValues:
        return RowValues(*(None if x is None else rows.of(x) for x in self))


class Scalars(NamedTuple):
    """Numbers of the divergence, in the order in which its kernels take them."""

    temperature: float
    kind: int
    beta: float
    kd_scale: float
    task_scale: float
    ignore_index: int


class Teacher(Protocol):
    """What the student's logits of each chunk are compared with, in one call of an operator."""

    @property
    def bytes_of_a_row(self) -> int:
        """Of what a chunk needs beside the student's logits."""

    def start(self, rows: int, all_rows: bool) -> None:
        """Before the first of the chunks, which have so many rows, and together all rows or only those that count."""

    def compare(self, student_logits: Tensor, rows: Rows, values: RowValues, scalars: Scalars) -> tuple[Tensor, Tensor]:
        """Of a chunk: task and distillation term of each row, ``[2, rows]``, and the gradient of the student's logits, of the
        sum over rows; it may lie in their place, and holds anything where the student wants none.

        Args:
            student_logits: ``[rows, classes]``.
            values: of all rows.
        """

    def finish(self) -> list[Tensor]:
        """After the last chunk: gradients of the teacher's own tensors, where such a teacher has any."""


def empty_gradients(hidden: Tensor, weight: Tensor | None, bias: Tensor | None, wanted: Sequence[bool]) -> list[Tensor]:
    """Of hidden states, weight and bias, float32 or better; of ready logits, in their dtype. Empty where not wanted."""
    dtype = torch.float32 if weight is not None and hidden.dtype in HALF else hidden.dtype
    shapes = (
        x.shape if x is not None and wants else [0] for x, wants in zip((hidden, weight, bias), wanted, strict=True)
    )
    return [hidden.new_empty(list(shape), dtype=dtype) for shape in shapes]


class Side:
    """Hidden states and their head, or logits that are ready; and the gradients that are wanted of them.

    Args:
        hidden: ``[N, H]``, or logits ``[N, V]`` where ``weight`` is None.
        numbers: scale and softcap of the head, which is 0 where there is none.
        classes: so many of the vocabulary take part, the first.
        dtype: of the logits.
        wanted: gradients of hidden states (or logits), weight, bias.
        group: the ranks that have the other classes of these rows; hidden states are then the same on all of them.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        numbers: Sequence[float],
        classes: int,
        dtype: torch.dtype,
        wanted: Sequence[bool],
        group: RankGroup | None = None,
    ) -> None:
        self.group = group
        self.hidden = hidden if weight is not None else hidden[:, :classes]
        self.weight = None if weight is None else weight[:classes]
        self.bias = None if bias is None else bias[:classes]
        scale, self.softcap = numbers
        self.factor = scale / self.softcap if self.softcap else scale  # of hidden @ weight.T + bias
        self.classes, self.dtype = classes, dtype
        self.gradients = empty_gradients(hidden, weight, bias, wanted)  # of all the vocabulary
        self.wants_hidden, self.wants_weight, self.wants_bias = wanted
        self.wants_any = any(wanted)
        self.begun = False
        for i in (1, 2):
            if wanted[i]:
                self.gradients[i][classes:].zero_()

    @property
    def is_read_in_place(self) -> bool:
        return self.weight is None and self.hidden.dtype == self.dtype and not self.wants_any

    @property
    def bytes_of_a_row(self) -> int:
        """Of the buffers of a chunk."""
        size = 0 if self.is_read_in_place else self.dtype.itemsize
        if self.softcap and self.wants_any:
            size += self.dtype.itemsize
        if self.wants_any and self._narrows:
            size += self.hidden.dtype.itemsize
        return size * self.classes

    @property
    def _narrows(self) -> bool:
        """Whether gradients of logits are rounded for tensor cores."""
        return self.weight is not None and self.weight.is_cuda and self.weight.dtype != self.dtype

    def start(self, rows: int, all_rows: bool) -> None:
        """Buffers for chunks of so many rows; gradients, where not all rows will be written."""
        shape = [rows, self.classes]
        self.buffer = None if self.is_read_in_place else self.hidden.new_empty(shape, dtype=self.dtype)
        self.slopes = self.hidden.new_empty(shape, dtype=self.dtype) if self.softcap and self.wants_any else None
        if self.wants_hidden and (not all_rows or self.weight is None):
            self.gradients[0].zero_()

    def _tiles(self) -> Iterator[slice]:
        assert self.weight is not None
        step = self.classes if self.weight.is_cuda or self.weight.dtype == self.dtype else _TILE
        for begin in range(0, self.classes, step):
            yield slice(begin, min(begin + step, self.classes))

    def _rows_of_hidden(self, rows: Rows) -> Tensor:
        """Rows that do not count may hold anything, which a gradient of 0 must not meet."""
        hidden = rows.of(self.hidden)
        return hidden if rows.present is None else torch.where(rows.present[rows.begin : rows.end, None], hidden, 0)

    def logits(self, rows: Rows) -> Tensor:
        """Those of the chunk, whose hidden states stay for :meth:`take`."""
        if self.buffer is None:
            return rows.of(self.hidden)
        out = self.buffer[: rows.end - rows.begin]
        if self.weight is None:
            return out.copy_(rows.of(self.hidden))
        self.chunk = self._rows_of_hidden(rows)
        for tile in self._tiles():
            bias = None if self.bias is None else self.bias[tile]
            _gemm(out[:, tile], self.chunk, self.weight[tile].t(), self.factor, add=bias)
        if self.softcap:
            out.tanh_()
            if self.slopes is not None:
                slopes = self.slopes[: len(out)]
                torch.mul(out, out, out=slopes)
                slopes.neg_().add_(1.0)
            out.mul_(self.softcap)
        return out

    def take(self, gradient: Tensor, rows: Rows) -> None:
        """Takes the gradient of the chunk's logits, which is lost, on to what is wanted."""
        if not self.wants_any:
            return
        if self.weight is None:
            rows.put(self.gradients[0][:, : self.classes], gradient)
            return
        factor = self.factor
        if self.slopes is not None:
            gradient.mul_(self.slopes[: len(gradient)])
            factor *= self.softcap
        if self.wants_bias:
            part = gradient.sum(0, dtype=self.gradients[2].dtype).mul_(factor)
            kept = self.gradients[2][: self.classes]
            kept.add_(part) if self.begun else kept.copy_(part)
        if self._narrows:
            gradient = gradient.to(self.weight.dtype)
        if self.wants_weight:
            for tile in self._tiles():
                _gemm(self.gradients[1][tile], gradient[:, tile].t(), self.chunk, factor, add=self.begun)
        if self.wants_hidden:
            whole = rows.chosen is None
            shape = [rows.end - rows.begin, self.hidden.shape[1]]
            out = rows.of(self.gradients[0]) if whole else self.gradients[0].new_empty(shape)
            for tile in self._tiles():
                _gemm(out, gradient[:, tile], self.weight[tile], factor, add=tile.start > 0)
            if not whole:
                rows.put(self.gradients[0], out)
        self.begun = True

    def finish(self) -> list[Tensor]:
        """The gradients: zeros where no chunk came. That of hidden states is of the classes of all ranks."""
        if not self.begun:
            for gradient in self.gradients[1:]:
                gradient.zero_()
        if self.group is not None and self.wants_hidden and self.weight is not None:
            self.gradients[0] = self.group.reduce(self.gradients[0], "sum")
        return self.gradients


def _gemm(out: Tensor, a: Tensor, b: Tensor, factor: float, add: Tensor | bool | None = None) -> None:
    """``out = factor * (a @ b + add)``, or ``out += factor * a @ b`` where ``add`` is True; sums in the dtype of ``out``."""
    base, beta = (out, 1.0 if add else 0.0) if add is None or isinstance(add, bool) else (add.to(out.dtype), factor)
    if a.is_cuda and a.dtype == b.dtype and a.dtype in HALF and out.dtype == torch.float32:
        torch.addmm(base, a, b, out_dtype=out.dtype, beta=beta, alpha=factor, out=out)
    else:
        torch.addmm(base, a.to(out.dtype), b.to(out.dtype), beta=beta, alpha=factor, out=out)


def chunk_rows(rows: int, most: int) -> int:
    """Rows of a chunk: at most so many, spread evenly."""
    return -(-rows // max(1, -(-rows // max(1, most))))


def divergence_in_chunks(
    student: Side,
    teacher: Teacher,
    values: RowValues,
    counts: Tensor | None,
    skip: bool,
    most_rows: int,
    scalars: Scalars,
    entropy: bool,
) -> tuple[Tensor, Tensor]:
    """Terms ``[2, N]`` (task, kd) of each row, and the student's entropy of each; gradients gather in both sides.

    Args:
        counts: ``[N]``, whether a row counts; None if all do.
        skip: take the rows that count alone, of which there must be known how many.
        most_rows: of a chunk.
    """
    n = student.hidden.shape[0]
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    terms = student.hidden.new_zeros([2, n], dtype=wide)
    entropies = student.hidden.new_zeros([n if entropy else 0], dtype=wide)
    index = None
    if counts is not None and skip:
        index = counts.nonzero().flatten()
        index = None if len(index) == n else index
    total = n if index is None else len(index)
    present = counts if index is None and not skip else None
    step = chunk_rows(total, most_rows)
    for side in (student, teacher):
        side.start(step, all_rows=index is None)
    for begin in range(0, total, max(1, step)):
        rows = Rows(begin, min(begin + step, total), index, present)
        logits = student.logits(rows)
        if entropy:
            rows.put(entropies, _logit_stats(logits, scalars.temperature)[4])
        part, gradient = teacher.compare(logits, rows, values, scalars)
        for of_all, of_chunk in zip(terms, part, strict=True):
            rows.put(of_all, of_chunk)
        student.take(gradient, rows)
        del gradient  # which may have memory of its own, and the next one needs as much
    return terms, entropies
