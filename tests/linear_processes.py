"""What the tests of linear losses run in processes of their own: a head under DDP, and one that FSDP2 has sharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastkd
from fastkd.training import process_group

ROWS, FEATURES, TEACHER_FEATURES, CLASSES = 12, 8, 6, 42


class Student(nn.Module):
    """A body and a head, whose loss is its forward: hooks of DDP and FSDP stand around that."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, FEATURES)
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, target: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        return fastkd.functional.linear_kd_loss(hidden, self.head, teacher_hidden, teacher_weight, target, 2.0, 0.5)


def make() -> tuple[Student, tuple[Tensor, ...]]:
    """The same on every rank, whose batch is a slice of it."""
    torch.manual_seed(0)
    student = Student()
    target = torch.randint(CLASSES, (ROWS,))
    target[::6] = -100  # as many in each half
    return student, (torch.randn(ROWS, 5), torch.randn(ROWS, TEACHER_FEATURES), target)


def loss_of(student: nn.Module, rows: slice, batch: tuple[Tensor, ...]) -> Tensor:
    x, teacher_hidden, target = batch
    weight = torch.randn(CLASSES, TEACHER_FEATURES, generator=torch.Generator().manual_seed(1))
    loss: Tensor = student(x[rows], teacher_hidden[rows], weight, target[rows])
    return loss


def gradients(student: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Any] = {name.removeprefix("module."): p.grad for name, p in student.named_parameters()}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found.items()}


def in_ranks(rank: int, folder: Path) -> None:
    """Gradients under DDP, and under FSDP2 with the head in the group of the root or in one of its own."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    with process_group("cpu"):
        ranks = dist.get_world_size()
        rows = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
        student, batch = make()
        under_ddp = DistributedDataParallel(student)
        loss_of(under_ddp, rows, batch).backward()
        made = {"ddp": gradients(under_ddp)}
        for name in ("root", "head"):
            student, batch = make()
            if name == "head":
                fully_shard(student.head)
            fully_shard(student)
            loss_of(student, rows, batch).backward()
            assert isinstance(student.head.weight, DTensor)
            made[name] = gradients(student)
        torch.save(made, folder / f"gradients{rank}.pt")
