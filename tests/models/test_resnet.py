"""The residual networks for small images: size, shape, seed, gradients, errors."""

from __future__ import annotations

import pytest
import torch

from fastkd.models.convnet import count_parameters
from fastkd.models.resnet import ResNet, resnet

pytestmark = pytest.mark.no_kernels

# He et al. (2016), table 6, in millions
PUBLISHED = {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85, 110: 1.7}


def counted(depth: int, in_channels: int, num_classes: int) -> int:
    """Parameters, added up layer by layer."""
    blocks = (depth - 2) // 6

    def convolution(before: int, width: int, size: int) -> int:
        return size * size * before * width + 2 * width  # the batch norm's two

    total = convolution(in_channels, 16, 3) + blocks * 2 * convolution(16, 16, 3)
    for before, width in ((16, 32), (32, 64)):
        total += convolution(before, width, 3) + convolution(before, width, 1)
        total += (2 * blocks - 1) * convolution(width, width, 3)
    return total + 64 * num_classes + num_classes


@pytest.mark.parametrize("depth", [8, 14, 20, 26, 32, 44, 56, 110])
@pytest.mark.parametrize(("in_channels", "num_classes"), [(3, 10), (1, 100)])
def test_size(depth: int, in_channels: int, num_classes: int) -> None:
    model = resnet(depth, in_channels=in_channels, num_classes=num_classes)
    assert count_parameters(model) == counted(depth, in_channels, num_classes)


@pytest.mark.parametrize("depth", PUBLISHED)
def test_published_size(depth: int) -> None:
    """Two of the published networks' shortcuts have no weights; ours have 2,752."""
    shortcuts = 16 * 32 + 32 * 64 + 2 * (32 + 64)
    without = count_parameters(resnet(depth)) - shortcuts
    assert without / 1e6 == pytest.approx(PUBLISHED[depth], abs=0.006 if depth < 110 else 0.06)
    assert count_parameters(resnet(20)) == 272_474  # as others count it with these shortcuts


@pytest.mark.parametrize(("side", "in_channels", "num_classes"), [(32, 3, 10), (28, 1, 100), (30, 3, 7), (1, 3, 2)])
def test_shape(side: int, in_channels: int, num_classes: int) -> None:
    model = resnet(8, in_channels=in_channels, num_classes=num_classes).eval()
    images = torch.randn(2, in_channels, side, side)
    stages = [model.relu(model.bn1(model.conv1(images)))]
    for stage in (model.layer1, model.layer2, model.layer3):
        stages.append(stage(stages[-1]))
    assert [x.shape[1] for x in stages] == [16, 16, 32, 64]
    assert [x.shape[2] for x in stages] == [side, side, -(-side // 2), -(-side // 4)]
    logits = model(images)
    assert logits.shape == (2, num_classes)
    torch.testing.assert_close(logits, model.fc(stages[-1].mean((2, 3))))


def test_depth_counts_layers() -> None:
    """Those with weights, the shortcuts' left out."""
    model = resnet(26)
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)) and "downsample" not in name
    ]
    assert len(layers) == 26


def test_named_as_torchvision_names() -> None:
    names = [name for name, _ in resnet(8).named_children()]
    assert names == ["conv1", "bn1", "relu", "layer1", "layer2", "layer3", "avgpool", "fc"]
    assert "layer2.0.downsample.1.running_var" in resnet(8).state_dict()


def test_seed_gives_the_weights() -> None:
    state = torch.random.get_rng_state()
    a, b, other = resnet(8, seed=3).state_dict(), resnet(8, seed=3).state_dict(), resnet(8, seed=4).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["layer3.0.conv2.weight"], other["layer3.0.conv2.weight"])


def test_gradients_reach_everything() -> None:
    model = resnet(14)
    images = torch.randn(4, 3, 32, 32, requires_grad=True)
    model(images).square().sum().backward()
    for name, value in [("images", images), *model.named_parameters()]:
        assert value.grad is not None, name
        assert bool(value.grad.isfinite().all()), name
        assert bool(value.grad.count_nonzero()), name


@pytest.mark.parametrize("depth", [-4, 0, 2, 7, 18, 21, 34, 52])
def test_other_depths(depth: int) -> None:
    message = rf"depth is {depth}, must be 6 n \+ 2 with n >= 1: 8, 14, 20, 26, 32, 44, 56, 110"
    with pytest.raises(ValueError, match=message):
        resnet(depth)


def test_no_blocks() -> None:
    with pytest.raises(ValueError, match="blocks is 0, must be at least 1"):
        ResNet(0)
