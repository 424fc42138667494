"""relation: truth, gradients, coincident and far points, batches of one and two, threads, memory, errors."""

from __future__ import annotations

import math
from functools import cache

import emulated
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from test_divergence_fuzz import SIZES, call, fuzz, tensors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd
from fastkd.functional import relation_loss
from fastkd.reference import relation as reference

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.cuda_kernels]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(2, 4, 3), (3, 2, 7), (5, 13, 1), (8, 33, 150), (41, 17, 20)]  # points, features of student and teacher
WEIGHTS = {"distance": (25.0, 0.0), "angle": (0.0, 50.0), "both": (25.0, 50.0)}
TERMS_AND_DTYPES = [
    *(("both", dtype) for dtype in DTYPES),
    *((terms, dtype) for terms in ("distance", "angle") for dtype in (torch.float32, torch.float64)),
]


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def run(loss: object, student: Tensor, teacher: Tensor, *weights: float) -> list[Tensor]:
    """The loss and the gradients of both sides, as float64 on the CPU."""
    student, teacher = student.detach().requires_grad_(), teacher.detach().requires_grad_()
    value = loss(student, teacher, *weights)
    return [t.detach().cpu().double() for t in (value, *torch.autograd.grad(value, (student, teacher)))]


def assert_accurate(student: Tensor, teacher: Tensor, *weights: float, spread: float = 1.0) -> None:
    """At most twice the error of plain torch in float32, or a few roundings of the result.

    In float64 a few roundings over ``spread``, the ratio of the closest and the farthest distance of a point.
    """
    ours = run(relation_loss, student, teacher, *weights)
    student, teacher = student.cpu(), teacher.cpu()
    expected = run(reference.relation_loss, student.double(), teacher.double(), *weights)
    wide = student.dtype == torch.float64
    plain = expected if wide else run(reference.relation_loss, student.float(), teacher.float(), *weights)
    for name, value, truth, other in zip(("loss", "student", "teacher"), ours, expected, plain, strict=True):
        eps = 2.0**-46 / spread if wide else 2.0**-23 if name == "loss" else torch.finfo(student.dtype).eps
        # relations that are constants, as all of two points are, leave roundings of numbers of this size
        floor = eps * float(truth.norm()) + 1e-14 * sum(weights)
        floor += torch.finfo(student.dtype).smallest_normal * truth.numel()
        error, best = float((value - truth).norm()), float((other - truth).norm())
        assert error <= 2 * best + floor, f"{name}: {error:.3g}, plain torch {best:.3g}, floor {floor:.3g}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("terms", "dtype"), TERMS_AND_DTYPES, ids=lambda value: str(value).removeprefix("torch."))
def test_truth(
    terms: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    device: torch.device,
    generator: torch.Generator,
) -> None:
    points, *features = shape
    assert_accurate(*(normal(generator, points, n).to(device, dtype) for n in features), *WEIGHTS[terms])


@cache
def truth_of_many(points: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Features, both terms and the gradient of the angles, one vertex after the other: B^3 numbers would be 1 GB."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = normal(generator, points, 6).requires_grad_(), normal(generator, points, 5)
    total = torch.zeros((), dtype=torch.float64)
    for a in range(points):
        directions = [F.normalize(x - x[a], dim=1, eps=1e-300) for x in (student, teacher)]
        loss = F.smooth_l1_loss(*(direction @ direction.mT for direction in directions)) / points
        loss.backward()
        total += loss.detach()
    distance = F.smooth_l1_loss(reference.distances(student.detach()), reference.distances(teacher))
    assert student.grad is not None
    return student.detach(), teacher, distance, total, student.grad


@pytest.mark.parametrize("points", [257, 512])
def test_many_points(points: int, cpu: torch.device) -> None:
    student, teacher, distance, angle, gradient = truth_of_many(points)
    student = student.clone().requires_grad_()
    loss, terms = relation_loss(student, teacher, 0.0, 1.0, return_terms=True)
    torch.testing.assert_close(terms, {"distance_loss": torch.zeros_like(distance), "angle_loss": angle})
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], gradient)
    terms = relation_loss(student, teacher, return_terms=True)[1]
    torch.testing.assert_close(terms, {"distance_loss": distance, "angle_loss": angle})


def test_many_tiles(device: torch.device, generator: torch.Generator) -> None:
    student, teacher = normal(generator, 67, 9), normal(generator, 67, 40)
    assert_accurate(student.to(device, torch.float32), teacher.to(device, torch.float32), 25.0, 50.0)


def test_terms_and_weights(device: torch.device, generator: torch.Generator) -> None:
    student, teacher = normal(generator, 9, 3).to(device), normal(generator, 9, 4).to(device)
    loss, terms = relation_loss(student, teacher, 2.0, 3.0, return_terms=True)
    expected = reference.relation_terms(student.cpu(), teacher.cpu())
    assert list(terms) == ["distance_loss", "angle_loss"]
    for term, value in zip(terms.values(), expected, strict=True):
        torch.testing.assert_close(term.cpu(), value)
    torch.testing.assert_close(loss.cpu(), 2 * expected[0] + 3 * expected[1])
    assert not any(
        term.requires_grad for term in relation_loss(student.requires_grad_(), teacher, return_terms=True)[1].values()
    )
    assert all(not value.any() for value in run(relation_loss, student, teacher, 0.0, 0.0))
    distance, angle = expected
    only = relation_loss(student, teacher, 0.0, 1.0, return_terms=True)[1]
    assert only["distance_loss"] == 0
    torch.testing.assert_close(only["angle_loss"].cpu(), angle)
    only = relation_loss(student, teacher, 1.0, 0.0, return_terms=True)[1]
    assert only["angle_loss"] == 0
    torch.testing.assert_close(only["distance_loss"].cpu(), distance)


@pytest.mark.parametrize("points", [1, 2])
def test_few_points(points: int, device: torch.device, generator: torch.Generator) -> None:
    """No pair, or relations that are constants: nothing to learn."""
    for dtype in DTYPES:
        student, teacher = (normal(generator, points, 5).to(device, dtype) for _ in range(2))
        loss, *gradients = run(relation_loss, student, teacher)
        assert loss < 1e-12
        assert all(g.abs().max() < 1e-9 for g in gradients)


def test_same_geometry(device: torch.device, generator: torch.Generator) -> None:
    """Itself, and moved, turned and scaled: no more than roundings."""
    x = normal(generator, 20, 6)
    turned = 3 * x @ torch.linalg.qr(normal(generator, 6, 6))[0] + 7
    for other in (x, turned):
        assert all(value.abs().max() < 1e-12 for value in run(relation_loss, x.to(device), other.to(device)))


def test_coincident_points(device: torch.device, few: bool, generator: torch.Generator) -> None:
    """Equal on one side, on both, all equal: as the reference, and no gradient between them."""
    features = 13 if few else 300
    for dtype in (torch.float32, torch.float64):
        for student_copies, teacher_copies in ((1, 0), (0, 2), (2, 2), (11, 0), (11, 11)):
            student, teacher = normal(generator, 12, features).to(dtype), normal(generator, 12, 4).to(dtype)
            student[1 : 1 + student_copies] = student[0]
            teacher[1 : 1 + teacher_copies] = teacher[0]
            assert_accurate(student.to(device), teacher.to(device), 25.0, 50.0)
            assert all(
                torch.isfinite(value).all() for value in run(relation_loss, student.to(device), teacher.to(device))
            )
    line = torch.arange(6.0, device=device)[:, None] * torch.tensor([1.0, -2.0, 0.5], device=device)
    assert_accurate(line, line.square() + 1, 25.0, 50.0)  # cosines of 1 and -1


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-4])
def test_clusters_far_away(offset: float, spread: float, device: torch.device, generator: torch.Generator) -> None:
    """Pairs much closer to each other than to the rest, far from the origin: as exact as differences of the features."""
    for dtype in (torch.float32, torch.float64):
        centres, around = normal(generator, 4, 1, 7), normal(generator, 4, 3, 7)
        student = (centres + spread * around + offset).reshape(12, 7).to(dtype)
        teacher = normal(generator, 12, 5).to(dtype)
        if torch.unique(student, dim=0).shape[0] == 12:
            assert_accurate(student.to(device), teacher.to(device), 25.0, 50.0, spread=spread)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_sides(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    """Nothing at all; but nvcc contracts the difference of two cosines with one of them, which leaves what that rounds."""
    most = 1e-15 if device.type == "cuda" else 0.0
    for points in (2, 3, 8, 33):
        x = normal(generator, points, 6).to(device, dtype)
        assert all(value.abs().max() <= most for value in run(relation_loss, x, x.clone()))


def test_how_far_points_may_be_apart(device: torch.device, generator: torch.Generator) -> None:
    x, teacher = normal(generator, 5, 4).clamp(-1, 1), normal(generator, 5, 4).to(device)
    near, far = (run(relation_loss, (x * scale).to(device), teacher) for scale in (1e153, 1e155))
    torch.testing.assert_close(near[0], run(relation_loss, x.to(device), teacher)[0])
    assert all(value.isfinite().all() for value in near)
    assert far[0].isnan()


def test_any_scale(device: torch.device, generator: torch.Generator) -> None:
    for dtype, scale in ((torch.float32, 1e-4), (torch.float32, 1e18), (torch.float16, 6e4), (torch.bfloat16, 1e37)):
        student = (normal(generator, 7, 3).clamp(-1, 1) * scale).to(device, dtype)
        ours = run(relation_loss, student, normal(generator, 7, 3).to(device, dtype))
        expected = run(reference.relation_loss, student.cpu().double(), torch.ones(7, 3).double())
        assert all(torch.isfinite(value).all() for value in (*ours, *expected[:1]))


def test_more_dimensions_and_strides(device: torch.device, generator: torch.Generator) -> None:
    base, teacher = normal(generator, 12, 40).to(device), normal(generator, 6, 5).to(device)
    for view in (base[:6, 3:20], base.t()[:6], base[:1].expand(6, -1), base[::2, ::3], base[:6, :1].expand(-1, 5)):
        for ours, packed in zip(
            run(relation_loss, view, teacher), run(relation_loss, view.contiguous(), teacher), strict=True
        ):
            assert torch.equal(ours, packed)
    maps = base[:6].reshape(6, 2, 4, 5).permute(0, 3, 1, 2)
    (_, gradient, _), flat = run(relation_loss, maps, teacher), run(relation_loss, maps.reshape(6, -1), teacher)
    assert torch.equal(gradient.reshape(6, -1), flat[1])


def test_dtypes_of_results(device: torch.device, generator: torch.Generator) -> None:
    for ours in DTYPES:
        for theirs in DTYPES:
            student, teacher = normal(generator, 5, 4).to(device, ours), normal(generator, 5, 6).to(device, theirs)
            loss = relation_loss(student.requires_grad_(), teacher.requires_grad_())
            assert loss.dtype == (torch.float64 if torch.float64 in (ours, theirs) else torch.float32)
            gradients = torch.autograd.grad(loss, (student, teacher))
            assert [g.dtype for g in gradients] == [ours, theirs]


def test_gradcheck(device: torch.device, few: bool, generator: torch.Generator) -> None:
    inputs = [normal(generator, 4, n).to(device).requires_grad_() for n in (2, 3)]
    for weights in [WEIGHTS["both"]] if few else WEIGHTS.values():
        assert torch.autograd.gradcheck(lambda s, t, w=weights: relation_loss(s, t, *w), inputs)
    maps = normal(generator, 4, 2, 1).to(device).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: fastkd.RelationLoss(1.0, 2.0)(s, inputs[1].detach()), maps)


def test_backward_twice_and_scaled(device: torch.device, generator: torch.Generator) -> None:
    student, teacher = normal(generator, 9, 4).to(device).requires_grad_(), normal(generator, 9, 3).to(device)
    loss = relation_loss(student, teacher)
    first, second = (torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(torch.autograd.grad(-3.0 * loss, student)[0], -3.0 * first)
    half = (normal(generator, 9, 4) * 1e4).to(device, torch.float16).requires_grad_()  # gradients below fp16's smallest
    scaled = torch.autograd.grad(relation_loss(half, teacher) * 2.0**16, half)[0].cpu().double()
    exact = half.detach().cpu().double().requires_grad_()
    expected = torch.autograd.grad(reference.relation_loss(exact, teacher.cpu()) * 2.0**16, exact)[0]
    torch.testing.assert_close(scaled, expected, rtol=2e-3, atol=1e-6)


def test_no_second_derivative(device: torch.device, generator: torch.Generator) -> None:
    student, teacher = normal(generator, 5, 4).to(device).requires_grad_(), normal(generator, 5, 3).to(device)
    loss = relation_loss(student, teacher)
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="relation_loss cannot be differentiated again"):
        gradient.square().sum().backward()
    with torch.inference_mode():
        kept = normal(generator, 5, 3).to(device)
    assert torch.isfinite(torch.autograd.grad(relation_loss(student, kept), student)[0]).all()
    transformed = torch.func.grad(lambda s: relation_loss(s, teacher))(student.detach())
    torch.testing.assert_close(transformed, gradient.detach())
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.func.grad(lambda s: torch.func.grad(lambda x: relation_loss(x, teacher))(s).sum())(student.detach())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite(bad: float, device: torch.device, generator: torch.Generator) -> None:
    """Wherever it stands, on either side: NaN, never a number that looks right."""
    for points in (2, 3, 20):
        for side in (0, 1):
            features = [normal(generator, points, 4).to(device) for _ in range(2)]
            features[side][points // 2, 1] = bad
            for weights in WEIGHTS.values():
                assert all(torch.isnan(value).all() for value in run(relation_loss, *features, *weights))


def test_opcheck(device: torch.device, generator: torch.Generator) -> None:
    student, teacher = normal(generator, 5, 3).to(device), normal(generator, 5, 4).to(device)
    for gradients in ((True, False), (True, True)):
        arguments = student.detach().requires_grad_(gradients[0]), teacher.detach().requires_grad_(gradients[1])
        torch.library.opcheck(torch.ops.fastkd.relation.default, (*arguments, 25.0, 50.0, *gradients))
    pairs = torch.ops.fastkd.relation(student, teacher, 25.0, 50.0, True, False)[2]
    torch.library.opcheck(
        torch.ops.fastkd.relation_backward.default, (student.float(), pairs, torch.ones((), device=device))
    )


@pytest.mark.compiles
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_compile(dynamic: bool | None, generator: torch.Generator) -> None:
    torch._dynamo.reset()
    criterion = fastkd.RelationLoss()
    compiled = torch.compile(lambda s, t: criterion(s * 2, t) * 3, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for points in (7, 9):
        student, teacher = normal(generator, points, 5).float().requires_grad_(), normal(generator, points, 6).float()
        ours, expected = compiled(student, teacher), criterion(student * 2, teacher) * 3
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(torch.autograd.grad(ours, student), torch.autograd.grad(expected, student))


def test_autocast(generator: torch.Generator) -> None:
    layer = torch.nn.Linear(6, 5)
    x, teacher = normal(generator, 9, 6).float(), normal(generator, 9, 4).float()
    with torch.autocast("cpu", torch.bfloat16):
        features = layer(x)
        loss = fastkd.RelationLoss()(features, teacher)
    assert features.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.backward()
    torch.testing.assert_close(loss, reference.relation_loss(features.detach().double(), teacher.double()).float())
    assert torch.isfinite(layer.weight.grad).all()
    assert str(fastkd.RelationLoss()) == "RelationLoss(distance_weight=25.0, angle_weight=50.0)"


def test_bits_do_not_depend_on_threads(cpu: torch.device, generator: torch.Generator) -> None:
    student, teacher = normal(generator, 150, 700).float(), normal(generator, 150, 30).float()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(run(relation_loss, student, teacher))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_bits_do_not_change(device: torch.device, generator: torch.Generator) -> None:
    student, teacher = (normal(generator, 35, n).to(device, torch.float32) for n in (130, 3))
    first, second = (run(relation_loss, student, teacher) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Allocations(TorchDispatchMode):
    """Bytes of all results of operators, in the largest of them."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple) else (result,):
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.untyped_storage().nbytes())
        return result


def test_memory_is_of_pairs(generator: torch.Generator) -> None:
    """512 points of 512 features: matrices of 2 MB, where differences of all pairs would take 537 MB a side."""
    student, teacher = normal(generator, 512, 512).float().requires_grad_(), normal(generator, 512, 512).float()
    with Allocations() as allocations:
        relation_loss(student, teacher).backward()
    assert allocations.largest == 512 * 512 * 8


@pytest.fixture
def on_paper() -> object:
    """What the kernels would be launched with, and where."""
    emulated.load()
    return torch.ops.fastkd_emulated


def test_geometry(on_paper: object) -> None:
    """The parts of the features cover them; few points fill the GPU by parts, many without."""
    for points in (1, 8, 9, 32, 33, 64, 512, 4097, 100_000):
        for columns in (1, 16, 63, 64, 65, 128, 1271, 50_176, 2**20):
            splits, each, squares, triangles, gradient = on_paper.plan_relation(points, columns, 132)
            tiles = -(-points // 32)
            assert each % 16 == 0
            assert splits * each >= columns
            assert splits == 1 or (splits * tiles * (tiles + 1) / 2 < 264 and columns > 64)
            assert squares == splits * tiles * (tiles + 1)
            groups = -(-points // 8)
            assert triangles == groups * (groups + 1) // 2
            assert gradient == tiles * -(-columns // 32)
    with pytest.raises(RuntimeError, match="points are 5000000, must be fewer"):
        on_paper.plan_relation(5_000_000, 3, 132)


def test_squares_on_and_above_the_diagonal(on_paper: object) -> None:
    found = [tuple(on_paper.relation_tile(i)) for i in range(5000)]
    assert found == [(row, column) for column in range(100) for row in range(column + 1)][:5000]
    for column in (99_999, 2**16, 2**20 - 1):
        first = column * (column + 1) // 2
        assert on_paper.relation_tile(first) == [0, column]
        assert on_paper.relation_tile(first + column) == [column, column]


@fuzz
@given(st.data())
def test_fuzz(device: torch.device, data: st.DataObject) -> None:
    draw = data.draw
    points = draw(st.sampled_from(SIZES))
    student, teacher = (draw(tensors((points, draw(st.sampled_from(SIZES[1:]))), DTYPES, device)) for _ in range(2))
    weights = [draw(st.sampled_from([0.0, 1.0, 0.0, 25.0, -1.0, math.nan, 1e308])) for _ in range(2)]
    flags = draw(st.booleans()), draw(st.booleans())
    if draw(st.booleans()) and student.is_floating_point():
        student = student.detach().requires_grad_()
    result = call(torch.ops.fastkd.relation, student, teacher, *weights, *flags)
    valid = all(x.dim() == 2 and x.numel() > 0 and x.dtype in DTYPES for x in (student, teacher))
    valid = valid and student.shape[0] == teacher.shape[0] and all(w >= 0 for w in weights)
    assert (result is not None) == valid
    if result is None:
        return
    loss, terms, *pairs = result
    assert (loss.shape, terms.shape) == ((), (2,))
    for matrix, wanted in zip(pairs, flags, strict=True):
        assert matrix.shape == ((student.shape[0],) * 2 if wanted else (0,))
        torch.testing.assert_close(matrix.mT if wanted else matrix, matrix, rtol=0, atol=0, equal_nan=True)
    if student.requires_grad:
        (gradient,) = torch.autograd.grad(loss, student)
        assert (gradient.shape, gradient.dtype) == (student.shape, student.dtype)


X = torch.zeros(4, 5)
ERRORS: dict[str, tuple[tuple[object, ...], type[Exception], tuple[str, ...]]] = {
    "list": (([1.0], X), TypeError, ("student_features is list", "tensor")),
    "none": ((X, None), TypeError, ("teacher_features is NoneType", "tensor")),
    "0-d": ((X[0, 0], X), ValueError, ("student_features has shape ()", "[batch, features...]")),
    "1-d": ((X, X[:, 0]), ValueError, ("teacher_features has shape (4,)", "[batch, features...]")),
    "no point": ((X[:0], X[:0]), ValueError, ("student_features has shape (0, 5)", "none of them 0")),
    "no feature": ((X, X[:, :0]), ValueError, ("teacher_features has shape (4, 0)", "none of them 0")),
    "batches": ((X, X[:3]), ValueError, ("teacher_features has shape (3, 5)", "as many points", "(4, 5)")),
    "integers": ((X.long(), X), TypeError, ("student_features has dtype torch.int64", "float32, float64")),
    "weight < 0": ((X, X, -1.0), ValueError, ("distance_weight is -1.0", "finite and not negative")),
    "weight nan": ((X, X, 1.0, math.nan), ValueError, ("angle_weight is nan", "finite and not negative")),
    "weight inf": ((X, X, math.inf), ValueError, ("distance_weight is inf", "finite and not negative")),
    "weight string": ((X, X, "1"), TypeError, ("distance_weight is str", "number")),
}


@pytest.mark.parametrize("case", ERRORS.values(), ids=ERRORS)
def test_errors(case: tuple[tuple[object, ...], type[Exception], tuple[str, ...]], device: torch.device) -> None:
    arguments, error, parts = case
    with pytest.raises(error) as caught:
        relation_loss(*(x.to(device) if isinstance(x, Tensor) else x for x in arguments))
    assert str(caught.value).startswith("fastkd: ")
    assert all(part in str(caught.value) for part in parts)


PAIRS = torch.zeros(4, 4, dtype=torch.float64)
OP_ERRORS: dict[str, tuple[str, tuple[object, ...], tuple[str, ...]]] = {
    "dimensions": ("relation", (X[0], X, 1.0, 1.0, True, False), ("student_features has shape (5,)", "2 dimensions")),
    "dtype": ("relation", (X, X.int(), 1.0, 1.0, True, False), ("teacher_features has dtype int32", "float32")),
    "batches": ("relation", (X, X[:2], 1.0, 1.0, True, False), ("teacher_features has shape (2, 5)", "(4, ...)")),
    "empty": ("relation", (X[:0], X[:0], 1.0, 1.0, True, False), ("student_features has shape (0, 5)", "one point")),
    "weight": ("relation", (X, X, 1.0, -2.0, True, False), ("angle_weight is -2", "not negative")),
    "pairs": ("relation_backward", (X, PAIRS[:3], X[0, 0]), ("pairs has shape (3, 4)", "(4, 4)")),
    "pairs' dtype": ("relation_backward", (X, PAIRS.float(), X[0, 0]), ("pairs has dtype float32", "float64")),
    "scale": ("relation_backward", (X, PAIRS, X), ("grad_loss has shape (4, 5)", "()")),
}  # fmt: skip


@pytest.mark.parametrize("case", OP_ERRORS.values(), ids=OP_ERRORS)
def test_errors_of_operators(case: tuple[str, tuple[object, ...], tuple[str, ...]], device: torch.device) -> None:
    name, arguments, parts = case
    with pytest.raises(RuntimeError) as caught:
        getattr(torch.ops.fastkd, name)(*(x.to(device) if isinstance(x, Tensor) else x for x in arguments))
    assert all(part in str(caught.value) for part in ("fastkd: ", *parts))
