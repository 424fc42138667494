"""Distillation without data on a GPU: nothing waits for it, and a step of generator and student is one CUDA graph."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cuda_cases import needs_cuda
from datafree_cases import METHODS, datafree
from mosaic_cases import Foreign, foreign, mosaic
from torch import Tensor
from training_cases import make_settings

from fastkd.data import Batch, NoBatches
from fastkd.methods.datafree import DataFree
from fastkd.training import Trainer
from fastkd.training.state import TrainingState

pytestmark = needs_cuda


@pytest.mark.parametrize("method", [*METHODS, "mosaic", "mosaic-conv"])
def test_no_iteration_waits_for_the_device(method: str) -> None:
    procedure, batch = (datafree(method), None) if method in METHODS else mosaic_with_images(method)
    procedure.to("cuda")
    state = TrainingState(procedure, make_settings(), NoBatches(3))
    for i in range(3):  # the first ones choose algorithms
        torch.cuda.set_sync_debug_mode("error" if i == 2 else "default")
        try:
            with state.updates.begin_iteration(0, i):
                procedure.iteration(batch, state.updates)
            state.updates.end_iteration()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def mosaic_with_images(method: str) -> tuple[DataFree, Batch]:
    """With images for an iteration, which are there before."""
    return mosaic(patch_mode="conv" if method == "mosaic-conv" else "crop"), Batch(foreign(0).to("cuda"))


@pytest.mark.parametrize("method", ["ta-dfkd", "dfad", "dfq"])
def test_a_step_is_a_cuda_graph(method: str) -> None:
    """Of generator and of student, gradients included; a replay draws other noise, and comes to what eager steps come to."""
    captured, eager = (datafree(method).to("cuda") for _ in range(2))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            one_step(captured)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = one_step(captured)
    torch.cuda.synchronize()
    state = {name: value.clone() for name, value in captured.state_dict().items() if isinstance(value, Tensor)}
    torch.cuda.manual_seed(5)
    graph.replay()
    first = [value.clone() for value in found]
    graph.replay()
    assert not torch.equal(first[0], found[0])
    eager.load_state_dict(state, strict=False)
    torch.cuda.manual_seed(5)
    for ours, theirs in zip(first, one_step(eager), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def one_step(procedure: DataFree) -> list[Tensor]:
    """Losses and gradients of what makes the images, and of the student."""
    parts = procedure.parts()
    made = procedure.judge(*procedure.maker())
    making = torch.stack(list(procedure.generator_terms(made).values())).sum()
    learning: Any = 0.0
    for lesson in procedure._lessons_of(made, None):
        learning = learning + procedure.student_loss(lesson.images, lesson.logits, lesson.weight)
    return [
        making.detach(),
        learning.detach(),
        *torch.autograd.grad(making, parts["generator"].parameters),
        *torch.autograd.grad(learning, parts["student"].parameters),
    ]


def test_mosaic_on_the_device() -> None:
    """To the end, in bfloat16, on images that are cropped there."""
    trainer = Trainer(mosaic().to("cuda"), Foreign(), make_settings(epochs=2, amp="bf16"), show="off")
    assert all(math.isfinite(value) for value in trainer.fit()[-1].values())


def test_a_training_on_the_device() -> None:
    trainer = Trainer(datafree("ta-dfkd").to("cuda"), NoBatches(5), make_settings(epochs=2, amp="bf16"), show="off")
    history = trainer.fit()
    assert 0.0 < history[-1]["selected"] <= 1.0
    assert trainer.procedure.pictures(trainer._state.updates).keys() == {"images", "losses"}  # type: ignore[union-attr]
