"""Densely connected networks for images of 32 x 32 pixels: every layer sees the maps of all before it in its stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastkd._checks import check_count, check_size
from fastkd._seeding import seeded
from fastkd.models.blocks import check_one_of, initialise
from fastkd.models.layers import MOST_DEPTH, MOST_WIDTH, FeatureLayers

__all__ = ["DenseNet", "cifar_densenet", "densenet_bc"]

BOTTLENECK = 4  # channels of the 1x1 convolutions, over the growth
USUAL = ((100, 12), (250, 24), (190, 40))  # depth and growth of the paper's networks
LAYERS = {121: (6, 12, 24, 16), 169: (6, 12, 32, 32), 201: (6, 12, 48, 32)}  # of those for ImageNet, of growth 32


class _Layer(nn.Module):
    """Batch norm, ReLU, 1x1 convolution, batch norm, ReLU, 3x3 convolution: ``growth`` channels behind those that come in."""

    def __init__(self, before: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(before, BOTTLENECK * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(BOTTLENECK * growth)
        self.conv2 = nn.Conv2d(BOTTLENECK * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv1(self.relu(self.bn1(x)))
        return torch.cat([x, self.conv2(self.relu(self.bn2(new)))], 1)


class DenseNet(nn.Module):
    """A 3x3 convolution of ``2 growth`` channels, stages of dense layers, batch norm, ReLU, the mean over the image, and a
    linear layer. All stages but the first begin with a transition: batch norm, ReLU, a 1x1 convolution to half of the
    channels, a 2x2 mean.

    Huang et al., "Densely Connected Convolutional Networks" (CVPR 2017), section 3, DenseNet-BC: with bottlenecks and
    compression by 0.5, without dropout.

    Args:
        layers: of each stage, one stage or more.
        growth: channels that a layer adds, k.
        in_channels: channels of the images.
        num_classes: number of logits K.
        seed: of the initial weights; torch's global generator stays as it is.

    Shape: float images ``[N, in_channels, H, W]`` -> logits ``[N, num_classes]``; H and W are 32 for CIFAR, 28 for MNIST,
    and may be any other that can be halved once for each stage but the first.
    """

    def __init__(
        self, layers: Sequence[int], growth: int, *, in_channels: int = 3, num_classes: int = 10, seed: int = 0
    ) -> None:
        super().__init__()
        if not isinstance(layers, Sequence):
            raise TypeError(f"fastkd: layers is {type(layers).__name__}, must be a sequence of numbers, one a stage")
        if not layers:
            raise ValueError("fastkd: layers is empty, must be of one stage or more")
        layers = [check_count(f"layers[{i}]", many, 1, MOST_DEPTH) for i, many in enumerate(layers)]
        growth = check_count("growth", growth, 1, MOST_WIDTH + 1)
        in_channels, num_classes = check_size("in_channels", in_channels, 1), check_size("num_classes", num_classes, 1)
        channels = 2 * growth
        self.stages = tuple(f"layer{i}" for i in range(1, len(layers) + 1))
        self.feature_layers = FeatureLayers("conv1", (*self.stages[:-1], "relu"), "avgpool")
        with seeded(seed):
            self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
            for i, (name, many) in enumerate(zip(self.stages, layers, strict=True)):
                transition = _transition(channels) if i else []
                channels = channels // 2 if i else channels
                dense = [_Layer(channels + j * growth, growth) for j in range(many)]
                self.add_module(name, nn.Sequential(*transition, *dense))
                channels += many * growth
            self.bn1 = nn.BatchNorm2d(channels)
            self.relu = nn.ReLU(inplace=True)
            self.avgpool = nn.AdaptiveAvgPool2d(1)
            self.fc = nn.Linear(channels, num_classes)
            initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images)
        for name in self.stages:
            x = getattr(self, name)(x)
        x = self.relu(self.bn1(x))
        return self.fc(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]


def densenet_bc(depth: int, growth: int, *, in_channels: int = 3, num_classes: int = 10, seed: int = 0) -> DenseNet:
    """The :class:`DenseNet` of the paper's table 2, DenseNet-BC of a depth and a growth: (100, 12), (250, 24), (190, 40), or
    any other depth ``6 n + 4``: three stages of n layers. Arguments as there."""
    if not 10 <= check_count("depth", depth) <= MOST_DEPTH or depth % 6 != 4:
        raise ValueError(
            f"fastkd: depth is {depth}, must be 6 n + 4 with n >= 1: 100, 190, 250, ..., {MOST_DEPTH} at most"
        )
    layers = [(depth - 4) // 6] * 3
    return DenseNet(layers, growth, in_channels=in_channels, num_classes=num_classes, seed=seed)


def cifar_densenet(depth: int, *, in_channels: int = 3, num_classes: int = 10, seed: int = 0) -> DenseNet:
    """The :class:`DenseNet` of depth 121, 169 or 201 of the paper's table 1, known from ImageNet: four stages, growth 32.
    The first convolution, for 32 x 32 pixels, is the 3x3 one without a max pool. Arguments as there."""
    layers = LAYERS[check_one_of("depth", check_count("depth", depth), LAYERS)]
    return DenseNet(layers, 32, in_channels=in_channels, num_classes=num_classes, seed=seed)


def _transition(channels: int) -> list[nn.Module]:
    return [
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels // 2, 1, bias=False),
        nn.AvgPool2d(2),
    ]
