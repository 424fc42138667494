"""DKD, DIST and standardised logits against independent formulas, value and gradients, and what they refuse."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import method_formulas as plain
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fastkd.methods import AT, CRD, DIST, DKD, FSP, RKD, SP, SRD, SSKD, FitNet, Hinton, Method, Outputs
from fastkd.methods.registry import create
from fastkd.methods.standardize import standardized

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]

SHAPES = [(1, 2), (1, 7), (2, 3), (6, 10), (33, 100)]
TEMPERATURES = [1.0, 2.0, 4.0]


def logits(seed: int, *shape: int, dtype: torch.dtype = torch.float64, scale: float = 3.0) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def labels(rows: int, classes: int) -> Tensor:
    return torch.arange(rows) * 5 % classes


def agree(
    method: Method, student: Tensor, teacher: Tensor, target: Tensor, expected: Callable[[Tensor], Tensor]
) -> None:
    """The method in the dtype of the logits, the formula in float64 on the same numbers."""
    ours, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    loss = method(Outputs(ours), Outputs(teacher), target, 1.0)
    wanted = expected(exact)
    coarse = {torch.float64: 1e-7, torch.float32: 2e-5}.get(student.dtype, 1e-4)
    torch.testing.assert_close(loss.total.double(), wanted.detach(), rtol=coarse, atol=coarse)
    (gradient,), (theirs,) = torch.autograd.grad(loss.total, [ours]), torch.autograd.grad(wanted, [exact])
    # of each part of the gradient, before they are added
    rounding = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(student.dtype, 0.0)
    error = (gradient.double() - theirs).abs().max().item()
    assert error <= (10 * coarse + rounding) * theirs.abs().max().item() + 1e-9
    torch.testing.assert_close(sum(loss.terms.values()), loss.total.detach())
    assert not any(term.requires_grad for term in loss.terms.values())


CASES = list(itertools.product(SHAPES, TEMPERATURES))
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize(("shape", "temperature"), CASES)
def test_dkd(shape: tuple[int, int], temperature: float, standardize: bool, dtype: torch.dtype) -> None:
    student, teacher, target = logits(1, *shape, dtype=dtype), logits(2, *shape, dtype=dtype), labels(*shape)

    def expected(s: Tensor) -> Tensor:
        pair = (s, teacher.double())
        pair = tuple(map(plain.standardized, pair)) if standardize else pair
        tckd, nckd = plain.decoupled(*pair, target, temperature)
        return 0.7 * F.cross_entropy(s, target) + 1.5 * tckd + 6.0 * nckd

    method = DKD(temperature, task_weight=0.7, target_weight=1.5, others_weight=6.0, standardize=standardize)
    agree(method, student, teacher, target, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "temperature"), CASES)
def test_dist(shape: tuple[int, int], temperature: float, dtype: torch.dtype) -> None:
    student, teacher, target = logits(1, *shape, dtype=dtype), logits(2, *shape, dtype=dtype), labels(*shape)

    def expected(s: Tensor) -> Tensor:
        inter, intra = plain.stronger(s, teacher.double(), temperature)
        return 0.7 * F.cross_entropy(s, target) + 1.5 * inter + 3.0 * intra

    agree(DIST(temperature, task_weight=0.7, inter_weight=1.5, intra_weight=3.0), student, teacher, target, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("task_weight", [0.0, 0.1])
@pytest.mark.parametrize(("shape", "temperature"), CASES)
def test_standardised_logits(
    shape: tuple[int, int], temperature: float, task_weight: float, dtype: torch.dtype
) -> None:
    student, teacher, target = logits(1, *shape, dtype=dtype), logits(2, *shape, dtype=dtype), labels(*shape)

    def expected(s: Tensor) -> Tensor:
        kd = plain.hinton(plain.standardized(s), plain.standardized(teacher.double()), temperature)
        return task_weight * F.cross_entropy(s, target) + 9.0 * kd

    method = Hinton(temperature, task_weight=task_weight, kd_weight=9.0, standardize=True)
    agree(method, student, teacher, target, expected)


# ---- what follows from the formulas --------------------------------------------------------------


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_dkd_is_the_kl_where_the_teacher_is_as_sure_of_all_rows(temperature: float) -> None:
    """Eq. 6 of the paper: ``KL = TCKD + (1 - p) NCKD``."""
    teacher, target = logits(1, 1, 8), torch.tensor([3])
    p = (teacher / temperature).softmax(1)[0, 3].item()
    student = logits(2, 1, 8)
    whole = DKD(temperature, task_weight=0.0, others_weight=1.0 - p)(Outputs(student), Outputs(teacher), target, 1.0)
    kl = Hinton(temperature, task_weight=0.0, kd_weight=1.0)(Outputs(student), Outputs(teacher), None)
    torch.testing.assert_close(whole.total, kl.total)


@pytest.mark.parametrize("epochs", [24, 240])
def test_the_warmup_of_dkd_is_that_of_the_first_epochs(epochs: int) -> None:
    """As the authors', who count epochs from 1: epoch e of 240 weighs min(e / 20, 1)."""
    weights = [DKD().warmup(epoch / epochs) for epoch in range(epochs)]
    if epochs == 240:
        assert weights == pytest.approx([min(epoch / 20, 1.0) for epoch in range(1, 241)])
    assert weights[0] == pytest.approx(0.05)
    assert weights == sorted(weights)
    assert DKD(warmup_share=0.0).warmup(0.0) == 1.0
    given = Outputs(logits(1, 4, 5)), Outputs(logits(2, 4, 5)), labels(4, 5)
    early, late = (DKD()(*given, progress).terms for progress in (0.0, 1.0))
    assert early["task_loss"] == late["task_loss"]
    for name in ("target_loss", "others_loss"):
        torch.testing.assert_close(20 * early[name], late[name])


def test_confident_teachers_and_students() -> None:
    """Where the probabilities of the others, or of the target, are beyond float32."""
    teacher = torch.tensor([[400.0, 0.0, 1.0], [0.0, 500.0, -500.0], [-1000.0, 0.0, 0.0]])
    student = torch.tensor([[-400.0, 1.0, 0.0], [0.0, 500.0, 499.0], [-1000.0, 0.0, 3.0]])
    target = torch.tensor([0, 1, 0])
    agree(DKD(), student, teacher, target, lambda s: _stable_dkd(s, teacher.double(), target))


def _stable_dkd(s: Tensor, t: Tensor, target: Tensor) -> Tensor:
    rows = torch.arange(len(t))
    parts = []
    for z in (t / 4, s / 4):
        others = z.clone()
        others[rows, target] = -torch.inf
        margin = z[rows, target] - others.logsumexp(1)
        parts.append((F.logsigmoid(margin), F.logsigmoid(-margin), others.log_softmax(1)))
    (p1, p0, p), (q1, q0, q) = parts
    tckd = p1.exp() * (p1 - q1) + p0.exp() * (p0 - q0)
    nckd = torch.where(p.isinf(), 0.0, p.exp() * (p - q)).sum(1)
    return F.cross_entropy(s, target) + 16 * (tckd + 8 * nckd).mean()


def test_masked_classes_of_dkd() -> None:
    student, teacher, target = logits(1, 4, 6), logits(2, 4, 6), torch.tensor([0, 1, 2, 0])
    without = [
        torch.cat([z, torch.full((4, 2), -torch.inf, dtype=z.dtype)], 1).requires_grad_() for z in (student, teacher)
    ]
    expected = DKD()(Outputs(student), Outputs(teacher), target).total
    loss = DKD()(Outputs(without[0]), Outputs(without[1].detach()), target).total
    torch.testing.assert_close(loss, expected)
    assert torch.autograd.grad(loss, without[0])[0].isfinite().all()


@pytest.mark.parametrize("scale", [0.1, 7.0])
def test_height_and_spread_are_nothing_to_standardised_logits(scale: float) -> None:
    z = logits(1, 5, 9)
    torch.testing.assert_close(standardized(scale * z + 100.0), standardized(z), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(standardized(z).mean(1), torch.zeros(5, dtype=z.dtype))
    torch.testing.assert_close(standardized(z).std(1), torch.ones(5, dtype=z.dtype))
    flat = torch.full((2, 4), 3.0, requires_grad=True)
    standardized(flat).square().sum().backward()
    assert flat.grad is not None
    assert flat.grad.isfinite().all()


def test_constant_rows_and_single_samples_of_dist() -> None:
    student = torch.zeros(3, 5, requires_grad=True)
    loss = DIST()(Outputs(student), Outputs(logits(1, 3, 5, dtype=torch.float32)), labels(3, 5))
    (gradient,) = torch.autograd.grad(loss.total, student)
    assert gradient.isfinite().all()
    assert loss.terms["inter_loss"].item() == pytest.approx(2 * 16)
    one = DIST()(Outputs(logits(1, 1, 5)), Outputs(logits(2, 1, 5)), labels(1, 5))
    assert one.terms["intra_loss"].item() == pytest.approx(2 * 16)


def test_perfect_students_of_dist() -> None:
    z = logits(1, 6, 5)
    for mapped in (z, z + torch.randn(6, 1)):  # the relation is blind to what softmax is blind to
        terms = DIST()(Outputs(mapped), Outputs(z), labels(6, 5)).terms
        assert terms["inter_loss"].item() == pytest.approx(0.0, abs=1e-4)
        assert terms["intra_loss"].item() == pytest.approx(0.0, abs=1e-4)


# ---- weights of 0, autocast, the option ----------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "terms"),
    [
        (DKD(task_weight=0.0), "target_loss others_loss"),
        (DKD(target_weight=0.0), "task_loss others_loss"),
        (DKD(others_weight=0.0), "task_loss target_loss"),
        (DKD(target_weight=0.0, others_weight=0.0), "task_loss"),
        (DIST(task_weight=0.0), "inter_loss intra_loss"),
        (DIST(inter_weight=0.0), "task_loss intra_loss"),
        (DIST(inter_weight=0.0, intra_weight=0.0), "task_loss"),
        (DIST(task_weight=0.0, inter_weight=0.0, intra_weight=0.0), ""),
        (Hinton(kd_weight=0.0, standardize=True), "task_loss"),
        (Hinton(task_weight=0.0, standardize=True), "kd_loss"),
    ],
    ids=str,
)
def test_what_has_weight_0_is_not_there(method: Method, terms: str) -> None:
    names = set(terms.split())
    student = logits(1, 4, 5).requires_grad_()
    wrong = torch.full((4, 5), torch.nan)
    teacher = Outputs(logits(2, 4, 5) if method.reads_teacher else wrong)
    target = labels(4, 5) if "task_loss" in names or isinstance(method, DKD) else None
    loss = method(Outputs(student), teacher, target, 1.0)
    assert set(loss.terms) == names
    loss.total.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert method.reads_teacher == bool(names - {"task_loss"})
    if not method.reads_teacher:
        method(Outputs(student), None, target)
    else:
        with pytest.raises(ValueError, match="teacher is None, must be its outputs for"):
            method(Outputs(student), None, labels(4, 5))


@pytest.mark.parametrize("method", [DKD(), DIST(), create("logit-std"), DKD(standardize=True)], ids=str)
def test_under_autocast(method: Method) -> None:
    half = [Outputs(logits(seed, 6, 10, dtype=torch.bfloat16)) for seed in (1, 2)]
    expected = method(*(Outputs(o.logits.float()) for o in half), labels(6, 10))
    with torch.autocast("cpu", torch.bfloat16):
        loss = method(*half, labels(6, 10))
    torch.testing.assert_close(loss.terms, expected.terms, rtol=1e-5, atol=1e-6)
    assert loss.total.dtype == torch.float32


def test_every_kl_may_be_of_standardised_logits() -> None:
    maps = {name: torch.rand(4, 3, 4, 4) for name in ("a", "b")}
    makers: list[Callable[..., Method]] = [
        lambda **more: FitNet(3, 3, ["a"], **more),
        lambda **more: SRD(3, 3, ["a"], **more),
        lambda **more: FSP(["a", "b"], **more),
        lambda **more: AT(["a"], **more),
        lambda **more: SP(["a"], **more),
        lambda **more: RKD(layers=["a"], **more),
        lambda **more: CRD(9, 3, 3, ["a"], **more),
        lambda **more: SSKD(3, 3, ["a"], turned_weight=0.0, **more),
    ]
    student, teacher = (Outputs(logits(seed, 4, 5, dtype=torch.float32), maps) for seed in (1, 2))
    for make in makers:
        method = make(task_weight=0.0, kd_weight=1.0, feature_weight=0.0, temperature=2.0, standardize=True)
        rows = slice(0, 1) if isinstance(method, SSKD) else slice(0, 4)
        pair = [standardized(o.logits)[rows] for o in (student, teacher)]  # type: ignore[arg-type]
        torch.testing.assert_close(method(student, teacher, None).total, plain.hinton(*pair, 2.0))
        assert "standardize=True" in repr(method)
        assert "standardize" not in repr(make())


def test_logit_std_by_name() -> None:
    method = create("logit-std")
    assert isinstance(method, Hinton)
    assert (method.standardize, method.temperature, method.kd_weight, method.task_weight) == (True, 2.0, 9.0, 0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: DKD()(Outputs(logits(1, 2, 1)), Outputs(logits(1, 2, 1)), torch.zeros(2).long()),
            "2 classes or more for DKD",
        ),
        (lambda: standardized(torch.zeros(2, 1)), "must have 2 classes or more to be standardised"),
        (lambda: DKD(task_weight=0.0)(Outputs(logits(1, 2, 3)), Outputs(logits(1, 2, 3)), None), "target is None"),
        (lambda: DKD(others_weight=-1.0), "others_weight is -1.0, must be finite and not negative"),
        (lambda: DKD(warmup_share=1.5), r"warmup_share is 1.5, must be in \[0, 1\]"),
        (lambda: DIST(intra_weight=float("inf")), "intra_weight is inf"),
        (lambda: DIST(0.0), "temperature is 0.0, must be positive"),
    ],
)
def test_what_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
    with pytest.raises(TypeError, match="standardize is int, must be True or False"):
        Hinton(standardize=1)  # type: ignore[arg-type]
