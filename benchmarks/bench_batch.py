"""Training batches from an alias table in one step, against drawing, indexing and augmenting one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import fastkd
from benchmarks import floors
from benchmarks.bench_alias import MULTINOMIAL_ITEMS
from benchmarks.bench_crop import MEAN, STD, augmentation_error, eager_augmentation
from benchmarks.case import Case, Contest, Settings, Work, short_name

PADDING = 4


class Collection(NamedTuple):
    """Images uint8 ``[N, 3, H, W]``, and what it takes to draw from them."""

    images: Tensor
    table: fastkd.AliasTable
    weights: Tensor


Drawn = tuple[Tensor, Tensor]  # augmented images, their indices in the collection
Draw = Callable[[Collection, int, torch.dtype], Drawn]


def one_step(of: Collection, n: int, dtype: torch.dtype) -> Drawn:
    """By fastkd."""
    return fastkd.draw_batch(of.table, of.images, n, padding=PADDING, mean=MEAN, std=STD, dtype=dtype)


def two_steps(of: Collection, n: int, dtype: torch.dtype) -> Drawn:
    """fastkd's own parts, one after the other."""
    indices = of.table.sample(n)
    return fastkd.random_crop_flip(of.images[indices], PADDING, mean=MEAN, std=STD, dtype=dtype), indices


def eager(of: Collection, n: int, dtype: torch.dtype) -> Drawn:
    """In plain torch."""
    indices = torch.multinomial(of.weights, n, replacement=True)
    offsets = torch.randint(-PADDING, PADDING + 1, (n, 2), device=indices.device)
    flip = torch.rand(n, device=indices.device) < 0.5
    return eager_augmentation(of.images[indices], offsets, flip, PADDING, dtype), indices


OWN = "sample, index, random_crop_flip"
PEERS: dict[str, Draw] = {OWN: two_steps, "multinomial, gather, flip, normalise": eager}
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
        weights = torch.rand(min(items, MULTINOMIAL_ITEMS), device=settings.device)
        collection = Collection(images, table, weights)

        def error(drawn: Drawn) -> float:
            views, indices = drawn
            return augmentation_error(views, images[indices[: len(views)].to(images.device)], PADDING)

        offsets = torch.randint(-PADDING, PADDING + 1, (n, 1, 2), device=settings.device)
        covered = floors.covered_pixels(offsets, (side, side), (side, side))
        rounding = 1e-6 if dtype == torch.float32 else 1e-2
        return Work(
            lambda: one_step(collection, n, dtype),
            {peer: lambda draw=draw: draw(collection, n, dtype) for peer, draw in PEERS.items()},
            error,
            rounding,
            rounding,
            floor_bytes=floors.draw_batch(n, covered, 3, (side, side), dtype.itemsize),
            own=(OWN,),
        )

    nbytes = items * 3 * side * side + 40 * n * 3 * side * side
    return Case(f"draw_batch {n}x3x{side}x{side} of {items}, uint8 to {short_name(dtype)}", build, nbytes)


def test_batch(case: Case, contest: Contest) -> None:
    """Each case."""
    contest(case)
