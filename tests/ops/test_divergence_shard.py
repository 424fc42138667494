"""Divergences over ranks: truth, agreement with one rank, labels, rows that are left out, infinities, errors.

The ranks are threads here; test_divergence_shard_ranks.py has processes.
"""

from __future__ import annotations

import math

import pytest
import torch
from divergence_cases import KINDS, Case, assert_accurate, fused, logits, off_alignment
from shard_cases import in_lockstep, sharded
from torch import Tensor

from fastkd import functional as F  # noqa: N812
from fastkd.ops._rank_group import RankGroup
from fastkd.ops.divergence import REDUCTIONS, divergence
from fastkd.reference import divergence as reference

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.cuda_kernels]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [(150,), (75, 75), (1, 149), (40, 37, 3, 70)]
DISTS = ["normal", "huge", "close", "masked"]


def make(
    dtype: torch.dtype, generator: torch.Generator, device: torch.device, dist: str = "normal", **options: object
) -> Case:
    student, teacher = logits(5, 150, dist, dtype, generator, device)
    upstream = torch.tensor([1.0, -0.5, 2.0, 1.0, 0.25]).to(device)
    return Case(student, teacher, upstream, {"temperature": torch.tensor([0.5, 1.0, 3.0, 2.0, 1.0]), **options})


# ---- truth ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dist", DISTS)
@pytest.mark.parametrize("kind", KINDS)
def test_truth(kind: str, dist: str, device: torch.device, few: bool, generator: torch.Generator) -> None:
    for sizes in SIZES[-1:] if few else SIZES:
        for dtype in DTYPES:
            if dist == "huge" and dtype == torch.float16:
                continue  # its logits may be equal by rounding alone
            assert_accurate(make(dtype, generator, device, dist, **KINDS[kind]), sharded(sizes))


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_task(kind: str, device: torch.device, few: bool, generator: torch.Generator) -> None:
    """Labels of every rank, rows that are left out, weights of either sign; one temperature, where exponentials are shared."""
    options = {
        "target": torch.tensor([0, -100, 149, 77, 41]),
        "weight": torch.tensor([1.0, 1.0, 0.5, -2.0, 0.0]),
        "kd_scale": 0.7,
        "task_scale": 0.3,
        **KINDS[kind],
    }
    for sizes in SIZES[-1:] if few else SIZES:
        for dtype in DTYPES:
            case = make(dtype, generator, device, **options)
            assert_accurate(case, sharded(sizes))
            case.options.update(temperature=1.0)
            assert_accurate(case, sharded(sizes))


@pytest.mark.parametrize("kind", KINDS)
def test_unaligned_rows(kind: str, device: torch.device, generator: torch.Generator) -> None:
    for dtype in DTYPES:
        case = make(dtype, generator, device, **KINDS[kind])
        case = Case(off_alignment(case.student), case.teacher, case.upstream, case.options)
        assert_accurate(case, sharded((3, 147)))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions(reduction: str, device: torch.device, generator: torch.Generator) -> None:
    target = torch.tensor([3, -100, 100, 149, 0], device=device)
    case = make(torch.float64, generator, device)
    student, teacher = case.student.requires_grad_(), case.teacher.requires_grad_()
    options = {"temperature": 2.0, "task_scale": 0.4, "kd_scale": 0.6, "reduction": reduction}
    ours = sharded((40, 37, 3, 70))(student, teacher, target, **options)
    expected = reference.divergence(student, teacher, target, **options)
    torch.testing.assert_close(ours, expected)
    up = torch.rand(expected.shape, dtype=torch.float64, generator=generator).to(device)
    for a, b in zip(
        torch.autograd.grad(ours, (student, teacher), up),
        torch.autograd.grad(expected, (student, teacher), up),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


# ---- exactness, and what is said in words ---------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "soft_cross_entropy"])
def test_equal_sides_are_exactly_0(kind: str, device: torch.device, generator: torch.Generator) -> None:
    for dtype in DTYPES:
        case = make(dtype, generator, device, **KINDS[kind])
        for t in (case.options["temperature"], 1.0):
            student = case.student.clone().requires_grad_()
            rows = sharded((40, 37, 3, 70))(
                student, case.student, **{**case.options, "temperature": t}, reduction="none"
            )
            assert rows.tolist() == [0.0] * 5
            (gradient,) = torch.autograd.grad(rows.sum(), student)
            assert gradient.abs().max() <= 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_make_no_difference(kind: str, device: torch.device, generator: torch.Generator) -> None:
    """As one rank, with the operator for one, to a few roundings; and small divergences keep their digits."""
    for dist in ("normal", "close"):
        case = make(torch.float32, generator, device, dist, **KINDS[kind])
        one, several = case.run(fused), case.run(sharded((40, 37, 3, 70)))
        torch.testing.assert_close(several[0], one[0], rtol=2e-5, atol=1e-9)
        for a, b in zip(several[1:], one[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-7)


def test_left_out_rows_hold_anything(device: torch.device, generator: torch.Generator) -> None:
    case = make(torch.float32, generator, device)
    target = torch.tensor([0, -100, 149, 77, 10**9], device=device)
    weight = torch.tensor([1.0, math.nan, 1.0, 1.0, 0.0], device=device)
    temperature = torch.tensor([2.0, math.nan, 2.0, 2.0, -1.0], device=device)
    options = {"target": target, "weight": weight, "temperature": temperature, "task_scale": 0.5, "reduction": "none"}
    student = case.student.clone()
    student[[1, 4]] = math.nan
    student.requires_grad_()
    rows = sharded((75, 75))(student, case.teacher, **options)
    assert rows[[1, 4]].tolist() == [0.0, 0.0]
    assert rows.isfinite().all()
    (gradient,) = torch.autograd.grad(rows.sum(), student)
    assert gradient[[1, 4]].abs().max() == 0
    assert gradient.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_infinities(kind: str, device: torch.device, generator: torch.Generator) -> None:
    """A rank whose classes are all masked, in one row on both sides; a NaN; a row without a softmax; infinite divergences."""
    for dtype in DTYPES:
        case = make(dtype, generator, device, **KINDS[kind])
        student, teacher = case.student, case.teacher
        student[0, :75] = teacher[0, :75] = -math.inf
        student[1, 80] = math.nan
        teacher[2] = -math.inf
        student[3, :75] = -math.inf
        teacher[4, 75:] = -math.inf
        options = {**case.options, "reduction": "none"}
        ours, one = (of(student, teacher, **options) for of in (sharded((75, 75)), fused))
        torch.testing.assert_close(ours, one, equal_nan=True, rtol=2e-5, atol=1e-6)
        gradients = []
        for of in (sharded((75, 75)), fused):
            leaf = student.clone().requires_grad_()
            of(leaf, teacher, **options)[:3].sum().backward()
            gradients.append(leaf.grad[:3])
        torch.testing.assert_close(*gradients, equal_nan=True, rtol=2e-2 if dtype.itemsize == 2 else 1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["forward", "reverse", "soft_cross_entropy"])
def test_what_is_masked_where_next_to_nothing_is_counts_for_nothing(kind: str, device: torch.device) -> None:
    """Probabilities that underflow relative to the maximum of all, but not to that of the rank that has them."""
    from_side = torch.tensor([[0.0, 1.0, -200.0, -201.0], [0.0, 1.0, -80.0, -120.0]])
    to_side = torch.tensor([[0.0, 1.0, -math.inf, 2.0], [0.0, 1.0, 0.0, -math.inf]])
    sides = [x.to(device).requires_grad_() for x in (to_side, from_side)]
    student, teacher = sides[::-1] if kind == "reverse" else sides
    one, several = (of(student, teacher, kind=kind, reduction="none") for of in (fused, sharded((2, 2))))
    assert one.isfinite().all()
    torch.testing.assert_close(several, one)
    for a, b in zip(*(torch.autograd.grad(x.sum(), (student, teacher)) for x in (several, one)), strict=True):
        torch.testing.assert_close(a, b)


def test_kd_loss_without_a_teacher(device: torch.device, generator: torch.Generator) -> None:
    """At alpha 0 the teacher's logits are not looked at, and at 1 the target says which rows count."""
    case = make(torch.float32, generator, device)
    target = torch.tensor([0, -100, 149, 77, 41], device=device)
    for alpha in (0.0, 1.0):
        teacher = torch.full_like(case.teacher, math.nan) if alpha == 0 else case.teacher
        expected = F.kd_loss(case.student, teacher, target, 3.0, alpha)
        ours = sharded((75, 75), F.kd_loss)(case.student, teacher, target, 3.0, alpha)
        torch.testing.assert_close(ours, expected)


def test_terms_that_are_not_there(device: torch.device, generator: torch.Generator) -> None:
    """Without a target there is no task, whatever its scale; without a share of the teacher its divergence is 0."""
    case = make(torch.float32, generator, device)
    student = case.student.requires_grad_()
    ours = sharded((75, 75))(student, case.teacher, task_scale=0.5)
    expected = fused(student, case.teacher)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(ours, student), torch.autograd.grad(expected, student))
    target = torch.tensor([0, -100, 149, 77, 41], device=device)
    options = {"kind": "soft_cross_entropy", "kd_scale": 0.0, "task_scale": 1.0}
    of_logits = lambda **more: divergence(case.student, case.teacher, target, **options, **more)[1]  # noqa: E731
    assert in_lockstep(1, lambda group: of_logits(group=group))[0].tolist() == pytest.approx(of_logits().tolist())


def test_no_second_derivatives(device: torch.device, generator: torch.Generator) -> None:
    case = make(torch.float64, generator, device)

    def loss(student: Tensor) -> Tensor:
        return in_lockstep(1, lambda group: divergence(student, case.teacher, group=group)[0])[0]

    def second_in_torch_func(group: RankGroup) -> Tensor:
        first = torch.func.grad(lambda x: divergence(x, case.teacher, group=group)[0])
        return torch.func.grad(lambda x: first(x).sum())(case.student)

    with pytest.raises(RuntimeError, match="over several ranks cannot be differentiated again"):
        in_lockstep(1, second_in_torch_func)
    student = case.student.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(student), student, create_graph=True)
    with pytest.raises(RuntimeError, match="over several ranks cannot be differentiated again"):
        gradient.sum().backward()


def test_no_rows(device: torch.device) -> None:
    empty = torch.empty(0, 10, device=device)
    assert sharded((5, 5))(empty, empty).item() == 0


def test_jensen_shannon_at_its_ends(device: torch.device, generator: torch.Generator) -> None:
    case = make(torch.float32, generator, device)
    for beta, direction in ((0.0, "forward"), (1.0, "reverse")):
        ours = sharded((75, 75), F.js_div)(case.student, case.teacher, beta=beta)
        torch.testing.assert_close(ours, F.kl_div(case.student, case.teacher, direction=direction))


def test_terms(device: torch.device, generator: torch.Generator) -> None:
    case = make(torch.float32, generator, device)
    target = torch.tensor([0, -100, 149, 77, 41], device=device)
    halves = case.student.split(75, -1), case.teacher.split(75, -1)
    made = in_lockstep(
        2,
        lambda g: divergence(halves[0][g.rank], halves[1][g.rank], target, group=g, task_scale=0.5, temperature=2.0)[1],
    )
    expected = divergence(case.student, case.teacher, target, task_scale=0.5, temperature=2.0)[1]
    for terms in made:
        torch.testing.assert_close(terms, expected)


# ---- errors --------------------------------------------------------------------------------------


def test_bad_numbers(device: torch.device, generator: torch.Generator) -> None:
    """A label of nobody's, a temperature that is none: an error that names the row, or NaN where values cannot be read."""
    case = make(torch.float32, generator, device)
    target = torch.tensor([0, 1, 150, 3, 4], device=device)
    for options, said in (
        ({"target": target}, r"target\[2\] is 150, must be in \[0, 150\)"),
        ({"target": target, "task_scale": 0.5}, r"target\[2\] is 150, must be in \[0, 150\)"),
        ({"temperature": torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0], device=device)}, r"temperature\[2\] is 0"),
    ):
        if device.type == "cuda":
            rows = sharded((75, 75))(case.student, case.teacher, **options, reduction="none")
            assert rows.isnan().tolist() == [False, False, True, False, False]
        else:
            with pytest.raises(RuntimeError, match=said):
                sharded((75, 75))(case.student, case.teacher, **options)
