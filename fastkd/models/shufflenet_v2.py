"""ShuffleNetV2 for images of 32 x 32 pixels: each unit works on half of the channels, which are then mixed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastkd._checks import check_number, check_size
from fastkd._seeding import seeded
from fastkd.models.blocks import check_one_of, convolution, initialise, stage
from fastkd.models.layers import FeatureLayers

__all__ = ["ShuffleNetV2"]

STEM = 24  # channels of the stem
BLOCKS = (4, 8, 4)
WIDTHS = {  # channels of the three stages and of the last convolution
    0.5: (48, 96, 192, 1024),
    1.0: (116, 232, 464, 1024),
    1.5: (176, 352, 704, 1024),
    2.0: (244, 488, 976, 2048),
}


class _Unit(nn.Module):
    """1x1, 3x3 depthwise and 1x1 convolution of one half of the channels, beside the other half as it is; then both are
    shuffled. With stride 2 both branches see all channels, and the other one is a 3x3 depthwise and a 1x1 convolution."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        half, self.halves = width // 2, stride == 1
        seen = before // 2 if self.halves else before
        self.branch = nn.Sequential(
            convolution(seen, half, 1),
            convolution(half, half, 3, stride, groups=half, activation=None),
            convolution(half, half, 1),
        )
        self.other = (
            nn.Identity()
            if self.halves
            else nn.Sequential(
                convolution(before, before, 3, stride, groups=before, activation=None), convolution(before, half, 1)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        other, x = x.chunk(2, 1) if self.halves else (x, x)
        pair = torch.stack([self.other(other), self.branch(x)], 2)
        return pair.flatten(1, 2)  # a channel of the one, a channel of the other, in turns


class ShuffleNetV2(nn.Module):
    """A 3x3 convolution, three stages of 4, 8 and 4 units that each halve the image, a 1x1 convolution, the mean over the
    image, and a linear layer.

    Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design" (ECCV 2018), figure 3 and table 5,
    whose first convolution has stride 2 and a max pool behind it. For 32 x 32 pixels it has stride 1 and there is no pool,
    as in pytorch-cifar: 4 x 4 places are left. RepDistiller's first convolution is 1x1 instead of 3x3.

    The stages are ``layer1`` to ``layer3``; methods take ``head``, the convolution behind them, for the last one, whose mean
    is the embedding.

    Args:
        width: 0.5, 1, 1.5 or 2, which stands for (116, 232, 464) channels and 1024 of the last convolution where it is 1.
        in_channels: channels of the images.
        num_classes: number of logits K.
        seed: of the initial weights; torch's global generator stays as it is.

    Shape: float images ``[N, in_channels, H, W]`` -> logits ``[N, num_classes]``; H and W are 32 for CIFAR, 28 for MNIST,
    and may be any other (their mean is taken over ``ceil(H / 8) x ceil(W / 8)`` places).
    """

    feature_layers = FeatureLayers("stem", ("layer1", "layer2", "head"), "avgpool")

    def __init__(self, width: float = 1.0, *, in_channels: int = 3, num_classes: int = 10, seed: int = 0) -> None:
        super().__init__()
        *widths, last = WIDTHS[check_one_of("width", check_number("width", width), WIDTHS)]
        in_channels, num_classes = check_size("in_channels", in_channels, 1), check_size("num_classes", num_classes, 1)
        with seeded(seed):
            self.stem = convolution(in_channels, STEM)
            self.layer1 = stage(_Unit, BLOCKS[0], STEM, widths[0], stride=2)
            self.layer2 = stage(_Unit, BLOCKS[1], widths[0], widths[1], stride=2)
            self.layer3 = stage(_Unit, BLOCKS[2], widths[1], widths[2], stride=2)
            self.head = convolution(widths[2], last, 1)
            self.avgpool = nn.AdaptiveAvgPool2d(1)
            self.fc = nn.Linear(last, num_classes)
            initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.stem(images))))
        return self.fc(self.avgpool(self.head(x)).flatten(1))  # type: ignore[no-any-return]
