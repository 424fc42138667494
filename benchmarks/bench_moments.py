"""Mean and variance of each channel, of a batch and of each sample, and their gradient, against torch.var_mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import fastkd
from benchmarks import floors
from benchmarks.case import Case, Contest, Settings, Work, on_threads, relative_error, short_name, thread_counts

Moments = Callable[[Tensor, bool], tuple[Tensor, Tensor]]  # of maps, per sample: mean and variance
Shape = tuple[int, ...]

QUICK: tuple[tuple[Shape, torch.dtype, bool], ...] = (
    ((128, 64, 32, 32), torch.float32, False),
    ((128, 64, 32, 32), torch.float32, True),
    ((128, 256, 8, 8), torch.float32, False),
    ((128, 256, 8, 8), torch.float32, True),
)
FULL: tuple[tuple[Shape, torch.dtype, bool], ...] = (
    ((32, 64, 56, 56), torch.float32, False),
    ((32, 64, 56, 56), torch.float32, True),
    ((128, 64, 32, 32), torch.bfloat16, False),
    ((128, 64, 32, 32), torch.bfloat16, True),
    ((128, 512, 4, 4), torch.float32, False),
    ((128, 512), torch.float32, False),
)
GPU = ((64, 56, 56), (2048, 7, 7), (512, 4, 4))  # and so many samples that only bytes count
TARGET = 1.5
TARGETS = {"torch eager": TARGET}
DIRECTIONS = {"moments": (False, False), "moments of samples": (True, False), "moments and gradient": (False, True)}
COMPILED = "torch.compile"
MOST_COPIES = 10  # of the maps, that a peer, or the truth in float64, takes


def ours(x: Tensor, per_sample: bool) -> tuple[Tensor, Tensor]:
    """fastkd."""
    return fastkd.channel_moments(x, per_sample=per_sample)


def var_mean(x: Tensor, per_sample: bool) -> tuple[Tensor, Tensor]:
    """torch, in float32 or better as batch normalisation's statistics are."""
    dims = tuple(d for d in range(x.dim()) if d > 1 or (d == 0 and not per_sample))
    var, mean = torch.var_mean(x.float() if x.dtype.itemsize == 2 else x, dims, correction=0)
    return mean, var


def cases(settings: Settings) -> Iterator[Case]:
    """Three directions of each of the maps."""
    if settings.sizes == "gpu":
        maps = [
            ((settings.rows(torch.Size(shape).numel(), dtype), *shape), dtype, channels_last)
            for shape in GPU
            for dtype in (torch.float32, torch.bfloat16)
            for channels_last in (False, True)
        ]
    else:
        maps = settings.pick(QUICK, FULL)
    for shape, dtype, channels_last in maps:
        for direction in DIRECTIONS:
            if len(shape) > 2 or direction != "moments of samples":  # of one number each
                yield _case(settings, shape, dtype, channels_last, direction)
    if settings.sizes == "full":
        yield from on_threads(_case(settings, *QUICK[0], "moments and gradient"), thread_counts())


def _case(settings: Settings, shape: Shape, dtype: torch.dtype, channels_last: bool, direction: str) -> Case:
    per_sample, gradient = DIRECTIONS[direction]

    def build() -> Work:
        # another mean and deviation in each channel, as maps before batch normalisation have
        scale = torch.rand(shape[1], device=settings.device).add(0.5).view(-1, *(1,) * (len(shape) - 2))
        x = (torch.randn(shape, device=settings.device) * scale + 3 * scale).to(dtype)
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        upstream = tuple(torch.randn(shape[1], device=settings.device) for _ in range(2))

        def step(moments: Moments, maps: Tensor) -> tuple[Tensor, ...]:
            if not gradient:
                return moments(maps, per_sample)
            maps = maps.detach().requires_grad_()
            results = moments(maps, per_sample)
            gradients = torch.autograd.grad(results, maps, tuple(g.to(results[0]) for g in upstream))
            return (*(value.detach() for value in results), *gradients)

        truth = tuple(value.to(torch.float32) for value in step(var_mean, x.double()))
        peers = {"torch eager": var_mean}
        if settings.compile:
            torch._dynamo.reset()  # each shape by itself: a recompilation would be for any shape, and slower
            peers[COMPILED] = torch.compile(var_mean, dynamic=False)
        return Work(
            lambda: step(ours, x),
            {peer: lambda moments=moments: step(moments, x) for peer, moments in peers.items()},
            lambda result: max(relative_error(value, right) for value, right in zip(result, truth, strict=True)),
            1e-2 if gradient and dtype.itemsize == 2 else 1e-6,
            1e-2,
            floor_bytes=floors.channel_moments(shape[0], x[0].numel(), dtype.itemsize, gradient=gradient),
            targets=TARGETS if gradient and settings.device.type == "cpu" else {},
        )

    elements = torch.Size(shape).numel()
    name = f"{direction} {'x'.join(map(str, shape))}{' channels-last' if channels_last else ''} {short_name(dtype)}"
    return Case(name, build, MOST_COPIES * 4 * elements)


def test_moments(case: Case, contest: Contest) -> None:
    """Each case."""
    contest(case)
