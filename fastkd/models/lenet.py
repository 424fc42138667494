"""LeNet-5 for handwritten digits, and the network of half its channels that is its student: 62 and 16 thousand parameters."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fastkd._checks import check_flag, check_size
from fastkd._seeding import seeded
from fastkd.models.layers import FeatureLayers

__all__ = ["LeNet5"]

SIDE = 32  # of the images
WIDTHS = (6, 16, 120, 84)  # channels of the three convolutions, and of the linear layer behind them


class _Pad(nn.Module):
    """Zeros around smaller images, which are then in the middle of 32 x 32."""

    def forward(self, images: Tensor) -> Tensor:
        down, right = SIDE - images.shape[-2], SIDE - images.shape[-1]
        if down < 0 or right < 0:
            size = f"{images.shape[-2]} x {images.shape[-1]}"
            raise ValueError(f"fastkd: images are of {size} pixels, must be of {SIDE} x {SIDE} at most for LeNet-5")
        return F.pad(images, (right // 2, right - right // 2, down // 2, down - down // 2))


class LeNet5(nn.Module):
    """Three 5x5 convolutions with ReLU (6, 16 and 120 channels; a 2x2 max pool before the second and the third), a linear
    layer of 84 with ReLU, and a linear layer.

    LeCun et al., "Gradient-Based Learning Applied to Document Recognition" (1998), section II.B, as it is made today and as
    in DAFL (Chen et al., "Data-Free Learning of Student Networks", ICCV 2019): ReLU and max pools in the place of the
    squashing functions and the trained averages, every map of the second convolution sees all of the first, and the output is
    linear. ``half`` is the student there, LeNet-5-Half.

    As LeCun et al. did with their digits, images of 28 x 28 pixels are put in the middle of 32 x 32. The border is of zeros:
    of images that are normalised, not their background but their mean. Whoever wants the background pads before that.

    Args:
        half: half of the channels of every hidden layer.
        in_channels: channels of the images.
        num_classes: number of logits K.
        seed: of the initial weights; torch's global generator stays as it is.

    Shape: float images ``[N, in_channels, H, W]`` -> logits ``[N, num_classes]``; H and W are 32 or less.
    """

    feature_layers = FeatureLayers("layer1", ("layer2", "layer3"), "embedding")

    def __init__(self, *, half: bool = False, in_channels: int = 3, num_classes: int = 10, seed: int = 0) -> None:
        super().__init__()
        in_channels, num_classes = check_size("in_channels", in_channels, 1), check_size("num_classes", num_classes, 1)
        first, second, third, last = (width // 2 for width in WIDTHS) if check_flag("half", half) else WIDTHS
        with seeded(seed):
            self.layer1 = nn.Sequential(_Pad(), nn.Conv2d(in_channels, first, 5), nn.ReLU())
            self.layer2 = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(first, second, 5), nn.ReLU())
            self.layer3 = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(second, third, 5), nn.ReLU())
            self.embedding = nn.Sequential(nn.Flatten(), nn.Linear(third, last), nn.ReLU())
            self.fc = nn.Linear(last, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(images)))
        return self.fc(self.embedding(x))  # type: ignore[no-any-return]
