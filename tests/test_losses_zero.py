"""Terms and rows of weight 0, and rows that are ignored: nothing of them is looked at."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import fastkd.functional as F  # noqa: N812
from fastkd.ops.divergence import divergence

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.cuda_kernels]


@pytest.fixture
def pair(device: torch.device, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    s, t = torch.randn(2, 6, 11, generator=generator, dtype=torch.float64).to(device).unbind()
    return s.requires_grad_(), t


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_alpha_of_zero(direction: str, dtype: torch.dtype, bad: float, device: torch.device) -> None:
    """The teacher has no part in the loss, whatever it holds, and no gradient."""
    student = torch.linspace(-2, 3, 33).view(3, 11).to(device, dtype).requires_grad_()
    teacher = torch.full_like(student, bad).requires_grad_()
    labels, kinds = torch.tensor([1, -100, 3], device=device), ("batchmean", "none")
    for reduction in kinds:
        loss, terms = F.kd_loss(
            student, teacher, labels, 3.0, 0.0, direction=direction, reduction=reduction, return_terms=True
        )
        ours = torch.autograd.grad(loss.sum(), (student, teacher))
        expected = nn.functional.cross_entropy(
            student.float(), labels, reduction="mean" if reduction == "batchmean" else "none"
        )
        torch.testing.assert_close(loss.float(), expected.detach(), rtol=1e-5, atol=1e-6)
        assert (terms["kl_div"] == 0).all()
        (theirs,) = torch.autograd.grad(expected.sum(), student)
        torch.testing.assert_close(ours[0], theirs.to(dtype))
        assert (ours[1] == 0).all()
    alone = F.kd_loss(student, teacher.detach(), labels, 3.0, 0.0)
    torch.testing.assert_close(torch.autograd.grad(alone, student)[0], ours[0] / 2)


@pytest.mark.parametrize("temperature", [math.nan, 0.0, torch.tensor([math.nan])], ids=str)
def test_temperature_of_a_term_of_weight_zero(
    temperature: float | Tensor | None, pair: tuple[Tensor, Tensor], device: torch.device
) -> None:
    labels = torch.arange(6, device=device)
    loss = F.kd_loss(*pair, labels, temperature, 0.0)
    assert torch.equal(loss, F.kd_loss(*pair, labels, 1.0, 0.0))


def test_a_target_says_which_rows_count(pair: tuple[Tensor, Tensor], reads_values: bool, device: torch.device) -> None:
    """Also where the cross-entropy has weight 0: it is looked at as it is by the divergence alone."""
    target = torch.tensor([0, 1, -100, 3, 4, 5], device=device)
    assert torch.equal(F.kd_loss(*pair, target, 2.0, 1.0), F.kl_div(*pair, 2.0, target=target))
    target[4] = 11
    calls = (lambda: F.kd_loss(*pair, target, 2.0, 1.0), lambda: F.kl_div(*pair, 2.0, target=target))
    for call in calls:
        if reads_values:
            with pytest.raises(RuntimeError, match=r"target\[4\] is 11, must be in \[0, 11\)"):
                call()
        else:
            assert call().isnan()


def test_all_terms_of_weight_zero(pair: tuple[Tensor, Tensor]) -> None:
    student, teacher = pair[0], torch.full_like(pair[1], math.nan)
    for kind in ("forward", "reverse", "jensen_shannon", "soft_cross_entropy"):
        loss, terms = divergence(student, teacher, kind=kind, kd_scale=0.0)
        assert loss == 0
        assert (terms == 0).all()
        assert (torch.autograd.grad(loss, student)[0] == 0).all()


def test_relation_of_weight_zero(pair: tuple[Tensor, Tensor]) -> None:
    student, teacher = pair[0], torch.full_like(pair[1], math.nan)
    loss = F.relation_loss(student, teacher, 0.0, 0.0)
    assert loss == 0
    assert (torch.autograd.grad(loss, student)[0] == 0).all()


@pytest.mark.parametrize("left_out", ["weight", "ignore_index", "both"])
@pytest.mark.parametrize("kind", ["kl", "js", "kd"])
def test_rows_left_out_may_hold_anything(
    kind: str, left_out: str, device: torch.device, generator: torch.Generator
) -> None:
    """Logits, temperature and target of a row of weight 0, or whose target is ignore_index: as if it were not there."""
    student, teacher = torch.randn(2, 4, 11, generator=generator).to(device).unbind()
    student.requires_grad_()
    target, weight, temperature = torch.tensor([1, 2, 3, 4]), torch.tensor([1.0, 2.0, 1.0, 0.5]), torch.ones(4)
    if left_out in ("ignore_index", "both"):
        target[1] = -7
    if left_out in ("weight", "both"):
        weight[1] = 0.0

    def run(t: Tensor, labels: Tensor, temperatures: Tensor) -> tuple[Tensor, ...]:
        options = {"weight": weight.to(device), "ignore_index": -7, "reduction": "none"}
        temperatures, labels = temperatures.to(device), labels.to(device)
        if kind == "kd":
            rows = F.kd_loss(student, t, labels, temperatures, **options)
        else:
            function = F.kl_div if kind == "kl" else F.js_div
            rows = function(student, t, temperatures, target=labels, **options)
        return rows.detach(), torch.autograd.grad(rows.sum(), student)[0]

    expected = run(teacher, target, temperature)
    assert expected[0][1] == 0
    for value in (0.0, -1.0, math.nan, math.inf):
        odd_temperature, odd_teacher = temperature.clone(), teacher.clone()
        odd_temperature[1] = value
        odd_teacher[1] = value
        labels = [target]
        if left_out == "weight":
            labels += [torch.tensor([1, 999, 3, 4]), torch.tensor([1, -1, 3, 4])]
        for each in labels:
            for ours, theirs in zip(run(odd_teacher, each, odd_temperature), expected, strict=True):
                assert torch.equal(ours, theirs)
