"""Methods by name, for two networks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastkd import _checks
from fastkd.methods import (
    AT,
    BSS,
    CRD,
    DIST,
    DKD,
    DML,
    FSP,
    ONE,
    RKD,
    SP,
    SRD,
    SSKD,
    Baseline,
    DataFree,
    FitNet,
    FixedLinear,
    Hinton,
    Method,
    NoisyLabels,
    Objective,
)
from fastkd.methods.registry import create, find, names
from fastkd.models.resnet import resnet
from fastkd.models.wide_resnet import wide_resnet
from fastkd.training.inference import predict

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]

KINDS = {
    "baseline": Baseline,
    "hinton": Hinton,
    "logit-std": Hinton,
    "bss": BSS,
    "dkd": DKD,
    "dist": DIST,
    "fitnet": FitNet,
    "srd": SRD,
    "fsp": FSP,
    "at": AT,
    "sp": SP,
    "rkd-d": RKD,
    "rkd-a": RKD,
    "rkd-da": RKD,
    "crd": CRD,
    "sskd": SSKD,
    "one": ONE,
    "dml": DML,
    "fixed-linear": FixedLinear,
    "vanilla": Hinton,
    "ood-kd": Hinton,
    "ood-fitnet": FitNet,
    "ood-rkd": RKD,
    "ood-crd": CRD,
    "ood-sskd": SSKD,
}
METHODS = [name for name in names() if issubclass(find(name).kind, Method)]  # no whole procedures
IMAGES = torch.randn(8, 1, 12, 12, generator=torch.Generator().manual_seed(0))
TARGET = torch.arange(8)
INDEX = torch.arange(20, 12, -1)


def networks(family: str) -> tuple[nn.Module, nn.Module]:
    if family == "resnet":
        return resnet(8, in_channels=1, seed=1), resnet(14, in_channels=1, seed=2)
    return wide_resnet(10, 1, in_channels=1, seed=1), wide_resnet(16, 1, in_channels=1, seed=2)


def of_the_tables() -> list[str]:
    """Names of the methods but for those that make images, or are for noisy labels, which have guides of their own."""
    return [name for name in names() if not issubclass(find(name).kind, (DataFree, NoisyLabels))]


def test_names() -> None:
    assert list(KINDS) == of_the_tables()


@pytest.mark.parametrize("family", ["resnet", "wide"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains(name: str, family: str) -> None:
    student, teacher = networks(family)
    torch.manual_seed(0)  # of the methods' own weights
    method = create(name, student, teacher, IMAGES, items=21)
    assert type(method) is KINDS[name]
    made = method.build_student(lambda seed: student if seed == 0 else networks(family)[0])
    objective = Objective(method, made, teacher)
    optimizer = torch.optim.SGD(objective.parameters(), 0.02)
    losses = []
    for _ in range(8):
        torch.manual_seed(0)
        loss, logits = objective(IMAGES, TARGET, 0.3, INDEX)
        assert logits.shape == (8, 10)
        optimizer.zero_grad()
        loss.total.backward()
        assert all(p.grad is not None for p in objective.parameters())
        optimizer.step()
        losses.append(loss.total.item())
    assert min(losses[1:]) < losses[0]
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(name.startswith("_teacher") for name in objective.state_dict())


class NoWaiting(TorchDispatchMode):
    """No operator whose result the host must know: a GPU would be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "masked_select", "unique"), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", METHODS)
def test_no_method_waits_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = networks("resnet")
    method = create(name, student, teacher, IMAGES, items=21)
    made = method.build_student(lambda seed: student if seed == 0 else networks("resnet")[0])
    objective = Objective(method, made, teacher)
    monkeypatch.setattr(_checks, "readable", lambda tensor: False)  # labels on a CPU are looked at
    for _ in range(2):
        with NoWaiting():
            objective(IMAGES, TARGET, 0.3, INDEX)[0].total.backward()


@pytest.mark.parametrize("name", ["dkd", "dist", "logit-std", "srd", "crd", "sskd"])
def test_a_compiled_step(name: str) -> None:
    student, teacher = networks("resnet")
    objective = Objective(create(name, student, teacher, IMAGES, items=21), student, teacher)
    state = {key: value.clone() for key, value in objective.state_dict().items()}
    torch.manual_seed(0)
    expected = objective(IMAGES, TARGET, 0.3, INDEX)[0].terms
    after = {key: value.clone() for key, value in objective.state_dict().items()}
    objective.load_state_dict(state)
    torch._dynamo.reset()
    torch.manual_seed(0)
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")(IMAGES, TARGET, 0.3, INDEX)[0].terms
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(objective.state_dict(), after)


def test_the_documents_have_all_methods_and_their_weights() -> None:
    symbols = {"r": "task_weight", "a": "kd_weight", "b": "feature_weight", "T": "temperature"}
    text = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in text.splitlines() if line.startswith("| ")][1:]
    assert [name for name, *_ in rows] == of_the_tables()
    for name, kind, weights in rows:
        assert kind == f"`{find(name).kind.__name__}`"
        if name not in METHODS:
            continue
        method = create(name, *networks("resnet"), torch.zeros(2, 1, 32, 32), items=50)
        given = dict(pair.split() for pair in weights.split(", "))
        assert {symbols[k]: float(v) for k, v in given.items()} == {
            symbols[k]: getattr(method, symbols[k]) for k in given
        }


def test_layers_are_those_of_each_network() -> None:
    method = create("fsp", networks("resnet")[0], wide_resnet(10, 1, in_channels=1))
    assert method.layers == ("relu", "layer1", "layer2", "layer3")
    assert method.teacher_layers == ("conv1", "layer1", "layer2", "relu")
    stages = create("at", *networks("resnet")[:1], wide_resnet(10, 1, in_channels=1))
    assert stages.layers == ("layer1", "layer2", "layer3")
    assert stages.teacher_layers == ("layer1", "layer2", "relu")
    assert create("rkd-d", *networks("resnet")).angle_weight == 0.0
    assert create("rkd-a", *networks("resnet")).distance_weight == 0.0
    hint = create("fitnet", resnet(8, in_channels=1), wide_resnet(10, 2, in_channels=1), IMAGES)
    assert (hint.layers, hint.student_channels, hint.teacher_channels) == (("layer2",), 32, 64)


def test_settings_take_the_place_of_the_studys() -> None:
    method = create("sp", *networks("resnet"), feature_weight=7.0, layers=["layer1"], teacher_layers=["layer2"])
    assert (method.feature_weight, method.layers, method.teacher_layers) == (7.0, ("layer1",), ("layer2",))
    assert create("hinton", temperature=2.0).temperature == 2.0


def test_the_weight_of_attention_shrinks_with_the_maps() -> None:
    student, teacher = networks("resnet")
    weights = [create("at", student, teacher, torch.zeros(2, 1, n, n)).feature_weight for n in (64, 32, 16)]
    assert weights == [
        1000.0,
        1000.0,
        250.0,
    ]  # the published one; b / (H W) of the first maps is never above its 1000 / 32^2
    assert create("at", student, teacher).feature_weight == 1000.0
    assert create("at", student, teacher, IMAGES, feature_weight=7).feature_weight == 7.0
    assert create("at", student, teacher, torch.zeros(2, 1, 32, 32), layers=["layer2"]).feature_weight == 250.0


@pytest.mark.parametrize("name", ["fitnet", "at", "srd", "crd", "sskd"])
def test_dry_run_leaves_the_networks_alone(name: str) -> None:
    student, teacher = networks("resnet")
    before = {name: value.clone() for name, value in student.state_dict().items()}
    create(name, student.train(), teacher, IMAGES, items=9)
    assert student.training
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    assert not any(module._forward_hooks for network in (student, teacher) for module in network.modules())


def test_each_module_keeps_its_mode() -> None:
    student, teacher = networks("resnet")
    student.train()
    student.bn1.eval()  # frozen by itself
    modes = [module.training for module in student.modules()]
    create("fitnet", student, teacher, IMAGES)
    assert [module.training for module in student.modules()] == modes
    assert torch.equal(predict(student, IMAGES), copy.deepcopy(student).eval()(IMAGES))
    assert [module.training for module in student.modules()] == modes
    with pytest.raises(RuntimeError):
        predict(student, IMAGES[:, 0, 0])
    assert [module.training for module in student.modules()] == modes


def test_who_needs_a_teacher() -> None:
    alone = [name for name in names() if not find(name).needs_teacher]
    assert [name for name in alone if find(name).family != "noisy labels"] == ["baseline", "one", "dml"]
    assert set(alone) >= {"bldr", "dividemix", "sop"}
    assert all(find(name).needs_teacher == KINDS[name].needs_teacher for name in METHODS)
    with pytest.raises(ValueError, match="method 'hintom' is unknown, did you mean hinton"):
        find("hintom")


def test_a_teacher_that_is_the_student_is_refused() -> None:
    student, teacher = networks("resnet")
    teacher.layer1 = student.layer1
    for shared in (student, teacher):
        with pytest.raises(
            ValueError, match=r"teacher shares \d+ parameters with what is trained \(.*must be a network of its own"
        ):
            Objective(create("hinton"), student, shared)
    assert student.training
    assert all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("name", ["baseline", "hinton", "logit-std", "dkd", "dist", "bss"])
def test_methods_without_features_take_any_network(name: str) -> None:
    networks = nn.Sequential(nn.Flatten(), nn.Linear(144, 10)), nn.Sequential(nn.Flatten(), nn.Linear(144, 10))
    loss, _ = Objective(create(name, *networks, IMAGES), *networks)(IMAGES, TARGET)
    assert loss.total.isfinite()


def test_layers_of_fitnet_from_a_generator() -> None:
    student, teacher = networks("resnet")
    method = create("fitnet", student, teacher, IMAGES, layers=iter(["layer1"]))
    assert (method.layers, method.student_channels) == (("layer1",), 16)
    with pytest.raises(TypeError, match="layers is the string 'layer1'"):
        create("fitnet", student, teacher, IMAGES, layers="layer1")


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"method 'rkd-dd' is unknown, did you mean rkd-d or"):
        create("rkd-dd")
    for name in (None, 3, ["hinton"]):
        with pytest.raises(TypeError, match=f"fastkd: name is {type(name).__name__}, must be text"):
            create(name)
    for name, option, message in (
        ("hinton", "temprature", "did you mean temperature.*must be one of temperature, task_weight, kd_weight"),
        ("hinton", "Temperature", "did you mean temperature"),
        ("hinton", "layers", "must be one of temperature, task_weight, kd_weight"),
        ("rkd-d", "distance_wieght", "did you mean distance_weight"),
        ("fitnet", "student_chanels", "did you mean student_channels"),
        ("at", "featureweight", "did you mean feature_weight"),
        ("one", "branch", "did you mean branches"),
        ("baseline", "temperature", "there are none"),
        ("hinton", "self", "must be one of"),
    ):
        with pytest.raises(ValueError, match=f"fastkd: {name}'s option '{option}' is unknown, {message}"):
            create(name, **{option: 3})
    with pytest.raises(ValueError, match="fitnet needs student, teacher and images, or student_channels"):
        create("fitnet")
    for name in ("fitnet", "at"):
        with pytest.raises(ValueError, match=r"layers is \(\), must be one name"):
            create(name, *networks("resnet"), IMAGES, layers=[])
    with pytest.raises(ValueError, match="teacher is None, must be a network for Hinton"):
        Objective(create("hinton"), resnet(8))
