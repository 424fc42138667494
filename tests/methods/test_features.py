"""FeatureTap: features of any network by name."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastkd.methods import FeatureTap, Outputs
from fastkd.models.resnet import resnet

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]


class Twice(nn.Module):
    """Runs one module twice, one never, and one that returns no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.idle, self.pair = nn.Linear(3, 3), nn.Linear(3, 3), Pair()

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(self.pair(self.shared(x))[0])


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def test_features_are_what_the_modules_return() -> None:
    model = resnet(8, in_channels=1).eval()
    images = torch.randn(2, 1, 28, 28)
    logits, features = FeatureTap(model, ["layer3", "relu", "layer1.0.conv1", "avgpool"])(images)
    stem = model.relu(model.bn1(model.conv1(images)))
    assert list(features) == ["layer3", "relu", "layer1.0.conv1", "avgpool"]
    assert torch.equal(features["relu"], stem)
    assert torch.equal(features["layer1.0.conv1"], model.layer1[0].conv1(stem))
    last = model.layer3(model.layer2(model.layer1(stem)))
    assert torch.equal(features["layer3"], last)
    assert torch.equal(features["avgpool"].flatten(1), last.mean((2, 3)))
    assert torch.equal(logits, model(images))


def test_gradients_flow_through_features() -> None:
    model = resnet(8, in_channels=1)
    FeatureTap(model, ["layer1"])(torch.randn(2, 1, 8, 8)).features["layer1"].sum().backward()
    assert model.conv1.weight.grad is not None
    assert model.layer2[0].conv1.weight.grad is None


def test_the_model_stays_as_it_is() -> None:
    model = resnet(8, in_channels=1)
    names, state = [name for name, _ in model.named_modules()], list(model.state_dict())
    tap = FeatureTap(model, ["layer1"])
    assert [name for name, _ in model.named_modules()] == names
    assert list(model.state_dict()) == state
    assert [name.removeprefix("model.") for name in tap.state_dict()] == state
    tap(torch.randn(1, 1, 8, 8))
    model(torch.randn(1, 1, 8, 8))  # nothing is kept outside of the tap
    assert all(t.here.outputs is None for t in tap._taps)


def test_several_taps_of_one_model_and_copies_do_not_meet() -> None:
    model = resnet(8, in_channels=1).eval()
    first, second = FeatureTap(model, ["layer1"]), FeatureTap(model, ["layer1", "layer2"])
    other = copy.deepcopy(second)
    with torch.no_grad():
        other.model.conv1.weight.mul_(2.0)
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(first(images).features["layer1"], second(images).features["layer1"])
    assert not torch.equal(other(images).features["layer1"], second(images).features["layer1"])


class Meeting(nn.Module):
    """Its threads wait for one another before and after its layer."""

    def __init__(self, threads: int) -> None:
        super().__init__()
        self.layer, self.barrier = nn.Linear(3, 3), threading.Barrier(threads, timeout=30)

    def forward(self, x: Tensor) -> Tensor:
        self.barrier.wait()
        x = self.layer(x)
        self.barrier.wait()
        return x + 1


def replica(module: nn.Module) -> Any:
    """As DataParallel makes them, of one device: hooks are those of the module itself."""
    made = module._replicate_for_data_parallel()
    made._parameters = dict(module._parameters)
    made._modules = {name: replica(child) for name, child in module._modules.items()}
    return made


@pytest.mark.parametrize("of_each", [lambda tap: tap, replica], ids=["one tap", "replicas"])
def test_each_thread_gets_its_own_features(of_each: Callable[[Any], Any]) -> None:
    threads = 3
    tap = FeatureTap(Meeting(threads), ["layer"])
    results: list[Any] = [None] * threads

    def run(i: int) -> None:
        mine = of_each(tap)
        # one of them runs the model without the tap
        results[i] = (mine.model if i == 1 else mine)(torch.full((1, 3), float(i)))

    running = [threading.Thread(target=run, args=(i,)) for i in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    for i in (0, 2):
        torch.testing.assert_close(results[i].features["layer"], tap.model.layer(torch.full((1, 3), float(i))))
        torch.testing.assert_close(results[i].logits, results[i].features["layer"] + 1)


def saved(tap: FeatureTap) -> Any:
    file = io.BytesIO()
    torch.save(tap, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda tap: pickle.loads(pickle.dumps(tap)), saved])
def test_copies_and_pickles_tap_as_the_original(copied: Callable[[FeatureTap], FeatureTap]) -> None:
    tap, images = FeatureTap(resnet(8, in_channels=1).eval(), ["layer1", "avgpool"]), torch.randn(2, 1, 8, 8)
    other = copied(tap)
    torch.testing.assert_close(other(images).features, tap(images).features, rtol=0, atol=0)
    other.remove()
    assert len(other.model.layer1._forward_hooks) == 0
    assert list(tap(images).features) == ["layer1", "avgpool"]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda outputs: pickle.loads(pickle.dumps(outputs))])
def test_copies_and_pickles_of_outputs(copied: Callable[[Outputs], Outputs]) -> None:
    for features in ({}, {"layer1": torch.ones(2, 4)}):
        outputs = Outputs(torch.arange(6.0).view(2, 3), features) if features else Outputs(torch.arange(6.0).view(2, 3))
        other = copied(outputs)
        assert type(other) is Outputs
        torch.testing.assert_close(tuple(other), (outputs.logits, features))


def test_logits_are_found_in_objects() -> None:
    class Wrapped(nn.Linear):
        def forward(self, x: Tensor) -> SimpleNamespace:  # as transformers' models do
            return SimpleNamespace(logits=super().forward(x))

    assert FeatureTap(Wrapped(3, 2))(torch.ones(1, 3)).logits.shape == (1, 2)
    with pytest.raises(TypeError, match=r"the model returned tuple, must be logits or have them as \.logits"):
        FeatureTap(Pair())(torch.ones(1))


def test_an_unknown_layer_lists_those_that_exist() -> None:
    with pytest.raises(
        ValueError, match=r"no layer 'layer_2'; near it: layer2, .*; it has conv1, bn1, relu, layer1, layer1.0"
    ):
        FeatureTap(resnet(8), ["layer1", "layer_2"])
    with pytest.raises(TypeError, match=r"layers is the string 'layer1', must be a sequence of names: \['layer1'\]"):
        FeatureTap(resnet(8), "layer1")


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("shared", "layer 'shared' ran 2 times in this forward pass, must run once"),
        ("idle", "layer 'idle' did not run"),
        ("pair", "layer 'pair' returned tuple, must be a tensor"),
    ],
)
def test_layers_that_cannot_be_tapped(layer: str, message: str) -> None:
    tap = FeatureTap(Twice(), [layer])
    for _ in range(2):  # a failed call leaves nothing behind
        with pytest.raises(RuntimeError, match=message):
            tap(torch.ones(1, 3))


def test_a_feature_changed_in_place_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.Flatten())
    images = torch.randn(2, 1, 4, 4)
    tap = FeatureTap(model, ["0"])
    for mode in (torch.enable_grad, torch.no_grad):
        with (
            mode(),
            pytest.raises(RuntimeError, match=r"layer '0' was changed in place .* the module that comes after"),
        ):
            tap(images)
    assert FeatureTap(model, ["1"])(images).features["1"].min() >= 0.0
    with torch.inference_mode():  # whose tensors do not count their changes
        assert FeatureTap(model, ["1"])(images).features["1"].min() >= 0.0


def test_a_removed_tap_leaves_no_hooks() -> None:
    model = resnet(8, in_channels=1)
    kept, removed = FeatureTap(model, ["layer1"]), FeatureTap(model, ["layer1", "layer2"])
    copied = copy.deepcopy(removed)
    removed.remove()
    assert (len(model.layer1._forward_hooks), len(model.layer2._forward_hooks)) == (1, 0)
    assert list(kept(torch.randn(2, 1, 8, 8)).features) == ["layer1"]
    assert list(copied(torch.randn(2, 1, 8, 8)).features) == ["layer1", "layer2"]
    copied.remove()
    assert len(copied.model.layer2._forward_hooks) == 0


def test_names_from_a_generator() -> None:
    assert FeatureTap(resnet(8), (f"layer{i}" for i in (1, 2))).layers == ("layer1", "layer2")


@pytest.mark.compiles
@pytest.mark.parametrize("part", [False, True])
def test_a_compiled_model_is_tapped_by_its_own_names(part: bool) -> None:
    model = resnet(8, in_channels=1).eval()
    images = torch.randn(2, 1, 8, 8)
    expected = FeatureTap(copy.deepcopy(model), ["layer1", "layer1.0.conv1"])(images)
    if part:
        model.layer1 = torch.compile(model.layer1, backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    tap = FeatureTap(model, ["layer1", "layer1.0.conv1"])
    logits, features = tap(images)
    torch.testing.assert_close(logits, expected.logits)
    torch.testing.assert_close(features, expected.features)
    with pytest.raises(ValueError, match=r"no layer 'layer_1'.*; it has conv1, bn1"):
        FeatureTap(model, ["layer_1"])


@pytest.mark.compiles
def test_a_tapped_model_compiles() -> None:
    tap = FeatureTap(resnet(8, in_channels=1).eval(), ["layer1", "avgpool"])
    images = torch.randn(2, 1, 8, 8)
    logits, features = torch.compile(tap, backend="aot_eager", fullgraph=True)(images)
    torch.testing.assert_close(logits, tap(images).logits)
    torch.testing.assert_close(features["layer1"], tap(images).features["layer1"])
