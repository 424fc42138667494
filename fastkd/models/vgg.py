"""VGG for images of 32 x 32 pixels: plain 3x3 convolutions, with batch norm, and one linear layer."""

from __future__ import annotations

from torch import Tensor, nn

from fastkd._checks import check_count, check_size
from fastkd._seeding import seeded
from fastkd.models.blocks import check_one_of, convolution, initialise
from fastkd.models.layers import FeatureLayers

__all__ = ["VGG"]

WIDTHS = (64, 128, 256, 512, 512)  # channels of the five stages
CONVOLUTIONS = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(nn.Module):
    """Five stages of 3x3 convolutions, batch norm and ReLU, the mean over the image, and a linear layer.

    Simonyan & Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition" (ICLR 2015), table 1, columns
    A, B, D and E; their three linear layers, which have nine tenths of the parameters, are one here, so a VGG-11 has nine
    layers. As RepDistiller has it, by whose networks distillation methods are compared: VGG-8, one convolution a stage, is
    of there; the second, third and fourth stage begin with a 2x2 max pool, the fifth does not (a mean over 4 x 4 places is
    left of 32 x 32). Convolutions have no bias, which batch norm would take away again; RepDistiller's have (2,752 values
    more in VGG-11).

    The stages are ``layer1`` to ``layer5``, of which methods take the first for the stem.

    Args:
        depth: 8, 11, 13, 16 or 19.
        in_channels: channels of the images.
        num_classes: number of logits K.
        seed: of the initial weights; torch's global generator stays as it is.

    Shape: float images ``[N, in_channels, H, W]`` -> logits ``[N, num_classes]``; H and W are 32 for CIFAR, 28 for MNIST,
    and may be any other from 8 on.
    """

    feature_layers = FeatureLayers("layer1", ("layer2", "layer3", "layer4", "layer5"), "avgpool")

    def __init__(self, depth: int, *, in_channels: int = 3, num_classes: int = 10, seed: int = 0) -> None:
        super().__init__()
        many = CONVOLUTIONS[check_one_of("depth", check_count("depth", depth), CONVOLUTIONS)]
        in_channels, num_classes = check_size("in_channels", in_channels, 1), check_size("num_classes", num_classes, 1)
        with seeded(seed):
            self.layer1 = _stage(many[0], in_channels, WIDTHS[0], pool=False)
            self.layer2 = _stage(many[1], WIDTHS[0], WIDTHS[1])
            self.layer3 = _stage(many[2], WIDTHS[1], WIDTHS[2])
            self.layer4 = _stage(many[3], WIDTHS[2], WIDTHS[3])
            self.layer5 = _stage(many[4], WIDTHS[3], WIDTHS[4], pool=False)
            self.avgpool = nn.AdaptiveAvgPool2d(1)
            self.fc = nn.Linear(WIDTHS[4], num_classes)
            initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.layer5(self.layer4(self.layer3(self.layer2(self.layer1(images)))))
        return self.fc(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]


def _stage(convolutions: int, before: int, width: int, pool: bool = True) -> nn.Sequential:
    layers = [convolution(before if i == 0 else width, width) for i in range(convolutions)]
    return nn.Sequential(*([nn.MaxPool2d(2)] if pool else []), *layers)
