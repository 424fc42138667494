"""More than 2^31 elements: rows and images beyond that place equal the same rows and images alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cuda_cases import assert_identical, needs_cuda
from torch import Tensor

import fastkd
from fastkd import functional as F  # noqa: N812
from fastkd.ops.alias import Table

pytestmark = needs_cuda

DEVICE = "cuda"
ROWS, CLASSES = 17000, 128257  # 2.18e9


@pytest.fixture(autouse=True)
def _own_memory() -> Iterator[None]:
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()


def need(gigabytes: int) -> None:
    """Skips where the GPU has less memory free."""
    free = torch.cuda.mem_get_info()[0]
    if free < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory, there are {free / 1e9:.0f}")


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Each row in norm: few rows may be split over the chip in another way, and sum in another order."""
    rows, truth = (x.double().reshape(len(x), -1) for x in (actual, expected))
    assert bool(((rows - truth).norm(dim=1) <= tolerance * truth.norm(dim=1)).all())


def logits() -> Tensor:
    return torch.randn(ROWS, CLASSES, device=DEVICE, dtype=torch.bfloat16)


def some_rows() -> Tensor:
    """The first, those around element 2^31, the last."""
    middle = 2**31 // CLASSES
    return torch.tensor([0, 1, *range(middle - 2, middle + 3), ROWS - 2, ROWS - 1], device=DEVICE)


@pytest.mark.parametrize("function", [F.kl_div, F.js_div], ids=["kl_div", "js_div"])
def test_loss_and_gradient(function: object) -> None:
    need(22)
    rows = some_rows()
    student, teacher = logits().requires_grad_(), logits()

    def loss_and_gradient(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        loss = function(s, t, reduction="none")  # type: ignore[operator]
        return loss.detach(), torch.autograd.grad(loss.sum(), s)[0]

    loss, gradient = loss_and_gradient(student, teacher)
    alone = loss_and_gradient(student.detach()[rows].requires_grad_(), teacher[rows])
    assert_close(loss[rows], alone[0], 1e-5)
    assert_close(gradient[rows], alone[1], 1e-2)
    assert bool(loss.isfinite().all())


def test_logit_stats() -> None:
    need(18)
    rows = some_rows()
    whole = logits().requires_grad_()

    def stats_and_gradient(z: Tensor) -> tuple[Tensor, ...]:
        stats = F.logit_stats(z)
        return *(s.detach() for s in stats), torch.autograd.grad(stats.entropy.sum() + stats.mean.sum(), z)[0]

    found = stats_and_gradient(whole)
    for ours, alone in zip(found, stats_and_gradient(whole.detach()[rows].requires_grad_()), strict=True):
        assert_close(ours[rows], alone, 1e-2 if alone.dtype == torch.bfloat16 else 1e-5)


def test_crop_of_large_images() -> None:
    """2.18e9 bytes in; their gradient as bfloat16 out."""
    need(16)
    batch, side, size = 14500, 224, 32
    generator = torch.Generator(DEVICE).manual_seed(0)
    images = torch.randint(256, (batch, 3, side, side), dtype=torch.uint8, device=DEVICE, generator=generator)
    image_size = images[0].numel()
    assert images.numel() > 2**31
    offsets = torch.randint(side - size + 1, (batch, 1, 2), device=DEVICE, generator=generator)
    last = slice(2**31 // image_size - 1, None)
    patches = fastkd.crop_patches(images, offsets, size)
    assert_identical((patches[last],), (fastkd.crop_patches(images[last].clone(), offsets[last], size),))
    floats = images.to(torch.bfloat16)
    del images
    floats.requires_grad_()
    cut = fastkd.crop_patches(floats, offsets, size)
    (gradient,) = torch.autograd.grad(cut, floats, cut.detach())
    for b in (0, 2**31 // image_size, batch - 1):
        y, x = offsets[b, 0].tolist()
        expected = torch.zeros_like(gradient[b])
        expected[:, y : y + size, x : x + size] = floats.detach()[b, :, y : y + size, x : x + size]
        assert_identical((gradient[b],), (expected,))


def test_many_patches() -> None:
    """2.2e9 bytes out."""
    need(6)
    batch, k, side, size = 2, 1600, 512, 480
    generator = torch.Generator(DEVICE).manual_seed(0)
    images = torch.randint(256, (batch, 3, side, side), dtype=torch.uint8, device=DEVICE, generator=generator)
    offsets = torch.randint(side - size + 1, (batch, k, 2), device=DEVICE, generator=generator)
    patches = fastkd.crop_patches(images, offsets, size)
    assert patches.numel() > 2**31
    for j in (0, 2**31 // patches[0].numel(), batch * k - 1):
        y, x = offsets.view(-1, 2)[j].tolist()
        assert_identical((patches[j],), (images[j // k, :, y : y + size, x : x + size],))


def table_of_the_last_block(items: int, device: str) -> fastkd.AliasTable:
    """Draws the last 4096 items, each as often as the others; whole blocks, and made where it is, being 17 GB."""
    blocks = items // 4096
    bins = torch.arange(items, device=device).remainder_(4096).add_(4096 << 12)
    block_weight = torch.full((blocks,), 4096, device=device)
    top = torch.tensor([0, blocks - 1], device=device).repeat(blocks, 1)
    table = fastkd.AliasTable(torch.zeros(1), 1.0, seed=1).to(device)
    scale = torch.tensor([0.0, 1.0, 0.0, float(items)], dtype=torch.float64, device=device)
    table._table = Table(bins, block_weight, top, scale)
    return table


def check_batches(items: int, side: int, n: int, device: str) -> None:
    table = table_of_the_last_block(items, device)
    images = torch.randint(256, (items, 3 if side > 1 else 1, side, side), dtype=torch.uint8, device=device)
    seeds = [torch.Generator(device).manual_seed(2) for _ in range(2)]
    batch, indices = fastkd.draw_batch(table, images, n, dtype=torch.bfloat16, generator=seeds[0])
    assert int(indices.min()) >= items - 4096
    assert_identical((indices,), (table.sample(n, seeds[1]),))
    expected = fastkd.random_crop_flip(images[indices], dtype=torch.bfloat16, generator=seeds[1])
    assert torch.equal(batch, expected)


@pytest.mark.parametrize(
    ("items", "side", "n"),
    [(200 * 4096, 32, 1000), (4096, 32, 720_000), (2**31 + 4096, 1, 100_000)],
    ids=["collection", "batch", "items"],
)
def test_batches(items: int, side: int, n: int) -> None:
    """2.5e9 bytes of images; 2.2e9 elements of the batch; more than 2^31 items."""
    need(30)
    check_batches(items, side, n, DEVICE)
