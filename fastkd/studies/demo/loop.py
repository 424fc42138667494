"""How the demo trains: AdamW along a cosine, and distillation on draws from a collection whose teacher logits are known."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastkd import statistics
from fastkd._checks import check_callable, check_count, check_not_negative
from fastkd.alias_table import AliasTable, check_one_for_each_item, check_table
from fastkd.losses import KDLoss, KLDivLoss
from fastkd.methods.features import check_module, logits_of, logits_of_one

__all__ = ["distill", "optimize"]


def optimize(
    model: nn.Module,
    loss_of_batch: Callable[[], Tensor],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float = 1e-2,
    on_step: Callable[[int], None] | None = None,
) -> None:
    """AdamW for ``steps`` steps with a cosine from ``learning_rate`` to zero.

    Args:
        loss_of_batch: draws the next batch, runs the model and returns the loss.
        steps: 1 or more.
        learning_rate, weight_decay: 0 or more.
        on_step: called with the number of steps done after each one; may evaluate the model (:func:`predict`).

    Raises:
        TypeError, ValueError: other than these.
    """
    check_module("model", model)
    check_callable("on_step", on_step)
    steps = check_count("steps", steps, 1)
    learning_rate = check_not_negative("learning_rate", learning_rate)
    weight_decay = check_not_negative("weight_decay", weight_decay)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss_of_batch().backward()
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step)
    model.eval()


def distill(
    student: nn.Module,
    images: Tensor,
    teacher_logits: Tensor,
    table: AliasTable,
    criterion: KLDivLoss | KDLoss,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float = 2e-3,
    target: Tensor | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Trains the student on batches drawn from the table, against teacher logits computed once.

    The logits that gave the scores also teach, so the teacher runs once over the collection and never again. (With
    augmentation after sampling it would have to run on every batch.)

    Args:
        images: the collection, ``[N, C, H, W]``.
        teacher_logits: ``[N, K]``, of the same images, on the device of the loss: that of the images, or the CPU where
            the loss has no CUDA kernel.
        table: over N items, on the device of the teacher's logits.
        criterion: takes (student logits, teacher logits, target).
        target: int64 ``[N]``, where the criterion needs labels, on the device of the teacher's logits.
        steps, batch_size: 1 or more.
        learning_rate: the highest: it falls to 0 along half a cosine.
        on_step: called with the number of steps done after each one.

    Returns:
        int64 ``[N]``: how often each image was drawn, on the device of the table.

    Raises:
        TypeError, ValueError: other than these: said before anything is drawn.
    """
    check_module("student", student)
    check_table("table", table)
    check_one_for_each_item("images", images, table, "images")
    check_one_for_each_item("teacher_logits", logits_of_one("teacher_logits", teacher_logits), table, "rows")
    if target is not None:
        check_one_for_each_item("target", target, table, "labels")
    batch_size = check_count("batch_size", batch_size, 1)
    counts = torch.zeros(len(table), dtype=torch.int64, device=table.device)

    def loss_of_batch() -> Tensor:
        drawn = table.sample(batch_size)
        statistics.draw_counts(drawn, out=counts)
        labels = None if target is None else target[drawn]
        logits = logits_of_one("the student's logits", logits_of(student(images[drawn.to(images.device)])))
        return criterion(logits.to(teacher_logits.device), teacher_logits[drawn], labels)  # type: ignore[no-any-return]

    optimize(student, loss_of_batch, steps=steps, learning_rate=learning_rate, on_step=on_step)
    return counts
