"""Patches against advanced indexing, grid_sample, unfold, torchvision and kornia, their gradient included."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import fastkd
from benchmarks import floors
from benchmarks.case import (
    BEST_PEER,
    Case,
    Contest,
    Run,
    Settings,
    Work,
    on_threads,
    peers_that_fit,
    relative_error,
    short_name,
    thread_counts,
)

Crop = Callable[[Tensor, Tensor, int], Tensor]
Shape = tuple[int, int, int, int]  # images, their side, patches of each, the side of a patch

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


def torchvision_crop(images: Tensor, offsets: Tensor, size: int) -> Tensor:
    """One call for each patch, as its RandomCrop has one place for a whole batch."""
    from torchvision.transforms.functional import crop

    places = offsets.tolist()
    return torch.stack([crop(image, y, x, size, size) for image, at in zip(images, places, strict=True) for y, x in at])


def kornia_crop(images: Tensor, offsets: Tensor, size: int) -> Tensor:
    """kornia's random crop of k copies of each image; it draws offsets of its own."""
    return _kornia(size)(images.repeat_interleave(offsets.shape[1], 0))


@functools.cache
def _kornia(size: int) -> Crop:
    from kornia.augmentation import RandomCrop

    return RandomCrop((size, size))


PEERS: dict[str, Crop] = {
    "advanced-index gather": gather,
    "grid_sample, nearest": grid_sample,
    "unfold and gather": unfold_gather,
    "torchvision crop, one by one": torchvision_crop,
    "kornia RandomCrop": kornia_crop,
}

TARGET_SHAPE = (256, 32, 8, 8)
FULL = (
    *((256, 32, k, size) for k in (1, 8, 32) for size in (8, 16, 28) if (k, size) != (8, 8)),
    (16, 224, 8, 64),
    (128, 224, 8, 64),
)
GPU = ((4096, 32, 8, 8), (256, 224, 8, 64))  # and both as batches so large that only bytes count
WHY_NOT_FASTER = "Besides, a call with a gradient pays for Python and autograd's engine (python -m benchmarks.layers)."
MANY_LAUNCHES = ("torchvision crop, one by one", "kornia RandomCrop")
MANY = "launches for each patch take seconds a run, and time on a GPU is short; see 4096x3x32x32"
PEER_COPIES = 12  # tensors of the size of the patches that a peer holds at its peak


def cases(settings: Settings) -> Iterator[Case]:
    """Steps forward and backward; on a GPU each by itself. The augmentation of a batch."""
    for batch in settings.pick([512], [8192], [512]):
        yield _augmentation(settings, batch)
    if settings.sizes != "gpu":
        for shape in settings.pick([TARGET_SHAPE], FULL):
            yield _patches(settings, shape, torch.float32, "step")
        if settings.sizes == "full":
            yield _patches(settings, TARGET_SHAPE, torch.bfloat16, "step")
            yield from on_threads(_patches(settings, FULL[-1], torch.float32, "step"), thread_counts())
        return
    large = [(settings.rows(3 * side * side, torch.float32), side, k, size) for _, side, k, size in GPU]
    fixed = [(min(batch, most), *rest) for (batch, *rest), (most, *_) in zip(GPU, large, strict=True)]
    for shape in dict.fromkeys((*fixed, *large)):
        for dtype in (torch.float32, torch.bfloat16):
            for direction in ("forward", "backward"):
                yield _patches(settings, shape, dtype, direction)


def _patches(settings: Settings, shape: Shape, dtype: torch.dtype, direction: str) -> Case:
    batch, side, k, size = shape
    heading = "" if direction == "step" else f"{direction} "
    name = f"crop {heading}{batch}x3x{side}x{side} k={k} L={size} {short_name(dtype)}"
    window, extent = (size, size), (side, side)

    def build() -> Work:
        images = torch.randn(batch, 3, side, side, device=settings.device, dtype=dtype)
        offsets = torch.randint(0, side - size + 1, (batch, k, 2), device=settings.device)
        covered = floors.covered_pixels(offsets, window, extent)
        forward = floors.crop(covered, 3, batch * k, window, dtype.itemsize, dtype.itemsize)
        backward = floors.crop_backward(batch, 3, extent, batch * k, window, dtype.itemsize)
        if direction == "forward":
            run, truth = _forward(images, offsets, size), gather(images, offsets, size)
        else:
            images.requires_grad_()
            upstream = torch.randn(batch * k, 3, size, size, device=settings.device, dtype=dtype)
            make = _step if direction == "step" else _backward
            run = make(images, offsets, size, upstream)
            wide = images.detach().float().requires_grad_()
            truth = _step(wide, offsets, size, upstream.float())(gather)()
            if direction == "backward":
                truth = truth.gradient
        # backward: sums of up to k patches, rounded to bf16 once by us and after each patch by some peers
        tolerance = 0.0 if direction == "forward" else 1e-2 if dtype == torch.bfloat16 else 1e-6
        work = Work(
            run(fastkd.crop_patches),
            {peer: _deferred(run, crop) for peer, crop in PEERS.items()},
            lambda result: _error(result, truth),
            tolerance,
            3e-2,
            floor_bytes={"forward": forward, "backward": backward, "step": forward + backward}[direction],
            targets={BEST_PEER: 8.0} if direction == "step" and shape == TARGET_SHAPE else {},
            target_percent=85.0 if settings.device.type == "cuda" and images.nbytes >= 1 << 30 else None,
            incomparable=("kornia RandomCrop",),
            reason=WHY_NOT_FASTER if direction == "step" else "",
        )
        # the gradient of unfold is one of every patch that there is
        every = 0 if direction == "forward" else 2 * batch * 3 * (side - size + 1) ** 2 * size**2 * dtype.itemsize
        if settings.sizes == "gpu" and shape != GPU[0]:
            for peer in MANY_LAUNCHES:
                work.leave_out(peer, MANY)
        return peers_that_fit(work, every, settings, ["unfold and gather"])

    nbytes = 3 * (batch * side * side + batch * k * size * size) * dtype.itemsize
    return Case(name, build, PEER_COPIES * nbytes)


def _forward(images: Tensor, offsets: Tensor, size: int) -> Callable[[Crop], Run]:
    return lambda crop: lambda: crop(images, offsets, size)


class Step(NamedTuple):
    """What a step makes."""

    patches: Tensor
    gradient: Tensor


def _step(images: Tensor, offsets: Tensor, size: int, upstream: Tensor) -> Callable[[Crop], Run]:
    def run(crop: Crop) -> Run:
        def step() -> Step:
            patches = crop(images, offsets, size)
            patches.backward(upstream)
            gradient, images.grad = images.grad, None
            assert gradient is not None
            return Step(patches.detach(), gradient)

        return step

    return run


def _backward(images: Tensor, offsets: Tensor, size: int, upstream: Tensor) -> Callable[[Crop], Run]:
    def run(crop: Crop) -> Run:
        patches = crop(images, offsets, size)
        return lambda: torch.autograd.grad(patches, images, upstream, retain_graph=True)[0]

    return run


def _error(result: Tensor | Step, truth: Tensor | Step) -> float:
    if isinstance(result, Step):
        return max(relative_error(value, right) for value, right in zip(result, truth, strict=True))
    return relative_error(result, truth)


def _deferred(run: Callable[[Crop], Run], crop: Crop) -> Run:
    """A backward needs its forward first, which a peer may fail at: not before it is called."""
    prepared: list[Run] = []

    def call() -> Tensor:
        if not prepared:
            prepared.append(run(crop))
        return prepared[0]()

    return call


def eager_augmentation(images: Tensor, offsets: Tensor, flip: Tensor, padding: int, dtype: torch.dtype) -> Tensor:
    """Pad, crop by advanced indexing, flip and normalise a batch of uint8 images, each image by itself."""
    side = images.shape[-1]
    crops = gather(F.pad(images, (padding,) * 4), offsets[:, None] + padding, side)
    crops = torch.where(flip[:, None, None, None], crops.flip(-1), crops)
    mean, std = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (MEAN, STD))
    return ((crops.float() / 255 - mean) / std).to(dtype)


Place = tuple[int, int, bool]  # row and column in the padded image, and whether it is mirrored


class OneByOne:
    """Pads, crops, mirrors and normalises one uint8 image ``[C, H, W]``, as the transforms of a Dataset do."""

    def __init__(self, padding: int, channels: int = 3) -> None:
        self.padding = padding
        self.mean, self.std = (torch.tensor(values[:channels]).view(-1, 1, 1) for values in (MEAN, STD))

    def __call__(self, image: Tensor, place: Place | None = None) -> Tensor:
        """At a random place, unless one is given."""
        y, x, mirrored = self.random_place() if place is None else place
        height, width = image.shape[1:]
        view = F.pad(image, (self.padding,) * 4)[:, y : y + height, x : x + width]
        return self.normalised(view.flip(-1) if mirrored else view)

    def random_place(self) -> Place:
        """Each of them as likely."""
        y, x = torch.randint(2 * self.padding + 1, (2,)).tolist()
        return y, x, bool(torch.rand(()) < 0.5)

    def normalised(self, image: Tensor) -> Tensor:
        """As it is, but for its numbers."""
        return (image.float() / 255 - self.mean) / self.std


def torchvision_augmentation(images: Tensor, padding: int) -> Tensor:
    """The same by torchvision's transforms, image by image, as a DataLoader's workers do."""
    transform = _torchvision(images.shape[-1], padding)
    return torch.stack([transform(image) for image in images])


@functools.cache
def _torchvision(side: int, padding: int) -> Callable[[Tensor], Tensor]:
    from torchvision.transforms import v2

    steps = [v2.RandomCrop(side, padding=padding), v2.RandomHorizontalFlip()]
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


def augmentation_error(views: Tensor, images: Tensor, padding: int) -> float:
    """How far each of the first few views is from the nearest of all crops and flips that its image has."""
    few, side = min(len(images), 8), images.shape[-1]
    views, images = views[:few].float(), images[:few].cpu().to(views.device)
    corners = torch.arange(-padding, padding + 1, device=views.device)
    offsets = torch.cartesian_prod(corners, corners)
    places, copies = offsets.repeat(few, 1), images.repeat_interleave(len(offsets), 0)
    worst = torch.full((few,), torch.inf, dtype=torch.float64, device=views.device)
    for flip in (False, True):
        flips = torch.full((len(places),), flip, device=views.device)
        every = eager_augmentation(copies, places, flips, padding, torch.float32).view(few, len(offsets), 3, side, side)
        distance = (every - views[:, None]).double().flatten(2).norm(dim=2) / views.double().flatten(1).norm(dim=1)[
            :, None
        ]
        worst = worst.minimum(distance.amin(1))
    return float(worst.max()) if views.isfinite().all() else float("nan")


def _augmentation(settings: Settings, most: int) -> Case:
    batch, side, padding = min(most, settings.rows(3 * 32 * 32, torch.uint8)), 32, 4

    def build() -> Work:
        images = torch.randint(256, (batch, 3, side, side), dtype=torch.uint8, device=settings.device)

        def places() -> tuple[Tensor, Tensor]:
            offsets = torch.randint(-padding, padding + 1, (batch, 2), device=settings.device)
            return offsets, torch.rand(batch, device=settings.device) < 0.5

        covered = floors.covered_pixels(places()[0][:, None], (side, side), (side, side))
        return Work(
            lambda: fastkd.random_crop_flip(images, padding, mean=MEAN, std=STD),
            {
                "pad, gather, flip, normalise": lambda: eager_augmentation(images, *places(), padding, torch.float32),
                "torchvision v2, one by one": lambda: torchvision_augmentation(images, padding),
            },
            lambda views: augmentation_error(views, images, padding),
            1e-6,
            1e-6,
            floor_bytes=floors.crop(covered, 3, batch, (side, side), 1, 4),
        )

    return Case(f"random_crop_flip {batch}x3x{side}x{side} uint8 to fp32", build, 100 * batch * 3 * side * side)


def test_crop(case: Case, contest: Contest) -> None:
    """Each case."""
    contest(case)
