"""Parts that several networks are made of."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TypeVar

from torch import Tensor, nn

__all__ = ["BasicBlock", "check_one_of", "convolution", "initialise", "shortcut", "stage"]

Number = TypeVar("Number", int, float)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm around a shortcut."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = shortcut(before, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        beside = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + beside)  # type: ignore[no-any-return]


def shortcut(before: int, width: int, stride: int) -> nn.Sequential | None:
    """A 1x1 convolution with batch norm where a residual block changes the shape, else nothing."""
    if before == width and stride == 1:
        return None
    return nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))


def stage(
    block: Callable[[int, int, int], nn.Module], blocks: int, before: int, width: int, stride: int
) -> nn.Sequential:
    """So many blocks, made of (channels before, channels, stride); the first one changes the shape."""
    return nn.Sequential(block(before, width, stride), *(block(width, width, 1) for _ in range(blocks - 1)))


def convolution(
    before: int,
    width: int,
    size: int = 3,
    stride: int = 1,
    *,
    groups: int = 1,
    activation: Callable[..., nn.Module] | None = nn.ReLU,
) -> nn.Sequential:
    """Convolution (padded, so that only the stride changes the size), batch norm, activation if any."""
    layers: list[nn.Module] = [
        nn.Conv2d(before, width, size, stride, padding=size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(width),
    ]
    if activation is not None:
        layers.append(activation(inplace=True))
    return nn.Sequential(*layers)


def initialise(network: nn.Module) -> None:
    """Weights of the convolutions as He et al. draw them for ReLU, by the channels that come out."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def check_one_of(name: str, number: Number, allowed: Collection[Number]) -> Number:
    if number not in allowed:
        raise ValueError(f"fastkd: {name} is {number}, must be one of {', '.join(map(str, allowed))}")
    return number
