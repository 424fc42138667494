"""What makes the images: a generator of noise, a generator with latents of its own, or the pixels themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastkd import _checks
from fastkd.models.generator import Generator, ToImages, check_image_shape

__all__ = ["Images", "Maker", "Source", "Squash"]

Source = Literal["noise", "latents", "pixels"]
Squash = Literal["tanh", "sigmoid"]


class Images(NamedTuple):
    """A batch, as it is made."""

    images: Tensor
    """``[B, C, H, W]``, normalised, differentiable in what makes them."""
    labels: Tensor | None
    """int64 ``[B]``, the classes that they are asked to be of, if any."""


class Maker(nn.Module):
    """Makes batches of images.

    Args:
        source: ``noise``: a generator, of noise that is drawn anew each time. ``latents``: a generator, of latents that are
            optimised with it. ``pixels``: images that are optimised.
        batch_size: B.
        shape: (C, H, W).
        mean, std: of the teacher's images, if known.
        squash: of the generator: ``tanh`` and a batch norm without weights, or ``sigmoid``, normalised by mean and std.
        classes: K, where each image is asked to be of a class, all classes alike; 0: none is.
        latent: dimensions of noise and latents.
        width: maps of the generator.
        first_stage: maps of the generator's first stage, over width.
        jitter: pixels, up to which images that are optimised are shifted each time, at random.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        shape: Sequence[int],
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        *,
        squash: Squash = "tanh",
        classes: int = 0,
        latent: int = 256,
        width: int = 128,
        first_stage: int = 1,
        jitter: int = 0,
    ) -> None:
        super().__init__()
        self.shape = check_image_shape(shape)
        self.batch_size = _checks.check_count("batch_size", batch_size, 2)
        self.latent, self.classes = _checks.check_count("latent", latent, 1), classes
        self.jitter = _checks.check_count("jitter", jitter, 0)
        if jitter and source != "pixels":
            raise ValueError(f"fastkd: jitter is {jitter}, must be 0 for the source {source!r}")
        self.mean = None if mean is None else tuple(mean)
        self.std = None if std is None else tuple(std)
        self.generator: Generator | None = None
        if source != "pixels":
            if squash == "sigmoid" and mean is None:
                raise ValueError("fastkd: mean is None, must be that of the teacher's images for the squash 'sigmoid'")
            norm = (mean, std) if squash == "sigmoid" else (None, None)
            wide = {"width": width, "first_stage": first_stage}
            self.generator = Generator(latent, self.shape, **wide, mean=norm[0], std=norm[1])
        self.drawn: nn.Parameter | None = None
        """Latents ``[B, latent]``, or pixels ``[B, C, H, W]``."""
        if source != "noise":
            self.drawn = nn.Parameter(torch.randn(batch_size, *(self.shape if source == "pixels" else (latent,))))
        # of pixels; on the device, which else would be waited for in each step
        known = source == "pixels" and not (mean is None and std is None)
        self.scale = ToImages(self.shape[0], mean, std) if known else None

    def forward(self) -> Images:
        """A batch."""
        labels = None
        if self.classes:
            labels = torch.arange(self.batch_size, device=self.device) % self.classes
        if self.generator is not None:
            return Images(self.generator(self.noise(self.batch_size) if self.drawn is None else self.drawn), labels)
        assert self.drawn is not None
        images: Tensor = self.drawn
        if self.jitter:
            images = self._shifted(images)
        return Images(images, labels)

    def _shifted(self, images: Tensor) -> Tensor:
        """All by the same numbers of pixels, around the edges. The shifts stay on the device: nothing waits, and neither
        torch.compile nor a CUDA graph takes them for constants."""
        shifts = torch.randint(-self.jitter, self.jitter + 1, (2,), device=images.device)
        for dim, shift in zip((2, 3), shifts.unbind(), strict=True):
            side = images.shape[dim]
            images = images.index_select(dim, (torch.arange(side, device=images.device) - shift) % side)
        return images

    @torch.no_grad()
    def samples(self, count: int) -> Tensor:
        """So many images; of latents and pixels, as often as there are."""
        if self.generator is not None and self.drawn is None:
            return self.generator(self.noise(count))  # type: ignore[no-any-return]
        return torch.cat([self().images] * -(-count // self.batch_size))[:count]

    def noise(self, count: int) -> Tensor:
        """For the generator, ``[count, latent]``."""
        return torch.randn(count, self.latent, dtype=next(self.parameters()).dtype, device=self.device)

    @property
    def lasting(self) -> bool:
        """Whether the next batch is made by what made the last one, and not drawn anew."""
        return self.drawn is None

    @torch.no_grad()
    def draw_anew(self, *, generator: bool) -> None:
        """Latents or pixels, where there are any, other ones in each process; and the weights of the generator, where that is
        asked for, the same in all."""
        if self.drawn is not None:
            self.drawn.normal_()
        if generator and self.generator is not None:
            self.generator.reset()
            if dist.is_available() and dist.is_initialized():
                for parameter in self.generator.parameters():
                    dist.broadcast(parameter, 0)

    @torch.no_grad()
    def keep_in_range(self) -> None:
        """Pixels stay values of an image, where these are known."""
        if self.scale is None:
            return
        assert self.drawn is not None
        mean, std = self.scale.mean, self.scale.std
        assert mean is not None
        assert std is not None
        self.drawn.copy_(self.drawn.clamp(-mean / std, (1.0 - mean) / std))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device
