"""MixMatch by masks, against rows that are cut out."""

from __future__ import annotations

import pytest
import torch
from mixmatch_cases import cut_mixmatch, mixing, sharp
from noisy_cases import BATCH, QUICK, Caught, Noisy, assert_gradients, make
from torch import Tensor, nn
from training_cases import CLASSES, small_resnet

from fastkd.methods.noisy import terms
from fastkd.methods.noisy.ensemble import Ensemble
from fastkd.methods.noisy.learner import whole_epochs
from fastkd.methods.noisy.mixmatch import (
    labelled_loss,
    logits_of_views,
    mixmatch,
    prior_loss,
    ramp,
    unlabelled_loss,
)

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread", "no_figures")]
METHODS = tuple(QUICK)


# ---- terms ---------------------------------------------------------------------------------------------


def case(labelled: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    mask = torch.tensor(labelled, dtype=torch.float64)
    logits = 3.0 * torch.randn(len(labelled), 5, dtype=torch.float64)
    return logits.requires_grad_(), torch.randn_like(logits).softmax(1).detach(), mask


def assert_alike(ours: Tensor, theirs: Tensor, logits: Tensor) -> None:
    torch.testing.assert_close(ours, theirs)
    pair = [torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*pair)


MASKS = [[1, 0, 1, 1, 0, 0], [1] * 6, [0, 0, 0, 1, 0, 0], [1, 1, 0, 1, 1, 1]]


@pytest.mark.parametrize("labelled", MASKS)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_of_labelled_rows(labelled: list[int], weighted: bool) -> None:
    logits, labels, mask = case(labelled)
    weight = torch.tensor([0.0, 1.0, 3.0, 0.5, 2.0], dtype=torch.float64) if weighted else None
    rows = mask.bool()
    log_p, y = logits.log_softmax(1)[rows], labels[rows]
    by_class = -(log_p * y).mean(0)
    theirs = by_class.sum() if weight is None else (by_class * weight).sum()
    assert_alike(labelled_loss(logits, labels, mask, weight), theirs, logits)


@pytest.mark.parametrize("labelled", [[1, 0, 1, 1, 0, 0], [0] * 6, [1, 1, 1, 1, 1, 0]])
def test_the_loss_of_unlabelled_rows(labelled: list[int]) -> None:
    logits, labels, mask = case(labelled)
    rows = ~mask.bool()
    theirs = torch.mean((logits[rows].softmax(1) - labels[rows]) ** 2)
    assert_alike(unlabelled_loss(logits, labels, mask), theirs, logits)


@pytest.mark.parametrize("weight", [None, torch.ones(5, dtype=torch.float64)])
def test_where_there_are_none_the_loss_is_0(weight: Tensor | None) -> None:
    logits, labels, mask = case([0] * 6)
    for loss in (labelled_loss(logits, labels, mask, weight), unlabelled_loss(logits, labels, 1.0 - mask)):
        assert loss.item() == 0.0
        assert not torch.autograd.grad(1e6 * loss, logits)[0].any()


def test_labels_may_be_hard() -> None:
    logits, _, mask = case([1, 0, 1, 1, 0, 1])
    target = torch.tensor([0, 1, 2, 3, 4, 0])
    theirs = nn.functional.cross_entropy(logits[mask.bool()], target[mask.bool()])
    assert_alike(labelled_loss(logits, nn.functional.one_hot(target, 5).double(), mask), theirs, logits)


def test_the_prior() -> None:
    logits, _, _ = case([1] * 6)
    prior, mean = torch.full((5,), 0.2, dtype=torch.float64), logits.softmax(1).mean(0)
    assert_alike(prior_loss(logits), (prior * (prior / mean).log()).sum(), logits)
    torch.testing.assert_close(prior_loss(torch.eye(4)), torch.tensor(0.0), atol=1e-6, rtol=0)
    lost = torch.tensor([[200.0, 0.0], [300.0, 0.0]], requires_grad=True)  # of whose second class nothing is left
    (gradient,) = torch.autograd.grad(prior_loss(lost), lost)
    assert (gradient[0, 0] > 0.1) & (gradient[0, 1] < -0.1)


def test_sharpened() -> None:
    p = torch.randn(5, 10, dtype=torch.float64).softmax(1)
    torch.testing.assert_close(terms.sharpened(p, 0.3), sharp(p, 0.3))
    one = torch.nn.functional.one_hot(p.argmax(1), 10).float()
    torch.testing.assert_close(terms.sharpened(p.float(), 1e-6), one)
    uniform = torch.full((1, 100), 0.01)
    torch.testing.assert_close(terms.sharpened(uniform, 1e-3), uniform)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("alpha", [4.0, 0.75, 0.0])
def test_all_of_it_on_a_network(alpha: float, weighted: bool) -> None:
    """The same mixtures, losses and gradients in the weights as of rows that are cut out."""
    network = small_resnet(0).double()
    torch.manual_seed(1)
    views = [torch.randn(BATCH, 1, 8, 8, dtype=torch.float64) for _ in range(2)]
    labels = torch.randn(BATCH, CLASSES, dtype=torch.float64).softmax(1)
    labelled = (torch.rand(BATCH) < 0.5).double()
    weight = torch.tensor([0.5, 3.0, 0.0, 1.0], dtype=torch.float64) if weighted else None
    order, share = mixing(7, 2 * BATCH, alpha)
    torch.manual_seed(7)
    found = mixmatch(network, views, labels, labelled, alpha, weight)
    ours = found.labelled_loss + 2.0 * found.unlabelled_loss
    gradients = torch.autograd.grad(ours, list(network.parameters()))
    logits, log_p, y, squared = cut_mixmatch(network, views, labels, labelled, order, share)
    rows = -(log_p * y if weight is None else log_p * y * weight).sum(1)
    torch.testing.assert_close(found.logits, logits)
    torch.testing.assert_close(ours, rows.mean() + 2.0 * squared)
    assert_gradients(gradients, rows.mean() + 2.0 * squared, network)
    assert 0.5 <= share < 1.0 or alpha == 0.0


def test_views_go_through_a_network_at_once() -> None:
    network, runs = small_resnet(0), []
    network.register_forward_hook(lambda _, images, logits: runs.append(logits))
    views = [torch.randn(3, 1, 8, 8) for _ in range(2)]
    found = logits_of_views(network, views)
    assert len(runs) == 1
    assert not runs[0].requires_grad
    assert torch.equal(torch.cat(found), runs[0])


def test_statistics_are_those_of_plain_images() -> None:
    network = small_resnet(0)
    before = network.bn1.running_mean.clone()
    views = [torch.randn(4, 1, 8, 8) for _ in range(2)]
    mixmatch(network, views, torch.full((4, CLASSES), 0.25), torch.ones(4), 4.0)
    assert torch.equal(network.bn1.running_mean, before)
    logits_of_views(network, views)
    theirs = 0.9 * before + 0.1 * network.conv1(torch.cat(views)).mean((0, 2, 3))
    torch.testing.assert_close(network.bn1.running_mean, theirs)


@pytest.mark.parametrize(
    ("share", "epochs", "expected"), [(10 / 300, 300, 10), (0.0, 5, 0), (1.0, 5, 5), (0.25, 5, 2), (1 / 3, 3, 1)]
)
def test_shares_in_epochs(share: float, epochs: int, expected: int) -> None:
    assert whole_epochs(share, epochs) == expected


def test_the_ramp() -> None:
    """As ``clip((epoch + batch / batches - warm_up) / length, 0, 1)``."""
    step = Caught(make("pes"), epochs=300)
    for epoch, iteration in ((9, 3), (10, 0), (10, 2), (17, 3), (26, 0), (200, 1)):
        step.epoch, step.iteration = epoch, iteration
        expected = min(1.0, max(0.0, (epoch + iteration / 4 - 10) / 16))
        assert ramp(step, 10, 16 / 300) == pytest.approx(expected)  # type: ignore[arg-type]
    assert ramp(step, 10, 0.0) == 1.0  # type: ignore[arg-type]
    step.epoch = 10
    step.iteration = 0
    assert ramp(step, 10, 0.0) == 1.0  # type: ignore[arg-type]


def test_an_ensemble() -> None:
    networks = [small_resnet(seed).eval() for seed in range(3)]
    images = torch.randn(5, 1, 8, 8)
    mean = sum(network(images) for network in networks) / 3
    torch.testing.assert_close(Ensemble(*networks).eval()(images), mean)
    with pytest.raises(ValueError, match="networks is empty, must be one network or more"):
        Ensemble()
    with pytest.raises(TypeError, match="networks is int, must be"):
        Ensemble(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS)
def test_autocast_keeps_no_weights_of_the_guesses(method: str) -> None:
    """They have no gradient: so would the update not."""
    procedure = make(method)
    step = Caught(procedure, epoch=4)
    with torch.autocast("cpu", torch.bfloat16):
        procedure.iteration(next(Noisy().epoch(0)), step)
    assert step.gradients
    assert all(gradient.any() for gradients in step.gradients for gradient in gradients)
