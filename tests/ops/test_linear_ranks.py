"""Linear losses of two processes: the gradients of one that has all rows, under DDP and where FSDP2 shards the head."""

from __future__ import annotations

from pathlib import Path

import linear_processes as work
import pytest
import torch
from training_processes import start_ranks

pytestmark = pytest.mark.no_kernels  # the sanitizers have the kernels under test elsewhere


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ranks")
    start_ranks(work.in_ranks, made)
    return made


@pytest.mark.parametrize("how", ["ddp", "root", "head"])
def test_two_processes_are_as_one(how: str, folder: Path) -> None:
    student, batch = work.make()
    work.loss_of(student, slice(None), batch).backward()
    expected = work.gradients(student)
    for rank in range(2):
        made = torch.load(folder / f"gradients{rank}.pt")[how]
        assert made.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(made[name], gradient)
