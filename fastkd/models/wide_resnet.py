"""Wide residual networks for small images: as accurate as far deeper thin ones, and faster."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from fastkd._checks import check_count, check_number, check_size
from fastkd._seeding import seeded
from fastkd.models.blocks import initialise, stage
from fastkd.models.layers import MOST_DEPTH, MOST_WIDTH, FeatureLayers

__all__ = ["WideResNet", "wide_resnet"]

WIDTHS = (16, 32, 64)  # channels of the three stages at width 1; the stem has 16 at any width
USUAL_DEPTHS = (10, 16, 22, 28, 40)


class _Block(nn.Module):
    """Batch norm, ReLU, 3x3 convolution, twice, around a shortcut.

    Where the shape changes, the shortcut is a 1x1 convolution of the activated input, as in the authors' network.
    """

    def __init__(self, before: int, width: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.downsample = None if before == width and stride == 1 else nn.Conv2d(before, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(active)
        x = self.dropout(self.relu(self.bn2(self.conv1(active))))
        return self.conv2(x) + shortcut  # type: ignore[no-any-return]


class WideResNet(nn.Module):
    """A 3x3 convolution, three stages of ``blocks`` pre-activation blocks (``16 width``, ``32 width`` and ``64 width``
    channels; the second and the third stage halve the image), batch norm, ReLU, the mean over the image, a linear layer.

    Zagoruyko & Komodakis, "Wide Residual Networks" (BMVC 2016), table 1, basic blocks B(3, 3). Modules are named as in
    torchvision's ResNet, ``bn1`` and ``relu`` being behind the stages here; run in order, they are the forward.

    Args:
        blocks: of each stage, n: the depth is ``6 n + 4``.
        width: the widening factor k.
        in_channels: channels of the images.
        num_classes: number of logits K.
        dropout: probability, in each block between the convolutions.
        seed: of the initial weights; torch's global generator stays as it is.

    Shape: float images ``[N, in_channels, H, W]`` -> logits ``[N, num_classes]``; H and W are 32 for CIFAR, 28 for MNIST,
    and may be any other (their mean is taken over ``ceil(H / 4) x ceil(W / 4)`` places).
    """

    feature_layers = FeatureLayers("conv1", ("layer1", "layer2", "relu"), "avgpool")

    def __init__(
        self,
        blocks: int,
        width: int,
        *,
        in_channels: int = 3,
        num_classes: int = 10,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        blocks, width = check_count("blocks", blocks, 1, MOST_DEPTH), check_count("width", width, 1, MOST_WIDTH + 1)
        in_channels, num_classes = check_size("in_channels", in_channels, 1), check_size("num_classes", num_classes, 1)
        if not 0.0 <= check_number("dropout", dropout) < 1.0:
            raise ValueError(f"fastkd: dropout is {dropout}, must be in [0, 1)")
        stem, *widths = WIDTHS[0], *(width * channels for channels in WIDTHS)
        block = partial(_Block, dropout=dropout)
        with seeded(seed):
            self.conv1 = nn.Conv2d(in_channels, stem, 3, padding=1, bias=False)
            self.layer1 = stage(block, blocks, stem, widths[0], stride=1)
            self.layer2 = stage(block, blocks, widths[0], widths[1], stride=2)
            self.layer3 = stage(block, blocks, widths[1], widths[2], stride=2)
            self.bn1 = nn.BatchNorm2d(widths[2])
            self.relu = nn.ReLU(inplace=True)
            self.avgpool = nn.AdaptiveAvgPool2d(1)
            self.fc = nn.Linear(widths[2], num_classes)
            initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(images))))
        x = self.relu(self.bn1(x))
        return self.fc(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]


def wide_resnet(
    depth: int, width: int, *, in_channels: int = 3, num_classes: int = 10, dropout: float = 0.0, seed: int = 0
) -> WideResNet:
    """The :class:`WideResNet` WRN-depth-width: depth 10, 16, 22, 28, 40, or any other ``6 n + 4``. Arguments as there."""
    if not 10 <= check_count("depth", depth) <= MOST_DEPTH or depth % 6 != 4:
        usual = ", ".join(map(str, USUAL_DEPTHS))
        raise ValueError(f"fastkd: depth is {depth}, must be 6 n + 4 with n >= 1: {usual}, ..., {MOST_DEPTH} at most")
    return WideResNet(
        (depth - 4) // 6, width, in_channels=in_channels, num_classes=num_classes, dropout=dropout, seed=seed
    )
