"""A small fully convolutional network, for segmentation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastkd._checks import check_size
from fastkd._seeding import seeded
from fastkd.models.layers import FeatureLayers

__all__ = ["USUAL", "Segmenter", "segmenter"]

USUAL = ((8, 16, 16), (16, 32, 32), (32, 64, 64, 64))


class Segmenter(nn.Module):
    """Stages ``layer1``, ``layer2``, ... of 3x3 convolution, batch norm, ReLU, then a ``classifier`` of each pixel.

    The second stage halves the image: those after it then cost a quarter, and see twice as far, four stages 13 x 13 pixels. The
    classifier, a 1x1 convolution, says four pixels of each place (sub-pixel convolution: Shi et al., CVPR 2016,
    arXiv:1609.05158). The children run in their order, so :class:`fastkd.methods.ONE` can split it. Methods look into the first
    stage, the last of the whole size, and into the last one, of half the size, so that networks of any depths compare.

    Args:
        widths: channels of each stage, two or more of them.
        in_channels: channels of the images.
        classes: number of logits K of a pixel.
        seed: of the initial weights; torch's global generator stays as it is.

    Shape: float images ``[N, in_channels, H, W]``, H and W even -> logits ``[N, classes, H, W]``.
    """

    def __init__(self, widths: Sequence[int], *, in_channels: int = 1, classes: int = 11, seed: int = 0) -> None:
        super().__init__()
        if not isinstance(widths, Sequence):
            raise TypeError(f"fastkd: widths is {type(widths).__name__}, must be a sequence of channels, one a stage")
        widths = [check_size(f"widths[{i}]", width, 1) for i, width in enumerate(widths)]
        in_channels, classes = check_size("in_channels", in_channels, 1), check_size("classes", classes, 1)
        if len(widths) < 2:
            raise ValueError(f"fastkd: widths is {tuple(widths)}, must be two stages or more")
        with seeded(seed):
            for i, (before, width) in enumerate(zip([in_channels, *widths], widths, strict=False), start=1):
                convolution = nn.Conv2d(before, width, 3, stride=2 if i == 2 else 1, padding=1, bias=False)
                self.add_module(f"layer{i}", nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU()))
            self.classifier = nn.Sequential(nn.Conv2d(widths[-1], 4 * classes, 1), nn.PixelShuffle(2))
        last = f"layer{len(widths)}"
        self.feature_layers = FeatureLayers("layer1.0", ("layer1", last), last)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-1] % 2 or images.shape[-2] % 2:
            raise ValueError(f"fastkd: images has shape {tuple(images.shape)}, must be [N, C, H, W], H and W even")
        for stage in self.children():
            images = stage(images)
        return images


def segmenter(*widths: int, in_channels: int = 3, num_classes: int = 10, seed: int = 0) -> Segmenter:
    """The network of these stages, by the arguments that all networks with a name have."""
    return Segmenter(widths, in_channels=in_channels, classes=num_classes, seed=seed)
