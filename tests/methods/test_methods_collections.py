"""Fixed-linear distillation against its formula; the deployed student; vanilla distillation; plateaus."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from training_cases import BATCHES, CLASSES, Batches, make_settings, small

from fastkd._seeding import seeded
from fastkd.data.batch import Batch
from fastkd.methods import FixedLinear, Objective, registry
from fastkd.methods.registry import Given
from fastkd.models.heads import linear_head, with_head
from fastkd.models.resnet import resnet
from fastkd.training import Trainer
from fastkd.training.optimization import make_optimizer, make_plateau

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]
IMAGES = Batches(batch=8).of(3)[0]


def pair(same_size: bool) -> tuple[nn.Module, nn.Module]:
    """Student and teacher."""
    return small(1), small(2, (4, 8) if same_size else (8, 16))


def latent_of(network: nn.Module, images: Tensor) -> Tensor:
    """What goes into the classifier of a ConvNet."""
    seen: list[Tensor] = []
    hook = network.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network(images)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("same_size", "project"), [(True, False), (True, True), (False, False)])
def test_loss_and_gradients_are_those_of_the_formula(same_size: bool, project: bool, train: bool) -> None:
    student, teacher = pair(same_size)
    truth = copy.deepcopy(student)
    method = FixedLinear(student, teacher, IMAGES, project=project).train(train)
    loss = method(IMAGES)
    loss.backward()

    truth.train(train)
    teacher.eval()
    z_s, z_t = latent_of(truth, IMAGES), latent_of(teacher, IMAGES).detach()
    projection = method.student.get_submodule("classifier")
    if isinstance(projection, nn.Linear):
        p = projection.weight.detach().clone().requires_grad_()
        assert p.shape == (z_t.shape[1], z_s.shape[1])
        z_s = z_s @ p.T
    else:
        assert same_size
        assert not project
    expected = torch.stack([((a - b) ** 2).sum() for a, b in zip(z_s, z_t, strict=True)]).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    ours = dict(method.student.named_parameters())
    for name, parameter in truth.named_parameters():
        if not name.startswith("classifier"):
            torch.testing.assert_close(ours[name].grad, parameter.grad, msg=name)
    if isinstance(projection, nn.Linear):
        torch.testing.assert_close(projection.weight.grad, p.grad)


@pytest.mark.parametrize(("same_size", "project"), [(True, False), (True, True), (False, False)])
def test_the_deployed_student_is_the_head_behind_the_projection(same_size: bool, project: bool) -> None:
    student, teacher = pair(same_size)
    method = FixedLinear(student, teacher, IMAGES, project=project).eval()
    deployed = method.deployed(method.network()).eval()
    head = teacher.classifier
    expected = method.student(IMAGES) @ head.weight.T + head.bias
    torch.testing.assert_close(deployed(IMAGES), expected)
    if same_size and not project:
        torch.testing.assert_close(deployed.classifier.weight, head.weight, rtol=0, atol=0)
    # an ordinary student: its own names, shapes and size
    plain = small(1)
    assert {n: v.shape for n, v in deployed.state_dict().items()} == {n: v.shape for n, v in plain.state_dict().items()}
    plain.load_state_dict(deployed.state_dict())
    torch.testing.assert_close(plain.eval()(IMAGES), deployed(IMAGES), rtol=0, atol=0)


def test_networks_of_other_kinds_and_without_a_bias() -> None:
    student, teacher = resnet(8, in_channels=1, num_classes=CLASSES, seed=1), small(2)
    teacher.classifier = nn.Linear(teacher.classifier.in_features, CLASSES, bias=False)
    method = FixedLinear(student, teacher, IMAGES).eval()
    deployed = method.deployed(method.network())
    assert deployed.fc.bias is None
    torch.testing.assert_close(deployed(IMAGES), method.student(IMAGES) @ teacher.classifier.weight.T)


def test_what_it_is_given_stays_as_it_is() -> None:
    student, teacher = pair(same_size=False)
    before = copy.deepcopy(teacher.state_dict())
    head = student.classifier.weight.clone()
    trainer = Trainer(FixedLinear(student, teacher, IMAGES), Batches(), make_settings(learning_rate=1e-3), show="off")
    body = next(student.parameters()).clone()
    trainer.fit()
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert torch.equal(student.classifier.weight, head)
    assert not torch.equal(next(student.parameters()), body)  # trained in place


class NoHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 8), nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.second(self.first(images.flatten(1)).relu()).relu()


def test_refusals() -> None:
    student, teacher = pair(same_size=True)
    with pytest.raises(
        ValueError, match=r"the logits of NoHead come out of none of its linear layers \(first, second\)"
    ):
        FixedLinear(NoHead(), teacher, IMAGES)
    with pytest.raises(ValueError, match="student has 4 classes, must have those of the teacher, 7"):
        FixedLinear(student, resnet(8, in_channels=1, num_classes=7, seed=0), IMAGES)
    with pytest.raises(ValueError, match=r"teacher shares \d+ parameters"):
        FixedLinear(student, student, IMAGES)
    with pytest.raises(TypeError, match="project is int, must be True or False"):
        FixedLinear(student, teacher, IMAGES, project=1)
    with pytest.raises(TypeError, match="batch is dict, must be a Batch"):
        FixedLinear(student, teacher, IMAGES).iteration({"images": Batch(IMAGES)}, None)


def test_a_head_is_found_by_its_output() -> None:
    class Reversed(nn.Module):
        """The head is not the last linear layer to be defined, and its logits are reshaped."""

        def __init__(self) -> None:
            super().__init__()
            self.classify, self.embed = nn.Linear(8, CLASSES), nn.Linear(64, 8)

        def forward(self, images: Tensor) -> Tensor:
            return self.classify(self.embed(images.flatten(1)).relu()).view(-1, CLASSES)

    network = Reversed()
    head = linear_head(network, IMAGES)
    assert head.name == "classify"
    assert head.layer is network.classify
    without = with_head(network, "classify", nn.Identity())
    torch.testing.assert_close(without.embed.weight, network.embed.weight)
    assert without.embed.weight is network.embed.weight


def test_vanilla_is_soft_cross_entropy_without_t_squared() -> None:
    student, teacher = pair(same_size=True)
    given = Given(student=student, teacher=teacher, images=IMAGES)
    objective = registry.create_procedure("vanilla", given)
    assert isinstance(objective, Objective)
    loss, _ = objective.eval()(IMAGES)
    ours = torch.autograd.grad(loss.total, student.classifier.weight)[0]
    p = (teacher.eval()(IMAGES).detach() / 2).softmax(1)
    expected = -(p * (student(IMAGES) / 2).log_softmax(1)).sum(1).mean()
    theirs = torch.autograd.grad(expected, student.classifier.weight)[0]
    torch.testing.assert_close(ours, theirs)


# ---- validation and plateaus -------------------------------------------------------------------------


def test_plateau_lowers_the_rate_after_so_many_epochs() -> None:
    settings = make_settings(schedule="plateau", learning_rate=1.0, decay=0.4, patience=3)
    optimizer = make_optimizer([nn.Parameter(torch.zeros(1))], settings)
    plateau = make_plateau(optimizer, settings)
    assert plateau is not None
    rates = []
    for loss in (5.0, 4.0, 4.0, 4.1, 4.0, 4.0, 3.9, 4.0, 4.0, 4.0, 4.0):
        plateau.step(loss)
        rates.append(round(optimizer.param_groups[0]["lr"], 6))
    # 4.0 is not lower than 4.0: three epochs without a new lowest, then the rate is lower
    assert rates == [1.0, 1.0, 1.0, 1.0, 0.4, 0.4, 0.4, 0.4, 0.4, 0.16, 0.16]
    assert make_plateau(optimizer, make_settings(schedule="constant")) is None


class Validation:
    """Three batches, the last of them smaller."""

    def __len__(self) -> int:
        return 3

    def epoch(self, epoch: int, /, start: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        yield from (Batches(batch=size).of(seed) for seed, size in ((7, 12), (8, 12), (9, 5)))


def trained(folder: Path | None = None, **more: object) -> Trainer:
    settings = make_settings(
        schedule="plateau", patience=1, decay=0.5, learning_rate=0.05, epochs=8, checkpoint_every=BATCHES + 2
    )
    student, teacher = pair(same_size=False)
    with seeded(5):  # of the projection
        method = FixedLinear(student, teacher, IMAGES)
    return Trainer(method, Batches(), settings, validate=Validation(), folder=folder, show="off", **more)


def test_validation_is_the_mean_over_the_images(tmp_path: Path) -> None:
    trainer = trained()
    line = trainer.fit()[-1]
    method = trainer.procedure.eval()
    with torch.no_grad():
        each = [method(images) * len(images) for images, *_ in Validation().epoch(0)]
    assert line["validation_loss"] == pytest.approx(float(sum(each)) / 29, rel=1e-5)
    assert {"validation_loss", "loss", "learning_rate"} <= set(line)


class StopError(Exception):
    pass


@pytest.mark.parametrize("step", [BATCHES, 2 * BATCHES + 3, 4 * BATCHES])
def test_resumed_equals_not_stopped_with_plateaus(step: int, tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole")
    history = whole.fit()
    assert len({line["learning_rate"] for line in history}) > 1  # it was lowered

    def stop(done: int) -> None:
        if done == step:
            raise StopError

    with pytest.raises(StopError):
        trained(tmp_path / "stopped", on_step=stop).fit()
    again = trained(tmp_path / "stopped")
    lines = again.fit(resume="auto")
    assert [{**line, "seconds": 0} for line in lines] == [{**line, "seconds": 0} for line in history]
    ours, theirs = again.deployed.state_dict(), whole.deployed.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_plateau_needs_a_validation() -> None:
    student, teacher = pair(same_size=True)
    trainer = Trainer(FixedLinear(student, teacher, IMAGES), Batches(), make_settings(schedule="plateau"), show="off")
    with pytest.raises(ValueError, match="validate is None, must be batches to validate on for the schedule 'plateau'"):
        trainer.fit()
    with pytest.raises(ValueError, match="patience is 0, must be 1 or more"):
        make_settings(patience=0)
    with pytest.raises(TypeError, match="validate is list"):
        Trainer(FixedLinear(*pair(True), IMAGES), Batches(), make_settings(), validate=[1])
