"""Inputs, truth and error bounds shared by the tests of sparse teachers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastkd.ops.sparse import sparse_divergence
from fastkd.reference import sparse as reference

CPU = torch.device("cpu")
KINDS = {
    "forward": {"kind": "forward"},
    "reverse": {"kind": "reverse"},
    "jsd0.3": {"kind": "jensen_shannon", "beta": 0.3},
}
TAILS = ("bucket", "renormalize", "drop")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """Arguments of a sparse divergence; the logits decide where it runs, other tensors may be anywhere."""

    student: Tensor
    indices: Tensor
    log_probs: Tensor
    options: dict[str, object] = field(default_factory=dict)

    def run(self, loss: Callable[..., Tensor], student: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Loss of each row, and the student's gradient of their sum with growing weights, as float64 on the CPU."""
        student = (self.student if student is None else student).detach().requires_grad_()  # strides and all
        device = student.device
        options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.options.items()}
        rows = loss(student, self.indices.to(device), self.log_probs.to(device), **{"reduction": "none", **options})
        (rows * torch.linspace(0.5, 2, len(rows)).to(rows)).sum().backward()
        gradient = student.grad if student.grad is not None else torch.zeros_like(student)
        return rows.detach().cpu().double(), gradient.cpu().double()


def fused(*args: object, **options: object) -> Tensor:
    return sparse_divergence(*args, **options)[0]


def _in(dtype: torch.dtype) -> Callable[..., Tensor]:
    def loss(student: Tensor, indices: Tensor, log_probs: Tensor, **options: object) -> Tensor:
        options = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in options.items()}
        return reference.sparse_divergence(student.to(dtype), indices, log_probs.to(dtype), **options)

    return loss


plain = _in(torch.float32)
"""The reference in float32, as plain torch computes 16-bit logits under autocast."""


def truth(case: Case) -> tuple[Tensor, Tensor]:
    return case.run(_in(torch.float64), case.student.cpu().double())


def make(
    rows: int,
    classes: int,
    entries: int,
    dtype: torch.dtype,
    generator: torch.Generator,
    device: torch.device = CPU,
    *,
    spread: float = 2.0,
    **options: object,
) -> Case:
    """Normal logits, and the teacher's largest probabilities; rows with some padding among them."""
    temperature = options.setdefault("temperature", 2.0)
    t = temperature[:, None].double() if isinstance(temperature, Tensor) else temperature
    student, teacher = (spread * torch.randn(rows, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    log_probs, indices = torch.log_softmax(teacher / t, -1).topk(entries)
    order = torch.rand(entries, generator=generator).argsort()  # no order is promised
    log_probs, indices = log_probs[:, order].contiguous(), indices[:, order].contiguous()
    if rows > 1 and entries > 2:
        log_probs[1, entries // 2], indices[1, entries // 2] = -torch.inf, 2**40  # not looked at
    log_probs = log_probs.to(torch.float64 if dtype == torch.float64 else torch.float32)
    return Case(student.to(device, dtype), indices, log_probs, options)


def assert_accurate(case: Case) -> None:
    """Losses and gradients are at most twice as far from the truth as plain torch, or a few roundings."""
    ours, expected = case.run(fused), truth(case)
    dtype = case.student.dtype
    others = case.run(plain, case.student.cpu()) if dtype != torch.float64 else expected
    temperature = torch.as_tensor(case.options["temperature"]).double()
    eps = 2.0**-48 if dtype == torch.float64 else 2.0**-23  # of logs, of size 1 or more, that cancel
    size = temperature**2 * (expected[0] / temperature**2).abs().clamp(min=1)
    floors = eps * size, eps * temperature.clamp(min=1) * torch.ones_like(expected[0]) * 2
    for name, value, right, other, floor in zip(("loss", "gradient"), ours, expected, others, floors, strict=True):
        assert torch.equal(value.isfinite(), right.isfinite()), f"{name}: {value}, {right}"
        kept = right.isfinite()
        error, best = ((x - right)[kept].norm().item() for x in (value, other))
        rounding = 0.0 if name == "loss" else torch.finfo(dtype).eps / 2 * right[kept].norm().item()
        tiny = torch.finfo(dtype).smallest_normal * right.numel() ** 0.5
        limit = 2 * max(best, rounding) + floor.norm().item() + tiny
        assert error <= limit, f"{name}: error {error:.3g}, plain torch {best:.3g}, limit {limit:.3g}"


def in_rows(case: Case, rows: Tensor) -> Case:
    """Some of its rows."""
    options = {k: v[rows] if isinstance(v, Tensor) and v.dim() > 0 else v for k, v in case.options.items()}
    return replace(
        case, student=case.student[rows], indices=case.indices[rows], log_probs=case.log_probs[rows], options=options
    )
