"""A plain convolutional network for small images, from a few thousand parameters to a few hundred thousand."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastkd._checks import check_size
from fastkd._seeding import seeded

__all__ = ["ConvNet", "count_parameters"]


class ConvNet(nn.Module):
    """Stages of 3x3 convolution, batch norm, ReLU, a 2x2 max pool after each half of them, and a linear layer.

    Args:
        widths: channels of each stage; the image is halved twice, after stages ``len // 2`` and ``len``.
        in_channels: channels of the images.
        image_size: their height and width, a multiple of 4.
        classes: number of logits K.
        seed: of the initial weights; torch's global generator stays as it is.

    Shape: float images ``[N, in_channels, image_size, image_size]`` -> logits ``[N, classes]``.
    """

    def __init__(
        self, widths: Sequence[int], *, in_channels: int = 1, image_size: int = 8, classes: int = 10, seed: int = 0
    ) -> None:
        super().__init__()
        if not isinstance(widths, Sequence):
            raise TypeError(f"fastkd: widths is {type(widths).__name__}, must be a sequence of channels, one a stage")
        widths = [check_size(f"widths[{i}]", width, 1) for i, width in enumerate(widths)]
        in_channels, classes = check_size("in_channels", in_channels, 1), check_size("classes", classes, 1)
        if len(widths) < 2 or check_size("image_size", image_size, 1) % 4:
            raise ValueError(
                f"fastkd: widths is {tuple(widths)} and image_size {image_size}, "
                "must be two stages or more and a multiple of 4"
            )
        with seeded(seed):
            layers: list[nn.Module] = []
            for i, (before, width) in enumerate(zip([in_channels, *widths], widths, strict=False), start=1):
                layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                if i in (len(widths) // 2, len(widths)):
                    layers.append(nn.MaxPool2d(2))
            self.features = nn.Sequential(*layers, nn.Flatten())
            self.classifier = nn.Linear(widths[-1] * (image_size // 4) ** 2, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))  # type: ignore[no-any-return]


def count_parameters(model: nn.Module) -> int:
    """Number of trainable values in the model."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
