"""Networks that make images: a DCGAN-style generator, and the encoder that makes a variational autoencoder of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastkd._checks import check_size

__all__ = ["Encoder", "Generator", "ToImages"]

SMALLEST = 4  # pixels of a side, as it is halved twice


class ToImages(nn.Module):
    """The last maps as images that a teacher takes.

    With mean and std, values in [0, 1] by a sigmoid, normalised as the teacher's own images are; else tanh and a batch norm
    without weights, which makes images of mean 0 and variance 1 of a teacher whose normalisation need not be known (DAFL).
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(self, channels: int, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        super().__init__()
        if (mean is None) != (std is None):
            raise ValueError("fastkd: mean and std are one given and one not, must be both or neither")
        for name, values in (("mean", mean), ("std", std)):
            if values is not None and len(values) != channels:
                raise ValueError(
                    f"fastkd: {name} has {len(values)} values, must be one for each of {channels} channels"
                )
            made = None if values is None else torch.tensor(list(values), dtype=torch.float32).view(-1, 1, 1)
            self.register_buffer(name, made, persistent=False)
        self.norm = nn.BatchNorm2d(channels, affine=False) if mean is None else None

    def forward(self, maps: Tensor) -> Tensor:
        if self.norm is not None:
            return self.norm(maps.tanh())  # type: ignore[no-any-return]
        assert self.mean is not None
        assert self.std is not None
        return (maps.sigmoid() - self.mean) / self.std


class Generator(nn.Module):
    """Noise ``[B, latent]`` to images ``[B, C, H, W]``: a linear layer to maps of a quarter of each side, then twice as large
    and twice again, by nearest neighbours, with a 3x3 convolution, a batch norm and a leaky ReLU after each.

    That of DAFL and of the methods after it (width, width and width / 2 maps; theirs is 128), or of MosaicKD, whose first
    stage is twice as wide.

    Args:
        latent: dimensions of the noise.
        shape: (C, H, W) of the images.
        width: maps of the second stage; the last has half as many.
        first_stage: maps of the first stage, over width.
        mean, std: as of :class:`ToImages`, a number a channel.

    Raises:
        ValueError: images that are smaller than 4 x 4 pixels.
    """

    def __init__(
        self,
        latent: int,
        shape: Sequence[int],
        *,
        width: int = 128,
        first_stage: int = 1,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        latent, width = check_size("latent", latent, 1), check_size("width", width, 2)
        first = width * check_size("first_stage", first_stage, 1)
        channels, height, side = check_image_shape(shape)
        half, quarter = ((-(-height // n), -(-side // n)) for n in (2, 4))
        self.first = nn.Sequential(
            nn.Linear(latent, first * quarter[0] * quarter[1]),
            nn.Unflatten(1, (first, *quarter)),
            nn.BatchNorm2d(first),
            nn.LeakyReLU(0.2),
        )
        self.second = _upsampled(first, width, half)
        self.third = _upsampled(width, width // 2, (height, side))
        self.last = nn.Sequential(nn.Conv2d(width // 2, channels, 3, padding=1), ToImages(channels, mean, std))

    def forward(self, noise: Tensor) -> Tensor:
        maps = self.first(noise)
        if not maps.is_cuda:  # where a CPU enlarges and convolves few channels up to five times as fast
            maps = maps.contiguous(memory_format=torch.channels_last)
        return self.last(self.third(self.second(maps)))  # type: ignore[no-any-return]

    def reset(self) -> None:
        """New weights, by torch's global generator."""
        for module in self.modules():
            restart: Any = getattr(module, "reset_parameters", None)
            if restart is not None:
                restart()


class Encoder(nn.Module):
    """Images ``[B, C, H, W]`` to mean and log-variance of a Gaussian ``[B, latent]`` each: a generator's other half.

    Three 3x3 convolutions of width / 2, width and width maps, the last two of them halving the sides.
    """

    def __init__(self, latent: int, shape: Sequence[int], *, width: int = 128) -> None:
        super().__init__()
        latent, width = check_size("latent", latent, 1), check_size("width", width, 2)
        channels, height, side = check_image_shape(shape)
        self.maps = nn.Sequential(
            *_convolved(channels, width // 2, 1), *_convolved(width // 2, width, 2), *_convolved(width, width, 2)
        )
        self.moments = nn.Linear(width * -(-height // 4) * -(-side // 4), 2 * latent)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.moments(self.maps(images).flatten(1)).chunk(2, 1)
        return mean, log_variance


def check_image_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """(C, H, W) that a generator can make."""
    if len(shape) != 3 or min(shape) < 1 or min(shape[1:]) < SMALLEST:
        raise ValueError(
            f"fastkd: images are of shape {tuple(shape)}, must be (C, H, W) with sides of {SMALLEST} pixels or more for a "
            "generator"
        )
    channels, height, width = (int(size) for size in shape)
    return channels, height, width


def _upsampled(channels: int, out: int, size: tuple[int, int]) -> nn.Sequential:
    convolution = nn.Conv2d(channels, out, 3, padding=1, bias=False)
    return nn.Sequential(nn.Upsample(size), convolution, nn.BatchNorm2d(out), nn.LeakyReLU(0.2))


def _convolved(channels: int, out: int, stride: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(out), nn.LeakyReLU(0.2)
