"""Losses of several processes that share the classes: the loss and the gradients of one that has them all."""

from __future__ import annotations

from pathlib import Path

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
    start_ranks(work.compare, folder, ranks=request.param)
    return [torch.load(folder / f"made{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("name", [*work.LOSSES, "kl compiled", "js compiled", "kd compiled"])
def test_ranks_are_as_one(name: str, made: list[dict[str, list[Tensor]]]) -> None:
    loss, *gradients = work.with_gradients(work.LOSSES[name.removesuffix(" compiled")], *work.logits())
    for rank, of in enumerate(made):
        torch.testing.assert_close(of[name][0], loss)
        for ours, whole in zip(of[name][1:], gradients, strict=True):
            torch.testing.assert_close(ours, work.part(whole, rank, len(made)), rtol=1e-4, atol=1e-7)


def test_two_groups_and_distributed_tensors(tmp_path: Path) -> None:
    start_ranks(work.on_a_mesh, tmp_path, ranks=4)
    for rank in range(4):
        half = slice(None, 3) if rank < 2 else slice(3, None)
        expected, *of_logits = work.with_gradients(
            lambda s, t: work.F.kl_div(s, t, 2.0, reduction="sum"), *(x[half] for x in work.logits())
        )
        loss, gradients, refused = torch.load(tmp_path / f"mesh{rank}.pt")
        torch.testing.assert_close(loss, expected)
        for ours, theirs in zip(gradients, of_logits, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
        placed, dimensions, kind, others = refused
        assert (
            "student_logits is a DTensor placed (Replicate(),), must be (Shard(dim=1),) on the mesh of group" in placed
        )
        assert f"student_logits is a DTensor over ranks {[rank & 2, rank | 1]}, must be over those of group" in others
        assert "group is a mesh of 2 dimensions, must have one" in dimensions
        assert "group is str, must be a process group of torch.distributed or a DeviceMesh" in kind
