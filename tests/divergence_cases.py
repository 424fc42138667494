"""Inputs, truth and error bounds shared by the tests of the divergences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import emulated
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fastkd.ops.divergence import divergence
from fastkd.reference import divergence as reference

CPU = torch.device("cpu")
KINDS = {
    "forward": {"kind": "forward"},
    "reverse": {"kind": "reverse"},
    "soft_cross_entropy": {"kind": "soft_cross_entropy"},
    **{f"jsd{beta}": {"kind": "jensen_shannon", "beta": beta} for beta in (0.01, 0.3, 0.5, 0.99)},
}


@dataclass(frozen=True)
class Case:
    """Arguments of a divergence in the dtype under test, and the gradient that comes in for each row.

    The logits decide where it runs; tensors among the options, and the gradient, may be anywhere.
    """

    student: Tensor
    teacher: Tensor
    upstream: Tensor
    options: dict[str, object]

    def to(self, *where: torch.device | torch.dtype) -> Case:
        """The case with logits and incoming gradient moved, to a device, a dtype, or both."""
        student, teacher, upstream = (x.to(*where) for x in (self.student, self.teacher, self.upstream))
        return replace(self, student=student, teacher=teacher, upstream=upstream)

    def run(self, loss: Callable[..., Tensor], teacher_gradient: bool = True) -> tuple[Tensor, ...]:
        """Loss of each row, and gradients of the student's logits and the teacher's (in their dtype), as float64 on the CPU."""
        device = self.student.device
        options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.options.items()}
        student, teacher = self.student.detach().requires_grad_(), self.teacher.detach()  # strides and all
        teacher.requires_grad_(teacher_gradient)
        rows = loss(student, teacher, reduction="none", **options)
        rows.backward(self.upstream.to(rows))
        inputs = (student, teacher) if teacher_gradient else (student,)
        gradients = [x.grad if x.grad is not None else torch.zeros_like(x) for x in inputs]
        return tuple(x.detach().cpu().double() for x in (rows, *gradients))


def fused(student: Tensor, teacher: Tensor, **options: object) -> Tensor:
    return divergence(student, teacher, **options)[0]


def plain(student: Tensor, teacher: Tensor, **options: object) -> Tensor:
    """The reference in float32, as plain torch computes 16-bit logits under autocast."""
    options = {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in options.items()}
    return reference.divergence(student.float(), teacher.float(), **options)


def library(
    student: Tensor,
    teacher: Tensor,
    *,
    kind: str,
    temperature: float | Tensor,
    beta: float = 0.5,
    reduction: str = "none",
) -> Tensor:
    """What users write with torch.nn.functional, in float32: the other candidate for the best plain-torch formula."""
    temperature = temperature.float() if isinstance(temperature, Tensor) else temperature
    t = temperature[..., None] if isinstance(temperature, Tensor) else temperature
    log_q, log_p = F.log_softmax(student.float() / t, -1), F.log_softmax(teacher.float() / t, -1)

    def kl(log_x: Tensor, log_y: Tensor) -> Tensor:
        return F.kl_div(log_y, log_x, reduction="none", log_target=True).sum(-1)

    if kind == "forward":
        rows = kl(log_p, log_q)
    elif kind == "reverse":
        rows = kl(log_q, log_p)
    elif kind == "soft_cross_entropy":
        rows = F.cross_entropy(student.float() / t, log_p.exp(), reduction="none")
    else:
        weights = torch.tensor([beta, 1 - beta]).log()
        log_m = torch.logsumexp(torch.stack([log_p + weights[0], log_q + weights[1]]), 0)
        rows = beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    return rows * temperature**2


def truth(case: Case) -> tuple[Tensor, ...]:
    """float64 on the CPU, from the logits as they are stored."""
    return case.to(CPU, torch.float64).run(reference.divergence)


def assert_same(actual: Tensor, expected: Tensor, dtype: torch.dtype, fixed_order: bool) -> None:
    """The same bits; where sums may take another order, the same but for a few roundings."""
    if fixed_order:
        assert torch.equal(actual, expected)
    else:
        torch.testing.assert_close(actual, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-6, equal_nan=True)


def assert_accurate(case: Case, loss: Callable[..., Tensor] = fused) -> None:
    """Losses and gradients are finite and at most twice as far from the truth as the best plain-torch formula."""
    # the student's gradient alone takes other kernels on a GPU, where rows stay on chip
    ours, alone = case.run(loss), case.run(loss, teacher_gradient=False)
    on_gpu = case.student.device.type == "cuda" or emulated.running()
    case = case.to(CPU)  # where truth and plain torch run
    expected = truth(case)
    candidates = [case.run(plain)]
    if not {"target", "weight"} & case.options.keys():
        candidates.append(case.run(library))
    temperature = torch.as_tensor(case.options["temperature"], dtype=torch.float64)
    dtype = case.student.dtype
    upstream = case.upstream.double().abs()
    # a GPU's logarithms of 16-bit Jensen-Shannon rows are right to 2^-22
    rough = on_gpu and dtype.itemsize == 2 and case.options["kind"] == "jensen_shannon"
    eps, unit = 2.0**-22 if rough else 2.0**-24, torch.ones_like(expected[0])
    if dtype == torch.float64:  # the truth is rounded too: z = s / T, then exp(z), then times log-ratios of size z
        finite = [torch.where(x.isfinite(), x, 0.0) for x in (case.student, case.teacher)]
        eps, unit = 2.0**-50, (torch.stack(finite).abs().amax((0, 2)) / temperature).square().clamp(min=1)
    # floor of a loss: logs of size 1 or more cancel in it, and are rounded once
    loss_floor = eps * temperature**2 * (expected[0] / temperature**2).abs().maximum(unit)
    # floor of a gradient: one rounding of probabilities of size 1 that cancel in it, times T
    gradient_floor = (eps * temperature.clamp(min=1) * upstream * unit)[..., None] + torch.finfo(dtype).smallest_normal
    rounding = torch.finfo(dtype).eps / 2  # of the result; rounded once more where the incoming gradient scales it
    few = len(upstream) < 32  # plain torch may be right by luck
    for name, index, results in (
        ("loss", 0, (ours, alone)),
        ("student gradient", 1, (ours, alone)),
        ("teacher gradient", 2, (ours,)),
    ):
        errors = [(c[index] - expected[index]).norm().item() for c in candidates]
        best = min((e for e in errors if e == e), default=0.0) if dtype != torch.float64 else 0.0
        floor = loss_floor if index == 0 else gradient_floor
        if index > 0:
            best = max(best, (rounding * expected[index]).norm().item())
        limit = 2 * best + (4 if few else 1) * floor.expand_as(expected[index]).norm().item()
        for result in results:
            assert torch.isfinite(result[index]).all(), f"{name}: {result[index]}"
            error = (result[index] - expected[index]).norm().item()
            assert error <= limit, f"{name}: error {error:.3g}, plain torch {best:.3g}, limit {limit:.3g}"


def logits(
    rows: int, classes: int, dist: str, dtype: torch.dtype, generator: torch.Generator, device: torch.device = CPU
) -> tuple[Tensor, Tensor]:
    """Student and teacher logits: ``normal``, ``huge`` (+-1e4), ``close`` (nearly equal), ``masked`` (-inf columns)."""

    def normal() -> Tensor:
        return torch.randn(rows, classes, generator=generator, dtype=torch.float64)

    student, teacher = 2 * normal(), 2 * normal()
    if dist == "huge":
        student, teacher = 1e4 * normal().sign() + student, 1e4 * normal().sign() + teacher
    elif dist == "close":
        teacher = student + 1e-3 * teacher
    elif dist in ("masked", "masked_apart"):
        last = classes - 1
        student[:, :last:3], teacher[:, :last:3] = -torch.inf, -torch.inf
        if dist == "masked_apart":  # the Jensen-Shannon divergence alone is finite here
            student[:, 1:last:3], teacher[:, 2:last:3] = -torch.inf, -torch.inf
    return student.to(device, dtype), teacher.to(device, dtype)


def off_alignment(x: Tensor) -> Tensor:
    """The same numbers, packed, one element past where an allocation starts: where wide loads do not fit."""
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
