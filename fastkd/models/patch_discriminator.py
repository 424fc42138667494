"""A network that tells real patches of images from made ones."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from fastkd._checks import check_flag, check_size

__all__ = ["PatchDiscriminator"]

SLOPE = 0.2  # of the leaky ReLUs


class _Layer(NamedTuple):
    kernel: int
    stride: int

    @property
    def padding(self) -> int:
        """That with which a stride of 2 halves a map."""
        return (self.kernel - 1) // 2


def _layers(size: int) -> list[_Layer]:
    """Convolutions, two or more, whose receptive field is ``size`` pixels: 4 x 4 and 3 x 3 ones of stride 2 for as long as they
    fit."""
    found, left = [], size - 1  # pixels to be seen beside the first, in steps of the maps so far
    while left > 3:
        kernel = 4 if left % 2 else 3
        found.append(_Layer(kernel, 2))
        left = (left - (kernel - 1)) // 2
    found.append(_Layer(left + 1, 2 if left > 1 else 1))
    return [*found, *[_Layer(1, 1)] * (2 - len(found))]


class PatchDiscriminator(nn.Module):
    """Images ``[B, C, H, W]`` to logits ``[B, 1, h, w]``, one for each patch: high where it looks real.

    Each logit sees ``size`` x ``size`` pixels and no more: an image of that size has one. So it can be given patches that were
    cropped (:func:`fastkd.random_patches`), or whole images, as a convolution. Convolutions of 4 x 4 or 3 x 3 pixels and
    stride 2, leaky ReLUs, batch norms from the second one on, and a 1 x 1 convolution to the logit. Of size 10 and ``padded``
    it is the discriminator of Fang et al., "Mosaicking to Distill" (NeurIPS 2021): 64 logits for an image of 32 x 32 pixels.

    Args:
        channels: C.
        size: of a patch, in pixels.
        width: maps of the first convolution; the others have twice as many.
        padded: whether each convolution pads its maps with zeros, by 1 for 3 x 3 and 4 x 4 pixels, so that patches reach beyond
            the edges of an image.
    """

    def __init__(self, channels: int, size: int, *, width: int = 128, padded: bool = False) -> None:
        super().__init__()
        channels, width = check_size("channels", channels, 1), check_size("width", width, 1)
        self.size, padded = check_size("size", size, 1), check_flag("padded", padded)
        modules: list[nn.Module] = []
        before = channels
        for number, layer in enumerate(_layers(self.size)):
            after = width if number == 0 else 2 * width
            padding = layer.padding if padded else 0
            modules.append(nn.Conv2d(before, after, layer.kernel, layer.stride, padding, bias=number == 0))
            if number:
                modules.append(nn.BatchNorm2d(after))
            modules.append(nn.LeakyReLU(SLOPE, inplace=True))
            before = after
        self.maps = nn.Sequential(*modules)
        self.logit = nn.Conv2d(before, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.logit(self.maps(images))  # type: ignore[no-any-return]
