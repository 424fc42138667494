"""NLNL: complementary labels, and the loss in each of its three steps."""

from __future__ import annotations

import copy

import pytest
import torch
from noisy_cases import BATCH, Noisy, caught, make
from training_cases import CLASSES

from fastkd._seeding import seeded
from fastkd.methods.noisy.nlnl import complementary
from fastkd.methods.noisy.samples import UNSEEN

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread", "no_figures")]


def test_complementary_labels() -> None:
    """Never the label, all others alike."""
    torch.manual_seed(0)
    target = torch.arange(5).repeat_interleave(4000)
    others = complementary(target, 5)[:, 0]
    assert complementary(target, 5, 3).shape == (len(target), 3)
    counts = torch.zeros(5, 5).index_put_((target, others), torch.ones(()), accumulate=True)
    assert not counts.diagonal().any()
    left = counts[~torch.eye(5, dtype=torch.bool)]
    assert left.min() > 850
    assert left.max() < 1150


@pytest.mark.parametrize("complements", [1, 3])
@pytest.mark.parametrize("epoch", [0, 5, 8])
def test_losses(epoch: int, complements: int) -> None:
    procedure = make("nlnl", complements=complements).double()
    with torch.no_grad():
        procedure.student.classifier.weight.mul_(8)  # type: ignore[union-attr,operator]
    batch = Noisy(views=1).batch(torch.arange(BATCH))
    batch = type(batch)(batch.images.double(), batch.target, batch.index)
    before = torch.rand(BATCH, dtype=torch.float64)  # of the label, an epoch earlier
    procedure.known["given"][:BATCH, 3] = before  # type: ignore[index]
    twin = copy.deepcopy(procedure)
    with seeded(2):
        step, _ = caught(procedure, batch, epoch)
    with seeded(2):
        others = complementary(batch.target, CLASSES, complements)  # type: ignore[arg-type]
    p = twin.student(batch.images).softmax(1)
    rows = []
    for i in range(BATCH):
        label = int(batch.target[i])  # type: ignore[index]
        given = (p[i, label].item() + float(before[i])) / 2
        if epoch == 0 or (epoch == 5 and given > 1 / CLASSES):
            rows.append(-torch.log(1 - p[i, others[i]]).mean())
        elif epoch == 8 and given > 0.5:
            rows.append(-torch.log(p[i, label]))
    assert 0 < len(rows) < BATCH + (epoch == 0)
    loss = torch.stack(rows).mean()
    torch.testing.assert_close(step.losses[0], loss.detach())
    for a, b in zip(step.gradients[0], torch.autograd.grad(loss, list(twin.student.parameters())), strict=True):
        torch.testing.assert_close(a, b)


def test_a_probability_is_kept_for_ten_epochs() -> None:
    procedure = make("nlnl")
    batch = Noisy(views=1).batch(torch.arange(BATCH))
    found = []
    for epoch in range(12):
        given = procedure.student(batch.images).softmax(1).gather(1, batch.target[:, None])[:, 0]  # type: ignore[operator,index]
        found.append(given.detach())
        caught(procedure, batch, epoch)
        with torch.no_grad():
            for parameter in procedure.student.parameters():  # type: ignore[union-attr]
                parameter.mul_(1.1)
    kept = procedure.known["given"]  # type: ignore[index]
    torch.testing.assert_close(kept[:BATCH].sort().values, torch.stack(found[2:], 1).sort().values)
    assert (kept[BATCH:] == UNSEEN).all()


def test_wrong_options() -> None:
    with pytest.raises(ValueError, match=r"positive_share is 0.2, must be at least selective_share"):
        make("nlnl", positive_share=0.2)
