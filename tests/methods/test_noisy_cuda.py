"""Learning with noisy labels on a GPU: nothing waits for it, and a training goes to its end."""

from __future__ import annotations

import math

import pytest
import torch
from cuda_cases import needs_cuda
from noisy_cases import Noisy, make
from training_cases import fit, make_settings

from fastkd import noise
from fastkd.data.batch import on_device
from fastkd.methods import registry
from fastkd.training.state import TrainingState

pytestmark = needs_cuda
METHODS = [name for name in registry.names() if registry.find(name).family == "noisy labels"]
DEVICE = torch.device("cuda", 0)


@pytest.mark.parametrize("method", METHODS)
def test_no_iteration_waits_for_the_device(method: str) -> None:
    """Nor what comes after an epoch."""
    batches = Noisy()
    state = TrainingState(make(method).to(DEVICE), make_settings(epochs=8), batches)
    for epoch in (0, 3, 7):
        for i, batch in enumerate(batches.epoch(epoch)):
            there = on_device(batch, DEVICE)
            torch.cuda.set_sync_debug_mode("error" if i > 1 else "default")  # the first ones choose algorithms
            try:
                with state.updates.begin_iteration(epoch, i):
                    state.procedure.iteration(there, state.updates)
                state.updates.end_iteration()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        state.procedure.after_epoch(state.updates)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_training_on_the_device(method: str, amp: str) -> None:
    trainer = fit(make(method).to(DEVICE), Noisy(), make_settings(epochs=4, amp=amp))
    history = trainer._state.history  # type: ignore[union-attr]
    assert all(math.isfinite(value) for value in history[-1].values())


@pytest.mark.parametrize("rule", noise.RULES)
def test_wrong_labels_are_those_of_a_cpu(rule: noise.Rule) -> None:
    data = Noisy(480)
    probabilities = (torch.eye(4)[data.truth] + 0.3 * torch.randn(480, 4)).softmax(1)
    here = noise.find(data.target, probabilities, rule=rule)
    there = noise.find(data.target.to(DEVICE), probabilities.to(DEVICE), rule=rule)
    assert torch.equal(here.noisy, there.noisy.cpu())
    torch.testing.assert_close(here.score, there.score.cpu(), rtol=1e-4, atol=1e-5)
