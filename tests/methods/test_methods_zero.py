"""A term of weight 0: not computed, not looked at, not among the terms, and nothing of it has to be there."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastkd.methods import (
    AT,
    BSS,
    FSP,
    ONE,
    RKD,
    SP,
    SRD,
    FeatureTap,
    FitNet,
    Hinton,
    JointLogits,
    Method,
    Objective,
    Outputs,
)
from fastkd.models.resnet import resnet
from fastkd.training import Trainer, TrainingSettings

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread", "no_figures")]

B, K = 6, 5
TARGET = torch.arange(B) % K
WEIGHTS = ("task_weight", "kd_weight", "feature_weight")

METHODS: dict[str, Callable[..., Method]] = {
    "hinton": Hinton,
    "logit-std": lambda **weights: Hinton(standardize=True, **weights),
    "srd": lambda **weights: SRD(4, 4, ["a"], **weights),
    "fitnet": lambda **weights: FitNet(4, 4, ["a"], **weights),
    "fsp": lambda **weights: FSP(["a", "b"], **weights),
    "at": lambda **weights: AT(["a"], **weights),
    "sp": lambda **weights: SP(["a"], **weights),
    "rkd": lambda **weights: RKD(25, 50, ["a"], **weights),
}
CASES = [
    pytest.param(name, on, id=f"{name} {'+'.join(w for w, used in zip(WEIGHTS, on, strict=False) if used) or 'none'}")
    for name in METHODS
    for on in itertools.product((True, False), repeat=3 if name not in ("hinton", "logit-std") else 2)
]


def made(name: str, on: tuple[bool, ...]) -> Method:
    weights = {weight: 0.5 if used else 0.0 for weight, used in zip(WEIGHTS, on, strict=False)}
    return METHODS[name](**weights)


def outputs(seed: int) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, K, generator=generator).requires_grad_()
    maps = {name: torch.randn(B, 4, 4, 4, generator=generator).requires_grad_() for name in ("a", "b")}
    return Outputs(logits, maps)


def tensors(student: Outputs, method: Method) -> list[Tensor]:
    return [student.logits, *student.features.values(), *method.parameters()]


# what a teacher may hold where it is not looked at
WRONG: dict[str, Callable[[Tensor], Any]] = {
    "nan": lambda x: torch.full_like(x, torch.nan),
    "inf": lambda x: torch.full_like(x, torch.inf),
    "-inf": lambda x: torch.full_like(x, -torch.inf),
    "another shape": lambda x: torch.zeros(2, 3),
    "another dtype": lambda x: torch.zeros_like(x, dtype=torch.int64),
    "no tensor": lambda x: None,
    "several": lambda x: JointLogits([x, x]),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(("name", "on"), CASES)
def test_what_has_weight_0_is_not_looked_at(name: str, on: tuple[bool, ...], wrong: str) -> None:
    """Value and gradients are, bit for bit, those of a proper teacher."""
    method, spoil = made(name, on), WRONG[wrong]
    task, kd, *feature = on
    student, teacher = outputs(1), outputs(2)
    state = {key: value.clone() for key, value in method.state_dict().items()}
    expected = method(student, teacher, TARGET)
    wanted = torch.autograd.grad(expected.total, tensors(student, method), materialize_grads=True)
    method.load_state_dict(state)  # of FitNet's batch norm

    given = Outputs(
        teacher.logits if kd else spoil(teacher.logits),
        teacher.features if any(feature) else {key: spoil(value) for key, value in teacher.features.items()},
    )
    loss = method(student, given, TARGET if task else spoil(TARGET.float()))
    names = ("task_loss", "kd_loss", method.term)
    assert list(loss.terms) == [name for name, used in zip(names, on, strict=False) if used]
    assert torch.equal(loss.total, expected.total)
    gradients = torch.autograd.grad(loss.total, tensors(student, method), materialize_grads=True)
    for ours, theirs in zip(gradients, wanted, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("name", "on"), CASES)
def test_the_students_own_numbers(name: str, on: tuple[bool, ...], value: float) -> None:
    """Features, or logits, of which nothing is made may hold anything; their gradient is 0."""
    method, (student, teacher) = made(name, on), (outputs(1), outputs(2))
    logits, features = any(on[:2]), any(on[2:])
    if not logits:
        student = student._replace(logits=torch.full_like(student.logits, value).requires_grad_())
    if not features:
        maps = {key: torch.full_like(f, value).requires_grad_() for key, f in student.features.items()}
        student = student._replace(features=maps)
    loss = method(student, teacher, TARGET)
    assert loss.total.isfinite()
    loss.total.backward()
    assert student.logits.grad is not None
    assert bool(student.logits.grad.any()) == logits
    for tensor in tensors(student, method):
        assert tensor.grad is None or tensor.grad.isfinite().all()
    assert all(p.grad is not None for p in method.parameters())  # as DistributedDataParallel wants it


@pytest.mark.parametrize(("name", "on"), [case for case in CASES if not any(case.values[1][1:])])
def test_no_teacher_and_no_features_are_needed(name: str, on: tuple[bool, ...]) -> None:
    method, student = made(name, on), outputs(1)
    assert not method.reads_teacher
    loss = method(Outputs(student.logits), None, TARGET)
    loss.total.backward()
    network = resnet(8, in_channels=1, num_classes=K)  # which has no layer a
    images = torch.randn(B, 1, 8, 8)
    loss, logits = Objective(method, network)(images, TARGET)
    loss.total.backward()
    assert logits.shape == (B, K)
    method.step(FeatureTap(network), None, images, TARGET)

    class Forbidden(nn.Linear):
        def forward(self, images: Tensor) -> Tensor:
            raise AssertionError("the teacher runs")

    Objective(method, network, Forbidden(3, 3))(images, TARGET)


def test_the_one_weights_of_rkd() -> None:
    student = Outputs(torch.zeros(B, K, requires_grad=True))
    method = RKD(0, 0)
    assert not method.reads_features
    assert not method.reads_teacher
    assert set(method(student, None, TARGET).terms) == {"task_loss"}


def test_weights_that_change_in_a_training() -> None:
    """To 0 and from there: taps and teacher come and go."""
    student, teacher = resnet(8, in_channels=1, num_classes=K), resnet(8, in_channels=1, num_classes=K, seed=2)
    asked: list[None] = []
    teacher.register_forward_hook(lambda *_: asked.append(None))
    method = AT(["layer1"], feature_weight=0.0)
    objective = Objective(method, student, teacher)
    images = torch.randn(B, 1, 8, 8)
    for feature_weight, kd_weight, terms, calls, tapped in (
        (0.0, 0.0, {"task_loss"}, 0, ()),
        (1.0, 0.0, {"task_loss", "attention_loss"}, 1, ("layer1",)),
        (1.0, 1.0, {"task_loss", "kd_loss", "attention_loss"}, 1, ("layer1",)),
        (0.0, 1.0, {"task_loss", "kd_loss"}, 1, ()),
        (0.0, 0.0, {"task_loss"}, 0, ()),
    ):
        method.feature_weight, method.kd_weight = feature_weight, kd_weight
        asked.clear()
        loss, _ = objective(images, TARGET)
        loss.total.backward()
        assert set(loss.terms) == terms
        assert len(asked) == calls
        assert objective.student.layers == tapped
        assert len(student.layer1._forward_hooks) == len(tapped)
    without = Objective(AT(["layer1"], feature_weight=0.0), resnet(8, in_channels=1, num_classes=K))
    without.method.feature_weight = 1.0
    with pytest.raises(ValueError, match="teacher is None, must be a network for AT"):
        without(images, TARGET)


def test_a_layer_that_is_read_must_be_there() -> None:
    student, teacher = resnet(8, in_channels=1, num_classes=K), resnet(8, in_channels=1, num_classes=K, seed=2)
    with pytest.raises(ValueError, match="the model has no layer 'a'"):
        Objective(AT(["a"]), student, teacher)
    with pytest.raises(ValueError, match="teacher is None, must be a network for AT"):
        Objective(AT(["layer1"]), student)


class Batches:
    """Three batches an epoch."""

    def __len__(self) -> int:
        return 3

    def epoch(self, epoch: int, *, start: int = 0) -> Any:
        generator = torch.Generator().manual_seed(epoch)
        return ((torch.randn(B, 1, 8, 8, generator=generator), TARGET) for _ in range(start, 3))


@pytest.mark.parametrize("weights", [(0.0, 0.0), (1.0, 0.0)])
def test_a_training(weights: tuple[float, float]) -> None:
    """Also of nothing at all; and one whose distillation ends with its second epoch."""
    task_weight, kd_weight = weights
    method = FitNet(4, 4, ["a"], task_weight=task_weight, kd_weight=kd_weight, feature_weight=0.0)
    network = resnet(8, in_channels=1, num_classes=K)
    (line,) = Trainer(Objective(method, network), Batches(), TrainingSettings(epochs=1), show="off").fit()
    assert ("task_loss" in line) == (task_weight > 0)
    assert not {"kd_loss", "hint_loss"} & set(line)

    method = AT(["layer1"], feature_weight=1.0)
    objective = Objective(method, network, resnet(8, in_channels=1, num_classes=K, seed=2))

    def off(line: dict[str, float]) -> None:
        method.feature_weight = 0.0

    history = Trainer(objective, Batches(), TrainingSettings(epochs=2), show="off", on_epoch=off).fit()
    assert ["attention_loss" in line for line in history] == [True, False]


def test_ramps_at_0() -> None:
    class Late(ONE):
        def ramp(self, progress: float) -> float:
            return 0.0 if progress < 0.5 else 1.0

    branch, ensemble = torch.zeros(B, K, requires_grad=True), torch.zeros(B, K, requires_grad=True)
    loss = Late()(Outputs(JointLogits([branch, branch, ensemble])), None, TARGET)
    assert set(loss.terms) == {"task_loss"}
    assert set(Late()(Outputs(JointLogits([branch, ensemble])), None, TARGET, 0.5).terms) == {"task_loss", "kd_loss"}

    attacks: list[None] = []

    class Counted(BSS):
        def attack(self, *args: Any, **kwargs: Any) -> Any:
            attacks.append(None)
            return super().attack(*args, **kwargs)

    student, teacher = (FeatureTap(nn.Sequential(nn.Flatten(), nn.Linear(4, K))) for _ in "ab")
    images = torch.randn(B, 1, 2, 2)
    for progress, count in ((0.0, 1), (0.74, 1), (0.75, 0), (1.0, 0)):
        attacks.clear()
        loss, _ = Counted().step(student, teacher, images, TARGET, progress)
        assert len(attacks) == count
        assert ("boundary_loss" in loss.terms) == bool(count)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_attacked_rows_of_weight_0(value: float) -> None:
    """Rows that only fill the batch are not looked at, also where no row counts."""
    for counting in (2, 0):
        weight = (torch.arange(4) < counting).float()
        given = torch.randn(4, K, generator=torch.Generator().manual_seed(0))
        student = torch.where(weight[:, None] > 0, given, value).requires_grad_()
        loss = BSS().boundary_loss(student, torch.where(weight[:, None] > 0, given, value), weight)
        loss.backward()
        assert loss.isfinite()
        assert student.grad is not None
        assert student.grad.isfinite().all()
        assert counting > 0 or loss == 0
