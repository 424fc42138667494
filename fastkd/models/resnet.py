"""Residual networks for small images, from 80 thousand parameters to 1.7 million."""

from __future__ import annotations

from torch import Tensor, nn

from fastkd._checks import check_count, check_size
from fastkd._seeding import seeded
from fastkd.models.blocks import BasicBlock, initialise, stage
from fastkd.models.layers import MOST_DEPTH

__all__ = ["ResNet", "resnet"]

WIDTHS = (16, 32, 64)  # channels of the three stages
USUAL_DEPTHS = (8, 14, 20, 26, 32, 44, 56, 110)


class ResNet(nn.Module):
    """A 3x3 convolution, three stages of ``blocks`` residual blocks (16, 32 and 64 channels; the second and the third
    stage halve the image), the mean over the image, and a linear layer.

    The network for CIFAR of He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), section 4.2. Where a
    stage changes shape, the shortcut is a 1x1 convolution with batch norm, as in RepDistiller, by whose networks and
    settings distillation methods are compared; He et al. pad with zeros there (option A: 2,752 parameters fewer). The study
    of Sarfraz et al., "Knowledge Distillation Beyond Model Compression", of ResNet-8 to 26, does not say which.
    Modules are named as in torchvision's ResNet.

    Args:
        blocks: of each stage, n: the depth is ``6 n + 2``.
        in_channels: channels of the images.
        num_classes: number of logits K.
        seed: of the initial weights; torch's global generator stays as it is.

    Shape: float images ``[N, in_channels, H, W]`` -> logits ``[N, num_classes]``; H and W are 32 for CIFAR, 28 for MNIST,
    and may be any other (their mean is taken over ``ceil(H / 4) x ceil(W / 4)`` places).
    """

    def __init__(self, blocks: int, *, in_channels: int = 3, num_classes: int = 10, seed: int = 0) -> None:
        super().__init__()
        blocks = check_count("blocks", blocks, 1, MOST_DEPTH)
        in_channels, num_classes = check_size("in_channels", in_channels, 1), check_size("num_classes", num_classes, 1)
        with seeded(seed):
            self.conv1 = nn.Conv2d(in_channels, WIDTHS[0], 3, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(WIDTHS[0])
            self.relu = nn.ReLU(inplace=True)
            self.layer1 = stage(BasicBlock, blocks, WIDTHS[0], WIDTHS[0], stride=1)
            self.layer2 = stage(BasicBlock, blocks, WIDTHS[0], WIDTHS[1], stride=2)
            self.layer3 = stage(BasicBlock, blocks, WIDTHS[1], WIDTHS[2], stride=2)
            self.avgpool = nn.AdaptiveAvgPool2d(1)
            self.fc = nn.Linear(WIDTHS[2], num_classes)
            initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]


def resnet(depth: int, *, in_channels: int = 3, num_classes: int = 10, seed: int = 0) -> ResNet:
    """The :class:`ResNet` of a depth: 8, 14, 20, 26, 32, 44, 56, 110, or any other ``6 n + 2``. Arguments as there."""
    if not 8 <= check_count("depth", depth) <= MOST_DEPTH or depth % 6 != 2:
        usual = ", ".join(map(str, USUAL_DEPTHS))
        raise ValueError(f"fastkd: depth is {depth}, must be 6 n + 2 with n >= 1: {usual}, ..., {MOST_DEPTH} at most")
    return ResNet((depth - 2) // 6, in_channels=in_channels, num_classes=num_classes, seed=seed)
