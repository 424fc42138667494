"""TwoConvNet: a student that is wide and not deep, for what a teacher cannot hand over to such a network."""

from __future__ import annotations

from torch import Tensor, nn

from fastkd._checks import check_size
from fastkd._seeding import seeded
from fastkd.models.blocks import initialise
from fastkd.models.layers import FeatureLayers

__all__ = ["TwoConvNet"]

WIDTHS = (512, 2048)  # channels of the two stages
DEPTHWISE = 21, 2  # maps that the depthwise convolutions make of each channel: 63 of RGB, 1024 of 512


class TwoConvNet(nn.Module):
    """Two depthwise-separable convolutions (7x7 depthwise to 63 channels, 1x1 to 512; 5x5 depthwise to 1024, 1x1 to 2048; both
    of stride 2, without padding) with batch norm and ReLU, the mean over the image, and a linear layer.

    Begon & Geurts, "Distillation from heterogeneous unlabeled collections", table 8, which is of 224 x 224 pixels: its
    109 and 53 places a side tell that nothing is padded. It does not say whether the convolutions have biases; here they have
    none, as the batch norm behind each pair would take them away again.

    Args:
        in_channels: channels of the images.
        num_classes: number of logits K.
        seed: of the initial weights; torch's global generator stays as it is.

    Shape: float images ``[N, in_channels, H, W]`` -> logits ``[N, num_classes]``; H and W are 32 for CIFAR (13 and 5 places a
    side), 28 for MNIST, and may be any other from 15 on.
    """

    feature_layers = FeatureLayers("conv1", ("layer1", "layer2"), "avgpool")

    def __init__(self, *, in_channels: int = 3, num_classes: int = 10, seed: int = 0) -> None:
        super().__init__()
        in_channels, num_classes = check_size("in_channels", in_channels, 1), check_size("num_classes", num_classes, 1)
        with seeded(seed):
            self.conv1 = _depthwise(in_channels, DEPTHWISE[0], 7)
            self.layer1 = nn.Sequential(*_pointwise(DEPTHWISE[0] * in_channels, WIDTHS[0]))
            self.layer2 = nn.Sequential(
                _depthwise(WIDTHS[0], DEPTHWISE[1], 5), *_pointwise(DEPTHWISE[1] * WIDTHS[0], WIDTHS[1])
            )
            self.avgpool = nn.AdaptiveAvgPool2d(1)
            self.fc = nn.Linear(WIDTHS[1], num_classes)
            initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.conv1(images)))
        return self.fc(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]


def _depthwise(channels: int, many: int, size: int) -> nn.Conv2d:
    return nn.Conv2d(channels, many * channels, size, stride=2, groups=channels, bias=False)


def _pointwise(before: int, width: int) -> list[nn.Module]:
    return [nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
