"""ELR+: its loss against an independent formula, what is remembered, the averages of the weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from noisy_cases import BATCH, Noisy, caught, make
from training_cases import CLASSES

from fastkd._seeding import seeded
from fastkd.methods import ELR
from fastkd.methods.noisy.elr import early_learning

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread", "no_figures")]


def elr(**options: object) -> ELR:
    procedure = make("elr+", **options)
    assert isinstance(procedure, ELR)
    return procedure


def test_early_learning() -> None:
    torch.manual_seed(0)
    z = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    remembered = 0.9 * torch.randn(5, 4, dtype=torch.float64).softmax(1)
    ours = early_learning(z, remembered)
    theirs = torch.stack([torch.log(1 - (remembered[i] * z[i].softmax(0)).sum()) for i in range(5)]).mean()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(x, z)[0] for x in (ours, theirs)))


@pytest.mark.parametrize("refine", [False, True])
def test_an_iteration(refine: bool) -> None:
    """Memories by the other's average, mixed as images and labels are; the losses and their gradients."""
    procedure = elr(refine=refine, average=0.8, average_share=0.5, regularization_share=0.4).double()
    with torch.no_grad():
        for name in ("student", "peer"):
            procedure.known[name].uniform_(0.0, 0.2)
    batch = Noisy(views=1).batch(torch.arange(BATCH))
    batch = type(batch)(batch.images.double(), batch.target, batch.index)
    twin = copy.deepcopy(procedure)
    with seeded(3):
        step, _ = caught(procedure, batch)
    assert batch.target is not None
    label = torch.eye(CLASSES, dtype=torch.float64)[batch.target]
    averages = list(twin.averages.networks)
    weight = 3 * math.exp(-5 * (1 - (0.25 / 10) / 0.4) ** 2)
    with seeded(3):
        for i, (name, other) in enumerate((("student", averages[1]), ("peer", averages[0]))):
            network = getattr(twin, name)
            with torch.no_grad():
                memory = 0.7 * twin.known[name][:BATCH] + 0.3 * other(batch.images).softmax(1)
            order = torch.randperm(BATCH)
            share = float(torch.distributions.Beta(1.0, 1.0).sample())
            share = max(share, 1 - share)
            images, y, t = (share * x + (1 - share) * x[order] for x in (batch.images, label, memory))
            if refine:
                y = y * t / (y * t).sum(1, keepdim=True)
            z = network(images)
            loss = -(y * z.log_softmax(1)).sum(1).mean() + weight * torch.log(1 - (t * z.softmax(1)).sum(1)).mean()
            torch.testing.assert_close(procedure.known[name][:BATCH], memory)
            torch.testing.assert_close(step.losses[i], loss.detach())
            for a, b in zip(step.gradients[i], torch.autograd.grad(loss, list(network.parameters())), strict=True):
                torch.testing.assert_close(a, b)
    decay = 0.8 * math.exp(-5 * (1 - (0.25 / 10) / 0.5) ** 2)
    before, after = (next(p.averages.networks[0].parameters()) for p in (twin, procedure))
    torch.testing.assert_close(after, decay * before + (1 - decay) * next(twin.student.parameters()))


def test_what_is_kept_is_both_averages() -> None:
    procedure = elr().eval()
    images = Noisy().images[:4]
    first, second = (average(images) for average in procedure.averages.networks)
    torch.testing.assert_close(procedure.deployed(procedure.network())(images), (first + second) / 2)
    assert not torch.equal(first, second)
    assert not any(p.requires_grad for p in procedure.averages.parameters())
