"""What the tests of language models run in two processes over gloo, as torchrun would start them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import language_models as cases
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


def heads_and_hidden() -> tuple[list[nn.Linear], list[Tensor], Tensor]:
    """Of a student and a teacher, and which tokens count."""
    heads, hidden = [], []
    for seed, width in ((0, 16), (1, 24)):
        torch.manual_seed(seed)
        heads.append(nn.Linear(width, 97))
        hidden.append(torch.randn(4, 5, width))
    heads[1].requires_grad_(False)
    return heads, hidden, torch.arange(5).expand(4, -1) < torch.tensor([[5], [2], [3], [4]])


def sharded_heads_of_trl(rank: int, folder: Path, patched: bool) -> dict[str, Any]:
    """TRL's loss of heads that fully_shard has in parts; each rank has its rows."""
    from torch.distributed.fsdp import fully_shard
    from trl.trainer import distillation_trainer

    from fastkd.integrations import trl as integration

    heads, (student, teacher), mask = heads_and_hidden()
    for head in heads:
        fully_shard(head)
    rows = part({"student": student, "teacher": teacher, "mask": mask}, rank)
    if patched:
        integration.patch("distillation")
    loss, entropy, count = distillation_trainer._chunked_divergence_loss(
        rows["student"],
        rows["teacher"],
        heads[0].weight,
        heads[1].weight,
        rows["mask"],
        0.5,
        num_items_in_batch=int(mask.sum()) / RANKS,
        student_lm_head_bias=heads[0].bias,
        teacher_lm_head_bias=heads[1].bias,
    )
    integration.unpatch()
    loss.backward()
    return {"loss": loss.detach(), "entropy": entropy, "count": count, **wholes(heads[0])}


def sharded_models(rank: int, folder: Path, head_apart: bool) -> dict[str, Any]:
    """distillation_loss of models that fully_shard has in parts: layers, what is left, and the head with that or apart."""
    from language_trainers import batch
    from torch.distributed.fsdp import fully_shard

    from fastkd.integrations.transformers import distillation_loss

    models = []
    for seed, width in ((0, 16), (1, 24)):
        model = cases.model(seed, width)
        for layer in model.model.layers:
            fully_shard(layer)
        if head_apart:
            fully_shard(model.lm_head)
        models.append(fully_shard(model))
    whole = batch(4)
    count = int((whole["labels"][:, 1:] != -100).sum())
    loss = distillation_loss(*models, part(whole, rank), count / RANKS, temperature=2.0, alpha=0.7)
    loss.backward()
    gradients = wholes(models[0])
    with torch.no_grad():  # in evaluation, too
        again = distillation_loss(*models, part(whole, rank), count / RANKS, temperature=2.0, alpha=0.7)
    torch.testing.assert_close(again, loss.detach())
    return {"loss": loss.detach(), "gradients": gradients}


# ---- trainers in two processes --------------------------------------------------------------------------


def distilled_by_trl(rank: int, folder: Path, kind: str, patched: bool) -> dict[str, Any]:
    from language_trainers import distilled

    return distilled(folder / f"{kind}{patched}{rank}", kind, patched)


def trained_by_transformers(rank: int, folder: Path) -> dict[str, Any]:
    from language_trainers import trained

    trainer, gradients = trained(folder / f"trainer{rank}", rows=2, accumulate=2)
    return {
        "gradients": gradients,
        "loss": trainer.state.log_history[0]["loss"],
        "eval_loss": trainer.evaluate()["eval_loss"],
    }


def accelerated(rank: int, folder: Path) -> dict[str, Any]:
    """The loop of the document: two batches a step and process, of unequal numbers of tokens."""
    from accelerate import Accelerator
    from language_trainers import Rows

    from fastkd.integrations.transformers import distillation_loss

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, teacher = cases.model(0), cases.model(1, 24)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    model, optimizer, loader = accelerator.prepare(model, optimizer, torch.utils.data.DataLoader(Rows(8), 2))
    batches = list(loader)
    count = accelerator.gather(torch.stack([(each["labels"][:, 1:] != -100).sum() for each in batches]).sum()).sum()
    total = torch.zeros(())
    for each in batches:
        with accelerator.accumulate(model):
            loss = distillation_loss(model, teacher, each, count, temperature=2.0, alpha=0.6)
            # backward() divides by the batches of a step and DDP by the processes: the count has both in it
            accelerator.backward(loss * accelerator.gradient_accumulation_steps * accelerator.num_processes)
            total += loss.detach()
    return {
        "gradients": cases.gradients(accelerator.unwrap_model(model)),
        "loss": accelerator.gather(total[None]).sum(),
    }
