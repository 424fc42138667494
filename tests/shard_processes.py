"""What the tests of losses over ranks run in processes of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import fastkd
from fastkd import functional as F  # noqa: N812
from fastkd.training import process_group

ROWS, CLASSES = 6, 90


def logits() -> tuple[Tensor, Tensor]:
    """Of all classes, the same on every rank; two rows are near each other, and two the same."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, ROWS, CLASSES, generator=generator).mul(2)
    teacher[1] = student[1] + 1e-3 * teacher[1]
    teacher[2] = student[2]
    return student, teacher


TARGET = torch.tensor([0, 89, 44, -100, 45, 17])

# a loss of logits of all classes, or of a rank's with its group
LOSSES: dict[str, Callable[..., Tensor]] = {
    "kl": lambda s, t, **group: F.kl_div(s, t, 2.0, **group),
    "kl mean": lambda s, t, **group: F.kl_div(s, t, 2.0, reduction="mean", target=TARGET, **group),
    "reverse": lambda s, t, **group: F.kl_div(s, t, direction="reverse", reduction="sum", **group),
    "js": lambda s, t, **group: F.js_div(s, t, 3.0, beta=0.3, reduction="none", **group).sum(),
    "cross-entropy": lambda s, t, **group: F.soft_cross_entropy(s, t, **group),
    "kd": lambda s, t, **group: F.kd_loss(s, t, TARGET, 4.0, 0.7, **group),
    "module": lambda s, t, **group: fastkd.KDLoss(2.0, 0.5)(s, t, TARGET, **group),
    "maps": lambda s, t, **group: F.kl_div(_map_of(s), _map_of(t), dim=1, **group),
}


def _map_of(rows: Tensor) -> Tensor:
    return rows.reshape(2, 3, 1, -1).permute(0, 3, 1, 2)


def part(x: Tensor, rank: int, ranks: int) -> Tensor:
    """The classes of a rank, of which the first has more."""
    more = 7 if ranks > 1 else 0
    each = (CLASSES - more) // ranks
    begin = 0 if rank == 0 else more + rank * each
    end = CLASSES if rank == ranks - 1 else more + (rank + 1) * each
    return x[..., begin:end]


def with_gradients(loss: Callable[..., Tensor], *tensors: Tensor, **options: Any) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    value = loss(*leaves, **options)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def compare(rank: int, folder: Path) -> None:
    """Losses and gradients of this rank, eager and compiled."""
    with process_group("cpu"):
        group = dist.group.WORLD
        ranks = dist.get_world_size()
        own = [part(x, rank, ranks) for x in logits()]
        made = {name: with_gradients(loss, *own, group=group) for name, loss in LOSSES.items()}
        for name in ("kl", "js", "kd"):
            compiled = torch.compile(LOSSES[name], fullgraph=True, backend="aot_eager")
            made[f"{name} compiled"] = with_gradients(compiled, *own, group=group)
        torch.save(made, folder / f"made{rank}.pt")


# losses of hidden states and heads: the student's, the teacher's
LINEAR: dict[str, Callable[..., Tensor]] = {
    "kl": lambda h, w, th, tw, **group: F.linear_kl_div(h, w, th, tw, 2.0, memory_budget=3000, **group),
    "js none": lambda h, w, th, tw, **group: F.linear_js_div(h, w, th, tw, reduction="none", **group).square().sum(),
    "kd": lambda h, w, th, tw, **group: F.linear_kd_loss(h, w, th, tw, TARGET, 2.0, 0.5, reduction="sum", **group),
    "module": lambda h, w, th, tw, **group: fastkd.LinearKDLoss(2.0, 0.5)(h, w, th, tw, TARGET, **group),
}


def heads() -> tuple[Tensor, ...]:
    """Hidden states and weights of all classes, the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    sizes = (ROWS, 8), (CLASSES, 8), (ROWS, 5), (CLASSES, 5)
    return tuple(torch.randn(size, generator=generator) for size in sizes)


GUIDE = Path(__file__).parents[1] / "docs" / "language-models.md"


def of_the_guide(h: Tensor, w: Tensor, th: Tensor, tw: Tensor, group: Any = None) -> Tensor:
    """The loss of its example."""
    if group is None:
        return F.linear_kl_div(h, w, th, tw, 2.0, target=TARGET)
    block = GUIDE.read_text().split("## Vocabularies over several ranks")[1].split("```python\n")[1].split("```")[0]
    names = {"student_hidden": h, "student_head": w, "teacher_hidden": th, "teacher_head": tw, "mesh": {"tp": group}}
    exec(compile(block.replace("loss.backward()", ""), GUIDE, "exec"), {**names, "target": TARGET}, names)
    loss: Tensor = names["loss"]
    return loss


LINEAR["guide"] = of_the_guide


def compare_heads(rank: int, folder: Path) -> None:
    """Losses and gradients of all classes, from DTensors; of one loss from plain tensors, eager and compiled."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    with process_group("cpu"):
        ranks = dist.get_world_size()
        mesh = init_device_mesh("cpu", (ranks,))

        def run(loss: Callable[..., Tensor]) -> list[Tensor]:
            hidden, weight, teacher_hidden, teacher_weight = heads()
            leaves = [
                hidden,
                distribute_tensor(weight, mesh, [Shard(0)]),
                distribute_tensor(teacher_hidden, mesh, [Replicate()]),
                distribute_tensor(teacher_weight, mesh, [Shard(0)]),
            ]
            for leaf in leaves:
                leaf.requires_grad_()
            value = loss(*leaves, group=mesh)
            gradients = torch.autograd.grad(value, leaves)
            whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]
            return [value.detach(), *whole]

        made = {name: run(loss) for name, loss in LINEAR.items()}
        made["distributed, compiled"] = run(torch.compile(LINEAR["kd"], fullgraph=True, backend="aot_eager"))
        hidden, weight, *teacher = heads()
        weights = [part(w.T, rank, ranks).T for w in (weight, teacher[1])]
        compiled = torch.compile(LINEAR["kd"], fullgraph=True, backend="aot_eager")
        for name, loss in (("plain", LINEAR["kd"]), ("compiled", compiled)):
            tensors = hidden, weights[0], teacher[0], weights[1]
            made[name] = with_gradients(loss, *tensors, group=dist.group.WORLD)
        torch.save(made, folder / f"heads{rank}.pt")


def on_a_mesh(rank: int, folder: Path) -> None:
    """Four ranks: two of them share the classes of two rows each; logits are DTensors, their group a mesh."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    with process_group("cpu"):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "classes"))
        classes = mesh["classes"]
        half = slice(None, 3) if mesh.get_local_rank("data") == 0 else slice(3, None)
        leaves = [
            DTensor.from_local(x[half].chunk(2, -1)[classes.get_local_rank()].contiguous(), classes, [Shard(-1)])
            for x in logits()
        ]
        for leaf in leaves:
            leaf.requires_grad_()
        loss = F.kl_div(*leaves, 2.0, group=classes, reduction="sum")
        compiled = torch.compile(LOSSES["kl"], backend="aot_eager")
        assert torch.equal(compiled(*leaves, group=classes), LOSSES["kl"](*leaves, group=classes))
        gradients = torch.autograd.grad(loss, leaves)
        whole = [gradient.full_tensor() for gradient in gradients]
        replicated = DTensor.from_local(logits()[0], classes, [Replicate()])
        refused = []
        for student, group in (
            (replicated, classes),
            (leaves[0], mesh),
            (leaves[0], "classes"),
            (leaves[0], mesh["data"]),
        ):
            try:
                F.kl_div(student, leaves[1], group=group)
            except (TypeError, ValueError) as error:
                refused.append(str(error))
        torch.save((loss.detach(), whole, refused), folder / f"mesh{rank}.pt")
