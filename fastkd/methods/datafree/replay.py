"""Images of earlier epochs, by a variational autoencoder that has learnt to make them (PRE-DFKD)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastkd.models.generator import Encoder, Generator

__all__ = ["Replay", "gaussian_divergence"]


def gaussian_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """``KL(N(mean, variance) || N(0, 1))``, summed over the dimensions, mean over the batch ``[B, d]``."""
    rows: Tensor = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum(1)
    return rows.mean()


class Replay(nn.Module):
    """Learns, in each iteration, new images and those that it makes itself, so that old ones are not lost.

    Binici et al., "Robust and Resource-Efficient Data-Free Knowledge Distillation by Generative Pseudo Replay" (AAAI 2022).
    The single step by which their code moves the latents of the images that it replays, down the teacher's losses, is left
    out: it moves each number by the learning rate, 0.001.

    Args:
        divergence_weight: of the KL divergence, beside an L1 distance of images and one of the teacher's logits.
    """

    def __init__(
        self,
        latent: int,
        shape: Sequence[int],
        *,
        width: int = 128,
        divergence_weight: float = 1e-5,
    ) -> None:
        super().__init__()
        self.latent, self.divergence_weight = latent, divergence_weight
        self.encoder = Encoder(latent, shape, width=width)
        self.decoder = Generator(latent, shape, width=width)

    def loss(self, images: Tensor, teacher_logits: Tensor, teacher: Callable[[Tensor], Tensor]) -> Tensor:
        """Of new images ``[B, C, H, W]``, half of which are learnt, and as many of its own.

        Args:
            teacher_logits: of the images, ``[B, K]``.
            teacher: images to logits.
        """
        half = max(2, len(images) // 2)  # of which a batch norm takes no single one
        with torch.no_grad():
            own = self.samples(half)
            target = torch.cat([images[:half], own])
            logits = torch.cat([teacher_logits[:half], teacher(own)])
        mean, log_variance = self.encoder(target)
        made = self.decoder(mean + (0.5 * log_variance).exp() * torch.randn_like(mean))
        distance: Tensor = (made - target).abs().mean() + (teacher(made) - logits).abs().mean()
        return distance + self.divergence_weight * gaussian_divergence(mean, log_variance)

    def samples(self, count: int) -> Tensor:
        """Images of noise, ``[count, C, H, W]``."""
        like = next(self.parameters())
        noise = torch.randn(count, self.latent, dtype=like.dtype, device=like.device)
        return self.decoder(noise)  # type: ignore[no-any-return]
