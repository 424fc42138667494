"""exp, log and the 16-bit conversions of every instruction set, seen through operators that lay them bare."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastkd
import fastkd.functional as F  # noqa: N812

pytestmark = pytest.mark.usefixtures("one_thread")


def every(dtype: torch.dtype) -> Tensor:
    """All 65536 numbers of a 16-bit type."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loads(dtype: torch.dtype, device: torch.device) -> None:
    """Every bit pattern, NaN as NaN: the maximum of a row of one, and of rows that end within a register."""
    numbers = every(dtype)
    torch.testing.assert_close(
        fastkd.logit_stats(numbers[:, None]).max, numbers.float(), rtol=0, atol=0, equal_nan=True
    )
    numbers = numbers[numbers.isfinite()]
    for width in (16, 31):
        rows = numbers[: len(numbers) // width * width].reshape(-1, width)
        assert torch.equal(fastkd.logit_stats(rows).max, rows.float().amax(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [256, 15])
def test_stores_round_to_nearest_even(dtype: torch.dtype, width: int, device: torch.device) -> None:
    """Every number times factors that make ties, subnormals, overflow and NaN, as torch rounds the product."""
    numbers = every(dtype)
    rows = numbers[: len(numbers) // width * width].reshape(-1, width)
    halves = [1 + 2.0**-8, 1 + 2.0**-9, 1 + 2.0**-11, 1 + 2.0**-12, 1.5]  # products half way between two numbers
    for factor in (2.0, 0.5, 1 / 3, -0.7, 2.0**-9, 2.0**-14, 2.0**-24, 1e-30, 1e30, 0.0, math.inf, math.nan, *halves):
        ours = rows.clone()
        torch.ops.fastkd.divergence_backward_(ours, torch.tensor(factor))
        expected = (rows.float() * torch.tensor(factor)).to(dtype)
        nan = expected.isnan()
        assert torch.equal(ours.isnan(), nan)
        assert torch.equal(ours.view(torch.int16)[~nan], expected.view(torch.int16)[~nan])


def softmax_of_two(x: Tensor) -> Tensor:
    """e^x / (1 + e^x) for x <= 0: the student's gradient where the teacher is certain of the other class."""
    student = torch.stack([torch.zeros_like(x), x], -1).requires_grad_()
    teacher = torch.stack([torch.zeros_like(x), torch.full_like(x, -math.inf)], -1)
    F.kl_div(student, teacher, reduction="sum").backward()
    return student.grad[:, 1].double()


def ulps(ours: Tensor, exact: Tensor, eps: float) -> float:
    return ((ours - exact).abs() / exact).max().item() / eps


def test_exp(device: torch.device) -> None:
    """1.5 ulp, and one each for the division and the product that follow; 0 below the smallest normal number."""
    x = torch.cat([torch.linspace(-87.3, 0, 200_001), -torch.logspace(-30, 1, 5001), torch.tensor([0.0])]).float()
    exact = torch.sigmoid(x.double())
    assert ulps(softmax_of_two(x), exact, 2.0**-23) < 2.5
    assert (softmax_of_two(torch.tensor([-87.4, -95.0, -103.9, -104.0, -200.0, -1e30, -math.inf])) == 0).all()
    x = torch.cat([torch.linspace(-707.9, 0, 50_001, dtype=torch.float64), -torch.logspace(-300, 1, 1001).double()])
    assert ulps(softmax_of_two(x), torch.sigmoid(x), 2.0**-52) < 6  # two for torch's own exp
    assert (softmax_of_two(torch.tensor([-708.1, -745.0, -1e300, -math.inf], dtype=torch.float64)) == 0).all()


def test_log(device: torch.device) -> None:
    """Of fp32 in the Jensen-Shannon divergence of certain sides, log(1 / beta); of fp64 in the log of a sum."""
    certain = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]])
    for beta in [2.0**-i for i in range(1, 24)] + [i / 1000 for i in range(1, 1000)]:
        ours = F.js_div(certain[:1], certain[1:], beta=beta).item()
        exact = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        # each log has a relative error of an ulp or two, and an argument rounded by as much
        assert abs(ours - exact) < 2.0**-23 * (3 * exact + 2), beta
    rows = torch.rand(20_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 30 - 30
    exact = torch.logsumexp(rows, -1)
    assert ((fastkd.logit_stats(rows).logsumexp - exact).abs() <= 2.0**-51 * (1 + exact.abs())).all()
