"""The wide residual networks: size, shape, order of the modules, seed, gradients, errors."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from fastkd.models.convnet import count_parameters
from fastkd.models.resnet import resnet
from fastkd.models.wide_resnet import WideResNet, wide_resnet

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]

# Zagoruyko & Komodakis (2016), tables 4 and 5 (CIFAR-10), in millions; WRN-16-2 as RepDistiller has it
PUBLISHED = {(40, 1): 0.6, (40, 2): 2.2, (40, 4): 8.9, (40, 8): 35.7, (28, 10): 36.5, (16, 8): 11.0, (16, 2): 0.7}


def counted(depth: int, width: int, in_channels: int = 3, num_classes: int = 10) -> int:
    """Parameters, added up layer by layer."""
    blocks = (depth - 4) // 6
    total = 9 * in_channels * 16
    for before, out in pairwise([16, 16 * width, 32 * width, 64 * width]):
        total += 2 * before + 9 * before * out + 2 * out + 9 * out * out  # norm, convolution, norm, convolution
        total += before * out if before != out or out != 16 else 0  # the shortcut
        total += (blocks - 1) * 2 * (2 * out + 9 * out * out)
    return total + 2 * 64 * width + 64 * width * num_classes + num_classes


@pytest.mark.parametrize(("depth", "width"), PUBLISHED)
@pytest.mark.parametrize(("in_channels", "num_classes"), [(3, 10), (1, 100)])
def test_size(depth: int, width: int, in_channels: int, num_classes: int) -> None:
    with torch.device("meta"):
        model = wide_resnet(depth, width, in_channels=in_channels, num_classes=num_classes)
    assert count_parameters(model) == counted(depth, width, in_channels, num_classes)


@pytest.mark.parametrize(("depth", "width"), PUBLISHED)
def test_published_size(depth: int, width: int) -> None:
    with torch.device("meta"):
        total = count_parameters(wide_resnet(depth, width))
    assert total / 1e6 == pytest.approx(PUBLISHED[depth, width], abs=0.06)


def test_size_by_hand() -> None:
    """WRN-16-2 for 10 classes, written out: stem, three stages of two blocks, norm, linear layer."""
    stem = 432
    first = (32 + 9 * 16 * 32 + 64 + 9 * 32 * 32 + 16 * 32) + (64 + 9 * 32 * 32 + 64 + 9 * 32 * 32)
    second = (64 + 9 * 32 * 64 + 128 + 9 * 64 * 64 + 32 * 64) + (128 + 9 * 64 * 64 + 128 + 9 * 64 * 64)
    third = (128 + 9 * 64 * 128 + 256 + 9 * 128 * 128 + 64 * 128) + (256 + 9 * 128 * 128 + 256 + 9 * 128 * 128)
    assert stem + first + second + third + 256 + 1290 == 691_674
    assert count_parameters(wide_resnet(16, 2)) == 691_674
    assert count_parameters(wide_resnet(40, 2)) == 2_243_546


@pytest.mark.parametrize(("side", "in_channels", "num_classes"), [(32, 3, 10), (28, 1, 100), (30, 3, 7), (1, 3, 2)])
def test_shape(side: int, in_channels: int, num_classes: int) -> None:
    model = wide_resnet(10, 2, in_channels=in_channels, num_classes=num_classes).eval()
    stages = [model.conv1(torch.randn(2, in_channels, side, side))]
    for stage in (model.layer1, model.layer2, model.layer3):
        stages.append(stage(stages[-1]))
    assert [x.shape[1] for x in stages] == [16, 32, 64, 128]
    assert [x.shape[2] for x in stages] == [side, side, -(-side // 2), -(-side // 4)]
    assert model.fc(model.relu(model.bn1(stages[-1])).mean((2, 3))).shape == (2, num_classes)


@pytest.mark.parametrize(
    "model", [wide_resnet(16, 1), wide_resnet(10, 2), resnet(8)], ids=["wrn-16-1", "wrn-10-2", "resnet8"]
)
@pytest.mark.parametrize("training", [False, True])
def test_children_in_order_are_the_forward(model: nn.Module, training: bool) -> None:
    """Networks are split between their children: each is called once, in this order."""
    model.train(training)
    images = torch.randn(4, 3, 32, 32)
    x = images
    for name, child in model.named_children():
        x = child(x.flatten(1) if name == "fc" else x)
    torch.testing.assert_close(model(images), x, rtol=0, atol=0)


def test_block_by_hand() -> None:
    """The first block's shortcut starts behind the activation, the second block's before it."""
    model = wide_resnet(16, 2).eval()
    first, second = model.layer1
    for norm in (first.bn1, second.bn1):
        nn.init.uniform_(norm.bias, -1, 1)  # else the order of norm and ReLU would matter less
    x = torch.randn(2, 16, 8, 8)
    active = torch.relu(first.bn1(x))
    y = first.conv2(torch.relu(first.bn2(first.conv1(active)))) + first.downsample(active)
    torch.testing.assert_close(first(x), y)
    z = second.conv2(torch.relu(second.bn2(second.conv1(torch.relu(second.bn1(y)))))) + y
    torch.testing.assert_close(model.layer1(x), z)


def test_depth_counts_layers() -> None:
    """Those with weights, the shortcuts' left out."""
    layers = [
        name
        for name, module in wide_resnet(22, 1).named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and "downsample" not in name
    ]
    assert len(layers) == 22 - 2  # 6 n, stem and linear layer: the depth counts two shortcuts, too


def test_dropout() -> None:
    images = torch.randn(2, 3, 8, 8)
    plain, dropping = wide_resnet(10, 1, seed=1), wide_resnet(10, 1, seed=1, dropout=0.5)
    assert torch.equal(plain.eval()(images), dropping.eval()(images))
    dropping.train()
    assert not torch.equal(dropping(images), dropping(images))
    plain.train()
    torch.testing.assert_close(plain(images), plain(images), rtol=0, atol=0)


def test_seed_gives_the_weights() -> None:
    state = torch.random.get_rng_state()
    a, b, other = (wide_resnet(10, 1, seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["layer3.0.conv2.weight"], other["layer3.0.conv2.weight"])


def test_gradients_reach_everything() -> None:
    model = wide_resnet(16, 1)
    images = torch.randn(4, 3, 16, 16, requires_grad=True)
    model(images).square().sum().backward()
    for name, value in [("images", images), *model.named_parameters()]:
        assert value.grad is not None, name
        assert bool(value.grad.isfinite().all()), name
        assert bool(value.grad.count_nonzero()), name


@pytest.mark.parametrize("depth", [-2, 0, 4, 9, 17, 20])
def test_other_depths(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"depth is {depth}, must be 6 n \+ 4 with n >= 1: 10, 16, 22, 28, 40"):
        wide_resnet(depth, 1)


@pytest.mark.parametrize(
    ("blocks", "width", "dropout", "message"),
    [
        (0, 1, 0.0, "blocks is 0, must be at least 1"),
        (1, 0, 0.0, "width is 0, must be at least 1"),
        (1, 1, 1.0, r"dropout is 1.0, must be in \[0, 1\)"),
        (1, 1, -0.1, r"dropout is -0.1, must be in \[0, 1\)"),
    ],
)
def test_errors(blocks: int, width: int, dropout: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WideResNet(blocks, width, dropout=dropout)
