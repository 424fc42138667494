"""Divergences of rows that are alike: exactly 0 for equal rows, never below 0, and no digits lost in between."""

from __future__ import annotations

import math

import pytest
import torch
from divergence_cases import KINDS as ALL_KINDS
from torch import Tensor

from fastkd import functional as F  # noqa: N812
from fastkd.ops.divergence import divergence
from fastkd.reference import divergence as reference

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.cuda_kernels]

KINDS = {name: options for name, options in ALL_KINDS.items() if name != "soft_cross_entropy"}
KINDS = {name: KINDS[name] for name in ("forward", "reverse", "jsd0.5")}
KINDS |= {f"jsd{beta}": {"kind": "jensen_shannon", "beta": beta} for beta in (1e-6, 0.9)}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CLASSES = (1, 2, 41, 401, 5000)  # all teams of threads of a GPU among them


def rows_of(classes: int, dtype: torch.dtype, device: torch.device, few: bool, generator: torch.Generator) -> Tensor:
    count = 4 if few and classes > 41 else 16
    scale = torch.tensor([0.01, 1.0, 5.0, 30.0]).repeat(count // 4)[:, None]
    return (scale * torch.randn(count, classes, generator=generator)).to(device, dtype)


def loss_and_gradients(student: Tensor, teacher: Tensor, both: bool, **options: object) -> tuple[Tensor, ...]:
    """The student's gradient alone takes other kernels on a GPU than both; no gradient at all, others again."""
    without = divergence(student, teacher, reduction="none", **options)[0]
    student, teacher = student.clone().requires_grad_(), teacher.clone().requires_grad_(both)
    rows, _ = divergence(student, teacher, reduction="none", **options)
    torch.testing.assert_close(rows.detach(), without, rtol=1e-3, atol=1e-12)
    rows.sum().backward()
    return (rows.detach(), student.grad, *([teacher.grad] if both else []))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_rows(
    kind: str, dtype: torch.dtype, device: torch.device, few: bool, reads_values: bool, generator: torch.Generator
) -> None:
    """Losses are 0, and gradients, but for Jensen-Shannon's on a GPU, which are within a few ulps of a probability."""
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for classes in CLASSES:
        x = rows_of(classes, dtype, device, few, generator)
        temperature = torch.tensor([1.0, 0.07], device=device).repeat_interleave(len(x) // 2)
        for both in (True, False):
            rows, *gradients = loss_and_gradients(x, x.clone(), both, temperature=temperature, **KINDS[kind])
            assert (rows == 0).all()
            for gradient in gradients:
                assert gradient.abs().max() <= (0.0 if reads_values or "jsd" not in kind else 4 * eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_nearly_equal(
    kind: str, dtype: torch.dtype, device: torch.device, few: bool, generator: torch.Generator
) -> None:
    """Differences from 1e-7 to 0.1 of logits of each scale: all pairs, or where they are few, each scale with another one."""
    for turn, classes in enumerate(CLASSES[1:]):
        x = rows_of(classes, dtype, device, few, generator)
        sizes = torch.tensor([1e-7, 1e-4, 1e-2, 0.1], dtype=torch.float64)
        size = (sizes.roll(turn) if len(x) == 4 else sizes.repeat_interleave(4))[:, None]
        y = (x.double() + (size * torch.randn(x.shape, generator=generator, dtype=torch.float64)).to(device)).to(dtype)
        for student, teacher in ((x, y), (y, x)):
            for both in (True, False):
                rows, *gradients = loss_and_gradients(student, teacher, both, temperature=1.0, **KINDS[kind])
                assert (rows >= 0).all()
                assert torch.isfinite(rows.sqrt()).all()
                assert all(torch.isfinite(g).all() for g in gradients)
            truth = reference.divergence(
                student.cpu().double(), teacher.cpu().double(), reduction="none", **KINDS[kind]
            )
            # an error of the ratios of probabilities, of whose squares the divergence is a sum; and the truth's own
            eps = torch.finfo(rows.dtype).eps
            bound = 1e-3 * truth + 8 * eps * truth.clamp(min=0).sqrt() + 1e-14
            assert ((rows.cpu().double() - truth).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_never_below_zero(
    kind: str, dtype: torch.dtype, device: torch.device, few: bool, generator: torch.Generator
) -> None:
    """Neighbours by one ulp, offsets, masked classes, probabilities that underflow."""
    x = rows_of(41, dtype, device, few, generator)
    step = torch.finfo(dtype).eps
    ulps = (torch.randint(-1, 2, x.shape, generator=generator) * step).to(x.device)
    masked = x.clone()
    masked[:, ::3] = -math.inf
    underflowing = x.clone()
    underflowing[:, 5:9] -= torch.tensor([80.0, 86.0, 88.0, 104.0], device=x.device).to(dtype)
    # probabilities that float32 or float64 hold with few digits or none, while their ratios are known
    deep = torch.full_like(x, -708.5 if dtype == torch.float64 else -87.5)
    deep[:, 0] = 0.0
    deeper = deep - torch.rand(x.shape, generator=generator).to(x.device, dtype)
    pairs = [
        (deep, deeper),
        (x, (x.double() * (1 + ulps)).to(dtype)),
        (x, (x.double() + 0.75).to(dtype)),
        (x, (x.double() + 1000).to(dtype)),
        (masked, (masked.double() * (1 + ulps)).to(dtype)),
        (masked, (x.double() - 50 * (masked == -math.inf)).to(dtype)),
        (underflowing, (underflowing.double() * (1 + ulps)).to(dtype)),
        (underflowing, x),
    ]
    for student, teacher in pairs:
        for a, b in ((student, teacher), (teacher, student)):
            for temperature in (1.0, 0.01, 3.0):
                rows = divergence(a, b, temperature=temperature, reduction="none", **KINDS[kind])[0]
                assert (rows >= 0).all()
                assert not rows.isnan().any()


def test_square_root_of_jensen_shannon_is_a_metric(device: torch.device, generator: torch.Generator) -> None:
    """The triangle inequality, with points so close that a value below 0 or of noise would break it."""
    x, y, z = (torch.randn(64, 17, generator=generator) * s for s in (1.0, 1e-3, 1e-3))
    a, b, c = x, x + y, x + y + z
    ab, bc, ac = (F.js_div(s.to(device), t.to(device), reduction="none").sqrt() for s, t in ((a, b), (b, c), (a, c)))
    assert (ac <= (ab + bc) * (1 + 1e-3)).all()
    assert (ab > 0).all()


def test_ends_of_beta(device: torch.device, generator: torch.Generator) -> None:
    """The divergence tends to 0 at both ends; over beta, or 1 - beta, to the KL that stands there by convention."""
    student, teacher = torch.randn(2, 5, 11, dtype=torch.float64, generator=generator).to(device).unbind()
    forward, reverse = (F.kl_div(student, teacher, direction=d) for d in ("forward", "reverse"))
    assert F.js_div(student, teacher, beta=0.0) == forward
    assert F.js_div(student, teacher, beta=1.0) == reverse
    for small in (1e-3, 1e-5):
        low, high = F.js_div(student, teacher, beta=small), F.js_div(student, teacher, beta=1 - small)
        assert max(low, high) < 4 * small * max(forward, reverse)
        torch.testing.assert_close(low / small, forward, rtol=10 * small, atol=0)
        torch.testing.assert_close(high / small, reverse, rtol=10 * small, atol=0)
