"""The residual networks known from ImageNet, for images of 32 x 32 pixels: 11 million parameters and more."""

from __future__ import annotations

from torch import Tensor, nn

from fastkd._checks import check_count, check_size
from fastkd._seeding import seeded
from fastkd.models.blocks import BasicBlock, check_one_of, initialise, shortcut, stage

__all__ = ["CifarResNet"]

WIDTHS = (64, 128, 256, 512)  # channels of the four stages; four times as many with bottlenecks
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
EXPANSION = 4  # channels of a bottleneck's output, over those of its 3x3 convolution


class _Bottleneck(nn.Module):
    """A 1x1 convolution to a quarter of the channels, a 3x3 one there, a 1x1 one back, around a shortcut."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        narrow = width // EXPANSION
        self.conv1 = nn.Conv2d(before, narrow, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(narrow)
        self.conv2 = nn.Conv2d(narrow, narrow, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(narrow)
        self.conv3 = nn.Conv2d(narrow, width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(before, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        beside = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.bn3(self.conv3(x)) + beside)  # type: ignore[no-any-return]


class CifarResNet(nn.Module):
    """A 3x3 convolution, four stages of residual blocks (64, 128, 256 and 512 channels; all but the first halve the image),
    the mean over the image, and a linear layer.

    He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), table 1, whose first 7x7 convolution of stride 2 and
    max pool would leave 8 x 8 places of 32 x 32. As in the public code of data-free distillation (DAFL, DFAD, CMI, TA-DFKD)
    and of DivideMix, a 3x3 convolution of stride 1 takes their place. Depth 18 and 34 have basic blocks, the others
    bottlenecks, whose 3x3 convolution has the stride, as in torchvision's. Modules are named as there.

    The thinner networks that He et al. made for CIFAR are :class:`fastkd.models.resnet.ResNet`.

    Args:
        depth: 18, 34, 50, 101 or 152.
        in_channels: channels of the images.
        num_classes: number of logits K.
        seed: of the initial weights; torch's global generator stays as it is.

    Shape: float images ``[N, in_channels, H, W]`` -> logits ``[N, num_classes]``; H and W are 32 for CIFAR, 28 for MNIST,
    and may be any other (their mean is taken over ``ceil(H / 8) x ceil(W / 8)`` places).
    """

    def __init__(self, depth: int, *, in_channels: int = 3, num_classes: int = 10, seed: int = 0) -> None:
        super().__init__()
        depth = check_one_of("depth", check_count("depth", depth), BLOCKS)
        in_channels, num_classes = check_size("in_channels", in_channels, 1), check_size("num_classes", num_classes, 1)
        basic, blocks = depth < 50, BLOCKS[depth]
        block = BasicBlock if basic else _Bottleneck
        widths = [width if basic else EXPANSION * width for width in WIDTHS]
        with seeded(seed):
            self.conv1 = nn.Conv2d(in_channels, WIDTHS[0], 3, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(WIDTHS[0])
            self.relu = nn.ReLU(inplace=True)
            self.layer1 = stage(block, blocks[0], WIDTHS[0], widths[0], stride=1)
            self.layer2 = stage(block, blocks[1], widths[0], widths[1], stride=2)
            self.layer3 = stage(block, blocks[2], widths[1], widths[2], stride=2)
            self.layer4 = stage(block, blocks[3], widths[2], widths[3], stride=2)
            self.avgpool = nn.AdaptiveAvgPool2d(1)
            self.fc = nn.Linear(widths[3], num_classes)
            initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]
