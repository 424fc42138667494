"""Plain forms of crop: the truth of the tests, and two forms that people use, which give the same patches inside the image.

Patch ``j`` of image ``b`` is ``out[b * k + j]`` in all of them; offsets are (y, x) of the top left corner.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def crop(images: Tensor, offsets: Tensor, size: tuple[int, int], flip: Tensor | None = None) -> Tensor:
    """By slicing, patch by patch; zeros outside the image. Differentiable any number of times."""
    (height, width), (batch, channels, image_height, image_width) = size, images.shape
    patches = []
    for b in range(batch):
        for j, (y, x) in enumerate(offsets[b].tolist()):
            top, bottom = min(max(y, 0), image_height), min(max(y + height, 0), image_height)
            left, right = min(max(x, 0), image_width), min(max(x + width, 0), image_width)
            patch = images[b, :, top:bottom, left:right]
            if patch.numel() == 0:
                patch = images.new_zeros(channels, height, width)
            elif patch.shape[1:] != size:
                patch = F.pad(patch, (left - x, x + width - right, top - y, y + height - bottom))
            patches.append(patch.flip(-1) if flip is not None and flip[b, j] else patch)
    return torch.stack(patches) if patches else images.new_zeros(0, channels, height, width)


def normalise(
    images: Tensor, mean: float | Sequence[float] | None, std: float | Sequence[float] | None, dtype: torch.dtype
) -> Tensor:
    """``(x - mean) / std`` as torchvision has it: uint8 is divided by 255, then every step is done in dtype."""
    x = images.to(dtype) / 255 if images.dtype == torch.uint8 else images.to(dtype)
    if mean is not None:
        x = x - torch.as_tensor(mean, dtype=dtype).reshape(-1, 1, 1)
    return x if std is None else x / torch.as_tensor(std, dtype=dtype).reshape(-1, 1, 1)


def crop_by_index(images: Tensor, offsets: Tensor, size: tuple[int, int]) -> Tensor:
    """By advanced indexing: one gather, whose backward is an accumulating scatter. Patches lie inside the image."""
    batch, patches, _ = offsets.shape
    rows = offsets[..., 0].reshape(-1, 1, 1, 1) + torch.arange(size[0])[:, None]
    columns = offsets[..., 1].reshape(-1, 1, 1, 1) + torch.arange(size[1])
    b = torch.arange(batch).repeat_interleave(patches).reshape(-1, 1, 1, 1)
    return images[b, torch.arange(images.shape[1]).reshape(-1, 1, 1), rows, columns]


def crop_by_grid_sample(images: Tensor, offsets: Tensor, size: tuple[int, int]) -> Tensor:
    """By ``grid_sample`` at pixel centres, all patches of an image in one tall grid. Floats only."""
    (height, width), (batch, channels, image_height, image_width) = size, images.shape
    patches = offsets.shape[1]
    y = (2 * (offsets[..., 0, None] + torch.arange(height)) + 1) / image_height - 1  # [B, k, h]
    x = (2 * (offsets[..., 1, None] + torch.arange(width)) + 1) / image_width - 1  # [B, k, w]
    shape = (batch, patches, height, width)
    grid = torch.stack([x[:, :, None].expand(shape), y[..., None].expand(shape)], -1).to(images.dtype)
    grid = grid.reshape(batch, patches * height, width, 2)
    out = F.grid_sample(images, grid, mode="nearest", align_corners=False)
    return out.reshape(batch, channels, patches, height, width).transpose(1, 2).reshape(-1, channels, height, width)


def philox(seed: int, stream: int, index: int) -> list[int]:
    """Philox4x32-10 (Salmon et al., SC 2011): key = seed, counter = (index, stream, 0). Four 32-bit words."""
    mask = 0xFFFFFFFF
    c = [index & mask, index >> 32 & mask, stream, 0]
    key = [seed & mask, seed >> 32 & mask]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ key[0], b & mask, (a >> 32) ^ c[3] ^ key[1], a & mask]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return c


def crop_offsets(
    seed: int,
    batch: int,
    patches: int,
    y_range: tuple[int, int],
    x_range: tuple[int, int],
    flip_probability: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Places from Python's integers; arguments as in :func:`fastkd.ops.crop.crop_offsets`."""
    offsets, flip = [], []
    for index in range(batch * patches):
        w = philox(seed, 2, index)
        y, x = w[0] << 16 | w[3] >> 16, w[1] << 16 | w[3] & 0xFFFF  # 48 bits each
        offsets.append([y_range[0] + (y * y_range[1] >> 48), x_range[0] + (x * x_range[1] >> 48)])
        flip.append(w[2] < int(flip_probability * 2**32))
    return (
        torch.tensor(offsets, dtype=torch.int64).reshape(batch, patches, 2),
        torch.tensor(flip, dtype=torch.bool).reshape(batch, patches),
    )
