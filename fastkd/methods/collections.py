"""Distillation from a heterogeneous unlabeled collection (Begon & Geurts, "Distillation from heterogeneous unlabeled
collections"): score every image once by the teacher, draw batches from ``q = softmax(lambda u)``, distill on them.

``lambda`` comes from the inter-quartile sampling probability ratio, IQPR: an image at the third quartile of the scores
is drawn IQPR times as often as one at the first (eq. 2.13). IQPR = 1 draws uniformly. The statistics below are those of
the paper's Tables 4 and 6; they take ``counts``, how often each item of the collection was drawn.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastkd import statistics
from fastkd._checks import check_count
from fastkd.losses import KDLoss, KLDivLoss
from fastkd.methods.features import check_module, logits_of, logits_of_one
from fastkd.methods.loop import optimise
from fastkd.sampling import AliasTable, check_one_for_each_item, check_table

__all__ = ["distill", "expected_skip_ratio", "irrelevant_proportion", "relevant_draws", "skip_ratio", "uniformity"]


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

    optimise(student, loss_of_batch, steps=steps, learning_rate=learning_rate, on_step=on_step)
    return counts


# The statistics on the device are those of fastkd.statistics; here as Python numbers, for which the device is waited for.


def skip_ratio(counts: Tensor) -> float:
    """:func:`fastkd.statistics.skip_ratio` as a number."""
    return statistics.skip_ratio(counts).item()


def expected_skip_ratio(probabilities: Tensor, draws: int) -> float:
    """:func:`fastkd.statistics.expected_skip_ratio` as a number."""
    return statistics.expected_skip_ratio(probabilities, draws).item()


def uniformity(counts: Tensor) -> float:
    """:func:`fastkd.statistics.uniformity` as a number."""
    return statistics.uniformity(counts).item()


def irrelevant_proportion(counts: Tensor, relevant: Tensor) -> float:
    """:func:`fastkd.statistics.irrelevant_proportion` as a number."""
    return statistics.irrelevant_proportion(counts, relevant).item()


def relevant_draws(counts: Tensor, relevant: Tensor) -> float:
    """:func:`fastkd.statistics.relevant_draws` as a number."""
    return statistics.relevant_draws(counts, relevant).item()
