"""Random patches, forward and backward, against the ways to write them in torch; GPU augmentation of uint8 images."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import fastkd
from benchmarks import floors
from benchmarks.gpu import Contenders, LazyCase, Settings, first_line, relative_error, short_name
from benchmarks.harness import Case
from fastkd.ops import crop as ops

Crop = Callable[[Tensor, Tensor, int], Tensor]

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)  # of CIFAR-10


def gather(images: Tensor, offsets: Tensor, size: int) -> Tensor:
    """Advanced indexing with the index of every pixel."""
    span = torch.arange(size, device=images.device)
    y, x = (offsets[..., 0, None] + span)[..., :, None], (offsets[..., 1, None] + span)[..., None, :]
    batch = torch.arange(images.shape[0], device=images.device)[:, None, None, None]
    return images.permute(0, 2, 3, 1)[batch, y, x].permute(0, 1, 4, 2, 3).flatten(0, 1)


def grid_sample(images: Tensor, offsets: Tensor, size: int) -> Tensor:
    """One tall grid for each image, its k patches on top of each other; nearest, the fastest mode."""
    batch, channels, height, width = images.shape
    k = offsets.shape[1]
    span = torch.arange(size, device=images.device)
    y = (2 * (offsets[..., 0, None] + span) + 1) / height - 1
    x = (2 * (offsets[..., 1, None] + span) + 1) / width - 1
    shape = (batch, k, size, size)
    grid = torch.stack([x[:, :, None, :].expand(shape), y[:, :, :, None].expand(shape)], -1).view(batch, -1, size, 2)
    tall = F.grid_sample(images, grid.to(images.dtype), mode="nearest", align_corners=False)
    return tall.view(batch, channels, k, size, size).transpose(1, 2).reshape(-1, channels, size, size)


def unfold_gather(images: Tensor, offsets: Tensor, size: int) -> Tensor:
    """A view of every patch there is, and a gather of those wanted."""
    every = images.unfold(2, size, 1).unfold(3, size, 1)  # [B, C, places in y, places in x, size, size]
    batch = torch.arange(images.shape[0], device=images.device)[:, None]
    return every[batch, :, offsets[..., 0], offsets[..., 1]].flatten(0, 1)


def kornia_crop(images: Tensor, offsets: Tensor, size: int) -> Tensor:
    """kornia's random crop of k copies of each image; it draws offsets of its own."""
    from kornia.augmentation import RandomCrop

    return RandomCrop((size, size))(images.repeat_interleave(offsets.shape[1], 0))


def cases() -> Iterator[Case]:
    """256 images of 3x32x32, 8 patches of 8x8 each, on the CPU."""
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


GPU_PEERS: dict[str, Crop] = {
    "advanced-index gather": gather,
    "grid_sample, nearest": grid_sample,
    "unfold and gather": unfold_gather,
    "kornia RandomCrop": kornia_crop,
}
SHAPES = ((4096, 32, 8, 8), (256, 224, 8, 64))  # images, their side, patches of each, the side of a patch


def gpu_cases(settings: Settings) -> Iterator[LazyCase]:
    """The shapes of the vision papers, then batches so large that only bytes count."""
    yield _augmentation(settings)
    large = tuple((settings.rows(3 * side * side, torch.float32), side, k, size) for _, side, k, size in SHAPES)
    fixed = tuple(
        (min(batch, rows), side, k, size) for (batch, side, k, size), (rows, *_) in zip(SHAPES, large, strict=True)
    )
    for batch, side, k, size in dict.fromkeys(fixed + large):
        for dtype in (torch.float32, torch.bfloat16):
            yield _patches(settings, (batch, side, k, size), dtype, backward=False)
            yield _patches(settings, (batch, side, k, size), dtype, backward=True)


def _patches(settings: Settings, shape: tuple[int, int, int, int], dtype: torch.dtype, *, backward: bool) -> LazyCase:
    batch, side, k, size = shape
    direction = "backward" if backward else "forward"
    name = f"crop {direction} {batch}x3x{side}x{side} k={k} L={size} {short_name(dtype)}"

    def build() -> Case:
        images = torch.randn(batch, 3, side, side, device=settings.device, dtype=dtype)
        offsets = torch.randint(0, side - size + 1, (batch, k, 2), device=settings.device)
        window, extent = (size, size), (side, side)
        if backward:
            images.requires_grad_()
            upstream = torch.randn(batch * k, 3, size, size, device=settings.device, dtype=dtype)
            run = _backward(images, offsets, size, upstream)
            floor = floors.crop_backward(batch, 3, extent, batch * k, window, dtype.itemsize)
        else:

            def run(crop: Crop) -> Callable[[], Tensor]:
                return lambda: crop(images, offsets, size)

            covered = floors.covered_pixels(offsets, window, extent)
            floor = floors.crop(covered, 3, batch * k, window, dtype.itemsize, dtype.itemsize)
        if backward:
            wide = images.detach().float().requires_grad_()
            truth = _backward(wide, offsets, size, upstream.float())(gather)()
        else:
            truth = run(gather)()
        # backward: sums of up to k patches, rounded to bf16 once by us and after each patch by some peers
        tolerance = 0.0 if not backward else 1e-2 if dtype == torch.bfloat16 else 1e-6
        peers = {peer: _deferred(run, crop) for peer, crop in GPU_PEERS.items()}
        kornia = peers.pop("kornia RandomCrop")
        contenders = Contenders(
            run(fastkd.crop_patches), peers, lambda result: relative_error(result, truth), tolerance, 3e-2
        )
        return _with_kornia(contenders.case(name, settings, rounds=9, floor_bytes=floor), kornia)

    return LazyCase(name, build)


def _deferred(run: Callable[[Crop], Callable[[], Tensor]], crop: Crop) -> Callable[[], Tensor]:
    """A backward needs its forward first, which a peer may fail at: not before it is called."""
    prepared: list[Callable[[], Tensor]] = []

    def call() -> Tensor:
        if not prepared:
            prepared.append(run(crop))
        return prepared[0]()

    return call


def _with_kornia(case: Case, run: Callable[[], Tensor]) -> Case:
    """kornia draws its own places: its result can be compared in shape only."""
    try:
        run()
        case.peers["kornia RandomCrop"] = run
    except Exception as problem:
        case.missing["kornia RandomCrop"] = first_line(problem)
    return case


def _backward(images: Tensor, offsets: Tensor, size: int, upstream: Tensor) -> Callable[[Crop], Callable[[], Tensor]]:
    def run(crop: Crop) -> Callable[[], Tensor]:
        patches = crop(images, offsets, size)
        return lambda: torch.autograd.grad(patches, images, upstream, retain_graph=True)[0]

    return run


def eager_augmentation(images: Tensor, offsets: Tensor, flip: Tensor, padding: int, dtype: torch.dtype) -> Tensor:
    """Pad, crop by advanced indexing, flip and normalise a batch of uint8 images, each image by itself."""
    side = images.shape[-1]
    crops = gather(F.pad(images, (padding,) * 4), offsets[:, None] + padding, side)
    crops = torch.where(flip[:, None, None, None], crops.flip(-1), crops)
    mean, std = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (MEAN, STD))
    return ((crops.float() / 255 - mean) / std).to(dtype)


def _augmentation(settings: Settings) -> LazyCase:
    batch, side, padding = min(512, settings.rows(3 * 32 * 32, torch.uint8)), 32, 4
    name = f"random_crop_flip {batch}x3x{side}x{side} uint8 to fp32"

    def places(device: torch.device) -> tuple[Tensor, Tensor]:
        offsets = torch.randint(-padding, padding + 1, (batch, 2), device=device)
        return offsets, torch.rand(batch, device=device) < 0.5

    def build() -> Case:
        images = torch.randint(256, (batch, 3, side, side), dtype=torch.uint8, device=settings.device)
        # random places differ from call to call: that both do the same to the same places is checked apart
        offsets, flip = places(settings.device)
        center, scale = [255 * m for m in MEAN], [1 / (255 * s) for s in STD]
        given = ops.crop(
            images, offsets[:, None], (side, side), flip[:, None], center=center, scale=scale, dtype=torch.float32
        )
        error = relative_error(given, eager_augmentation(images, offsets, flip, padding, torch.float32))
        contenders = Contenders(
            lambda: fastkd.random_crop_flip(images, padding, mean=MEAN, std=STD),
            {
                "pad, gather, flip, normalise": lambda: eager_augmentation(
                    images, *places(settings.device), padding, torch.float32
                )
            },
            lambda result: error if result.isfinite().all() else float("nan"),
            1e-6,
            1e-6,
        )
        covered = floors.covered_pixels(offsets[:, None], (side, side), (side, side))
        floor = floors.crop(covered, 3, batch, (side, side), 1, 4)
        return contenders.case(name, settings, rounds=51, floor_bytes=floor)

    return LazyCase(name, build)
