"""Whatever the operators are called with, they answer or raise; meant to run under the sanitizers too."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

import fastkd  # noqa: F401  registers the operators

pytestmark = pytest.mark.cuda_kernels

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OTHERS = [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64]
SIZES = [0, 1, 2, 3, 15, 16, 17, 33]
NUMBERS = [0.0, 1.0, -1.0, 0.3, 1e-320, 1e-40, 1e40, 1e308, math.nan, math.inf, -math.inf]
INTEGERS = [0, 1, 2, 3, -1, 7, -100, 2**31, 2**62, -(2**63)]
EXTREMES = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-44, -3e38, 3e38, 6e4, 1e4, -1e4]
# valid three times out of four, so that calls get past the first check
RARE = st.integers(0, 3).map(lambda i: i == 0)

fuzz = settings(max_examples=150, suppress_health_check=list(HealthCheck))


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...], dtypes: list[torch.dtype], device: torch.device) -> Tensor:
    """Mostly of this shape and these dtypes; any layout; ordinary or extreme numbers."""
    if draw(RARE) and draw(RARE):
        shape = tuple(draw(st.lists(st.sampled_from(SIZES[:5]), max_size=3)))
    dtype = draw(st.sampled_from(OTHERS + FLOATS if draw(RARE) and draw(RARE) else dtypes))
    layout = draw(st.sampled_from(["packed", "packed", "transposed", "expanded", "sliced", "stepped"]))
    stored = shape
    if layout == "transposed":
        stored = shape[::-1]
    elif layout == "expanded" and shape:
        axis = draw(st.integers(0, len(shape) - 1))
        stored = tuple(1 if i == axis else n for i, n in enumerate(shape))
    elif layout in ("sliced", "stepped"):
        stored = tuple(n + 3 if layout == "sliced" else 2 * n for n in shape)
    values = torch.randn(stored, generator=torch.Generator().manual_seed(draw(st.integers(0, 9))), dtype=torch.float64)
    if draw(RARE):
        flat = values.reshape(-1)
        for _ in range(min(4, flat.numel())):
            flat[draw(st.integers(0, flat.numel() - 1))] = draw(st.sampled_from(EXTREMES))
    if not dtype.is_floating_point and not dtype.is_complex:
        values = values.nan_to_num(0, 0, 0).clamp(-100, 100).abs()
    tensor = values.to(device, dtype)
    if layout == "transposed":
        tensor = tensor.permute(tuple(range(tensor.dim()))[::-1])
    elif layout == "expanded":
        tensor = tensor.expand(shape)
    elif layout == "sliced":
        tensor = tensor[tuple(slice(2, 2 + n) for n in shape)]
    elif layout == "stepped":
        tensor = tensor[(slice(None, None, 2),) * len(shape)]
    return tensor


def call(op: object, *arguments: object) -> object:
    """The result, or None where the operator refused; whether it was right to is for the caller to assert."""
    try:
        return op(*arguments)
    except RuntimeError as error:
        assert str(error).startswith("fastkd: "), error  # noqa: PT017
        return None


def fits(tensor: Tensor | None, shape: tuple[int, ...], dtypes: list[torch.dtype]) -> bool:
    return tensor is None or (tuple(tensor.shape) == shape and tensor.dtype in dtypes)


def are_logits(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and tensor.shape[1] > 0 and tensor.dtype in FLOATS


def is_temperature(value: float) -> bool:
    return 0 < value < math.inf


def number(draw: st.DrawFn, valid: list[float]) -> float:
    return draw(st.sampled_from(NUMBERS if draw(RARE) else valid))


@fuzz
@given(st.data())
def test_divergence(device: torch.device, reads_values: bool, data: st.DataObject) -> None:
    draw = data.draw
    rows, classes = draw(st.sampled_from(SIZES)), draw(st.sampled_from(SIZES[1:]))
    dtype = draw(st.sampled_from(FLOATS))
    student, teacher = (draw(tensors((rows, classes), [dtype], device)) for _ in range(2))
    weight, temperatures = (
        draw(st.none() | tensors((rows,), [torch.float32, torch.float64], device)) for _ in range(2)
    )
    if temperatures is not None and temperatures.is_floating_point() and not draw(RARE):
        temperatures = temperatures.abs() + 0.01
    target = draw(st.none() | tensors((rows,), [torch.int64], device))
    if target is not None and target.dtype == torch.int64 and not draw(RARE):
        target = target % classes
    integers = [draw(st.sampled_from(INTEGERS if draw(RARE) and draw(RARE) else INTEGERS[:4])) for _ in range(2)]
    flags = draw(st.booleans()), draw(st.booleans())
    if draw(st.booleans()) and student.is_floating_point():
        student = student.detach().requires_grad_()
    scales = number(draw, [0.0, 1.0, 0.9]), number(draw, [0.0, 0.1, 1.0])
    temperature, beta = number(draw, [1.0, 0.05, 4.0]), number(draw, [0.0, 0.3, 1.0])
    ignore_index = draw(st.sampled_from(INTEGERS))
    before = student.detach().clone(), teacher.clone()
    result = call(
        torch.ops.fastkd.divergence, student, teacher, target, weight, temperatures, temperature, integers[0], beta,
        *scales, ignore_index, integers[1], *flags,
    )  # fmt: skip
    for old, new in zip(before, (student, teacher), strict=True):
        assert torch.equal(old.nan_to_num(), new.detach().nan_to_num())
    valid = (
        are_logits(student)
        and fits(teacher, tuple(student.shape), [student.dtype])
        and fits(weight, student.shape[:1], [torch.float32, torch.float64])
        and fits(temperatures, student.shape[:1], [torch.float32, torch.float64])
        and fits(target, student.shape[:1], [torch.int64])
        and (temperatures is not None or is_temperature(temperature))
        and 0 <= beta <= 1
        and all(0 <= i <= 3 for i in integers)
    )
    if valid and reads_values and temperatures is not None:
        valid = all(map(is_temperature, temperatures.tolist()))
    if valid and reads_values and target is not None:
        valid = all(0 <= y < student.shape[1] or y == ignore_index for y in target.tolist())
    assert (result is not None) == valid
    if result is None:
        return
    loss, terms, *gradients = result
    rows, classes = student.shape
    shape = (rows,) if integers[1] == 0 else ()
    assert loss.shape == shape
    assert terms.shape == (2, *shape)
    for gradient, wanted in zip(gradients, flags, strict=True):
        assert gradient.shape == ((rows, classes) if wanted else (0,))
        assert gradient.dtype == student.dtype
    if student.requires_grad and rows > 0:
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        assert gradient.shape == student.shape


@fuzz
@given(st.data())
def test_scale(device: torch.device, data: st.DataObject) -> None:
    draw = data.draw
    shape = draw(st.sampled_from(SIZES)), draw(st.sampled_from(SIZES))
    gradient = draw(tensors(shape, FLOATS, device))
    factor = draw(tensors(draw(st.sampled_from([(), shape[:1]])), [torch.float32, torch.float64], device))
    before = gradient.clone()
    try:
        torch.ops.fastkd.divergence_backward_(gradient, factor)
    except RuntimeError as error:
        assert str(error).startswith("fastkd: "), error  # noqa: PT017
        refused = True
    else:
        refused = False
    valid = (
        gradient.dim() == 2
        and gradient.is_contiguous()
        and gradient.dtype in FLOATS
        and factor.dtype in (torch.float32, torch.float64)
        and factor.shape in ((), gradient.shape[:1])
    )
    assert refused != valid
    if refused:
        assert torch.equal(gradient.nan_to_num(), before.nan_to_num())
        return
    rows = factor if factor.dim() == 0 else factor[:, None]
    compute = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    expected = (before.cpu().to(compute) * rows.cpu().to(compute)).to(gradient.dtype)
    torch.testing.assert_close(gradient.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@fuzz
@given(st.data())
def test_logit_stats(device: torch.device, data: st.DataObject) -> None:
    draw = data.draw
    rows, classes = draw(st.sampled_from(SIZES)), draw(st.sampled_from(SIZES[1:]))
    logits = draw(tensors((rows, classes), FLOATS, device))
    temperature = number(draw, [1.0, 0.05, 4.0])
    stats = call(torch.ops.fastkd.logit_stats, logits, temperature)
    kept = torch.float64 if logits.dtype == torch.float64 else torch.float32
    valid = are_logits(logits) and is_temperature(temperature)
    assert (stats is not None) == valid
    if stats is not None:
        assert all(value.shape == logits.shape[:1] for value in stats)
        assert ((stats[1] >= 0) & (stats[1] < logits.shape[1])).all()
    argmax, logsumexp, entropy = (draw(tensors((rows,), [d], device)) for d in (torch.int64, kept, kept))
    if draw(st.booleans()):
        argmax = argmax * draw(st.sampled_from(INTEGERS))
    gradients = [draw(st.none() | tensors((rows,), [kept], device)) for _ in range(4)]
    result = call(torch.ops.fastkd.logit_stats_backward, logits, temperature, argmax, logsumexp, entropy, *gradients)
    per_row = [logsumexp, entropy, *gradients]
    valid = valid and fits(argmax, logits.shape[:1], [torch.int64])
    assert (result is not None) == (valid and all(fits(t, logits.shape[:1], [kept]) for t in per_row))
    if result is not None:
        assert result.shape == logits.shape
        assert result.dtype == logits.dtype
