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
    """One tall grid for each image, its k patches on top of each other; nearest, the fastest mode."""
    batch, channels, height, width = images.shape
    k = offsets.shape[1]
    span = torch.arange(size)
    y = (2 * (offsets[..., 0, None] + span) + 1) / height - 1
    x = (2 * (offsets[..., 1, None] + span) + 1) / width - 1
    shape = (batch, k, size, size)
    grid = torch.stack([x[:, :, None, :].expand(shape), y[:, :, :, None].expand(shape)], -1).view(batch, -1, size, 2)
    tall = F.grid_sample(images, grid, mode="nearest", align_corners=False)
    return tall.view(batch, channels, k, size, size).transpose(1, 2).reshape(-1, channels, size, size)


def kornia_crop(images: Tensor, offsets: Tensor, size: int) -> Tensor:
    """kornia's random crop of k copies of each image; it draws offsets of its own."""
    from kornia.augmentation import RandomCrop

    return RandomCrop((size, size))(images.repeat_interleave(offsets.shape[1], 0))


def cases() -> Iterator[Case]:
    """256 images of 3x32x32, 8 patches of 8x8 each."""
    images = torch.randn(256, 3, 32, 32, requires_grad=True)
    offsets = torch.randint(0, 25, (256, 8, 2))
    upstream = torch.randn(2048, 3, 8, 8)

    def step(crop):
        crop(images, offsets, 8).backward(upstream)
        gradient, images.grad = images.grad, None  # freed by the harness, outside the clock
        return gradient

    for peer in (gather, grid_sample):
        torch.testing.assert_close(step(peer), step(fastkd.crop_patches), rtol=1e-4, atol=1e-5)
    peers = {"advanced-index gather": gather, "grid_sample, nearest": grid_sample}
    try:
        step(kornia_crop)
        peers["kornia RandomCrop"] = kornia_crop
    except ImportError:
        print("kornia is not installed: left out")
    yield Case(
        "crop 256x3x32x32 k=8 L=8",
        lambda: step(fastkd.crop_patches),
        {name: lambda peer=peer: step(peer) for name, peer in peers.items()},
        dict.fromkeys(peers, 8.0),
        101,
    )
