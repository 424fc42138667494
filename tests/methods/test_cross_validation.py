"""Cross-validation: what a network says of its fold, it has not learnt there."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from noisy_cases import BATCH, ITEMS, Noisy, caught, make
from torch import Tensor
from training_cases import Linear, fit, make_settings

from fastkd.methods import CrossValidation

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread", "no_figures")]


def cross_validation(**options: object) -> CrossValidation:
    procedure = make("cross-validation", **options)
    assert isinstance(procedure, CrossValidation)
    return procedure


def test_folds_are_as_large_as_each_other() -> None:
    assert cross_validation(folds=5).fold.bincount().tolist() == [ITEMS // 5 + (i < ITEMS % 5) for i in range(5)]


def test_losses() -> None:
    """Each network's mean over the samples of the other folds."""
    procedure = cross_validation()
    twin = copy.deepcopy(procedure)
    batch = Noisy(views=1).batch(torch.arange(BATCH))
    step, _ = caught(procedure, batch)
    target, fold = batch.target, twin.fold[:BATCH]
    assert target is not None
    networks = twin.student.networks
    losses = [
        F.cross_entropy(network(batch.images)[fold != number], target[fold != number])
        for number, network in enumerate(networks)  # type: ignore[arg-type]
    ]
    loss = torch.stack(losses).sum()
    torch.testing.assert_close(step.losses[0], loss.detach())
    for a, b in zip(step.gradients[0], torch.autograd.grad(loss, list(twin.student.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_labels_of_a_fold_do_not_reach_its_network() -> None:
    """Other labels of one fold change what the others say, and not what is said of it."""

    def said(data: Noisy) -> tuple[Tensor, Tensor]:
        procedure = cross_validation(network=Linear)
        fit(procedure, data, make_settings(epochs=5))
        with torch.no_grad():
            found = procedure.probabilities(procedure.network(), data.images, torch.arange(ITEMS))
        return found, procedure.fold

    plain, fold = said(Noisy(views=1))
    changed = Noisy(views=1)
    changed.target = torch.where(fold == 1, (changed.target + 1) % 3, changed.target)
    other, _ = said(changed)
    assert torch.equal(plain[fold == 1], other[fold == 1])
    assert not torch.equal(plain[fold == 0], other[fold == 0])


def test_wrong_options() -> None:
    with pytest.raises(ValueError, match="folds is 1, must be at least 2"):
        cross_validation(folds=1)
