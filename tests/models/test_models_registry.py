"""Networks by name, torchvision's through a stand-in for it, and the layers that methods look into."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from fastkd.data import registry as data
from fastkd.methods import FeatureTap
from fastkd.methods import registry as methods
from fastkd.models import FeatureLayers, create, feature_layers, names
from fastkd.models.cifar_resnet import CifarResNet
from fastkd.models.convnet import ConvNet
from fastkd.models.densenet import DenseNet, cifar_densenet, densenet_bc
from fastkd.models.lenet import LeNet5
from fastkd.models.mobilenet_v2 import MobileNetV2
from fastkd.models.resnet import ResNet, resnet
from fastkd.models.segmenter import Segmenter
from fastkd.models.shufflenet_v2 import ShuffleNetV2
from fastkd.models.two_conv_net import TwoConvNet
from fastkd.models.vgg import VGG
from fastkd.models.wide_resnet import WideResNet, wide_resnet

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]


class TheirResNet(nn.Module):
    """The top level of torchvision's ResNet, with one convolution a stage."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1, self.layer2, self.layer3, self.layer4 = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.avgpool(self.layer4(self.layer3(self.layer2(self.layer1(x))))).flatten(1))


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that has two networks."""
    makers = {
        "resnet18": TheirResNet,
        "resnet50": TheirResNet,
        "resnet8": TheirResNet,
        "linear": lambda num_classes: nn.Linear(9, num_classes),
    }
    package, models = ModuleType("torchvision"), ModuleType("torchvision.models")
    models.list_models = lambda module=None: sorted(makers) if module is models else [*makers, "fcn_resnet50"]  # type: ignore[attr-defined]
    models.get_model = lambda name, *, weights, num_classes: makers[name](num_classes=num_classes)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision as it is where it was built for another torch: its import raises RuntimeError."""

    class Finder:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name.startswith("torchvision"):
                raise RuntimeError("operator torchvision::nms does not exist\nand more")

    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.delitem(sys.modules, "torchvision.models", raising=False)


@pytest.mark.parametrize(
    "name", [name for name in names() if name.startswith(("resnet", "wrn")) and name != "wrn-28-10"]
)
def test_residual_networks(name: str) -> None:
    with torch.device("meta"):
        model = create(name, in_channels=1, num_classes=7)
    kind = ResNet if name.startswith("resnet") else WideResNet
    assert isinstance(model, kind)
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and "downsample" not in n]
    depth = int(name.removeprefix("resnet") if kind is ResNet else name.split("-")[1])
    assert len(layers) == (depth if kind is ResNet else depth - 2)
    assert model.conv1.in_channels == 1
    assert model.fc.out_features == 7
    if kind is WideResNet:
        assert model.fc.in_features == 64 * int(name.split("-")[2])


def test_seed_and_case() -> None:
    expected = resnet(8, seed=5).state_dict()
    for key, value in create("ResNet8", seed=5).state_dict().items():
        assert torch.equal(value, expected[key])
    wide = wide_resnet(10, 1, seed=5).state_dict()
    assert torch.equal(create("WRN-10-1", seed=5).state_dict()["conv1.weight"], wide["conv1.weight"])


def test_unusual_depth_is_taken() -> None:
    with torch.device("meta"):
        assert len(create("resnet38").layer1) == 6
        assert len(create("wrn-34-3").layer1) == 5
        assert len(create("densenet-bc-22-8").layer1) == 3


OTHERS = {
    "cifar-resnet": CifarResNet,
    "cifar-vgg": VGG,
    "densenet-bc": DenseNet,
    "cifar-densenet": DenseNet,
    "cifar-mobilenetv2": MobileNetV2,
    "cifar-shufflenetv2": ShuffleNetV2,
    "lenet5": LeNet5,
    "twoconvnet": TwoConvNet,
}


@pytest.mark.parametrize(
    "name", [name for name in names() if not name.startswith(("resnet", "wrn", "torchvision", "segmenter"))]
)
def test_other_networks(name: str) -> None:
    with torch.device("meta"):
        model = create(name.upper(), in_channels=1, num_classes=7)
    (kind,) = (kind for start, kind in OTHERS.items() if name.startswith(start))
    assert type(model) is kind
    assert model.fc.out_features == 7
    assert next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels == 1


@pytest.mark.parametrize("name", [*(name for name in names() if name.startswith("segmenter")), "Segmenter-3-7-5-6-6"])
def test_dense_networks(name: str) -> None:
    """Their names are the widths of their stages, of which there may be any number."""
    model = create(name, in_channels=2, num_classes=7, seed=3)
    assert isinstance(model, Segmenter)
    widths = [int(width) for width in name.split("-")[1:]]
    expected = Segmenter(widths, in_channels=2, classes=7, seed=3)
    assert [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)][:-1] == widths
    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True)
    )
    images = torch.randn(2, 2, 12, 8)
    tap = FeatureTap(model, (layers := feature_layers(model)).stages)
    assert tap(images).logits.shape == (2, 7, 12, 8)
    assert [tuple(tap(images).features[stage].shape[1:]) for stage in layers.stages] == [
        (widths[0], 12, 8),
        (widths[-1], 6, 4),
    ]
    assert (layers.stem, layers.embedding) == ("layer1.0", layers.stages[-1])


def test_names_of_torchvision_stay_its_own() -> None:
    """What it has for images of 224 x 224 pixels; here they would be others."""
    theirs = {"resnet18", "resnet50", "vgg11", "vgg11_bn", "densenet121", "mobilenet_v2", "shufflenet_v2_x1_0"}
    assert not theirs & set(names())


@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize("name", ["resnet18", "torchvision/resnet18", "resnet50", "Torchvision/resnet8"])
def test_torchvision(name: str) -> None:
    """resnet50, a depth of ours, means the one that everybody knows by that name."""
    state = torch.random.get_rng_state()
    model = create(name, num_classes=7, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert isinstance(model, TheirResNet)
    assert model.fc.out_features == 7
    assert torch.equal(model.conv1.weight, create(name, seed=3).conv1.weight)
    assert not torch.equal(model.conv1.weight, create(name, seed=4).conv1.weight)


@pytest.mark.usefixtures("torchvision")
def test_torchvision_with_other_channels() -> None:
    model = create("resnet18", in_channels=1)
    assert model.conv1.weight.shape == (8, 1, 7, 7)
    assert model.conv1.bias is None
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 10)
    assert torch.equal(model.conv1.weight, create("resnet18", in_channels=1).conv1.weight)
    with pytest.raises(ValueError, match="in_channels is 1, must be 3: Linear has no convolution to replace"):
        create("linear", in_channels=1)


@pytest.mark.usefixtures("torchvision")
def test_own_name_comes_first() -> None:
    assert isinstance(create("resnet8"), ResNet)


@pytest.mark.usefixtures("torchvision")
def test_only_classification_networks() -> None:
    with pytest.raises(ValueError, match="'torchvision/fcn_resnet50' is unknown, did you mean torchvision/resnet50"):
        create("torchvision/fcn_resnet50")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("resnet9", "resnet8"),
        ("resnet-20", "resnet20"),
        ("wrn_16_2", "wrn-16-2"),
        ("wrn-16-0", "wrn-16-1"),
        ("wrn-17-2", "wrn-16-2"),
        ("resnet2", "resnet20"),
        ("resnet99999998", "resnet8"),
        ("wrn-10-99999", "wrn-10-2"),
        ("wrn-99994-2", "wrn-40-2"),
        ("resnet88888888888", "resnet8"),
        ("cifar-resnet20", "cifar-resnet50"),
        ("vgg11", "cifar-vgg11"),
        ("mobilenetv2", "cifar-mobilenetv2"),
        ("shufflenetv2", "cifar-shufflenetv2"),
        ("cifar-densenet", "cifar-densenet121"),
        ("densenet-bc-100", "densenet-bc-100-12"),
        ("densenet-bc-101-12", "densenet-bc-100-12"),
        ("densenet-bc-100-101", "densenet-bc-100-12"),
        ("lenet", "lenet5"),
        ("two-conv-net", "twoconvnet"),
        ("segmenter-8", "segmenter-8-16-16"),
        ("segmenter-8-0", "segmenter-8-16-16"),
        ("segmenter-8-16-", "segmenter-8-16-16"),
        ("segmenter-8-6401", "segmenter-8-16-16"),
    ],
)
@pytest.mark.parametrize("having", ["torchvision", "broken", "absent"])
def test_unknown_name(name: str, nearest: str, having: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(having)
    with pytest.raises(
        ValueError, match=rf"fastkd: name '{name}' is unknown, did you mean .*{nearest}.*depths are"
    ) as error:
        create(name)
    why = {
        "torchvision": "wrn widths up to 100)",
        "broken": "are taken, too, does not load)",
        "absent": "are taken, too, is not installed)",
    }
    assert str(error.value).endswith(why[having])


@pytest.mark.parametrize("name", [None, 3, b"resnet8", ["resnet8"]])
@pytest.mark.parametrize("call", [create, data.load, methods.create])
def test_names_are_text(call: Callable[[Any], object], name: Any) -> None:
    with pytest.raises(TypeError, match=f"fastkd: name is {type(name).__name__}, must be text"):
        call(name)


_SIZES = ("depth", "in_channels", "num_classes")
NETWORKS: dict[str, tuple[tuple[str, ...], Callable[..., nn.Module]]] = {
    "create": (("in_channels", "num_classes"), partial(create, "resnet8")),
    "ResNet": (("blocks", "in_channels", "num_classes"), lambda **given: ResNet(**{"blocks": 1, **given})),
    "WideResNet": (
        ("blocks", "width", "in_channels", "num_classes"),
        lambda **given: WideResNet(**{"blocks": 1, "width": 1, **given}),
    ),
    "ConvNet": (("in_channels", "image_size", "classes"), lambda **given: ConvNet((4, 4), **given)),
    "ConvNet's widths": (("widths[1]",), lambda **given: ConvNet((4, *given.values()))),
    "resnet": (("depth",), lambda **given: resnet(**given)),
    "wide_resnet": (("depth", "width"), lambda **given: wide_resnet(**{"depth": 10, "width": 1, **given})),
    "CifarResNet": (_SIZES, lambda **given: CifarResNet(**{"depth": 18, **given})),
    "VGG": (_SIZES, lambda **given: VGG(**{"depth": 8, **given})),
    "DenseNet": (
        ("growth", "in_channels", "num_classes"),
        lambda **given: DenseNet(**{"layers": (1,), "growth": 1, **given}),
    ),
    "DenseNet's layers": (("layers[1]",), lambda **given: DenseNet((1, *given.values()), 1)),
    "densenet_bc": (("depth", "growth"), lambda **given: densenet_bc(**{"depth": 10, "growth": 1, **given})),
    "cifar_densenet": (("depth",), lambda **given: cifar_densenet(**given)),
    "MobileNetV2": (("stem_stride", "in_channels", "num_classes"), MobileNetV2),
    "ShuffleNetV2": (("in_channels", "num_classes"), ShuffleNetV2),
    "LeNet5": (("in_channels", "num_classes"), LeNet5),
    "TwoConvNet": (("in_channels", "num_classes"), TwoConvNet),
}


@pytest.mark.parametrize("value", [0, -4, 1.5, "1", None, True, 2**70])
@pytest.mark.parametrize(("network", "argument"), [(n, argument) for n in NETWORKS for argument in NETWORKS[n][0]])
def test_sizes_of_networks(network: str, argument: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"fastkd: {re.escape(argument)} is "):
        NETWORKS[network][1](**{argument: value})
    with pytest.raises(TypeError, match="fastkd: widths is NoneType, must be a sequence"):
        ConvNet(None)  # type: ignore[arg-type]


@pytest.mark.usefixtures("absent")
def test_name_like_none_lists_all() -> None:
    with pytest.raises(ValueError, match=r"name 'xyzzy' is unknown, must be one of resnet8, resnet14, .*resnet152"):
        create("xyzzy")
    for name in (3, None):
        with pytest.raises(TypeError, match=f"fastkd: name is {type(name).__name__}, must be text"):
            create(name)


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "torchvision/vgg11"])
def test_torchvision_that_does_not_load(name: str) -> None:
    message = (
        rf"name '{name}' is a network of torchvision, which does not load: operator torchvision::nms does not exist$"
    )
    with pytest.raises(ImportError, match=message):
        create(name)


@pytest.mark.usefixtures("absent")
def test_torchvision_that_is_not_there() -> None:
    with pytest.raises(ImportError, match="name 'resnet34' is a network of torchvision, which is not installed"):
        create("resnet34")


def test_names_are_those_of_help_texts() -> None:
    assert {"resnet8", "resnet26", "wrn-16-2", "wrn-40-2", "torchvision/resnet18"} <= set(names())
    assert len(set(names())) == len(names())


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (resnet(8), FeatureLayers("relu", ("layer1", "layer2", "layer3"), "avgpool")),
        (wide_resnet(10, 1), FeatureLayers("conv1", ("layer1", "layer2", "relu"), "avgpool")),
        (TheirResNet(10), FeatureLayers("maxpool", ("layer1", "layer2", "layer3", "layer4"), "avgpool")),
    ],
    ids=["resnet", "wide", "torchvision"],
)
def test_feature_layers(model: nn.Module, expected: FeatureLayers) -> None:
    """Each is called once, in this order, and what it returned is not written to afterwards."""
    assert feature_layers(model) == expected
    seen: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    for name in (expected.stem, *expected.stages, expected.embedding):
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.append((name, output, output.detach().clone()))
        )
    model.eval()(torch.randn(2, 3, 32, 32))
    assert [name for name, _, _ in seen] == [expected.stem, *expected.stages, expected.embedding]
    assert all(torch.equal(output, copy) for _, output, copy in seen)
    assert seen[-1][1].shape[2:] == (1, 1)
    assert bool((seen[-1][1] == seen[-2][1].mean((2, 3), keepdim=True)).all()) or torch.allclose(
        seen[-1][1], seen[-2][1].mean((2, 3), keepdim=True), atol=1e-6
    )


def test_declared_feature_layers() -> None:
    model = ConvNet([4, 8])
    model.feature_layers = ("features.0", ["features.3", "features.7"], "features.8")  # type: ignore[assignment]
    assert feature_layers(model) == FeatureLayers("features.0", ("features.3", "features.7"), "features.8")
    model.feature_layers = ("features.0", ("features.77",), "features.8")  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"model declares the feature layer 'features.77', which is no module of it"):
        feature_layers(model)


def test_unknown_feature_layers() -> None:
    with pytest.raises(ValueError, match=r"model is a ConvNet.* by hand, .*: its modules are features, classifier$"):
        feature_layers(ConvNet([4, 8]))
    with pytest.raises(ValueError, match=r"model is a ReLU.*: its modules are none$"):
        feature_layers(nn.ReLU())
    for missing in ("layer1", "avgpool"):
        model = TheirResNet(10)
        delattr(model, missing)
        with pytest.raises(ValueError, match="its modules are conv1"):
            feature_layers(model)
