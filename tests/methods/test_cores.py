"""CORES*: its losses against independent formulas, part by part of the training."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from noisy_cases import BATCH, ITEMS, Noisy, caught, make
from training_cases import CLASSES

from fastkd.methods.noisy.cores import class_losses

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread", "no_figures")]

BETAS = {0: 0.0, 1: 0.0, 2: 2 / 3, 3: 4 / 3, 4: 2.0, 7: 2.0}
"""By epoch of ten, by the default schedule."""


@pytest.mark.parametrize("epoch", BETAS)
def test_losses(epoch: int) -> None:
    procedure = make("cores").double()
    batch = Noisy().batch(torch.arange(BATCH))
    batch = type(batch)(batch.images.double(), batch.target, batch.index, (batch.views[0].double(),))
    kept_before = torch.arange(ITEMS, dtype=torch.float64) % 2
    procedure.known["kept"].copy_(kept_before)  # type: ignore[index]
    prior = torch.rand(CLASSES, dtype=torch.float64)
    prior /= prior.sum()
    procedure.prior.copy_(prior)  # type: ignore[operator]
    twin = copy.deepcopy(procedure)
    step, _ = caught(procedure, batch, epoch)
    target, second = batch.target, epoch >= 5
    assert target is not None
    z = twin.student(torch.cat([batch.images, batch.views[0]]) if second else batch.images)
    first = z[:BATCH]
    rows, kept = [], []
    for i in range(BATCH):
        losses = -torch.log(first[i].softmax(0) + 1e-8)
        task = -first[i].log_softmax(0)[target[i]]
        rows.append((task - BETAS[epoch] * prior @ losses) / (1 + BETAS[epoch]))
        kept.append(float(kept_before[i]) if second else float(epoch < 3 or bool(task <= losses.mean())))
    loss = sum(r * k for r, k in zip(rows, kept, strict=True)) / sum(kept)
    if second:
        loss = loss + F.kl_div(z[BATCH:].log_softmax(1), first.softmax(1).detach(), reduction="batchmean")
    torch.testing.assert_close(step.losses[0], loss.detach())  # type: ignore[union-attr]
    for a, b in zip(step.gradients[0], torch.autograd.grad(loss, list(twin.student.parameters())), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(procedure.known["kept"][:BATCH], torch.tensor(kept, dtype=torch.float64))  # type: ignore[index]


def test_prior_is_of_the_labels_that_are_kept() -> None:
    procedure = make("cores")
    data = Noisy()
    step, _ = caught(procedure, data.batch(torch.arange(BATCH)))
    procedure.known["kept"][: BATCH // 2] = 0.0  # type: ignore[index]
    procedure.after_epoch(step)  # type: ignore[arg-type]
    seen = data.target[BATCH // 2 : BATCH]  # what was not seen does not count
    torch.testing.assert_close(procedure.prior, torch.bincount(seen, minlength=CLASSES) / len(seen))
    before = procedure.prior.clone()  # type: ignore[operator]
    procedure.known["kept"].zero_()  # type: ignore[index]
    procedure.after_epoch(step)  # type: ignore[arg-type]
    assert torch.equal(procedure.prior, before)  # type: ignore[arg-type]


def test_losses_of_the_classes_do_not_go_on_for_ever() -> None:
    z = torch.tensor([[500.0] + [0.0] * (CLASSES - 1)], requires_grad=True)
    loss = class_losses(z).mean(-1)
    assert loss.item() == pytest.approx(18.42 * (CLASSES - 1) / CLASSES, rel=1e-3)
    assert not torch.autograd.grad(loss.sum(), z)[0].any()


def test_nothing_kept() -> None:
    """A batch of which the sieve keeps nothing changes nothing."""
    procedure = make("cores", consistency=0.0)
    procedure.known["kept"].zero_()  # type: ignore[index]
    step, _ = caught(procedure, Noisy().batch(torch.arange(BATCH)), 7)
    assert step.losses[0].item() == 0.0
    assert not any(gradient.any() for gradient in step.gradients[0])


def test_wrong_options() -> None:
    with pytest.raises(ValueError, match=r"second_share is 0.1, must be at least sieve_share, 0.3"):
        make("cores", second_share=0.1)
    with pytest.raises(ValueError, match="beta is -1"):
        make("cores", beta=-1.0)
