"""Heads and hidden states, and the truth of their divergences, for the tests of the linear losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastkd import LinearHead
from fastkd.ops.linear import linear_divergence
from fastkd.ops.sparse_linear import sparse_linear_divergence
from fastkd.reference import linear as reference

NAMES = ("student_hidden", "student_weight", "student_bias", "teacher_hidden", "teacher_weight", "teacher_bias")


@dataclass
class Heads:
    """Two sides in one dtype: tensors in the order of NAMES, numbers of the heads (scale, softcap)."""

    tensors: list[Tensor | None]
    student_numbers: tuple[float, float | None] = (1.0, None)
    teacher_numbers: tuple[float, float | None] = (1.0, None)
    ready: bool = False
    """The teacher's hidden states are logits."""
    options: dict[str, Any] = field(default_factory=dict)

    def _arguments(self, tensors: list[Tensor | None]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden, *student, teacher_hidden, teacher_weight, teacher_bias = tensors
        if self.ready:
            return (hidden, LinearHead(*student, *self.student_numbers)), {"teacher_logits": teacher_hidden}
        teacher = LinearHead(teacher_weight, teacher_bias, *self.teacher_numbers)
        return (hidden, LinearHead(*student, *self.student_numbers), teacher_hidden, teacher), {}

    def fused(self, tensors: list[Tensor | None], **options: Any) -> Tensor:
        arguments, more = self._arguments(tensors)
        return linear_divergence(*arguments, **more, **self.options, **options)[0]

    def plain(self, tensors: list[Tensor | None]) -> Tensor:
        arguments, more = self._arguments(tensors)
        return reference.linear_divergence(*arguments, **more, **self.options)

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor | None]:
        return [None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in self.tensors]

    def of_rank(self, rank: int, sizes: Sequence[int]) -> Heads:
        """The same hidden states, and the classes of one of several ranks that have so many each."""
        begin = sum(sizes[:rank])
        own = slice(begin, begin + sizes[rank])
        hidden, weight, bias, *teacher = self.tensors
        theirs = [teacher[0][:, own], None, None] if self.ready else [teacher[0], *_rows(teacher[1:], own)]
        return replace(self, tensors=[hidden, *_rows((weight, bias), own), *theirs])

    def run(self, loss: Any, upstream: Tensor, dtype: torch.dtype | None = None, **options: Any) -> dict[str, Tensor]:
        """The loss, and the gradient of everything, in float64."""
        leaves = self.leaves(dtype)
        value = loss(leaves, **options)
        value.backward(upstream.to(value).expand(value.shape))
        of = {name: x.grad for name, x in zip(NAMES, leaves, strict=True) if x is not None}
        assert all(of[name].dtype == x.dtype for name, x in zip(NAMES, leaves, strict=True) if x is not None)
        return {name: x.detach().cpu().double() for name, x in {"loss": value, **of}.items()}


def _rows(tensors: Sequence[Tensor | None], of: slice) -> list[Tensor | None]:
    return [None if x is None else x[of] for x in tensors]


@dataclass
class SparseHead(Heads):
    """A student alone, and a sparse teacher in the options."""

    def fused(self, tensors: list[Tensor | None], **options: Any) -> Tensor:
        hidden, *head = tensors[:3]
        student = LinearHead(*head, *self.student_numbers)
        return sparse_linear_divergence(hidden, student, **{**self.options, **options})[0]

    def plain(self, tensors: list[Tensor | None]) -> Tensor:
        hidden, *head = tensors[:3]
        return reference.sparse_linear_divergence(hidden, (*head, *self.student_numbers), **self.options)


def make_heads(
    generator: torch.Generator,
    shape: tuple[int, int, int, int] = (23, 16, 24, 131),
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    ready: bool = False,
    device: torch.device | str = "cpu",
    **numbers: Any,
) -> Heads:
    """Logits of size 2 or so. ``shape``: rows, features of student and teacher, classes."""
    rows, hs, ht, classes = shape

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator, dtype=torch.float64) * scale).to(device, dtype)

    student = [normal(rows, hs), normal(classes, hs, scale=2 * hs**-0.5), normal(classes) if bias else None]
    if ready:
        return Heads([*student, normal(rows, classes, scale=2.0), None, None], ready=True, **numbers)
    teacher = [normal(rows, ht), normal(classes, ht, scale=2 * ht**-0.5), normal(classes) if bias else None]
    return Heads([*student, *teacher], **numbers)


def make_sparse_head(
    generator: torch.Generator,
    shape: tuple[int, int, int, int] = (23, 16, 7, 131),
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    device: torch.device | str = "cpu",
    options: dict[str, Any] | None = None,
    **numbers: Any,
) -> SparseHead:
    """The teacher's most probable classes, with padding among those of row 1. ``shape``: rows, features, entries, classes."""
    rows, features, entries, classes = shape
    tensors = make_heads(generator, (rows, features, 1, classes), dtype, bias, device=device).tensors[:3]
    options = options or {}
    temperature = options.get("temperature", 1.0)
    temperature = temperature[:, None].cpu() if isinstance(temperature, Tensor) else temperature
    logits = 2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    log_probs, indices = torch.log_softmax(logits / temperature, -1).topk(entries)
    if rows > 1 and 2 < entries < classes:
        log_probs[1, entries // 2], indices[1, entries // 2] = -torch.inf, 2**40
    log_probs = log_probs.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    given = {"teacher_indices": indices.to(device), "teacher_log_probs": log_probs, **options}
    return SparseHead([*tensors, None, None, None], options=given, **numbers)


def assert_right(heads: Heads, upstream: Tensor, ours: dict[str, Tensor] | None = None, **options: Any) -> None:
    """Losses and gradients: finite, and at most twice as far from float64 as plain torch in float32 with the same inputs, but
    for the rounding of a 16-bit gradient; of float64, within a few roundings."""
    dtype = heads.tensors[0].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ours = ours or heads.run(heads.fused, upstream, **options)
    truth = heads.run(heads.plain, upstream, torch.float64)
    plain = heads.run(heads.plain, upstream, wide)
    for name, expected in truth.items():
        assert torch.isfinite(ours[name]).all(), name
        error, theirs = ((x[name] - expected).norm().item() for x in (ours, plain))
        size = expected.norm().item()
        rounding = torch.finfo(dtype if name != "loss" else wide).eps * (8 if dtype == wide else 1)
        limit = 2 * theirs + rounding * size + 4 * torch.finfo(wide).eps * expected.numel() ** 0.5
        assert error <= limit, (
            f"{name}: error {error:.3g}, plain torch {theirs:.3g}, limit {limit:.3g}, size {size:.3g}"
        )
