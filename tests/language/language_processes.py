"""What the tests of language models run in two processes over gloo, as torchrun would start them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import language_cases as cases
import torch
import torch.distributed as dist
from torch import Tensor, nn

RANKS = 2


def run(rank: int, folder: Path, calls: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]) -> None:
    """What each call returns, one after the other, for the tests to read: to import trainers takes seconds."""
    dist.init_process_group("gloo")
    results = {name: call(rank, folder, *arguments) for name, (call, arguments) in calls.items()}
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def part(values: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    return {name: value.chunk(RANKS)[rank] for name, value in values.items()}


def wholes(module: nn.Module) -> dict[str, Tensor]:
    """Gradients, gathered where they are in parts."""
    return {
        name: gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        for name, gradient in cases.gradients(module).items()
    }


# ---- hidden states and heads of FSDP2 -------------------------------------------------------------------


def sharded_loss_of_trl(rank: int, folder: Path, patched: bool) -> dict[str, Any]:
    """TRL's loss of heads that fully_shard has in parts; each rank has its rows."""
    from torch.distributed.fsdp import fully_shard
    from trl.trainer import distillation_trainer

    from fastkd.integrations import trl as integration

    heads = []
    for seed, width in ((0, 16), (1, 24)):
        torch.manual_seed(seed)
        heads.append(fully_shard(nn.Linear(width, 97)))
    heads[1].requires_grad_(False)
    student, teacher = (torch.randn(4, 5, width, generator=torch.Generator().manual_seed(width)) for width in (16, 24))
    rows = part({"student": student, "teacher": teacher, "mask": torch.arange(5).expand(4, -1) < torch.tensor([[5], [2], [3], [4]])}, rank)
    if patched:
        integration.patch("distillation")
    loss, entropy, count = distillation_trainer._chunked_divergence_loss(
        rows["student"],
        rows["teacher"],
        heads[0].weight,
        heads[1].weight,
        rows["mask"],
        0.5,
        num_items_in_batch=14 / RANKS,
        student_lm_head_bias=heads[0].bias,
        teacher_lm_head_bias=heads[1].bias,
    )
    integration.unpatch()
    loss.backward()
    return {"loss": loss.detach(), "entropy": entropy, "count": count, **wholes(heads[0])}
