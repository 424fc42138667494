"""Linear losses of processes that share the classes of the heads: the loss and the gradients of one that has them all."""

from __future__ import annotations

import pytest
import shard_processes as work
import torch
from torch import Tensor
from training_processes import start_ranks

pytestmark = pytest.mark.no_kernels  # the sanitizers have the kernels under test elsewhere


@pytest.fixture(scope="module", params=[2, 4])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Tensor]]]:
    """What each rank made."""
    folder = tmp_path_factory.mktemp("ranks")
    start_ranks(work.compare_heads, folder, ranks=request.param)
    return [torch.load(folder / f"heads{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("name", [*work.LINEAR, "distributed, compiled"])
def test_distributed_heads_are_as_one(name: str, made: list[dict[str, list[Tensor]]]) -> None:
    expected = work.with_gradients(work.LINEAR.get(name, work.LINEAR["kd"]), *work.heads())
    for of in made:
        for ours, one in zip(of[name], expected, strict=True):
            torch.testing.assert_close(ours, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "compiled"])
def test_parts_of_heads_are_as_one(name: str, made: list[dict[str, list[Tensor]]]) -> None:
    loss, hidden, weight, teacher_hidden, teacher_weight = work.with_gradients(work.LINEAR["kd"], *work.heads())
    for rank, of in enumerate(made):
        weights = (work.part(w.T, rank, len(made)).T for w in (weight, teacher_weight))
        expected = loss, hidden, next(weights), teacher_hidden, next(weights)
        for ours, one in zip(of[name], expected, strict=True):
            torch.testing.assert_close(ours, one, rtol=1e-4, atol=1e-5)
