"""logit_stats: truth, gradients, ties and infinities, large logits, errors."""

from __future__ import annotations

import math

import pytest
import torch
from divergence_cases import assert_same, off_alignment
from torch import Tensor

import fastkd
from fastkd.reference import divergence as reference

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.cuda_kernels]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(0, 5), (1, 1), (4, 2), (3, 3), (5, 41), (5, 256), (3, 401), (2, 1271), (9, 2056)]
NAMES = fastkd.functional.LogitStats._fields


def run(stats: object, logits: Tensor, temperature: float) -> dict[str, Tensor]:
    """Every statistic, and the gradient of each but argmax, as float64 on the CPU."""
    result = {}
    for name, value in zip(NAMES, stats(logits, temperature), strict=True):
        result[name] = value.detach().cpu().double()
    for i, name in enumerate(NAMES):
        if name != "argmax":
            x = logits.detach().requires_grad_()  # strides and all
            stats(x, temperature)[i].sum().backward()
            result[f"gradient of {name}"] = x.grad.cpu().double()
    return result


def assert_accurate(logits: Tensor, temperature: float) -> None:
    """At most twice the error of plain torch in float32, or a few roundings of the value."""
    results = run(fastkd.logit_stats, logits, temperature)
    logits = logits.cpu()
    expected = run(reference.logit_stats, logits.double(), temperature)
    plain = run(reference.logit_stats, logits.float(), temperature)
    # the mean of terms that cancel, and the entropy, are differences of numbers of this size
    size = {"mean": logits.double().abs().mean(-1) / temperature, "entropy": 1 + expected["entropy"].abs()}
    for name, ours in results.items():
        gradient = name.startswith("gradient")
        eps = torch.finfo(logits.dtype).eps if gradient else 2.0**-48 if logits.dtype == torch.float64 else 2.0**-22
        if gradient and logits.dtype == torch.float64:  # the truth is rounded too: in s / T, before exp
            eps = 2.0**-50 * float(logits.abs().max().clamp(min=1)) / temperature
        error = (ours - expected[name]).abs()
        best = (plain[name] - expected[name]).norm() if logits.dtype != torch.float64 else 0.0
        scale = size.get(name, expected[name].abs())
        floor = eps * scale + torch.finfo(logits.dtype).smallest_normal + (eps / temperature if gradient else 0)
        assert error.norm() <= 2 * best + floor.norm(), f"{name}: {error.norm():.3g}, plain torch {best:.3g}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_truth(dtype: torch.dtype, shape: tuple[int, int], device: torch.device, generator: torch.Generator) -> None:
    logits = torch.randn(shape, generator=generator, dtype=torch.float64).mul(3).to(device, dtype)
    for temperature in (0.05, 1.0, 3.0):
        if shape[0] > 0:
            assert_accurate(logits, temperature)
        stats = fastkd.logit_stats(logits, temperature)
        assert all(value.shape == shape[:1] for value in stats)
        assert stats.argmax.dtype == torch.int64
        assert torch.equal(stats.argmax.cpu(), logits.cpu().argmax(-1))


@pytest.mark.parametrize("temperature", [1e-39, 1e-300, 5e-324])
def test_tiny_temperatures(temperature: float, device: torch.device, generator: torch.Generator) -> None:
    """Factors beyond the dtype stop at its largest number: 0 times an infinite one would be NaN."""
    for dtype in (torch.float32, torch.float64):
        logits = torch.randn(3, 41, generator=generator, dtype=torch.float64).to(device, dtype)
        results = run(fastkd.logit_stats, logits, temperature)
        assert not results["gradient of entropy"].any()
        for name in ("max", "mean", "logsumexp"):
            assert results[f"gradient of {name}"].isfinite().all()


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_large_logits(temperature: float, device: torch.device, generator: torch.Generator) -> None:
    """A common offset has no part in entropy and gradients: no digits may be lost to it."""
    for dtype in (torch.float32, torch.float64):
        base = torch.randint(-64, 64, (4, 97), generator=generator).to(device, dtype) / 64
        at_zero = run(fastkd.logit_stats, base, temperature)
        at_large = run(fastkd.logit_stats, base + 8192, temperature)
        for name in at_zero:
            if name == "entropy" or name.startswith("gradient"):
                torch.testing.assert_close(at_large[name], at_zero[name], rtol=0, atol=0)


def test_large_vocabulary(device: torch.device, generator: torch.Generator) -> None:
    logits = torch.randn(2, 128257, generator=generator).to(device)
    assert_accurate(logits, 1.0)
    assert torch.equal(fastkd.logit_stats(logits).argmax.cpu(), logits.cpu().argmax(-1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_off_alignment(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    for classes in (1, 2, 3, 7, 8, 9, 31, 33, 41, 100, 401, 1000, 1271):
        logits = off_alignment(torch.randn(3, classes, generator=generator).to(device, dtype))
        assert_accurate(logits, 2.0)
        assert torch.equal(fastkd.logit_stats(logits).argmax.cpu(), logits.cpu().argmax(-1))


def test_ties_and_positions(device: torch.device) -> None:
    """The first of equal maxima, wherever it stands."""
    for dtype in DTYPES:
        for classes in (1, 7, 130, 700):
            logits = torch.ones(classes, classes).triu().to(device, dtype)  # row i: the maximum from class i on
            assert fastkd.logit_stats(logits).argmax.tolist() == list(range(classes))
            assert fastkd.logit_stats(-logits).argmax.tolist() == [0] * classes


@pytest.mark.parametrize("shape", [(40, 37), (24, 300), (6, 2500), (4, 9001)], ids=str)
def test_first_of_equal_maxima(shape: tuple[int, int], device: torch.device, generator: torch.Generator) -> None:
    """Maxima in several chunks, by whatever thread, and in the ragged ends: few values, so that most are equal."""
    for dtype in DTYPES:
        for move in (torch.Tensor.contiguous, off_alignment):
            logits = move(torch.randint(-3, 1, shape, generator=generator).to(device, dtype))
            rare = torch.zeros(shape).bernoulli_(3 / shape[1], generator=generator).to(device, dtype)
            for x in (logits, logits + rare, move(torch.full_like(logits, -2.0))):
                assert fastkd.logit_stats(x, 0.5).argmax.tolist() == x.cpu().double().argmax(-1).tolist()


@pytest.mark.parametrize("classes", [5, 37, 300, 2500, 9001])
def test_ends_of_rows(classes: int, device: torch.device) -> None:
    """The maximum, a NaN and infinities at the first places and the last, twice."""
    places = [i for i in (*range(9), *range(classes - 9, classes)) if 0 <= i < classes]
    other = [(i * 7 + 3) % classes for i in places]
    rows = torch.arange(len(places))
    for dtype in DTYPES:
        for value in (3.0, math.inf, math.nan):
            logits = torch.arange(classes).remainder(5).div(4).repeat(len(places), 1).to(dtype)
            logits[rows, torch.tensor(places)] = value
            logits[rows, torch.tensor(other)] = value
            stats = fastkd.logit_stats(off_alignment(logits.to(device)))
            assert stats.argmax.tolist() == [min(pair) for pair in zip(places, other, strict=True)]
            assert_same(stats.max.cpu(), torch.full((len(places),), value).to(stats.max.dtype), dtype, False)


@pytest.mark.parametrize("classes", [37, 300, 2500, 9001])
def test_masked_classes(classes: int, device: torch.device, generator: torch.Generator) -> None:
    """-inf here and there, and in whole stretches: the others as if they were alone; and the first NaN of several."""
    for dtype in DTYPES:
        logits = torch.randn(4, classes, generator=generator).to(dtype)
        logits[0, torch.rand(classes, generator=generator) < 0.3] = -math.inf
        logits[1, classes // 3 :] = -math.inf
        logits[2, : classes - 2] = -math.inf
        logits[3, 1:-1] = -math.inf
        x = off_alignment(logits.to(device)).requires_grad_()
        stats = fastkd.logit_stats(x, 2.0)
        (gradient,) = torch.autograd.grad((stats.entropy + stats.logsumexp + stats.max).sum(), x)
        for row in range(4):
            kept = logits[row].isfinite()
            y = logits[row][kept].double()[None].requires_grad_()
            alone = reference.logit_stats(y, 2.0)
            for name in ("max", "logsumexp", "entropy"):
                torch.testing.assert_close(
                    getattr(stats, name)[row].cpu().double(), alone[NAMES.index(name)][0], rtol=1e-5, atol=1e-5
                )
            (expected,) = torch.autograd.grad((alone[4] + alone[3] + alone[0]).sum(), y)
            torch.testing.assert_close(
                gradient[row].cpu()[kept].double(), expected[0], rtol=1e-2, atol=float(torch.finfo(dtype).eps)
            )
            assert not gradient[row].cpu()[~kept].any()
        assert stats.mean.tolist() == [-math.inf] * 4
        logits[:, classes // 2] = math.nan
        logits[1:, -1] = math.nan
        logits[2:, 2] = math.nan
        first = [classes // 2, classes // 2, 2, 2]
        assert fastkd.logit_stats(off_alignment(logits.to(device)), 2.0).argmax.tolist() == first


def test_sums_beyond_float(device: torch.device, fixed_order: bool) -> None:
    """The mean of numbers whose sum is no float (which CUDA kernels find); differences from the maximum that are none."""
    for dtype in (torch.float32, torch.bfloat16):
        huge = torch.full((2, 300), 3e38, dtype=dtype, device=device)
        stats = fastkd.logit_stats(huge)
        if not fixed_order:
            torch.testing.assert_close(stats.mean, huge[:, 0].float(), rtol=1e-6, atol=0)
        torch.testing.assert_close(stats.entropy.cpu(), torch.full((2,), math.log(300)), rtol=1e-6, atol=0)
        huge[:, 7::2] *= -1
        stats = fastkd.logit_stats(huge)
        assert stats.argmax.tolist() == [0, 0]
        torch.testing.assert_close(stats.entropy.cpu(), torch.full((2,), math.log(153)), rtol=1e-6, atol=0)
        tiny = torch.arange(300, device=device).to(dtype).repeat(2, 1)
        tiny[:, 299] = 1000
        stats = fastkd.logit_stats(tiny, 1e-39)
        assert stats.argmax.tolist() == [299, 299]
        assert stats.entropy.tolist() == [0.0, 0.0]


def test_many_rows(device: torch.device, generator: torch.Generator) -> None:
    """Of more rows, each has fewer threads."""
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(1030, 301, generator=generator).to(device, dtype)
        assert_accurate(logits, 1.0)
        assert torch.equal(fastkd.logit_stats(logits).argmax.cpu(), logits.cpu().argmax(-1))


@pytest.mark.parametrize("classes", [3, 40, 300])
def test_infinities_as_torch_has_them(classes: int, device: torch.device) -> None:
    inf, nan = math.inf, math.nan
    for dtype in DTYPES:
        for place in (0, classes // 2, classes - 1):
            for fill, value in (
                (0.0, inf),
                (0.0, -inf),
                (0.0, nan),
                (-inf, 1.0),
                (-inf, -inf),
                (inf, nan),
                (-inf, nan),
            ):
                row = torch.full((1, classes), fill, dtype=dtype)
                row[0, place] = value
                ours, theirs = fastkd.logit_stats(row.to(device), 2.0), reference.logit_stats(row.double(), 2.0)
                for name in ("max", "argmax", "mean", "logsumexp"):
                    expected = theirs[NAMES.index(name)]
                    torch.testing.assert_close(
                        getattr(ours, name).cpu().double(), expected.double(), equal_nan=True, rtol=1e-6, atol=1e-6
                    )
                # no probabilities, no entropy
                defined = value == 1.0 or (math.isfinite(fill) and value == -inf)
                assert math.isfinite(ours.entropy.item()) == defined


def test_masked_classes_get_no_gradient(device: torch.device) -> None:
    logits = torch.tensor([[0.0, -math.inf, 1.0, -math.inf]], device=device, requires_grad=True)
    stats = fastkd.logit_stats(logits)
    (stats.entropy + stats.logsumexp + stats.max).sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[0, [1, 3]].tolist() == [0.0, 0.0]


def test_nan_stays_in_its_row(device: torch.device, generator: torch.Generator) -> None:
    logits = torch.randn(3, 37, generator=generator).to(device)
    clean = run(fastkd.logit_stats, logits, 2.0)
    logits[1, 5] = math.nan
    for name, value in run(fastkd.logit_stats, logits, 2.0).items():
        assert torch.equal(value[[0, 2]], clean[name][[0, 2]])
    assert fastkd.logit_stats(logits).argmax[1] == 5


def test_gradcheck_and_combinations(device: torch.device, generator: torch.Generator) -> None:
    logits = torch.randn(3, 5, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    for wanted in ([0], [2], [3], [4], [0, 2], [3, 4], [0, 2, 3, 4]):
        assert torch.autograd.gradcheck(lambda x, w=wanted: tuple(fastkd.logit_stats(x, 1.7)[i] for i in w), logits)
    stats = fastkd.logit_stats(logits.reshape(3, 1, 5))
    assert stats.max.shape == (3, 1)
    assert not stats.argmax.requires_grad
    (gradient,) = torch.autograd.grad(stats.entropy.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="logit_stats cannot be differentiated again"):
        gradient.sum().backward()


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_compile(dynamic: bool | None, generator: torch.Generator) -> None:
    torch._dynamo.reset()

    def loss(x: Tensor) -> Tensor:
        stats = fastkd.logit_stats(x, 2.0)
        return (stats.entropy * stats.logsumexp + stats.mean + stats.max.square() + stats.argmax).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for classes in (7, 9):
        x = torch.randn(3, classes, generator=generator, requires_grad=True)
        torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(loss(x), x))


def test_strides(device: torch.device, fixed_order: bool, generator: torch.Generator) -> None:
    """As contiguous copies."""
    base = torch.randn(12, 1300, generator=generator).to(device)
    for view in (base[:, 3:1290], base.t()[:200], base[:1].expand(5, -1), base[:, :1].expand(-1, 50), base[::2]):
        strided, packed = (run(fastkd.logit_stats, logits, 3.0) for logits in (view, view.contiguous()))
        for name, value in strided.items():
            assert_same(value, packed[name], torch.float32, fixed_order)


def test_bits_do_not_depend_on_threads(cpu: torch.device, generator: torch.Generator) -> None:
    logits = torch.randn(60, 1300, generator=generator).to(cpu)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(run(fastkd.logit_stats, logits, 3.0))
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


X = torch.zeros(3, 5)
ERRORS: dict[str, tuple[tuple[object, ...], type[Exception], tuple[str, ...]]] = {
    "list": (([1.0],), TypeError, ("logits is list", "tensor")),
    "0-d": ((X[0, 0],), ValueError, ("logits", "()", "classes > 0")),
    "no class": ((X[:, :0],), ValueError, ("logits", "(3, 0)", "classes > 0")),
    "integers": ((X.long(),), TypeError, ("logits", "int64", "float32, float64, bfloat16 or float16")),
    "T = 0": ((X, 0), ValueError, ("temperature is 0", "positive and finite")),
    "T nan": ((X, math.nan), ValueError, ("temperature is nan", "positive and finite")),
    "T inf": ((X, math.inf), ValueError, ("temperature is inf", "positive and finite")),
    "T tensor": ((X, torch.ones(3)), TypeError, ("temperature is Tensor", "number")),
    "T string": ((X, "1"), TypeError, ("temperature is str", "number")),
}


@pytest.mark.parametrize("case", ERRORS.values(), ids=ERRORS)
def test_errors(case: tuple[tuple[object, ...], type[Exception], tuple[str, ...]], device: torch.device) -> None:
    arguments, error, parts = case
    with pytest.raises(error) as caught:
        fastkd.logit_stats(*(x.to(device) if isinstance(x, Tensor) else x for x in arguments))
    assert str(caught.value).startswith("fastkd: ")
    assert all(part in str(caught.value) for part in parts)
