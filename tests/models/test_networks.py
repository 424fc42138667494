"""The networks that the papers name, for images of 32 x 32 pixels: size, shape, layers, seed, gradients, every method."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from fastkd.methods import FeatureTap, FixedLinear, Method, MultiBranch, Objective
from fastkd.methods import registry as methods
from fastkd.models import create, feature_layers
from fastkd.models.cifar_resnet import CifarResNet
from fastkd.models.convnet import count_parameters
from fastkd.models.densenet import DenseNet, cifar_densenet, densenet_bc
from fastkd.models.lenet import LeNet5
from fastkd.models.mobilenet_v2 import MobileNetV2
from fastkd.models.shufflenet_v2 import ShuffleNetV2
from fastkd.models.vgg import VGG

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]

# (channels, height) of stem and stages, and the embedding's channels, of 32 x 32 pixels; then the heights of 28 x 28
MAPS: dict[str, tuple[list[tuple[int, int]], int, list[int]]] = {
    "cifar-resnet18": ([(64, 32), (64, 32), (128, 16), (256, 8), (512, 4)], 512, [28, 28, 14, 7, 4]),
    "cifar-resnet50": ([(64, 32), (256, 32), (512, 16), (1024, 8), (2048, 4)], 2048, [28, 28, 14, 7, 4]),
    "cifar-vgg8": ([(64, 32), (128, 16), (256, 8), (512, 4), (512, 4)], 512, [28, 14, 7, 3, 3]),
    "cifar-vgg11": ([(64, 32), (128, 16), (256, 8), (512, 4), (512, 4)], 512, [28, 14, 7, 3, 3]),
    "densenet-bc-16-12": ([(24, 32), (48, 32), (48, 16), (48, 8)], 48, [28, 28, 14, 7]),
    "cifar-densenet121": ([(64, 32), (256, 32), (512, 16), (1024, 8), (1024, 4)], 1024, [28, 28, 14, 7, 3]),
    "cifar-mobilenetv2": ([(32, 16), (24, 16), (32, 8), (96, 4), (1280, 2)], 1280, [14, 14, 7, 4, 2]),
    "cifar-mobilenetv2-0.5": ([(16, 16), (12, 16), (16, 8), (48, 4), (1280, 2)], 1280, [14, 14, 7, 4, 2]),
    "cifar-shufflenetv2": ([(24, 32), (116, 16), (232, 8), (1024, 4)], 1024, [28, 14, 7, 4]),
    "cifar-shufflenetv2-0.5": ([(24, 32), (48, 16), (96, 8), (1024, 4)], 1024, [28, 14, 7, 4]),
    "lenet5": ([(6, 28), (16, 10), (120, 1)], 84, [28, 10, 1]),
    "lenet5-half": ([(3, 28), (8, 10), (60, 1)], 42, [28, 10, 1]),
    "twoconvnet": ([(63, 13), (512, 13), (2048, 5)], 2048, [11, 11, 4]),
}


def conv(before: int, width: int, size: int) -> int:
    """Weights of a convolution, which has no bias, and the batch norm's two behind it."""
    return size * size * before * width + 2 * width


def depthwise(width: int) -> int:
    return 9 * width + 2 * width


def linear(before: int, width: int) -> int:
    return before * width + width


def cifar_resnet(depth: int) -> int:
    """He et al., table 1: blocks of two 3x3 convolutions, or of 1x1, 3x3, 1x1 with four times the channels behind them."""
    blocks = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}[depth]
    total, before = conv(3, 64, 3), 64
    for i, (many, width) in enumerate(zip(blocks, (64, 128, 256, 512), strict=True)):
        for j in range(many):
            if depth < 50:
                total += conv(before, width, 3) + conv(width, width, 3)
                out = width
            else:
                out = 4 * width
                total += conv(before, width, 1) + conv(width, width, 3) + conv(width, out, 1)
            total += conv(before, out, 1) if j == 0 and (i > 0 or depth >= 50) else 0
            before = out
    return total + linear(before, 10)


def vgg(depth: int) -> int:
    """Simonyan & Zisserman, table 1, with batch norms and one linear layer."""
    columns = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
    widths = [w for w, many in zip((64, 128, 256, 512, 512), columns[depth], strict=True) for _ in range(many)]
    return sum(conv(before, width, 3) for before, width in pairwise([3, *widths])) + linear(512, 10)


def densenet(layers: tuple[int, ...], growth: int) -> int:
    """Huang et al., section 3: batch norms are before their convolutions."""
    channels = 2 * growth
    total = 9 * 3 * channels
    for i, many in enumerate(layers):
        if i > 0:
            total += 2 * channels + channels * (channels // 2)
            channels //= 2
        for _ in range(many):
            total += 2 * channels + channels * 4 * growth + 2 * 4 * growth + 9 * 4 * growth * growth
            channels += growth
    return total + 2 * channels + linear(channels, 10)


def mobilenet(width: float) -> int:
    """Sandler et al., table 2: (expansion, channels, blocks)."""
    before = int(32 * width)
    total = conv(3, before, 3)
    for t, c, n in ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)):
        for _ in range(n):
            out = int(c * width)
            total += conv(before, t * before, 1) if t > 1 else 0
            total += depthwise(t * before) + conv(t * before, out, 1)
            before = out
    return total + conv(before, 1280, 1) + linear(1280, 10)


def shufflenet(*widths: int) -> int:
    """Ma et al., table 5 and figure 3."""
    *stages, last = widths
    total, before = conv(3, 24, 3), 24
    for many, width in zip((4, 8, 4), stages, strict=True):
        half = width // 2
        total += depthwise(before) + conv(before, half, 1)  # of stride 2: this branch and the other one
        total += conv(before, half, 1) + depthwise(half) + conv(half, half, 1)
        total += (many - 1) * (conv(half, half, 1) + depthwise(half) + conv(half, half, 1))
        before = width
    return total + conv(before, last, 1) + linear(last, 10)


def lenet(first: int, second: int, third: int, last: int) -> int:
    convolutions = (25 * 3 * first + first) + (25 * first * second + second) + (25 * second * third + third)
    return convolutions + linear(third, last) + linear(last, 10)


COUNTED = {
    **{f"cifar-resnet{depth}": cifar_resnet(depth) for depth in (18, 34, 50, 101, 152)},
    **{f"cifar-vgg{depth}": vgg(depth) for depth in (8, 11, 13, 16, 19)},
    "densenet-bc-16-12": densenet((2, 2, 2), 12),
    "densenet-bc-100-12": densenet((16, 16, 16), 12),
    "densenet-bc-250-24": densenet((41, 41, 41), 24),
    "densenet-bc-190-40": densenet((31, 31, 31), 40),
    "cifar-densenet121": densenet((6, 12, 24, 16), 32),
    "cifar-densenet169": densenet((6, 12, 32, 32), 32),
    "cifar-densenet201": densenet((6, 12, 48, 32), 32),
    "cifar-mobilenetv2": mobilenet(1.0),
    "cifar-mobilenetv2-0.5": mobilenet(0.5),
    "cifar-shufflenetv2": shufflenet(116, 232, 464, 1024),
    "cifar-shufflenetv2-0.5": shufflenet(48, 96, 192, 1024),
    "cifar-shufflenetv2-1.5": shufflenet(176, 352, 704, 1024),
    "cifar-shufflenetv2-2.0": shufflenet(244, 488, 976, 2048),
    "lenet5": lenet(6, 16, 120, 84),
    "lenet5-half": lenet(3, 8, 60, 42),
    # Begon & Geurts, table 8, layer by layer: "roughly two millions parameters"
    "twoconvnet": 49 * 63 + 63 * 512 + 2 * 512 + 25 * 1024 + 1024 * 2048 + 2 * 2048 + linear(2048, 10),
}


def size(make: Callable[..., nn.Module], *args: Any, **settings: Any) -> int:
    with torch.device("meta"):
        return count_parameters(make(*args, **settings))


@pytest.mark.parametrize("name", COUNTED)
def test_size(name: str) -> None:
    assert size(create, name) == COUNTED[name]


STEM = 3 * 64 * (7 * 7 - 3 * 3)  # weights that a stem for 224 x 224 pixels has more
NORM = (
    2 * 64
)  # of torchvision's batch norm behind the stem of a DenseNet, which the paper's networks for CIFAR have not
# the figures of torchvision's documentation, num_params, all of 1000 classes
TORCHVISION: list[tuple[Callable[..., nn.Module], float, int, int]] = [
    (CifarResNet, 18, STEM, 11_689_512),
    (CifarResNet, 34, STEM, 21_797_672),
    (CifarResNet, 50, STEM, 25_557_032),
    (CifarResNet, 101, STEM, 44_549_160),
    (CifarResNet, 152, STEM, 60_192_808),
    (cifar_densenet, 121, STEM + NORM, 7_978_856),
    (cifar_densenet, 169, STEM + NORM, 14_149_480),
    (cifar_densenet, 201, STEM + NORM, 20_013_928),
    (MobileNetV2, 1.0, 0, 3_504_872),
    (ShuffleNetV2, 0.5, 0, 1_366_792),
    (ShuffleNetV2, 1.0, 0, 2_278_604),
    (ShuffleNetV2, 1.5, 0, 3_503_624),
    (ShuffleNetV2, 2.0, 0, 7_393_996),
]


@pytest.mark.parametrize(("make", "which", "more", "published"), TORCHVISION)
def test_size_of_torchvisions(make: Callable[..., nn.Module], which: float, more: int, published: int) -> None:
    assert size(make, which, num_classes=1000) + more == published


@pytest.mark.parametrize(("depth", "published"), [(11, 133), (13, 133), (16, 138), (19, 144)])
def test_published_size_of_vgg(depth: int, published: int) -> None:
    """Simonyan & Zisserman, table 2, in millions: with three linear layers, the first one of 7 x 7 places."""
    linears = linear(7 * 7 * 512, 4096) + linear(4096, 4096) + linear(4096, 1000)
    assert round((size(VGG, depth) - linear(512, 10) + linears) / 1e6) == published


@pytest.mark.parametrize(("depth", "growth", "published"), [(100, 12, 0.8), (250, 24, 15.3), (190, 40, 25.6)])
def test_published_size_of_densenet(depth: int, growth: int, published: float) -> None:
    """Huang et al., table 2, in millions."""
    assert round(size(densenet_bc, depth, growth) / 1e6, 1) == published


def test_published_size_of_lenet() -> None:
    """LeCun et al. count 60,000. Their C3 has 900 weights fewer, as its maps see some of S2's each, their averages have two
    values a map, and their output layer is given."""
    ours = size(LeNet5, in_channels=1)
    assert ours == 61_706
    assert ours - 900 + 2 * (6 + 16) - linear(84, 10) == 60_000


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize(("side", "in_channels", "num_classes"), [(32, 3, 10), (28, 1, 7)])
def test_shapes(name: str, side: int, in_channels: int, num_classes: int) -> None:
    """In training, where what a layer returned must not be changed in place either."""
    maps, embedding, of_28 = MAPS[name]
    heights = of_28 if side == 28 else [height for _, height in maps]
    model = create(name, in_channels=in_channels, num_classes=num_classes)
    layers = feature_layers(model)
    tapped = (layers.stem, *layers.stages, layers.embedding)
    logits, features = FeatureTap(model, tapped)(torch.randn(2, in_channels, side, side))
    assert logits.shape == (2, num_classes)
    *spatial, last = (features[layer] for layer in tapped)
    # those of the first depthwise convolution are 21 of each channel that comes in
    channels = [width if i or name != "twoconvnet" else 21 * in_channels for i, (width, _) in enumerate(maps)]
    assert [tuple(m.shape) for m in spatial] == [(2, c, h, h) for c, h in zip(channels, heights, strict=True)]
    assert last.flatten(1).shape == (2, embedding)
    torch.testing.assert_close(model.fc(last.flatten(1)), logits)
    if not name.startswith("lenet"):  # whose embedding is a layer
        torch.testing.assert_close(last.flatten(1), spatial[-1].mean((2, 3)))
        assert spatial[-1].min() >= 0.0


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("training", [False, True])
def test_children_in_order_are_the_forward(name: str, training: bool) -> None:
    model = create(name).train(training)
    images = torch.randn(2, 3, 32, 32)
    x = images
    for child_name, child in model.named_children():
        x = child(x.flatten(1) if child_name == "fc" else x)
    torch.testing.assert_close(model(images), x, rtol=0, atol=0)


@pytest.mark.parametrize("name", MAPS)
def test_seed_gives_the_weights(name: str) -> None:
    state = torch.random.get_rng_state()
    a, b, other = (create(name, seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a[key], b[key]) for key in a)
    drawn = [key for key, value in a.items() if value.dim() > 1]
    assert not any(torch.equal(a[key], other[key]) for key in drawn)


@pytest.mark.parametrize("name", MAPS)
def test_gradients_reach_everything(name: str) -> None:
    model = create(name)
    images = torch.randn(4, 3, 32, 32, requires_grad=True)
    model(images).square().sum().backward()
    for key, value in [("images", images), *model.named_parameters()]:
        assert value.grad is not None, key
        assert bool(value.grad.isfinite().all()), key
        assert bool(value.grad.count_nonzero()), key


FAMILIES = {  # student and teacher, of equal channels, as fsp needs
    "cifar-resnet18": "cifar-resnet18",
    "cifar-vgg8": "cifar-vgg11",
    "densenet-bc-10-12": "densenet-bc-10-12",
    "cifar-shufflenetv2-0.5": "cifar-shufflenetv2-0.5",
    "twoconvnet": "twoconvnet",
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "method_name", [name for name in methods.names() if issubclass(methods.find(name).kind, Method)]
)
def test_every_method_takes_a_step(method_name: str, name: str) -> None:
    images, target = torch.randn(4, 1, 16, 16), torch.arange(4)
    student, teacher = create(name, in_channels=1, seed=1), create(FAMILIES[name], in_channels=1, seed=2)
    settings = {"branch_at": "layer2"} if (method_name, name) == ("one", "twoconvnet") else {}
    method = methods.create(method_name, student, teacher, images, items=9, **settings)
    made = method.build_student(lambda seed: student if seed == 0 else create(name, in_channels=1, seed=10 + seed))
    objective = Objective(method, made, teacher)
    loss, logits = objective(images, target, 0.3, torch.arange(4))
    assert logits.shape == (4, 10)
    loss.total.backward()
    assert bool(loss.total.isfinite())
    for key, value in objective.named_parameters():
        assert value.grad is not None, key
        assert bool(value.grad.isfinite().all()), key
    assert type(method.deployed(made)) is type(student)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_network_has_a_head(name: str) -> None:
    images = torch.randn(4, 1, 16, 16)
    student, teacher = create(name, in_channels=1, seed=1), create(FAMILIES[name], in_channels=1, seed=2)
    method = FixedLinear(student, teacher, images)
    method(images).backward()
    assert all(p.grad is not None for p in method.parameters())
    deployed = method.eval().deployed(method.network())
    assert type(deployed) is type(student)
    assert deployed(images).shape == (4, 10)


def test_methods_say_what_does_not_fit() -> None:
    with pytest.raises(
        ValueError, match="branch_at is 'layer3', must be a child of TwoConvNet: layer1, layer2, avgpool, fc"
    ):
        MultiBranch.split([create("twoconvnet", seed=seed) for seed in range(2)], "layer3")
    images = torch.randn(2, 1, 28, 28)
    student, teacher = create("lenet5-half", in_channels=1), create("lenet5", in_channels=1)
    objective = Objective(methods.create("fsp", student, teacher), student, teacher)
    with pytest.raises(ValueError, match="FSP needs equal numbers of channels"):
        objective(images, torch.arange(2))


def test_lenet_of_smaller_images() -> None:
    """They are in the middle of 32 x 32; larger ones are refused."""
    model = create("lenet5", in_channels=1).eval()
    images = torch.randn(2, 1, 28, 27)
    padded = torch.zeros(2, 1, 32, 32)
    padded[:, :, 2:30, 2:29] = images
    torch.testing.assert_close(model(images), model(padded), rtol=0, atol=0)
    with pytest.raises(ValueError, match="images are of 32 x 33 pixels, must be of 32 x 32 at most for LeNet-5"):
        model(torch.zeros(1, 1, 32, 33))


def test_shuffled_halves() -> None:
    """Channels of the half that stays and of the one that is worked on come in turns."""
    unit = copy.deepcopy(create("cifar-shufflenetv2-0.5").layer1[1]).eval()
    x = torch.randn(2, 48, 8, 8)
    out = unit(x)
    assert torch.equal(out[:, 0::2], x[:, :24])
    assert torch.equal(out[:, 1::2], unit.branch(x[:, 24:]))


def test_dense_layers_keep_what_they_see() -> None:
    stage = create("densenet-bc-16-12").layer1.eval()
    x = torch.randn(2, 24, 8, 8)
    first = stage[0](x)
    out = stage(x)
    assert torch.equal(out[:, :24], x)
    assert torch.equal(out[:, :36], first)


def test_mobilenet_settings() -> None:
    """The embedding as Begon & Geurts widen it to their teacher's; the stride of pytorch-cifar's."""
    wide = MobileNetV2(embedding=2048, stem_stride=1)
    assert wide.fc.in_features == 2048
    assert wide.layer4(wide.layer3(wide.layer2(wide.layer1(wide.stem(torch.randn(2, 3, 32, 32)))))).shape[2:] == (4, 4)
    with torch.device("meta"):
        assert MobileNetV2(1.4).fc.in_features == 1792
        assert MobileNetV2(0.35).fc.in_features == 1280


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CifarResNet(20), "depth is 20, must be one of 18, 34, 50, 101, 152"),
        (lambda: VGG(12), "depth is 12, must be one of 8, 11, 13, 16, 19"),
        (lambda: cifar_densenet(100), "depth is 100, must be one of 121, 169, 201"),
        (lambda: densenet_bc(101, 12), r"depth is 101, must be 6 n \+ 4 with n >= 1: 100, 190, 250, ..., 2000 at most"),
        (lambda: densenet_bc(100, 101), "growth is 101, must be less than 101"),
        (lambda: DenseNet((), 12), "layers is empty, must be of one stage or more"),
        (lambda: ShuffleNetV2(0.7), r"width is 0.7, must be one of 0.5, 1.0, 1.5, 2.0"),
        (lambda: MobileNetV2(0.05), r"width is 0.05, must be in \[0.1, 10\]"),
        (lambda: MobileNetV2(float("nan")), r"width is nan, must be in \[0.1, 10\]"),
        (lambda: MobileNetV2(stem_stride=3), "stem_stride is 3, must be less than 3"),
        (lambda: MobileNetV2(embedding=0), "embedding is 0, must be at least 1"),
    ],
)
def test_errors(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=f"fastkd: {message}"):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ShuffleNetV2("1"), "width is str, must be a number"),  # type: ignore[arg-type]
        (lambda: MobileNetV2(None), "width is NoneType, must be a number"),  # type: ignore[arg-type]
        (lambda: LeNet5(half=1), "half is int, must be True or False"),  # type: ignore[arg-type]
        (lambda: DenseNet(3, 12), "layers is int, must be a sequence"),  # type: ignore[arg-type]
    ],
)
def test_wrong_types(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(TypeError, match=f"fastkd: {message}"):
        make()
