"""Distillation from images of another domain: patches of theirs are put together anew, to images of the teacher's classes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fastkd import _checks
from fastkd.data.batch import Batch, Batches
from fastkd.methods.datafree import DataFree, Judged
from fastkd.methods.datafree.procedure import SHOWN
from fastkd.methods.datafree.terms import shares
from fastkd.methods.procedure import Step
from fastkd.methods.registry import register
from fastkd.models.patch_discriminator import PatchDiscriminator
from fastkd.patches import padding_of, random_crop_flip, random_patches

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Mosaic", "PatchMode", "discriminator_loss"]

PatchMode = Literal["crop", "conv"]


def discriminator_loss(made: Tensor, real: Tensor, weight: Tensor) -> Tensor:
    """The loss of a discriminator, of logits ``[B, n]`` of n patches of each image: binary cross-entropy, summed over the
    patches, the mean over the images and over made and real ones (Fang et al., Eq. 3). ``weight`` is ``[B]``, the share of each
    made image."""
    return 0.5 * ((F.softplus(made).sum(1) * weight).sum() + F.softplus(-real).sum(1).mean())


@register(
    "mosaic",
    family="out-of-domain",
    needs=("out-of-domain images", "teacher"),
    trains="generator, discriminator, student",
    paper="Fang et al., NeurIPS 2021",
    adversarial=1.0,
    adversary="kl",
    entropy=1.0,
    balance=10.0 / math.log(2.0),  # of a logarithm to base 2
    student_steps=5,
    squash="sigmoid",
    latent=100,
    first_stage=2,
    generator_betas=(0.5, 0.999),
    generator_schedule="cosine",
)
class Mosaic(DataFree):
    """MosaicKD: images whose patches look like those of out-of-domain images, and of which the teacher is sure.

    Fang et al., "Mosaicking to Distill: Knowledge Distillation from Out-of-Domain Data" (NeurIPS 2021), with the weights of the
    authors' code. An iteration: the discriminator learns to tell patches of out-of-domain images from those of made ones
    (Eq. 3); the generator learns to make patches that it takes for real, images that the teacher is sure of (Eq. 4), of all
    classes alike, and on which student and teacher differ (Eq. 5); then the student learns from the teacher, in each of its
    steps on new images and as many out-of-domain ones.

    An iteration takes ``student_steps`` batches of out-of-domain images at once, as they are: those of the student are cropped
    and mirrored here, those of the discriminator are not.

    Args:
        padding: pixels of black that crops of out-of-domain images may reach into, for the student; of zeros, where mean and
            std are not given.
        flip: whether half of these are mirrored.
        patch_mode: crop: patches of random places, drawn for each image anew, are given to the discriminator. conv: it is given
            whole images, padded with zeros, and sees the patches at regular places, as in the authors' code.
        patch_size: of a patch, in pixels.
        patches_per_image: with crop. Where an image has fewer places than that, each patch counts for several.
        local: weight of the patches in the generator's loss, a sum over those of an image.
        discriminator_width: maps of its first convolution.

    Raises:
        ValueError: patches larger than the images; as of :class:`DataFree`.
    """

    augments: ClassVar[bool] = True
    black: Tensor | None

    def __init__(
        self,
        *given: Any,
        padding: int = 4,
        flip: bool = True,
        patch_mode: PatchMode = "crop",
        patch_size: int = 10,
        patches_per_image: int = 64,
        local: float = 1.0,
        discriminator_width: int = 128,
        **options: Any,
    ) -> None:
        super().__init__(*given, **options)
        self.patch_mode = _checks.check_choice("patch_mode", patch_mode, get_args(PatchMode))
        self.padding = padding_of(padding)
        self.flip_probability = 0.5 if _checks.check_flag("flip", flip) else 0.0
        self.patch_size = _checks.check_size("patch_size", patch_size, 1)
        self.patches_per_image = _checks.check_size("patches_per_image", patches_per_image, 1)
        self.weights["local"] = _checks.check_not_negative("local", local)
        channels, height, width = self.maker.shape
        if self.patch_size > min(height, width):
            raise ValueError(
                f"fastkd: patch_size is {self.patch_size}, must be at most the side of the images, {min(height, width)}"
            )
        places = (height - self.patch_size + 1) * (width - self.patch_size + 1)
        self._drawn = min(self.patches_per_image, places)
        self._counts = self.patches_per_image / self._drawn if self.patch_mode == "crop" else 1.0
        """How much each patch counts."""
        self.discriminator = PatchDiscriminator(
            channels, self.patch_size, width=discriminator_width, padded=self.patch_mode == "conv"
        )
        self.batches = self.student_steps
        self._shift: list[float] | None = None
        """From normalised images to such whose black is 0, of each channel."""
        if self.maker.mean is not None and self.maker.std is not None:
            self._shift = [mean / std for mean, std in zip(self.maker.mean, self.maker.std, strict=True)]
        shift = None if self._shift is None else torch.tensor(self._shift).view(-1, 1, 1)
        self.register_buffer("black", shift, persistent=False)
        self._seen: tuple[Tensor, ...] = ()
        """The last out-of-domain images, to be drawn; in a tuple, which is no state."""
        names = ("padding", "flip", "patch_mode", "patch_size", "patches_per_image", "local", "discriminator_width")
        self._options |= {name: value for name, value in locals().items() if name in names}

    def helpers(self) -> dict[str, nn.Module | None]:
        return {**super().helpers(), "discriminator": self.discriminator}

    def patch_logits(self, images: Tensor) -> Tensor:
        """The discriminator's, ``[B, n]``: of n patches of each image ``[B, C, H, W]``; differentiable in the images."""
        patches = images
        if self.patch_mode == "crop":
            patches, _ = random_patches(images, self.patch_size, self._drawn)
        logits: Tensor = self.discriminator(patches)
        exact = torch.promote_types(logits.dtype, torch.float32)  # many are summed
        return logits.to(exact).view(len(images), -1)

    def images_of(self, batch: Batches) -> Tensor:
        size = self.batches * self.batch_size
        if not isinstance(batch, Batch):
            raise TypeError(
                f"fastkd: batch is {type(batch).__name__}, must be a Batch of {size} out-of-domain images for MosaicKD"
            )
        if len(batch) != size or batch.images.shape[1:] != self.maker.shape:
            raise ValueError(
                f"fastkd: images has shape {tuple(batch.images.shape)}, must be {(size, *self.maker.shape)}: batch_size, "
                f"{self.batch_size}, out-of-domain images of the task's shape for each of {self.student_steps} student_steps"
            )
        self._seen = (batch.images[: min(self.batch_size, SHOWN)].detach().clone(),)
        return batch.images

    def before_terms(self, made: Judged, given: Tensor | None, step: Step) -> dict[str, Tensor]:
        """An update of the discriminator, on these and on out-of-domain images."""
        assert given is not None
        if not self.weights["local"]:
            return {}
        logits = self.patch_logits(made.images.detach()), self.patch_logits(given[: self.batch_size])
        loss = self._counts * discriminator_loss(*logits, shares(made.usable))
        step.update(loss, "discriminator")
        return {"discriminator_loss": loss.detach()}

    def pictures(self, step: Step) -> Mapping[str, Figure]:
        """Made images beside out-of-domain ones, and the classes that the teacher sees in both (Figures 3 and 4 of the paper);
        the losses, as of :class:`DataFree`."""
        from fastkd.methods import pictures  # matplotlib takes a second to import

        found = dict(super().pictures(step))
        if not self._seen:
            return found
        shown = self._seen[0].float().cpu()
        found["out-of-domain"] = pictures.image_grid(shown, mean=self.maker.mean, std=self.maker.std)
        kinds = {"made": self.judge(self.samples(len(self._seen[0]))), "out-of-domain": self.judge(self._seen[0])}
        classes = {name: judged.stats.argmax.flatten().cpu() for name, judged in kinds.items()}
        found["classes"] = pictures.class_bars(classes, kinds["made"].logits.shape[-1])
        return found

    def generator_terms(self, made: Judged) -> dict[str, Tensor]:
        found = super().generator_terms(made)
        if self.weights["local"]:
            found["local"] = self.weights["local"] * self.fooling(made.images, shares(made.usable))
        return found

    def fooling(self, images: Tensor, weight: Tensor) -> Tensor:
        """The generator's part of Eq. 3, a sum over the patches: lowest where the discriminator takes all for real."""
        return self._counts * (F.softplus(-self.patch_logits(images)).sum(1) * weight).sum()

    def other_images(self, given: Tensor | None, number: int) -> Tensor:
        """Out-of-domain images, cropped and mirrored; and those of the memory, if there is one."""
        assert given is not None
        images, mean = given[number * self.batch_size :][: self.batch_size], None
        if self.black is not None:  # then, 0 is black, with which crops are padded
            images, mean = images + self.black, self._shift
        cropped = random_crop_flip(images, self.padding, flip_probability=self.flip_probability, mean=mean)
        replayed = super().other_images(given, number)
        return cropped if replayed is None else torch.cat([cropped, replayed])
