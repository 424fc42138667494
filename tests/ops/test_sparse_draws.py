"""Random sparse teachers: distribution, independence of draws and rows, the same bits everywhere, use in a loss, errors."""

from __future__ import annotations

import math

import pytest
import torch
from refusals import DTYPES as NO_FLOATS
from refusals import refuses
from torch import Tensor

from fastkd import functional as F  # noqa: N812
from fastkd.functional import sample_teacher
from fastkd.ops import sparse as ops
from fastkd.reference import sparse as reference

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.cuda_kernels]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# of draw(seed 11) from the logits below: they are what they were, on every device
KNOWN_INDICES = [[0, 1, 3, 4, 5, 0, 0, 0], [0, 2, 3, 5, 0, 0, 0, 0]]
KNOWN_COUNTS = [[2, 1, 1, 3, 1, 0, 0, 0], [1, 1, 4, 2, 0, 0, 0, 0]]
LOGITS = torch.tensor([[0.0, 1.0, -math.inf, 2.0, 3.0, -1.0], [5.0, 5.0, 5.0, 5.0, 5.0, 5.0]])


def seed(number: int, device: torch.device) -> Tensor:
    return torch.tensor([number], device=device)


def counts(drawn: tuple[Tensor, Tensor], classes: int) -> Tensor:
    """How often each class was drawn, by row."""
    indices, log_probs = (x.cpu() for x in drawn)
    draws = indices.shape[-1]
    numbers = (log_probs.double().exp() * draws).round()
    return torch.zeros(*indices.shape[:-1], classes, dtype=torch.float64).scatter_add(-1, indices, numbers)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 2, 5), (2, 41, 64), (2, 1271, 17), (1, 5003, 300), (1, 33000, 33)], ids=str
)
def test_entries(shape: tuple[int, int, int], device: torch.device, generator: torch.Generator) -> None:
    """Classes that differ, in order, then padding; probabilities that are counts; the bits of the CPU."""
    rows, classes, draws = shape
    for dtype in DTYPES:
        logits = (3 * torch.randn(rows, classes, generator=generator)).to(device, dtype)
        indices, log_probs = ops.sample_teacher(logits, seed(5, device), draws, 1.5)
        assert indices.shape == log_probs.shape == (rows, draws)
        assert (indices.dtype, log_probs.dtype) == (torch.int64, torch.float32)
        indices, log_probs = indices.cpu(), log_probs.cpu()
        kept = log_probs > -math.inf
        assert (kept[:, :-1] >= kept[:, 1:]).all()
        assert ((indices[:, 1:] > indices[:, :-1]) | ~kept[:, 1:]).all()
        assert (indices >= 0).all()
        assert (indices < classes).all()
        assert not indices[~kept].any()
        numbers = log_probs.double().exp() * draws
        torch.testing.assert_close(numbers, numbers.round(), rtol=0, atol=1e-4)
        assert (numbers.round().sum(-1) == draws).all()


def test_known_draws(device: torch.device) -> None:
    indices, log_probs = (x.cpu() for x in ops.sample_teacher(LOGITS.to(device), seed(11, device), 8))
    assert indices.tolist() == KNOWN_INDICES
    assert (log_probs.exp() * 8).round().int().tolist() == KNOWN_COUNTS


def test_distribution(device: torch.device, few: bool, generator: torch.Generator) -> None:
    """Chi-square of all draws, and of their pairs: the temperature counts, and masked classes never come."""
    rows, draws, temperature = 40 if few else 400, 50, 2.0
    logits = torch.randn(12, generator=generator, dtype=torch.float64)
    logits[3] = -math.inf
    found = counts(ops.sample_teacher(logits.expand(rows, 12).to(device), seed(3, device), draws, temperature), 12)
    expected = torch.softmax(logits / temperature, -1)
    total, kept = found.sum(0), expected > 0
    assert total[~kept].sum() == 0
    n = rows * draws
    chi = ((total - n * expected)[kept].square() / (n * expected)[kept]).sum()
    assert 1.0 < chi < 33.1  # 11 - 1 degrees of freedom: beyond it once in 4000
    # the variance over rows is that of independent draws
    share = (found.var(0) / (draws * expected * (1 - expected)))[kept].mean()
    assert abs(share - 1) < (0.4 if few else 0.12)


def test_mean_is_the_teacher(generator: torch.Generator) -> None:
    """Of the gradient, too: that of drop is unbiased, which that of the largest classes is not."""
    teacher, student = (2 * torch.randn(1, 30, generator=generator) for _ in range(2))
    student = student.requires_grad_()
    (whole,) = torch.autograd.grad(F.kl_div(student, teacher, 2.0), student)
    many = student.expand(4000, 30)
    drawn = sample_teacher(teacher.expand(4000, 30), 10, 2.0, generator=generator)
    (sampled,) = torch.autograd.grad(F.sparse_kl_div(many, *drawn, 2.0, tail="drop"), student)
    error = (sampled - whole).norm() / whole.norm()
    log_probs, largest = torch.log_softmax(teacher / 2.0, -1).topk(10)
    (biased,) = torch.autograd.grad(F.sparse_kl_div(student, largest, log_probs, 2.0, tail="drop"), student)
    assert error < 0.05 < (biased - whole).norm() / whole.norm()
    plain = reference.sample_teacher(teacher.expand(4000, 30), 10, 2.0, generator)
    (other,) = torch.autograd.grad(F.sparse_kl_div(many, *plain, 2.0, tail="drop"), student)
    assert (other - whole).norm() / whole.norm() < 0.05


def test_generators_and_rows(device: torch.device, generator: torch.Generator) -> None:
    """Of a seed, the row's number and the logits; the generator goes on, threads do not matter."""
    logits = torch.randn(2, 9, 500, generator=generator).to(device)
    streams = [torch.Generator(device).manual_seed(3) for _ in range(2)]
    first, second = (sample_teacher(logits, 20, generator=streams[0]) for _ in range(2))
    assert first[0].shape == (2, 9, 20)
    assert not torch.equal(first[0], second[0])
    torch.set_num_threads(3)
    for other in (first, second):
        again = sample_teacher(logits, 20, generator=streams[1])
        assert all(torch.equal(x, y) for x, y in zip(again, other, strict=True))
    few = ops.sample_teacher(logits[0], seed(4, device), 20)
    fewer = ops.sample_teacher(logits[0, :5], seed(4, device), 20)
    assert all(torch.equal(x[:5], y) for x, y in zip(few, fewer, strict=True))
    strided = torch.stack([logits[0], logits[0]], -1)[..., 0]
    assert torch.equal(ops.sample_teacher(strided, seed(4, device), 20)[0], few[0])
    assert ops.sample_teacher(logits[0, :0], seed(4, device), 20)[0].shape == (0, 20)


def test_opcheck(device: torch.device) -> None:
    logits = LOGITS.to(device)
    for numbers in (None, torch.tensor([2.0], dtype=torch.float64)):
        arguments = logits, seed(4, device), 5, 1.0, numbers
        torch.library.opcheck(torch.ops.fastkd.sample_teacher.default, arguments)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_logits_that_cannot_be(bad: float, device: torch.device, reads_values: bool) -> None:
    logits = torch.zeros(3, 50, device=device)
    if bad == -math.inf:
        logits[1] = bad
    else:
        logits[1, 7] = bad
    if reads_values:
        with pytest.raises(RuntimeError, match=r"fastkd: teacher_logits\[1\] holds NaN, \+inf or nothing but -inf"):
            ops.sample_teacher(logits, seed(1, device), 4)
        return
    indices, log_probs = ops.sample_teacher(logits, seed(1, device), 4)
    assert torch.isnan(log_probs[1]).all()
    assert not log_probs[[0, 2]].isnan().any()
    assert torch.isnan(F.sparse_kl_div(torch.zeros_like(logits), indices, log_probs, reduction="none")[1])


def test_errors(device: torch.device) -> None:
    logits = LOGITS.to(device)
    refuses("teacher_logits is list", lambda: sample_teacher([1.0], 3))
    refuses("teacher_logits has shape", lambda: sample_teacher(logits[:, :0], 3))
    refuses("k is 0, must be at least 1", lambda: sample_teacher(logits, 0))
    refuses("k is float", lambda: sample_teacher(logits, 2.5))
    refuses("temperature is 0", lambda: sample_teacher(logits, 2, 0.0))
    refuses("generator is int", lambda: sample_teacher(logits, 2, generator=3))
    for dtype in NO_FLOATS:
        refuses("teacher_logits has dtype", lambda dtype=dtype: sample_teacher(logits.to(dtype), 2))
    with pytest.raises(RuntimeError, match="fastkd: seed has shape"):
        torch.ops.fastkd.sample_teacher(logits, torch.zeros(2, dtype=torch.int64, device=device), 2, 1.0)
    with pytest.raises(RuntimeError, match="fastkd: k is 0"):
        torch.ops.fastkd.sample_teacher(logits, seed(1, device), 0, 1.0)


def test_sharp_and_flat_temperatures(device: torch.device) -> None:
    logits = torch.tensor([[0.0, 1e-3, 3.0, -5.0]], device=device)
    for temperature in (1e-310, 1e-6):
        assert ops.sample_teacher(logits, seed(1, device), 6, temperature)[0].tolist() == [[2, 0, 0, 0, 0, 0]]
    flat = counts(ops.sample_teacher(logits.expand(20, 4), seed(1, device), 100, 1e300), 4).sum(0)
    assert (flat - 500).abs().max() < 100
