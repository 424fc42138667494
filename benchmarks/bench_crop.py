"""Random patches, forward and backward, against the ways to write them in torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import fastkd
from benchmarks.harness import Case


def gather(images: Tensor, offsets: Tensor, size: int) -> Tensor:
    """Advanced indexing with the index of every pixel."""
    span = torch.arange(size)
    y, x = (offsets[..., 0, None] + span)[..., :, None], (offsets[..., 1, None] + span)[..., None, :]
    batch = torch.arange(images.shape[0])[:, None, None, None]
    return images.permute(0, 2, 3, 1)[batch, y, x].permute(0, 1, 4, 2, 3).flatten(0, 1)


def grid_sample(images: Tensor, offsets: Tensor, size: int) -> Tensor:
    """Each image repeated k times, a sampling grid for each patch."""
    height, width = images.shape[2:]
    k = offsets.shape[1]
    span = torch.arange(size)
    y = (2 * (offsets[..., 0].flatten()[:, None] + span) + 1) / height - 1
    x = (2 * (offsets[..., 1].flatten()[:, None] + span) + 1) / width - 1
    grid = torch.stack([x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], -1)
    return F.grid_sample(images.repeat_interleave(k, 0), grid, mode="nearest", align_corners=False)


def cases() -> Iterator[Case]:
    """256 images of 3x32x32, 8 patches of 8x8 each."""
    images = torch.randn(256, 3, 32, 32, requires_grad=True)
    offsets = torch.randint(0, 25, (256, 8, 2))
    upstream = torch.randn(2048, 3, 8, 8)

    def step(crop):
        images.grad = None
        crop(images, offsets, 8).backward(upstream)
        return images.grad

    for peer in (gather, grid_sample):
        torch.testing.assert_close(step(peer), step(fastkd.crop_patches), rtol=1e-4, atol=1e-5)
    yield Case(
        "crop 256x3x32x32 k=8 L=8",
        lambda: step(fastkd.crop_patches),
        {"advanced-index gather": lambda: step(gather), "grid_sample": lambda: step(grid_sample)},
        {"advanced-index gather": 8.0, "grid_sample": 8.0},
        101,
    )
