"""PES: phases, the renewed layers, weights of classes, and its loss against an independent formula."""

from __future__ import annotations

import copy
import re
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from mixmatch_cases import cut_mixmatch, mixing, sharp
from noisy_cases import BATCH, ITEMS, Caught, Noisy, assert_gradients, make
from test_procedures import fit
from torch import Tensor, nn
from training_cases import CLASSES, Linear, make_settings, small, small_resnet

from fastkd.data import Batch
from fastkd.methods import PES
from fastkd.methods.noisy.pes import class_weights
from fastkd.methods.noisy.tail import tail_of
from fastkd.methods.registry import find
from fastkd.models import create

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread", "no_figures")]


def pes(seed: int = 0, **options: Any) -> PES:
    made = make("pes", seed, **options)
    assert isinstance(made, PES)
    return made


def first_batch() -> Batch:
    batch = next(Noisy().epoch(0))
    return Batch(batch.images.double(), batch.target, batch.index, tuple(view.double() for view in batch.views))


# ---- one iteration -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["some", "all", "none"])
@pytest.mark.parametrize("epoch", [5, 9])
def test_the_loss(epoch: int, kind: str) -> None:
    """And its gradient, from the views on, as the authors' code has it; in the second half with another alpha."""
    options = {"lambda_u": 30.0, "alpha": 2.0, "late_alpha": 0.5, "temperature": 0.4}
    procedure = pes(**options).double()
    torch.manual_seed(0)
    procedure.known["labelled"].copy_((torch.rand(ITEMS) < {"some": 0.5, "all": 1.0, "none": 0.0}[kind]).double())
    procedure.class_weight.copy_(torch.tensor([0.5, 3.0, 0.0, 1.2]))
    batch = first_batch()
    step = Caught(procedure, epoch=epoch, epochs=16, iteration=3)  # 4 of warm-up, 4 of refinement, 8 of ramp
    procedure.warmup_share, procedure.refine_share = 3 / 16, 1 / 16
    twin = copy.deepcopy(procedure)
    torch.manual_seed(9)
    found = procedure.iteration(batch, step)  # type: ignore[arg-type]
    assert step.parts == [("body", "tail")]

    views, network = [batch.images, *batch.views], twin.student
    with torch.no_grad():
        first, second = network(torch.cat(views)).chunk(2)
    p = (first.softmax(1) + second.softmax(1)) / 2
    labelled = twin.known["labelled"][batch.index].bool()
    labels = F.one_hot(batch.target, CLASSES).double()
    labels[~labelled] = sharp(p, 0.4)[~labelled]
    draws = mixing(9, 2 * BATCH, 2.0 if epoch < 8 else 0.5)
    _, log_p, y, squared = cut_mixmatch(network, views, labels, labelled, *draws)
    weight = 30.0 * min(1.0, (epoch + 3 / 4 - 4) / 8)
    loss = torch.zeros((), dtype=torch.float64)
    if kind != "none":
        loss = loss - ((log_p * y).mean(0) * torch.tensor([0.5, 3.0, 0.0, 1.2])).sum()
    if kind != "all":
        loss = loss + weight * squared
    torch.testing.assert_close(step.losses[0], loss)
    parts = procedure.parts()
    by_id = dict(zip(map(id, procedure.student.parameters()), network.parameters(), strict=True))
    assert_gradients(step.gradients[0], loss, [by_id[id(q)] for name in parts for q in parts[name].parameters])
    torch.testing.assert_close(found["labelled_loss"] + found["unlabelled_loss"], found["loss"])
    expected = (p.argmax(1) == batch.target).double()
    assert torch.equal(procedure.known["agreed"][batch.index], expected)
    torch.testing.assert_close(found["accuracy"].double(), expected.mean())


@pytest.mark.parametrize(("epoch", "parts"), [(1, ("body", "tail")), (2, ("tail",)), (3, ("tail",))])
def test_before_that_it_is_cross_entropy(epoch: int, parts: tuple[str, ...]) -> None:
    procedure, batch = pes().double(), first_batch()
    twin, step = copy.deepcopy(procedure), Caught(procedure, epoch=epoch)
    procedure.iteration(batch, step)  # type: ignore[arg-type]
    logits = twin.student(batch.images)
    loss = F.cross_entropy(logits, batch.target)
    assert step.parts == [parts]
    assert_gradients(step.gradients[0], loss, [p for name in parts for p in twin.parts()[name].parameters])
    agreed = procedure.known["agreed"]
    assert torch.equal(agreed[batch.index], (logits.argmax(1) == batch.target).double())


def test_phases() -> None:
    """Which parts a training moves, when the tail is another one, and what is logged."""
    procedure = pes(warmup_share=0.2, refine_share=0.4)
    seen: list[dict[str, Tensor]] = []
    real = procedure.after_epoch

    def after_epoch(step: Any) -> Any:
        seen.append({name: value.clone() for name, value in procedure.student.named_parameters()})
        return real(step)

    procedure.after_epoch = after_epoch  # type: ignore[method-assign]
    history = fit(procedure, Noisy(), make_settings(epochs=5))._state.history  # type: ignore[union-attr]
    moved = [{name for name in after if not torch.equal(after[name], before[name])} for before, after in pairwise(seen)]
    head = {"fc.weight", "fc.bias"}
    assert moved[:2] == [head, head]
    assert all(head < names for names in moved[2:])
    assert ["labelled_loss" in line for line in history] == [False, False, False, True, True]


# ---- the renewed layers --------------------------------------------------------------------------------


def test_a_renewed_tail() -> None:
    """That of another network of the kind, with its statistics; the optimizer has forgotten the old one."""
    procedure = pes(renewed_stages=1)
    for norm in procedure.student.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.fill_(7.0)  # type: ignore[union-attr]
    before, fresh = copy.deepcopy(procedure.student.state_dict()), small_resnet(1).state_dict()
    step = Caught(procedure, epoch=1)
    procedure.before_epoch(step)
    assert not step.restarted
    step.epoch = 2
    procedure.before_epoch(step)
    assert step.restarted == ["tail"]
    for name, value in procedure.student.state_dict().items():
        expected = fresh if name.startswith(("layer3.", "fc.")) else before
        assert torch.equal(value, expected[name]), name
    step.epoch, step.restarted = 3, []
    procedure.before_epoch(step)
    assert not step.restarted


def test_without_refinement_nothing_is_renewed() -> None:
    procedure, step = pes(refine_share=0.0), Caught(pes(), epoch=2)
    before = copy.deepcopy(procedure.student.state_dict())
    procedure.before_epoch(step)
    assert not step.restarted
    assert all(torch.equal(value, before[name]) for name, value in procedure.student.state_dict().items())


IMAGES = torch.randn(2, 3, 32, 32)


NETWORKS = (
    *("resnet8", "wrn-16-1", "cifar-resnet18", "cifar-vgg8", "densenet-bc-40-12"),
    *("cifar-mobilenetv2-0.5", "cifar-shufflenetv2-0.5", "lenet5", "twoconvnet"),
)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_tail_of_each_network(name: str) -> None:
    """The head; with a stage more, what comes after the stage before."""
    network = create(name, in_channels=3, num_classes=10)
    (head,) = tail_of(network, IMAGES)
    assert isinstance(network.get_submodule(head), nn.Linear)
    tail = tail_of(network, IMAGES, 1)
    assert head in tail
    kept = [n for n, module in network.named_modules() if not any(module.children()) and n not in tail]
    assert kept
    # nothing of it runs before what is kept
    order: list[str] = []
    for leaf in (*tail, *kept):
        network.get_submodule(leaf).register_forward_hook(lambda *_, leaf=leaf: order.append(leaf))
    network(IMAGES)
    assert max(order.index(n) for n in kept if n in order) < min(order.index(n) for n in tail if n in order)


def test_a_head_is_all_that_a_network_needs() -> None:
    """Where no stages are known: of a ConvNet, and of any with a last linear layer."""
    assert pes(network=small).tail == ("classifier",)
    assert pes(network=Linear).tail == ("layers.3",)
    with pytest.raises(ValueError, match="model is a ConvNet, whose layers are not known"):
        pes(network=small, renewed_stages=1)


# ---- which are labelled --------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [[5, 1, 9, 2], [0, 4, 4, 100], [0, 0, 0, 3], [0, 0, 0, 0], [7, 7, 7, 7]])
def test_weights_of_classes(counts: list[int]) -> None:
    numbers = np.array(counts)
    theirs = np.zeros(4)
    if numbers.any():
        with np.errstate(divide="ignore"):
            theirs = np.mean(numbers[numbers != 0]) / numbers
        theirs[theirs == np.inf] = 0
        theirs[theirs > 3] = 3
    ours = class_weights(torch.tensor(counts, dtype=torch.float64))
    np.testing.assert_allclose(ours.numpy(), theirs)


def test_labelled_are_those_whose_label_is_predicted() -> None:
    procedure = pes(items=6)
    known = procedure.known
    known["target"].copy_(torch.tensor([0, 0, 1, 2, 3, CLASSES]))  # the last was never seen
    known["agreed"].copy_(torch.tensor([1, 1, 1, 0, 1, 1]))
    procedure.divide()
    assert known["labelled"].tolist() == [1, 1, 1, 0, 1, 0]
    torch.testing.assert_close(procedure.class_weight, torch.tensor([2 / 3, 4 / 3, 0.0, 4 / 3]))
    known["agreed"].zero_()
    procedure.divide()
    assert not known["labelled"].any()
    assert not procedure.class_weight.any()


def test_no_label_is_predicted() -> None:
    """A training goes on, of unlabelled samples alone."""
    procedure = pes(warmup_share=0.5, refine_share=0.0)
    divide = procedure.divide
    procedure.divide = lambda: (procedure.known["agreed"].zero_(), divide())  # type: ignore[method-assign]
    history = fit(procedure, Noisy(), make_settings(epochs=3))._state.history  # type: ignore[union-attr]
    assert history[-1]["labelled"] == history[-1]["labelled_loss"] == history[-1]["agreed"] == 0.0


def test_what_is_published() -> None:
    """Numbers of the authors' code for CIFAR-10N, of 300 epochs."""
    options = find("pes").options()
    assert {name: option.default for name, option in options.items()} == {
        "warmup_share": 20 / 300,
        "refine_share": 5 / 300,
        "renewed_stages": 0,
        "temperature": 0.5,
        "alpha": 4.0,
        "late_alpha": 0.75,
        "lambda_u": 5.0,
        "ramp_share": 16 / 300,
    }
    assert all(option.help for option in options.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_share": -0.5}, "warmup_share is -0.5, must be"),
        ({"refine_share": 1.1}, "refine_share is 1.1, must be"),
        ({"renewed_stages": -1}, "renewed_stages is -1, must be"),
        ({"renewed_stages": 3}, "renewed_stages is 3, must be in [0, 3): ResNet has 3 stages, layer1, layer2, layer3"),
        ({"temperature": -1.0}, "temperature is -1.0, must be positive"),
        ({"alpha": -1.0}, "alpha is -1.0, must be"),
        ({"late_alpha": -1.0}, "late_alpha is -1.0, must be"),
        ({"lambda_u": -5.0}, "lambda_u is -5.0, must be"),
        ({"ramp_share": -1.0}, "ramp_share is -1.0, must be"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        pes(**options)
