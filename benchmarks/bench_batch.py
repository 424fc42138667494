"""Training batches from an alias table in one step, against drawing, indexing and augmenting one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import fastkd
from benchmarks import floors
from benchmarks.bench_crop import MEAN, STD, eager_augmentation
from benchmarks.gpu import Contenders, LazyCase, Settings, relative_error, short_name
from benchmarks.harness import Case

PADDING = 4
TWO_STEPS = "sample, index, random_crop_flip"
EAGER = "multinomial, index, pad, gather, flip, normalise"


def _collection(items: int, side: int, device: torch.device) -> tuple[fastkd.AliasTable, Tensor]:
    """Tables of this size are built on the CPU in a moment."""
    images = torch.randint(256, (items, 3, side, side), dtype=torch.uint8, device=device)
    return fastkd.AliasTable(torch.randn(items), iqpr=5.0, seed=0).to(device), images


def _two_steps(
    table: fastkd.AliasTable,
    images: Tensor,
    n: int,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> Tensor:
    drawn = images[table.sample(n, generator)]
    return fastkd.random_crop_flip(drawn, PADDING, mean=MEAN, std=STD, dtype=dtype, generator=generator)


def cases() -> Iterator[Case]:
    """256 of 50,000 images of 3x32x32, on the CPU."""
    table, images = _collection(50_000, 32, torch.device("cpu"))
    yield Case(
        "draw_batch 256x3x32x32 of 50000, uint8 to fp32",
        lambda: fastkd.draw_batch(table, images, 256, mean=MEAN, std=STD),
        {TWO_STEPS: lambda: _two_steps(table, images, 256)},
        {},
        51,
    )


def gpu_cases(settings: Settings) -> Iterator[LazyCase]:
    """A batch of the vision papers, then one so large that only bytes count; small images and large ones."""
    for side, batch in ((32, 512), (32, None), (224, 256)):
        for dtype in (torch.float32, torch.bfloat16):
            yield _draws(settings, side, batch, dtype)


def _draws(settings: Settings, side: int, batch: int | None, dtype: torch.dtype) -> LazyCase:
    items = settings.rows(3 * side * side, torch.uint8)
    n = min(settings.rows(3 * side * side, dtype), batch or items)
    name = f"draw_batch {n}x3x{side}x{side} of {items}, uint8 to {short_name(dtype)}"

    def build() -> Case:
        device = settings.device
        table, images = _collection(items, side, device)

        def ours(generator: torch.Generator | None = None) -> Tensor:
            return fastkd.draw_batch(table, images, n, mean=MEAN, std=STD, dtype=dtype, generator=generator)[0]

        # what is drawn differs from call to call: that both make the same of the same seed is checked apart
        seeds = [torch.Generator(device).manual_seed(1) for _ in range(2)]
        error = relative_error(ours(seeds[0]), _two_steps(table, images, n, dtype, seeds[1]))
        contenders = Contenders(
            ours,
            {TWO_STEPS: lambda: _two_steps(table, images, n, dtype), EAGER: _eager(images, n, dtype)},
            lambda result: error if result.isfinite().all() else float("nan"),
            0.0,
            0.0,
        )
        offsets = torch.randint(-PADDING, PADDING + 1, (n, 1, 2), device=device)
        covered = floors.covered_pixels(offsets, (side, side), (side, side))
        floor = floors.draw_batch(n, covered, 3, (side, side), dtype.itemsize)
        return contenders.case(name, settings, rounds=31, floor_bytes=floor)

    return LazyCase(name, build)


def _eager(images: Tensor, n: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    """In plain torch; every item is as probable as the others, which costs multinomial the same."""
    weights = torch.ones(len(images), device=images.device)

    def call() -> Tensor:
        drawn = images[torch.multinomial(weights, n, replacement=True)]
        offsets = torch.randint(-PADDING, PADDING + 1, (n, 2), device=images.device)
        flip = torch.rand(n, device=images.device) < 0.5
        return eager_augmentation(drawn, offsets, flip, PADDING, dtype)

    return call
