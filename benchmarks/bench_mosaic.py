"""An iteration of MosaicKD against the same one as its authors' code makes it: a step of the discriminator of patches, one of
the generator, then several of the student, each on new images and on as many out-of-domain ones.

The out-of-domain images lie on the host, as bytes. Theirs takes them one by one, as a Dataset with transforms does, in this
process: workers would share its cores. Its losses are written term by term: the softmax of the same logits is taken for the
divergence and again for the others, with a logarithm of its own. Ours takes a batch at once, and the terms share a pass.

Both have the same networks, and discriminators that see the same patches: of whole images, as a convolution (the authors'), or
with "crops" of random places, 64 for each image, which the peer cuts by advanced indexing. An update makes gradients of what it
trains alone; those of the published generator's loss go into discriminator and student, too: in favour of the peer.

Iterations are there whole and, of larger batches, without their networks, where what these return is given.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import fastkd
from benchmarks import bench_crop, floors
from benchmarks.bench_crop import MEAN, STD, OneByOne
from benchmarks.bench_divergence import eager_kl
from benchmarks.bench_training import PADDING, at_most, cut_by, fastkd_places, realness
from benchmarks.case import Case, Contest, Settings, Work
from benchmarks.iterations import (
    BYTES_OF_AN_IMAGE,
    WHOLE_FULL,
    WHOLE_GPU,
    WHOLE_QUICK,
    Iterations,
    Shape,
    Steps,
    Trained,
    Updates,
    compared,
    parameters_of,
    student_and_teacher,
)
from benchmarks.trainer import Given, Source
from fastkd.data import Batch
from fastkd.methods import registry
from fastkd.methods.mosaic import Mosaic, PatchMode

# largest relative errors; networks enlarge those of one bit, at kinks, and where convolutions on a GPU round to TF32
OF_LOSSES, OF_NETWORKS = 1e-5, 1e-2
BYTES_OF_PATCHES = 1 << 20  # of an image, with the index of each of their pixels
LOOKS = 3  # of the discriminator: at made and at real images for its own loss, at made ones for the generator's
# batch, classes, images, steps of the student: the authors'
BETWEEN = ((256, 100, (3, 32, 32), 5),)


class Networks(NamedTuple):
    """Of an iteration."""

    student: nn.Module
    teacher: nn.Module
    generator: nn.Module
    discriminator: nn.Module


def cases(settings: Settings) -> Iterator[Case]:
    """Iterations, and what of them is no network, each with both kinds of patches; of LeNets with the authors' alone."""
    for size in settings.pick(WHOLE_QUICK, WHOLE_FULL, WHOLE_GPU):
        yield _whole(settings, *size, patch_mode="conv")
    for size in settings.pick(WHOLE_QUICK[1:], WHOLE_FULL[1:], WHOLE_GPU[1:]):
        yield _whole(settings, *size, patch_mode="crop")
    for between in settings.pick(BETWEEN, (), BETWEEN):
        yield _between(settings, *between, patch_mode="conv")
        yield _between(settings, *between, patch_mode="crop")


Cut = Callable[..., Tensor]  # (images, source=) -> what the discriminator sees of them


def whole_images(images: Tensor, source: Source) -> Tensor:
    """It finds the patches itself."""
    return images


class Theirs:
    """The authors' way.

    Args:
        stored: out-of-domain images of all steps of the student, uint8 ``[steps * B, C, H, W]``, on the host.
        latent: dimensions of the noise.
        weights: of the generator's terms, by name.
    """

    def __init__(
        self, networks: Networks, stored: Tensor, steps: int, latent: int, weights: dict[str, float], cut: Cut
    ) -> None:
        self.networks, self.batches, self.weights, self.cut = networks, stored.chunk(steps), weights, cut
        self.device = next(networks.generator.parameters()).device
        self.transform = OneByOne(PADDING, stored.shape[1])
        self.noise_of = partial(torch.randn, len(self.batches[0]), latent, device=self.device)

    def iteration(self, step: Updates) -> Tensor:
        """All of it; the student's mean loss."""
        made = self.networks.generator(self.noise_of())
        real = torch.stack([self.transform.normalised(image) for image in self.batches[0]]).to(self.device)
        step.update(self.discriminator_loss(made.detach(), real, step.source), "discriminator")
        step.update(self.generator_loss(made, step.source), "generator")
        losses = []
        for stored in self.batches:
            loss = self.student_loss(self.noise_of(), stored, step.source)
            step.update(loss, "student")
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    def discriminator_loss(self, made: Tensor, real: Tensor, source: Source) -> Tensor:
        """Cross-entropy, a sum over the patches of an image."""
        return (self.taken_for(0.0, made, source) + self.taken_for(1.0, real, source)) / (2 * len(made))

    def generator_loss(self, made: Tensor, source: Source) -> Tensor:
        """The sum of its terms."""
        teacher_logits, student_logits = self.networks.teacher(made), self.networks.student(made)
        p, log_p = teacher_logits.softmax(1), teacher_logits.log_softmax(1)
        mean = p.mean(0)
        loss = self.weights["adversarial"] * -eager_kl(student_logits, teacher_logits)
        loss = loss + self.weights["entropy"] * -(p * log_p).sum(1).mean()
        loss = loss + self.weights["local"] * self.taken_for(1.0, made, source) / len(made)
        return loss + self.weights["balance"] * math.log(2.0) * (mean * mean.log2()).sum()

    def taken_for(self, kind: float, images: Tensor, source: Source) -> Tensor:
        """How far the discriminator is from taking images for made ones (0) or for real ones (1), a sum over all patches."""
        logits = self.networks.discriminator(self.cut(images, source=source))
        return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, kind), reduction="sum")

    def student_loss(self, noise: Tensor, stored: Tensor, source: Source) -> Tensor:
        """On new images and on out-of-domain ones."""
        with torch.no_grad():
            images = torch.cat([self.networks.generator(noise), self.augmented(stored, source)])
            teacher_logits = self.networks.teacher(images)
        return eager_kl(self.networks.student(images), teacher_logits)

    def augmented(self, stored: Tensor, source: Source) -> Tensor:
        """Cropped, mirrored and normalised, one by one."""
        if source is None:
            return torch.stack([self.transform(image) for image in stored]).to(self.device)
        offsets, flip = fastkd_places(len(stored), source)
        corners = (offsets + PADDING).tolist()
        places = [(y, x, mirrored) for (y, x), mirrored in zip(corners, flip.tolist(), strict=True)]
        return torch.stack(list(map(self.transform, stored, places))).to(self.device)


def work(
    settings: Settings,
    mosaic: Mosaic,
    trained: Callable[[Networks], Trained],
    updates: type[Updates],
    tolerance: float,
) -> Work:
    """fastkd and the authors' way, with the same networks, or what stands for them."""
    generator = mosaic.maker.generator
    assert generator is not None
    networks = Networks(mosaic.network(), mosaic.frozen["teacher"], generator, mosaic.discriminator)
    copies = copy.deepcopy(networks)
    stored = torch.randint(256, (mosaic.batches * mosaic.batch_size, *mosaic.maker.shape), dtype=torch.uint8)
    to_floats: dict[str, Any] = {"padding": 0, "flip_probability": 0.0}
    to_floats |= {"mean": mosaic.maker.mean, "std": mosaic.maker.std}
    to_floats["generator"] = torch.Generator(settings.device)  # the other one stays for what theirs draws, too

    def ours(step: Any) -> Tensor:
        images = fastkd.random_crop_flip(stored.to(settings.device), **to_floats)
        return mosaic.iteration(Batch(images), step)["loss"]

    cut: Cut = whole_images
    if mosaic.patch_mode == "crop":
        cut = partial(cut_by, bench_crop.gather, size=mosaic.patch_size, k=mosaic.patches_per_image)
    authors = Theirs(copies, stored, mosaic.student_steps, mosaic.maker.latent, mosaic.weights, cut)
    theirs = Iterations(trained(copies), authors.iteration, updates=updates)
    return compared(settings, Iterations(trained(networks), ours, updates=updates), theirs, theirs.first, tolerance)


def mosaic_of(
    settings: Settings, student: nn.Module, teacher: nn.Module, batch: int, shape: Shape, **options: Any
) -> Mosaic:
    """The method, of images normalised as CIFAR's are, or a channel as their first."""
    few, (mean, std) = torch.zeros(2, *shape, device=settings.device), (values[: shape[0]] for values in (MEAN, STD))
    given = registry.Given(student, teacher, few, batch, mean=mean, std=std, padding=PADDING)
    mosaic = registry.create_procedure("mosaic", given, **options)
    assert isinstance(mosaic, Mosaic)
    return mosaic.to(settings.device)


def _name(what: str, steps: int, patch_mode: PatchMode, without: str = "") -> str:
    return f"MosaicKD {what}, {steps} steps{', crops' if patch_mode == 'crop' else ''}{without}"


def _whole(
    settings: Settings,
    teacher_name: str,
    student_name: str,
    shape: Shape,
    most: int,
    most_width: int,
    steps: int,
    *,
    patch_mode: PatchMode,
) -> Case:
    batch, width = at_most(settings, most), at_most(settings, most_width)

    def build() -> Work:
        images = torch.randn(batch, *shape, device=settings.device)
        networks = student_and_teacher(settings, student_name, teacher_name, images)
        options: dict[str, Any] = {"width": width, "discriminator_width": width, "student_steps": steps}
        mosaic = mosaic_of(settings, *networks, batch, shape, patch_mode=patch_mode, **options)
        return work(settings, mosaic, _trained, Steps, OF_NETWORKS)

    name = _name(f"{teacher_name} to {student_name}, {batch}x{'x'.join(map(str, shape))}", steps, patch_mode)
    return Case(name, build, batch * BYTES_OF_AN_IMAGE)


def _trained(networks: Networks) -> Trained:
    student, _, generator, discriminator = networks
    return parameters_of(student=student, generator=generator, discriminator=discriminator)


# What of an iteration is no network.


class Looking(Given):
    """Stands for a student: what it returns is given, but for a few pixels of each image, by which wrong crops are noticed."""

    def forward(self, images: Tensor) -> Tensor:
        logits, pixels = super().forward(images), images.flatten(1)
        classes = logits.shape[1]
        return logits + pixels[:, :: pixels.shape[1] // classes][:, :classes]


class Realness(nn.Module):
    """Stands for a discriminator of patches that were cropped."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, patches: Tensor) -> Tensor:
        return self.scale * realness(patches)


def _between(settings: Settings, most: int, classes: int, shape: Shape, steps: int, *, patch_mode: PatchMode) -> Case:
    batch = at_most(settings, most)

    def build() -> Work:
        def random(*size: int) -> Tensor:
            return torch.randn(*size, device=settings.device)

        # the teacher says to both halves of a batch the same: theirs asks it once, ours half by half
        student, teacher = Looking(random(2 * batch, classes)), Given(random(batch, classes).repeat(2, 1))
        mosaic = mosaic_of(settings, student, teacher, batch, shape, patch_mode=patch_mode, student_steps=steps)
        teacher.requires_grad_()
        patches = Given(random(batch, 1, shape[1] // 4, shape[2] // 4))
        discriminator: Any = patches if patch_mode == "conv" else Realness()
        generator: Any = Given(random(batch, *shape))
        mosaic.discriminator, mosaic.maker.generator = discriminator, generator
        found = work(settings, mosaic.to(settings.device), _given_to, Updates, OF_LOSSES)
        found.floor_bytes = _floor(mosaic, classes, patches.values.numel())
        return found

    name = _name(f"{batch}x{'x'.join(map(str, shape))} K={classes}", steps, patch_mode, ", no networks")
    # of all steps, and several times
    nbytes = 8 * 4 * batch * steps * (math.prod(shape) + 2 * classes)
    return Case(name, build, nbytes + (batch * BYTES_OF_PATCHES if patch_mode == "crop" else 0))


def _given_to(networks: Networks) -> Trained:
    """What gradients of the losses are asked for: of the generator's all that it would go on with."""
    student, teacher, generator, discriminator = (list(network.parameters()) for network in networks)
    looked_at = generator if isinstance(networks.discriminator, Realness) else discriminator
    return {"student": student, "generator": [*student, *teacher, *looked_at], "discriminator": discriminator}


def _floor(mosaic: Mosaic, classes: int, patch_logits: int) -> int:
    """Bytes: of images for the discriminator, crops for the student, logits and their gradients, and patches."""
    batch, steps, (channels, *extent) = mosaic.batch_size, mosaic.student_steps, mosaic.maker.shape
    side = (extent[0], extent[1])
    offsets = torch.randint(-PADDING, PADDING + 1, (steps * batch, 1, 2))
    found = floors.crop(floors.covered_pixels(offsets, side, side), channels, steps * batch, side, 1, 4)
    found += 4 * batch * channels * math.prod(side)
    found += steps * floors.divergence(2 * batch, classes, 4)
    found += floors.divergence(batch, classes, 4, teacher_gradient=True)
    if mosaic.patch_mode == "conv":
        return found + LOOKS * 2 * 4 * patch_logits
    size, number = (mosaic.patch_size, mosaic.patch_size), mosaic.patches_per_image
    places = torch.randint(min(side) - mosaic.patch_size + 1, (batch, number, 2))
    found += LOOKS * floors.crop(floors.covered_pixels(places, size, side), channels, batch * number, size, 4, 4)
    return found + floors.crop_backward(batch, channels, side, batch * number, size, 4)


def test_mosaic(case: Case, contest: Contest) -> None:
    """Each case."""
    contest(case)
