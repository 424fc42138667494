"""channel_moments: truth, gradients, means far from 0, infinities, memory formats, threads, errors."""

from __future__ import annotations

import math

import emulated
import hypothesis.strategies as st
import pytest
import torch
from divergence_cases import assert_same, off_alignment
from hypothesis import given
from test_divergence_fuzz import SIZES, call, fits, fuzz, tensors
from torch import Tensor

import fastkd
from fastkd.reference import moments as reference

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.cuda_kernels]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FORMATS = ["contiguous", "channels_last"]
# one pixel, one channel, rows shorter than a register, of 32 to 64 pixels and longer, channels in no whole registers
SHAPES = [
    (1, 1),
    (1, 9),
    (5, 3),
    (41, 33),
    (3, 5, 1),
    (2, 1, 130),
    (7, 3, 2, 2),
    (3, 17, 7, 7),
    (2, 40, 5, 5),
    (2, 3, 3, 41, 11),
    (3, 8, 3, 4, 4),
    (130, 2, 9),
    (1, 150, 6),
]


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def laid(x: Tensor, memory_format: str) -> Tensor:
    """The numbers in that order, of any number of dimensions."""
    return x.contiguous() if memory_format == "contiguous" else x.movedim(1, -1).contiguous().movedim(-1, 1)


def run(moments: object, x: Tensor, per_sample: bool, upstream: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Mean, variance and gradient, as float64 on the CPU."""
    x = x.detach().requires_grad_()
    values = moments(x, per_sample=per_sample)
    (gradient,) = torch.autograd.grad(tuple(values), x, tuple(g.to(v) for g, v in zip(upstream, values, strict=True)))
    return {
        name: t.detach().cpu().double()
        for name, t in zip(("mean", "var", "gradient"), (*values, gradient), strict=True)
    }


def torch_moments(x: Tensor, per_sample: bool) -> tuple[Tensor, Tensor]:
    """As torch has them."""
    dims = [d for d in range(x.dim()) if d != 1 and (d > 0 or not per_sample)]
    if not dims:  # of one number each
        return x * 1, x - x
    var, mean = torch.var_mean(x, dims, correction=0)
    return mean, var


def assert_accurate(x: Tensor, per_sample: bool, generator: torch.Generator) -> None:
    """At most twice the error of torch in the dtype (float32 for 16 bits), or a rounding or two of the result."""
    shape = tuple(x.shape[:2]) if per_sample else (x.shape[1],)
    upstream = normal(generator, *shape), normal(generator, *shape)
    ours = run(fastkd.channel_moments, x, per_sample, upstream)
    on_gpu = x.is_cuda or emulated.running()  # whose sums are in float for longer
    x = x.cpu()
    truth = run(reference.channel_moments, x.double(), per_sample, upstream)
    plain = run(torch_moments, x if x.dtype == torch.float64 else x.float(), per_sample, upstream)
    eps = 2.0**-51 if x.dtype == torch.float64 else 2.0**-23
    count = x.numel() / math.prod(shape)
    spread = truth["var"].sqrt()
    far = truth["mean"].abs() + spread
    slopes = (2 * upstream[1].abs() * far + upstream[0].abs()) / count
    floors = {
        "mean": eps * (truth["mean"].abs() + (2 if on_gpu else 0.01) * spread),
        "var": (4 if on_gpu else 1) * eps * truth["var"] + 16 * (eps * truth["mean"].abs()).square(),
        # each number of the gradient is rounded, to the dtype in the end
        "gradient": 4 * slopes * eps + float(truth["gradient"].abs().max()) * torch.finfo(x.dtype).eps,
    }
    for name, value in ours.items():
        error, best = (value - truth[name]).abs(), (plain[name] - truth[name]).abs()
        floor = floors[name] + torch.finfo(x.dtype).smallest_normal * (2 if name == "gradient" else 0)
        allowed = 2 * best.max() + floor.max()
        assert error.max() <= allowed, f"{name}: {error.max():.3g}, torch {best.max():.3g}, floor {floor.max():.3g}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_truth(
    dtype: torch.dtype, memory_format: str, shape: tuple[int, ...], device: torch.device, generator: torch.Generator
) -> None:
    x = laid(normal(generator, *shape).to(device, dtype), memory_format)
    for per_sample in (False, True):
        moments = fastkd.channel_moments(x, per_sample=per_sample)
        assert moments.mean.shape == moments.var.shape == (shape[:2] if per_sample else shape[1:2])
        assert moments.mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_accurate(x, per_sample, generator)


# beyond what one task, one chunk, one panel of channels or one block of threads takes
LARGE = [
    (1, 1, 70_000),
    (3, 2, 5000),
    (2, 600, 40),
    (1, 1200, 16),
    (2, 1100, 15),
    (70, 3, 30),
    (300, 130, 2),
    (9, 1100, 3),
    (1500, 24),
    (2, 20, 2100),
]


@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_many(
    memory_format: str, shape: tuple[int, ...], device: torch.device, few: bool, generator: torch.Generator
) -> None:
    for dtype in (torch.float32, torch.bfloat16) if few else DTYPES:
        x = laid(normal(generator, *shape).to(device, dtype), memory_format)
        for per_sample in (False, True):
            assert_accurate(x, per_sample, generator)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_far_from_zero(memory_format: str, device: torch.device, few: bool, generator: torch.Generator) -> None:
    for shape in ((4, 5, 1000), (40, 20, 3), (600, 3)) if few else ((4, 5, 30_000), (400, 40, 3), (6000, 3)):
        base = normal(generator, *shape)
        for mean, dtype in ((1e4, torch.float32), (-300.0, torch.float16), (1e9, torch.float64)):
            for per_sample in (False, True):
                assert_accurate(laid((base + mean).to(device, dtype), memory_format), per_sample, generator)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_outliers(memory_format: str, device: torch.device, generator: torch.Generator) -> None:
    """One number far from all others: first, last, or between."""
    for shape in ((3, 2, 4000), (50, 3, 9), (800, 5)):
        for place in (0, 1, -1):
            for size in (1e3, 1e6, 1e12):
                x = normal(generator, *shape)
                x.flatten(2 if x.dim() > 2 else 0)[..., place] = size
                for per_sample in (False, True):
                    assert_accurate(laid(x.to(device, torch.float32), memory_format), per_sample, generator)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_one_and_the_same_number(memory_format: str, device: torch.device) -> None:
    """Has no variance, whatever its binary digits."""
    for dtype in DTYPES:
        for shape in ((3, 3, 1500), (70, 5, 7), (130, 9)):
            for value in (0.0, 0.1, -1234.567, 3e4):
                x = laid(torch.full(shape, value).to(device, dtype), memory_format)
                for per_sample in (False, True):
                    mean, var = fastkd.channel_moments(x, per_sample=per_sample)
                    assert not var.any()
                    assert torch.equal(mean, x.flatten()[0].to(mean.dtype).expand_as(mean))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_numbers_whose_squares_are_beyond_float(memory_format: str, device: torch.device) -> None:
    for shape in ((4, 3, 500), (64, 5, 4), (400, 7)):
        for dtype in (torch.float32, torch.bfloat16):
            for value in (3e38, 1e25):
                x = laid(torch.full(shape, value).to(device, dtype), memory_format)
                mean, var = fastkd.channel_moments(x)
                torch.testing.assert_close(mean, torch.full_like(mean, float(x.flatten()[0])), rtol=1e-6, atol=0)
                assert not var.any()
            x[::2] *= -1  # of 1e25: a variance that is no float
            assert fastkd.channel_moments(x).var.isinf().all()
            assert not fastkd.channel_moments(x).mean.abs().gt(1e19).any()
            x = torch.zeros(shape, dtype=dtype, device=device)
            x[0, 1] = 1e19 / 300
            x = laid(x, memory_format)
            truth = reference.channel_moments(x.cpu().double())
            for value, right in zip(fastkd.channel_moments(x), truth, strict=True):
                torch.testing.assert_close(value.cpu().double(), right, rtol=1e-6, atol=0)
        x = laid(torch.full(shape, 1e300, dtype=torch.float64, device=device), memory_format)
        assert not fastkd.channel_moments(x).var.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_what_is_not_finite_stays_in_its_channel(
    memory_format: str, bad: float, device: torch.device, generator: torch.Generator
) -> None:
    for shape in ((2, 7, 300), (3, 20, 5), (40, 19), (2, 7, 50)):
        for dtype in DTYPES:
            for place in (0, -1):
                clean = laid(normal(generator, *shape).to(device, dtype), memory_format)
                x = clean.clone()
                x[place, 3].view(-1)[place] = bad
                for per_sample in (False, True):
                    upstream = (torch.ones(shape[:2]), torch.ones(shape[:2]))
                    upstream = upstream if per_sample else (upstream[0][0], upstream[1][0])
                    found = run(fastkd.channel_moments, x, per_sample, upstream)
                    expected = run(fastkd.channel_moments, clean, per_sample, upstream)
                    one = (place, 3) if per_sample else (..., 3)
                    assert not found["mean"][one].isfinite().any()
                    assert not found["var"][one].isfinite().any()
                    for name in ("mean", "var"):
                        found[name][one] = expected[name][one] = 0
                    of_channel = (place, 3) if per_sample else (slice(None), 3)
                    assert not found["gradient"][of_channel].isfinite().any()
                    found["gradient"][of_channel] = expected["gradient"][of_channel] = 0
                    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_off_alignment(
    dtype: torch.dtype, memory_format: str, device: torch.device, generator: torch.Generator
) -> None:
    for shape in ((2, 3, 37), (3, 16, 3), (5, 8), (2, 4, 130), (2, 1, 2100), (1, 48, 9)):
        x = laid(normal(generator, *shape).to(device, dtype), memory_format)
        base = off_alignment(x if memory_format == "contiguous" else x.movedim(1, -1))
        for per_sample in (False, True):
            assert_accurate(base if memory_format == "contiguous" else base.movedim(-1, 1), per_sample, generator)


def test_memory_formats(device: torch.device, generator: torch.Generator) -> None:
    """The gradient has that of x, and what is laid out otherwise gives what a copy gives."""
    for x, memory_format in (
        (normal(generator, 2, 3, 4, 5).to(device), torch.channels_last),
        (normal(generator, 2, 3, 4, 5, 2).to(device), torch.channels_last_3d),
        (normal(generator, 2, 3, 1, 5).to(device), torch.channels_last),
    ):
        for given_format in (memory_format, torch.contiguous_format):
            y = x.contiguous(memory_format=given_format).requires_grad_()
            (gradient,) = torch.autograd.grad(fastkd.channel_moments(y).var.sum(), y)
            assert gradient.is_contiguous(memory_format=given_format)
    base = normal(generator, 6, 8, 10, 9).to(device, torch.float32)
    tokens = normal(generator, 3, 11, 5).to(device, torch.float32)
    views = (
        base[::2],
        base[:, 1:4, 2:],
        base.permute(0, 1, 3, 2),
        base.transpose(0, 1),
        base[:1].expand(4, -1, -1, -1),
        base[:, :1].expand(-1, 5, -1, -1),
        base[..., :1].expand(-1, -1, -1, 3),
        base.contiguous(memory_format=torch.channels_last)[:, :, 1:-1],
        tokens.mT,
        tokens[:, ::2].mT,
        base[:, :, 0, 0],
    )
    for view in views:
        for per_sample in (False, True):
            shape = view.shape[:2] if per_sample else view.shape[1:2]
            upstream = normal(generator, *shape), normal(generator, *shape)
            strided, packed = (
                run(fastkd.channel_moments, x, per_sample, upstream) for x in (view, laid(view, "contiguous"))
            )
            for name, value in strided.items():
                # channels-last views have an order of their own
                torch.testing.assert_close(value, packed[name], rtol=1e-6, atol=1e-6)


def test_gradcheck(device: torch.device, generator: torch.Generator) -> None:
    for shape in ((3, 2, 2, 2), (4, 3), (2, 3, 5)):
        for memory_format in FORMATS:
            x = laid(normal(generator, *shape).to(device), memory_format).requires_grad_()
            for per_sample in (False, True):
                for wanted in ([0], [1], [0, 1]):
                    assert torch.autograd.gradcheck(
                        lambda x, w=wanted, s=per_sample: tuple(fastkd.channel_moments(x, per_sample=s)[i] for i in w),
                        x,
                    )


def test_gradient_is_scaled_before_it_is_rounded(device: torch.device, generator: torch.Generator) -> None:
    """Of float16, a loss scale finds what would be below its smallest number."""
    x = (normal(generator, 4, 3, 500) * 1e-3).to(device, torch.float16).requires_grad_()
    (gradient,) = torch.autograd.grad(fastkd.channel_moments(x).var.sum() * 2.0**16, x)
    exact = x.detach().cpu().double().requires_grad_()
    (expected,) = torch.autograd.grad(reference.channel_moments(exact)[1].sum() * 2.0**16, exact)
    torch.testing.assert_close(gradient.cpu().double(), expected, rtol=2e-3, atol=1e-7)


def test_no_second_derivative(device: torch.device, generator: torch.Generator) -> None:
    x = normal(generator, 3, 2, 5).to(device).requires_grad_()
    (gradient,) = torch.autograd.grad(fastkd.channel_moments(x).var.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="channel_moments cannot be differentiated again"):
        gradient.square().sum().backward()
    transformed = torch.func.grad(lambda x: fastkd.channel_moments(x).var.sum())(x.detach())
    torch.testing.assert_close(transformed, gradient.detach())
    y = x.detach().requires_grad_()
    assert torch.autograd.gradgradcheck(reference.channel_moments, y)
    with torch.inference_mode():
        kept = normal(generator, 3, 2, 5).to(device)
    assert not fastkd.channel_moments(kept).var.requires_grad
    assert not fastkd.channel_moments(x.detach()).var.requires_grad


@pytest.mark.parametrize("per_sample", [False, True], ids=["batch", "samples"])
def test_opcheck(per_sample: bool, device: torch.device, generator: torch.Generator) -> None:
    contiguous, channels_last = FORMATS[:2]
    for shape, memory_format in (
        ((3, 4, 2, 2), contiguous),
        ((3, 4, 2, 2), channels_last),
        ((3, 4), contiguous),
        ((2, 3, 2, 1, 2), channels_last),
    ):
        x = laid(normal(generator, *shape).to(device, torch.float32), memory_format)
        torch.library.opcheck(torch.ops.fastkd.channel_moments.default, (x.detach().requires_grad_(), per_sample))
        mean, var = fastkd.channel_moments(x, per_sample=per_sample)
        for gradients in ((mean, None), (None, var), (mean, var)) if len(shape) == 4 else ((mean, var),):
            torch.library.opcheck(torch.ops.fastkd.channel_moments_backward.default, (x, mean, *gradients))


@pytest.mark.compiles
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_compile(dynamic: bool | None, generator: torch.Generator) -> None:
    torch._dynamo.reset()

    def loss(x: Tensor) -> Tensor:
        batch, sample = fastkd.channel_moments(x * 2), fastkd.channel_moments(x, per_sample=True)
        return (batch.mean.square() + batch.var).sum() + (sample.var - sample.mean).norm()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for samples in (3, 5):
        for memory_format in FORMATS:
            x = laid(normal(generator, samples, 6, 4, 7).float(), memory_format).requires_grad_()
            (ours,), (expected,) = (torch.autograd.grad(f(x), x) for f in (compiled, loss))
            torch.testing.assert_close(ours, expected)
            assert ours.stride() == expected.stride()


def test_it_is_what_batch_normalisation_measures(generator: torch.Generator) -> None:
    x = normal(generator, 8, 5, 6, 6).float()
    norm = torch.nn.BatchNorm2d(5, momentum=1.0)
    norm(x)
    mean, var = fastkd.channel_moments(x)
    count = x.numel() / 5
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, var * count / (count - 1))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_bits_do_not_depend_on_threads(memory_format: str, cpu: torch.device, generator: torch.Generator) -> None:
    for shape in ((64, 40, 150), (512, 300, 2), (20_000, 24), (2, 3, 140_000)):
        x = laid(normal(generator, *shape).float(), memory_format)
        for per_sample in (False, True):
            ones = torch.ones(shape[:2] if per_sample else shape[1:2])
            results = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append(run(fastkd.channel_moments, x, per_sample, (ones, ones)))
            for other in results[1:]:
                assert all(torch.equal(other[name], value) for name, value in results[0].items())


@pytest.mark.parametrize("memory_format", FORMATS)
def test_bits_do_not_change(
    memory_format: str, device: torch.device, fixed_order: bool, generator: torch.Generator
) -> None:
    """From run to run; and a sample's, per sample, with what is beside it in the batch."""
    for shape in ((5, 6, 130), (9, 24, 7), (70, 33)):
        x = laid(normal(generator, *shape).to(device, torch.float32), memory_format)
        for per_sample in (False, True):
            first, second = (fastkd.channel_moments(x, per_sample=per_sample) for _ in range(2))
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        alone = fastkd.channel_moments(laid(x[2:3], memory_format), per_sample=True)
        for a, b in zip(fastkd.channel_moments(x, per_sample=True), alone, strict=True):
            assert_same(a[2:3], b, torch.float32, fixed_order)


@pytest.fixture
def on_paper() -> object:
    """What the kernels would be launched with, and where."""
    emulated.load()
    return torch.ops.fastkd_emulated


SIZES_ON_PAPER = (1, 3, 4, 49, 64, 1000, 3136, 65_537, 2**24 + 1)


def test_geometry_of_columns(on_paper: object) -> None:
    """Every channel and pixel has a thread; shared memory needs no consent; few channels are cut, many are not."""
    for outer in (1, 64, 5000):
        for channels in (2, 3, 24, 64, 512, 2048, 100_003):
            for pixels in SIZES_ON_PAPER:
                for size in (2, 4, 8):
                    _, piece, pieces, width, height, packs, blocks, threads, shared = on_paper.plan_moments(
                        True, outer, channels, pixels, size, True, 132
                    )
                    units = channels * size // 16 if packs else channels
                    assert packs == (channels * size % 16 == 0)
                    assert (pieces - 1) * piece < pixels <= pieces * piece
                    assert threads - 32 < width * height <= threads <= 256
                    assert threads % 32 == 0
                    assert height <= pixels
                    assert blocks == outer * pieces * -(-units // width)
                    assert shared <= 48 << 10
                    assert pieces == 1 or blocks // pieces < 8 * 132
    assert not on_paper.plan_moments(True, 1, 64, 64, 4, False, 132)[5]
    assert on_paper.plan_moments(True, 1, 64, 2**20, 4, True, 132)[6] >= 8 * 132


def test_geometry_of_rows(on_paper: object) -> None:
    """Short rows share a block, long ones have one or more, whose parts are whole chunks."""
    teams = set()
    for rows in ((1, 1), (128, 64), (1, 500_000)):
        for pixels in SIZES_ON_PAPER:
            for size in (2, 4, 8):
                team, piece, pieces, _, _, _, blocks, threads, _ = on_paper.plan_moments(
                    False, *rows, pixels, size, True, 132
                )
                teams.add(team)
                lanes = (1, 4, 32, threads)[team]
                assert (pieces - 1) * piece < pixels <= pieces * piece
                assert blocks == min(-(-rows[0] * rows[1] * pieces * lanes // threads), 2**31 if team == 3 else 2**16)
                assert pieces == 1 or (team == 3 and piece * size % 2048 == 0 and rows[0] * rows[1] < 8 * 132)
    assert teams == {0, 1, 2, 3}
    assert on_paper.plan_moments(False, 1, 3, 2**26, 4, True, 132)[2] > 300
    with pytest.raises(RuntimeError, match=r"parts of x are .*, must be at most"):
        on_paper.plan_moments(False, 2**20, 2**20, 3000, 4, True, 132)
    with pytest.raises(RuntimeError, match="maps are 4294967296, must be fewer than"):
        on_paper.plan_moments(False, 2**16, 2**16, 30, 4, True, 132)


@fuzz
@given(st.data())
def test_fuzz(device: torch.device, data: st.DataObject) -> None:
    draw = data.draw
    shape = tuple(draw(st.lists(st.sampled_from(SIZES[1:6]), min_size=2, max_size=4)))
    x = draw(tensors(shape, DTYPES, device))
    per_sample = draw(st.booleans())
    result = call(torch.ops.fastkd.channel_moments, x, per_sample)
    valid = x.dtype in DTYPES and 2 <= x.dim() <= 5 and x.numel() > 0
    assert (result is not None) == valid
    if result is None:
        return
    wide = [torch.float64 if x.dtype == torch.float64 else torch.float32]
    results = tuple(x.shape[:2] if per_sample else x.shape[1:2])
    assert all(fits(value, results, wide) for value in result)
    mean, *gradients = (draw(tensors(results, wide, device)) for _ in range(3))
    gradients = [None if draw(st.booleans()) else g for g in gradients]
    gradient = call(torch.ops.fastkd.channel_moments_backward, x, mean, *gradients)
    by_samples = tuple(x.shape[:2] if mean.dim() == 2 else x.shape[1:2])
    assert (gradient is not None) == all(fits(value, by_samples, wide) for value in (mean, *gradients))
    if gradient is not None:
        assert (gradient.shape, gradient.dtype) == (x.shape, x.dtype)


X = torch.zeros(4, 5, 2, 2)
ERRORS: dict[str, tuple[tuple[object, ...], type[Exception], tuple[str, ...]]] = {
    "list": (([1.0], False), TypeError, ("x is list", "tensor")),
    "1-d": ((X[:, 0, 0, 0], False), ValueError, ("x has shape (4,)", "[samples, channels, ...]")),
    "6-d": ((X[..., None, None], False), ValueError, ("x has shape (4, 5, 2, 2, 1, 1)", "up to 3 more dimensions")),
    "no sample": ((X[:0], False), ValueError, ("x has shape (0, 5, 2, 2)", "none of them 0")),
    "no pixel": ((X[..., :0], True), ValueError, ("x has shape (4, 5, 2, 0)", "none of them 0")),
    "integers": ((X.long(), False), TypeError, ("x has dtype torch.int64", "float32, float64")),
    "flag": ((X, "all"), TypeError, ("per_sample is str", "True or False")),
}


@pytest.mark.parametrize("case", ERRORS.values(), ids=ERRORS)
def test_errors(case: tuple[tuple[object, ...], type[Exception], tuple[str, ...]], device: torch.device) -> None:
    (x, per_sample), error, parts = case
    with pytest.raises(error) as caught:
        fastkd.channel_moments(x.to(device) if isinstance(x, Tensor) else x, per_sample=per_sample)
    assert str(caught.value).startswith("fastkd: ")
    assert all(part in str(caught.value) for part in parts)


def test_errors_of_the_operators(device: torch.device) -> None:
    """Past the Python signature: nothing is read beyond a tensor."""
    backward = torch.ops.fastkd.channel_moments_backward
    x = X.to(device)
    mean = torch.zeros(5, device=device)
    for arguments, message in (
        ((x, mean[:4], mean, None), r"mean has shape \(4,\), must be \(5,\)"),
        ((x, mean, mean[:4], None), r"grad_mean has shape \(4,\), must be \(5,\)"),
        ((x, mean, None, mean.double()), "grad_var has dtype float64, must be one of float32"),
        ((x, mean.expand(4, 5), mean, None), r"grad_mean has shape \(5,\), must be \(4, 5\)"),
        ((x[0, 0, 0], mean, mean, None), r"x has shape \(2,\), must be \[samples, channels"),
    ):
        with pytest.raises(RuntimeError, match=f"fastkd: {message}"):
            backward(*arguments)
