"""SOP: its loss against an independent formula, and what it does to wrong labels."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from noisy_cases import BATCH, ITEMS, Noisy, caught, make
from test_bldr import one_sample
from training_cases import CLASSES, Linear, fit, make_settings

from fastkd.data import Batch

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread", "no_figures")]


@pytest.mark.parametrize("consistency", [0.0, 0.9])
def test_loss(consistency: float) -> None:
    """Its gradients in the network, u and v, too."""
    procedure = make("sop", consistency=consistency, squared=2.0, balance=0.2).double()
    batch = Noisy().batch(torch.arange(BATCH))
    target, views = batch.target, [view.double() for view in (batch.images, *batch.views)]
    assert target is not None
    for name in "uv":
        procedure.known[name].uniform_(0.1, 0.5)  # type: ignore[index]
    twin = copy.deepcopy(procedure)
    u, v = (twin.known[name][:BATCH].requires_grad_() for name in "uv")  # type: ignore[index]
    step, _ = caught(procedure, Batch(views[0], target, batch.index, (views[1],)))
    used = views if consistency else views[:1]
    z = twin.student(torch.cat(used))
    rows, errors, predictions = zip(*(one_sample(z[i], int(target[i]), u[i], v[i]) for i in range(BATCH)), strict=True)
    loss = torch.stack(rows).mean() + 2 * torch.stack(errors).sum() / BATCH
    loss = loss - 0.2 * (torch.stack(predictions).mean(0).log() / CLASSES).sum()
    if consistency:
        first, second = z.chunk(2)
        loss = loss + 0.9 * F.kl_div(second.log_softmax(1), first.softmax(1).detach(), reduction="batchmean")
    torch.testing.assert_close(step.losses[0], loss.detach())
    expected = torch.autograd.grad(loss, [*twin.student.parameters(), u, v])
    for ours, theirs in zip(step.gradients[0], expected, strict=False):
        torch.testing.assert_close(ours, theirs)
    for name, before, gradient in zip("uv", (u, v), expected[-2:], strict=True):
        moved = procedure.known[name][:BATCH]  # type: ignore[index]
        torch.testing.assert_close(moved, before.detach() - 10 * gradient)


def test_views_are_asked_for_where_they_are_used() -> None:
    assert (make("sop").views, make("sop").strong_views) == (2, 1)
    assert (make("sop", consistency=0.0).views, make("sop", consistency=0.0).strong_views) == (1, 0)


def test_corrections_grow_where_labels_are_wrong() -> None:
    """After a while u is larger for wrong labels than for right ones."""
    data = Noisy(views=1)
    procedure = make("sop", network=Linear, consistency=0.0, balance=0.0)
    fit(procedure, data, make_settings(epochs=60, learning_rate=0.05, weight_decay=0.0))
    u = procedure.known["u"].square()[:, 0]  # type: ignore[index]
    assert len(u) == ITEMS
    assert u[data.wrong].mean() > 3 * u[~data.wrong].mean()
