"""What every CUDA kernel promises: the caller's stream and device, no waiting, few launches, no memory but its outputs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from cuda_cases import (
    DETERMINED,
    Case,
    assert_identical,
    needs_cuda,
    parametrized,
    parametrized_determined,
    run_all,
)
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import fastkd
from fastkd import functional as F  # noqa: N812

pytestmark = needs_cuda

DEVICE = "cuda"
DELAY = 100_000_000  # cycles, about 50 ms: whoever does not wait comes too early


@parametrized
def test_nothing_waits_for_the_device(case: Case) -> None:
    inputs = case.inputs(DEVICE)
    case(*inputs)  # what is loaded once may wait
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        case(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@parametrized
def test_the_host_runs_ahead(case: Case) -> None:
    """A wait inside a kernel's launcher, which torch's debug mode does not see."""
    inputs = case.inputs(DEVICE)
    case(*inputs)
    torch.cuda.synchronize()
    torch.cuda._sleep(4 * DELAY)
    slept = torch.cuda.Event()
    slept.record()
    case(*inputs)
    assert not slept.query(), "the call returned only after all earlier work of the device was done"
    torch.cuda.synchronize()


@parametrized_determined
def test_bits_do_not_change(case: Case) -> None:
    inputs = case.inputs(DEVICE)
    assert_identical(case(*inputs), case(*inputs))


@parametrized_determined
def test_current_stream_is_used(case: Case) -> None:
    fresh = case.inputs(DEVICE, seed=1)
    expected = case(*fresh)
    late = tuple(torch.zeros_like(value) for value in fresh)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(DELAY)
        for buffer, value in zip(late, fresh, strict=True):
            buffer.copy_(value)
        results = case(*late)
    torch.cuda.current_stream().wait_stream(stream)
    assert_identical(results, expected)


def test_two_streams_at_once() -> None:
    """Workspace that calls share would be written by both."""
    streams = [torch.cuda.Stream() for _ in range(2)]
    inputs = [[case.inputs(DEVICE, seed) for case in DETERMINED] for seed in (1, 2)]
    expected = [[case(*given) for case, given in zip(DETERMINED, side, strict=True)] for side in inputs]
    torch.cuda.synchronize()
    for _ in range(3):
        results: list[list[tuple[Tensor, ...]]] = [[], []]
        for stream in streams:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(DELAY)  # both queues fill up, then run side by side
        for i, case in enumerate(DETERMINED):
            for stream, side, found in zip(streams, inputs, results, strict=True):
                with torch.cuda.stream(stream):
                    found.append(case(*side[i]))
        torch.cuda.synchronize()
        for found, wanted in zip(results, expected, strict=True):
            for actual, correct in zip(found, wanted, strict=True):
                assert_identical(actual, correct)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU, or none")
@parametrized_determined
def test_device_of_the_tensors_is_used(case: Case) -> None:
    assert torch.cuda.current_device() == 0
    results = case(*case.inputs("cuda:1"))
    assert all(value.device == torch.device("cuda:1") for value in results)
    assert torch.cuda.current_device() == 0
    assert_identical(results, case(*case.inputs("cuda:0")))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU, or none")
@parametrized
def test_every_call_on_the_second_device(case: Case) -> None:
    assert all(value.device == torch.device("cuda:1") for value in case(*case.inputs("cuda:1")))


def launches(trace: profile) -> list[str]:
    """Kernels, copies and fills that the device ran."""
    return [event.name for event in trace.events() or [] if event.device_type == DeviceType.CUDA]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("upstream", [1.0, 3.0])
def test_small_loss_is_one_launch_each_way(dtype: torch.dtype, upstream: float) -> None:
    student, teacher = (torch.randn(256, 100, device=DEVICE, dtype=dtype) for _ in range(2))
    student.requires_grad_()
    incoming = torch.full((), upstream, device=DEVICE)

    def forward() -> Tensor:
        return F.kl_div(student, teacher, 4.0)

    def backward(loss: Tensor) -> None:
        torch.autograd.grad(loss, student, incoming)

    backward(forward())
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        loss = forward()
        torch.cuda.synchronize()
    assert len(launches(trace)) == 1, launches(trace)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        backward(loss)
        torch.cuda.synchronize()
    assert len(launches(trace)) <= 1, launches(trace)


def test_a_batch_is_one_launch() -> None:
    """Draw, gather, crop, flip and normalisation."""
    case = next(case for case in DETERMINED if case.name.startswith("draw_batch"))
    inputs = case.inputs(DEVICE)
    case(*inputs)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        case(*inputs)
        torch.cuda.synchronize()
    assert len(launches(trace)) == 1, launches(trace)


@pytest.mark.parametrize("shape", [(1024,), (50_000,), (5000, 64)], ids=str)
def test_selection_is_one_launch(shape: tuple[int, ...]) -> None:
    losses = torch.rand(shape, device=DEVICE)
    fastkd.select_clean(losses)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        fastkd.select_clean(losses)
        torch.cuda.synchronize()
    assert len(launches(trace)) == 1, launches(trace)


SLACK = 4 << 20  # bytes: workspace, and what the allocator rounds up to

_LARGE = {
    "kl_div": lambda s, t: _loss_and_gradient(F.kl_div(s, t), s),
    "js_div": lambda s, t: _loss_and_gradient(F.js_div(s, t), s),
    "kd_loss": lambda s, t: _loss_and_gradient(F.kd_loss(s, t, torch.zeros_like(s[:, 0], dtype=torch.int64)), s),
    "logit_stats": lambda s, _: _loss_and_gradient(F.logit_stats(s).entropy.sum(), s),
}


def _loss_and_gradient(loss: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    return loss, torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("classes", [1000, 32000, 128256])
@pytest.mark.parametrize("name", _LARGE)
def test_no_memory_but_the_outputs(name: str, classes: int) -> None:
    rows = (64 << 20) // (2 * classes)
    student, teacher = (torch.randn(rows, classes, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    student.requires_grad_()
    _LARGE[name](student, teacher)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = _LARGE[name](student, teacher)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= sum(value.nbytes for value in results) + SLACK


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_no_memory_but_the_patches(backward: bool) -> None:
    images = torch.randn(1024, 3, 64, 64, device=DEVICE, requires_grad=backward)
    offsets = torch.randint(33, (1024, 4, 2), device=DEVICE)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    patches = fastkd.crop_patches(images, offsets, 32)
    results = [patches]
    if backward:
        results += torch.autograd.grad(patches, images, patches.detach())
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= sum(value.nbytes for value in results) + SLACK


_BROKEN_DEVICE = """
import sys, torch
from fastkd import functional as F
s, t = (torch.randn(8, 100, device="cuda") for _ in range(2))
F.kl_div(s, t)
try:
    torch.zeros(2, device="cuda")[torch.tensor([99], device="cuda")]  # an assertion of the device: it is lost
    torch.cuda.synchronize()
except RuntimeError:
    pass
for call in (lambda: F.kl_div(s, t), lambda: F.logit_stats(s)):
    try:
        call()
    except RuntimeError as error:
        print("raised", str(error).splitlines()[0])
sys.stdout.flush()
import os; os._exit(0)  # no destructor of a lost device
"""


def test_a_failed_launch_is_an_exception() -> None:
    found = subprocess.run([sys.executable, "-c", _BROKEN_DEVICE], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.count("raised") == 2, found.stdout + found.stderr[-2000:]


def test_cases_cover_every_operator() -> None:
    """An operator with a CUDA kernel that no case calls would go unchecked."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        run_all(torch.device(DEVICE))
    called = {
        event.name.removeprefix("fastkd::") for event in trace.events() or [] if event.name.startswith("fastkd::")
    }
    operators = {name for name in fastkd.build_info()["cuda_operators"] if not name.startswith("alias_")}
    assert operators <= called
