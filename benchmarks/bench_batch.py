"""Training batches from an alias table in one step, against drawing, indexing and augmenting one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import fastkd
from benchmarks import floors
from benchmarks.bench_crop import MEAN, STD, eager_augmentation
from benchmarks.case import Case, Contest, Settings, Work, relative_error, short_name

PADDING = 4
Draw = Callable[[fastkd.AliasTable, Tensor, int, torch.dtype], Tensor]


def two_steps(
    table: fastkd.AliasTable,
    images: Tensor,
    n: int,
    dtype: torch.dtype,
    generator: torch.Generator | None = None,
) -> Tensor:
    """fastkd's own parts, one after the other."""
    drawn = images[table.sample(n, generator)]
    return fastkd.random_crop_flip(drawn, PADDING, mean=MEAN, std=STD, dtype=dtype, generator=generator)


def eager(table: fastkd.AliasTable, images: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """In plain torch; every item is as probable as the others, which costs multinomial the same."""
    drawn = images[torch.multinomial(torch.ones(len(images), device=images.device), n, replacement=True)]
    offsets = torch.randint(-PADDING, PADDING + 1, (n, 2), device=images.device)
    flip = torch.rand(n, device=images.device) < 0.5
    return eager_augmentation(drawn, offsets, flip, PADDING, dtype)


PEERS: dict[str, Draw] = {
    "sample, index, random_crop_flip": two_steps,
    "multinomial, gather, flip, normalise": eager,
}
ITEMS = 50_000  # of a collection on a CPU
QUICK = ((32, 256),)  # side of the images, batch
FULL = ((32, 2048), (96, 256))
GPU = (
    (32, 512),
    (32, None),
    (224, 256),
)  # a batch of the vision papers, one so large that only bytes count, large images


def cases(settings: Settings) -> Iterator[Case]:
    """uint8 to normalised floats."""
    for side, batch in settings.pick(QUICK, FULL, GPU):
        items = settings.rows(3 * side * side, torch.uint8) if settings.sizes == "gpu" else ITEMS
        for dtype in settings.pick([torch.float32], gpu=[torch.float32, torch.bfloat16]):
            yield _draws(settings, items, side, batch, dtype)


def _draws(settings: Settings, items: int, side: int, batch: int | None, dtype: torch.dtype) -> Case:
    n = min(settings.rows(3 * side * side, dtype), batch or items)

    def build() -> Work:
        images = torch.randint(256, (items, 3, side, side), dtype=torch.uint8, device=settings.device)
        table = fastkd.AliasTable(torch.randn(items), iqpr=5.0, seed=0).to(settings.device)

        def ours(generator: torch.Generator | None = None) -> Tensor:
            return fastkd.draw_batch(table, images, n, mean=MEAN, std=STD, dtype=dtype, generator=generator)[0]

        # what is drawn differs from call to call: that both make the same of the same seed is checked apart
        seeds = [torch.Generator(settings.device).manual_seed(1) for _ in range(2)]
        error = relative_error(ours(seeds[0]), two_steps(table, images, n, dtype, seeds[1]))
        offsets = torch.randint(-PADDING, PADDING + 1, (n, 1, 2), device=settings.device)
        covered = floors.covered_pixels(offsets, (side, side), (side, side))
        return Work(
            ours,
            {peer: lambda draw=draw: draw(table, images, n, dtype) for peer, draw in PEERS.items()},
            lambda result: error if result.isfinite().all() else float("nan"),
            0.0,
            0.0,
            floor_bytes=floors.draw_batch(n, covered, 3, (side, side), dtype.itemsize),
        )

    nbytes = items * 3 * side * side + 40 * n * 3 * side * side
    return Case(f"draw_batch {n}x3x{side}x{side} of {items}, uint8 to {short_name(dtype)}", build, nbytes)


def test_batch(case: Case, contest: Contest) -> None:
    """Each case."""
    contest(case)
