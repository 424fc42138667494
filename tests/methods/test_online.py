"""ONE and DML: losses against independent formulas, and the networks that they train."""

from __future__ import annotations

import copy
import math

import method_formulas as plain
import pytest
import torch
from torch import Tensor, nn

from fastkd.methods import DML, ONE, Cohort, FeatureTap, JointLogits, Method, MultiBranch, Outputs
from fastkd.models.convnet import ConvNet
from fastkd.models.resnet import resnet

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]

TARGET = torch.tensor([0, 3, 9, 3, 1, 7])


def logits(networks: int) -> Tensor:
    generator = torch.Generator().manual_seed(networks)
    return torch.randn(networks, 6, 10, generator=generator, dtype=torch.float64).requires_grad_()


def check(method: Method, given: Tensor, expected: Tensor, progress: float = 0.0) -> None:
    loss = method(Outputs(JointLogits(given)), None, TARGET, progress)
    torch.testing.assert_close(loss.total, expected)
    for ours, theirs in zip(torch.autograd.grad(loss.total, given), torch.autograd.grad(expected, given), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(sum(loss.terms.values()), expected.detach())


@pytest.mark.parametrize("progress", [0.0, 0.1, 80 / 300, 0.9])
def test_one(progress: float) -> None:
    epoch = 300 * progress
    weight = math.exp(-5 * (1 - min(epoch, 80) / 80) ** 2)
    given = logits(4)
    check(ONE(), given, plain.one(given, TARGET, weight, 3.0), progress)


def test_one_without_a_ramp() -> None:
    given = logits(3)
    check(ONE(2.0, ramp_share=0.0), given, plain.one(given, TARGET, 1.0, 2.0))


@pytest.mark.parametrize("networks", [2, 3])
def test_dml(networks: int) -> None:
    given = logits(networks)
    check(DML(networks), given, plain.mutual(given, TARGET))


def test_a_network_is_split_into_branches() -> None:
    makes = [resnet(8, in_channels=1, seed=seed) for seed in range(3)]
    student = MultiBranch.split(makes, "layer3").eval()
    images = torch.randn(4, 1, 28, 28)
    every = student(images)
    assert isinstance(every, JointLogits)
    assert [logits.shape for logits in every] == [(4, 10)] * 4
    assert torch.equal(every[0], makes[0].eval()(images))
    trunk = makes[0].layer2(makes[0].layer1(makes[0].relu(makes[0].bn1(makes[0].conv1(images)))))
    second = makes[1].eval()
    torch.testing.assert_close(every[1], second.fc(second.layer3(trunk).mean((2, 3))))
    linear, norm = student.gate[2], student.gate[3]
    gate = norm(linear(trunk.mean((2, 3)))).clamp(min=0).softmax(1)
    torch.testing.assert_close(every[3], sum(gate[:, i, None] * every[i] for i in range(3)))
    assert torch.equal(ONE().deployed(student).eval()(images), every[0])
    assert {id(p) for p in student.branch(0).parameters()} == {id(p) for p in student.trunk.parameters()} | {
        id(p) for p in student.branches[0].parameters()
    }


def test_a_student_of_each_method() -> None:
    def make(seed: int) -> nn.Module:
        return resnet(8, in_channels=1, seed=seed)

    images = torch.randn(4, 1, 12, 12)
    for method in (ONE(), DML(3)):
        student = method.build_student(make)
        loss, main = method.step(FeatureTap(student), None, images, torch.arange(4))
        assert main.shape == (4, 10)
        loss.total.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
        kept = method.deployed(student)
        assert kept.eval()(images).shape == (4, 10)
        assert sum(p.numel() for p in kept.parameters()) == sum(p.numel() for p in make(0).parameters())
    a, b = DML().build_student(make).networks
    assert not torch.equal(a.conv1.weight, b.conv1.weight)


def test_the_students_weights_are_those_of_the_seeds() -> None:
    def make(seed: int) -> nn.Module:
        return resnet(8, in_channels=1, seed=seed)

    for method in (ONE(), DML()):
        before = torch.get_rng_state()
        first, second = method.build_student(make).state_dict(), method.build_student(make).state_dict()
        assert torch.equal(before, torch.get_rng_state())
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_is_deployed_is_the_students_own_class() -> None:
    def make(seed: int) -> nn.Module:
        return resnet(8, in_channels=1, seed=seed)

    images = torch.randn(4, 1, 12, 12)
    method = ONE()
    student = method.build_student(make)
    averaged = copy.deepcopy(student)
    frozen = averaged.branch(1).conv1.weight.clone()
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    evaluated = method.deployed(student)
    for _ in range(2):
        optimizer.zero_grad()
        method.step(FeatureTap(student), None, images, torch.arange(4))[0].total.backward()
        optimizer.step()
    student.eval()
    every = student(images)
    for i, kept in enumerate((method.deployed(student), student.branch(1))):
        plain = make(7)
        plain.load_state_dict(kept.state_dict())
        assert type(kept) is type(plain)
        assert not kept.training
        assert torch.equal(plain.eval()(images), every[i])
    assert torch.equal(evaluated(images), every[0])  # made before the steps, of the same weights
    assert torch.equal(averaged.branch(1).conv1.weight, frozen)
    assert not torch.equal(student.branch(1).conv1.weight, frozen)
    assert averaged.branch(1).conv1.weight is averaged.trunk[0].weight
    assert {name.partition(".")[0] for name in student.state_dict()} == {"trunk", "branches", "gate"}


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_gate_is_where_the_networks_are(device: str, dtype: torch.dtype, by_hand: bool) -> None:
    def make(seed: int) -> nn.Module:
        return resnet(8, in_channels=1, seed=seed).to(device, dtype)

    method = ONE(branches=2)
    student = method.build_student(make)
    if by_hand:
        student = MultiBranch(student.trunk, list(student.branches), 32)
    images, target = torch.linspace(-1, 1, 4 * 144).reshape(4, 1, 12, 12).to(device, dtype), torch.arange(4).to(device)
    if device == "cpu":
        plain = method.build_student(lambda seed: resnet(8, in_channels=1, seed=seed))
        assert torch.equal(student.gate[2].weight, plain.gate[2].weight.to(dtype))
        expected = plain.eval()(images.float())
        for one, other in zip(student.eval()(images), expected, strict=True):
            torch.testing.assert_close(one.float(), other, rtol=0.05, atol=0.05)
    loss, main = method.step(FeatureTap(student.train()), None, images, target)
    loss.total.backward()
    assert (main.shape, main.dtype, main.device.type) == ((4, 10), dtype, device)
    assert all(p.grad is not None and (p.dtype, p.device.type) == (dtype, device) for p in student.parameters())


def test_the_gate_whatever_the_defaults_are() -> None:
    def make(seed: int) -> nn.Module:
        return resnet(8, in_channels=1, seed=seed)

    nets, plain = [make(seed) for seed in range(2)], ONE(branches=2).build_student(make)
    with torch.device("meta"):
        student = MultiBranch.split(nets, "layer3")
        inside = ONE(branches=2).build_student(make)
    assert torch.equal(student.gate[2].weight, plain.gate[2].weight)
    assert all(p.is_meta for p in inside.parameters())
    nothing = MultiBranch(nn.Identity(), [nn.Flatten(), nn.Flatten()], 3)
    assert nothing.gate[2].weight.dtype == torch.float32


def test_branches_made_by_hand_are_deployed_as_they_are() -> None:
    trunk, branches = nn.Conv2d(1, 2, 3), [nn.Sequential(nn.Flatten(), nn.Linear(8, 3)) for _ in range(2)]
    student, images = MultiBranch(trunk, branches, 2).eval(), torch.randn(2, 1, 4, 4)
    assert torch.equal(student.branch(1)(images), student(images)[1])


class OutOfOrder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3)

    def forward(self, images: Tensor) -> Tensor:
        return -self.head(self.stem(images)).mean((2, 3))


def test_networks_that_cannot_be_split() -> None:
    nets = [OutOfOrder(), OutOfOrder()]
    with pytest.raises(
        ValueError, match="OutOfOrder does not run its children in order, so it cannot be split at 'head'"
    ):
        MultiBranch.split(nets, "head")
    with pytest.raises(ValueError, match="ConvNet does not run its children in order"):
        MultiBranch.split([ConvNet((4, 8)), ConvNet((4, 8))], "classifier")  # made for images of 8 x 8 pixels
    for at in ("layer9", "stem"):
        with pytest.raises(ValueError, match=f"branch_at is '{at}', must be a child of OutOfOrder: head"):
            MultiBranch.split(nets, at)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="branches is 1, must be at least 2"):
        ONE(branches=1)
    with pytest.raises(ValueError, match=r"ramp_share is 5.0, must be a share of the training, in \[0, 1\]"):
        ONE(ramp_share=5.0)
    with pytest.raises(ValueError, match="networks is 1, must be at least 2"):
        DML(1)
    with pytest.raises(ValueError, match="networks is 0, must be at least 2"):
        Cohort([])
    for method in (ONE(), DML()):
        for given, message in (
            (torch.zeros(6, 10), r"student.logits has shape \(6, 10\), must be JointLogits"),
            (
                torch.zeros(3, 6, 10),
                r"student.logits has shape \(3, 6, 10\), must be JointLogits.*JointLogits\(stack\)",
            ),
            (JointLogits([torch.zeros(6, 10)]), "student.logits holds 1 networks, must be JointLogits"),
            (JointLogits([torch.zeros(6, 10), torch.zeros(6, 9)]), r"student.logits\[1\] has shape \(6, 9\), must be"),
        ):
            with pytest.raises(ValueError, match=message):
                method(Outputs(given), None, TARGET)
        with pytest.raises(TypeError, match="student is ResNet, must be a"):
            method.deployed(resnet(8))
