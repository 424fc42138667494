"""MobileNetV2 for images of 32 x 32 pixels: few parameters, in depthwise convolutions between narrow layers."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from fastkd._checks import check_between, check_count, check_size
from fastkd._seeding import seeded
from fastkd.models.blocks import convolution, initialise, stage
from fastkd.models.layers import FeatureLayers

__all__ = ["MobileNetV2"]

STEM = 32  # channels of the stem
WIDTHS = (16, 24, 32, 64, 96, 160, 320)  # of the seven sequences of blocks
EMBEDDING = 1280
EXPANSION = 6


class _Block(nn.Module):
    """A 1x1 convolution to ``expansion`` times the channels, a 3x3 depthwise one, a 1x1 one without activation; around them
    a shortcut, if the shape stays. Where nothing expands there is no first convolution."""

    def __init__(self, before: int, width: int, stride: int, expansion: int = EXPANSION) -> None:
        super().__init__()
        wide = before * expansion
        self.expand = nn.Identity() if expansion == 1 else convolution(before, wide, 1, activation=nn.ReLU6)
        self.depthwise = convolution(wide, wide, 3, stride, groups=wide, activation=nn.ReLU6)
        self.project = convolution(wide, width, 1, activation=None)
        self.has_shortcut = before == width and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.has_shortcut else y


class MobileNetV2(nn.Module):
    """A 3x3 convolution, four stages of inverted residual blocks, a 1x1 convolution to 1280 channels, the mean over the image,
    and a linear layer.

    Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (CVPR 2018), table 2, whose five strides of 2
    would leave a single place of 32 x 32. RepDistiller, by whose networks distillation methods are compared, leaves out one
    of them, that of the 24 channels, and so does this: 2 x 2 places are left. Its ``mobile_half`` is ``width=0.5``, but for
    ReLU in the place of ReLU6 and a 1x1 convolution in the first block, where nothing expands. ``stem_stride=1`` leaves
    4 x 4, as in pytorch-cifar.

    The stages are ``layer1`` (24 channels) to ``layer4`` (320); as those end without activation, methods take ``head``, the
    1280 channels, for the last one.

    Args:
        width: the multiplier of all channels but the last ones, rounded down, in [0.1, 10].
        embedding: channels that the linear layer sees. Begon & Geurts make them 2048, those of their teacher. By default
            1280, times the width where it is above 1.
        stem_stride: 1 or 2.
        in_channels: channels of the images.
        num_classes: number of logits K.
        seed: of the initial weights; torch's global generator stays as it is.

    Shape: float images ``[N, in_channels, H, W]`` -> logits ``[N, num_classes]``; H and W are 32 for CIFAR, 28 for MNIST,
    and may be any other.
    """

    feature_layers = FeatureLayers("stem", ("layer1", "layer2", "layer3", "head"), "avgpool")

    def __init__(
        self,
        width: float = 1.0,
        *,
        embedding: int | None = None,
        stem_stride: int = 2,
        in_channels: int = 3,
        num_classes: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__()
        width = check_between("width", width, 0.1, 10.0)
        embedding = int(EMBEDDING * max(1.0, width)) if embedding is None else check_size("embedding", embedding, 1)
        stem_stride = check_count("stem_stride", stem_stride, 1, 3)
        in_channels, num_classes = check_size("in_channels", in_channels, 1), check_size("num_classes", num_classes, 1)
        stem, *widths = (int(channels * width) for channels in (STEM, *WIDTHS))
        with seeded(seed):
            self.stem = convolution(in_channels, stem, 3, stem_stride, activation=nn.ReLU6)
            self.layer1 = nn.Sequential(
                stage(partial(_Block, expansion=1), 1, stem, widths[0], stride=1),
                stage(_Block, 2, widths[0], widths[1], stride=1),
            )
            self.layer2 = stage(_Block, 3, widths[1], widths[2], stride=2)
            self.layer3 = nn.Sequential(
                stage(_Block, 4, widths[2], widths[3], stride=2), stage(_Block, 3, widths[3], widths[4], stride=1)
            )
            self.layer4 = nn.Sequential(
                stage(_Block, 3, widths[4], widths[5], stride=2), stage(_Block, 1, widths[5], widths[6], stride=1)
            )
            self.head = convolution(widths[6], embedding, 1, activation=nn.ReLU6)
            self.avgpool = nn.AdaptiveAvgPool2d(1)
            self.fc = nn.Linear(embedding, num_classes)
            initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(images)))))
        return self.fc(self.avgpool(self.head(x)).flatten(1))  # type: ignore[no-any-return]
