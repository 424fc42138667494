"""What is asked of generated images: the terms of a generator's loss, and how far a student is from its teacher.

Logits are ``[B, ..., K]``: of a classifier a row an image, of a dense network one a pixel, with the classes last. ``weight`` is
``[B]``, the share of each image in the mean, alike for all of its pixels, or ``[B, ...]``, that of each row: not negative, of
sum 1, or 0 where none counts; what a sample of weight 0 holds does not matter, if it is finite. All are scalars, differentiable
in whatever requires a gradient, the logits of both networks among them, without waiting for the device.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fastkd import functional
from fastkd.functional import ChannelMoments, LogitStats

__all__ = [
    "Divergence",
    "balance",
    "bn_statistics",
    "class_prior",
    "divergence",
    "l2_norm",
    "label_entropy",
    "mean_activation",
    "of_rows",
    "shares",
    "total_variation",
]

Divergence = Literal["kl", "l1", "js", "js-published"]
PUBLISHED_TEMPERATURE, PUBLISHED_RANGE = 3.0, (0.01, 0.99)


def shares(counted: Tensor) -> Tensor:
    """Equal weights for the samples that count, bool ``[B]``: their sum is 1, or 0 where there is none."""
    chosen = counted.float()
    return chosen / chosen.sum().clamp(min=1.0)


def of_rows(weight: Tensor, rows: torch.Size) -> Tensor:
    """The share of each row, of rows ``[B, ...]``."""
    if weight.shape == rows:
        return weight
    return (weight / rows[1:].numel()).view(-1, *[1] * (len(rows) - 1)).expand(rows)


def divergence(
    kind: Divergence, student_logits: Tensor, teacher_logits: Tensor, weight: Tensor, temperature: float = 1.0
) -> Tensor:
    """How far the student is from the teacher, on logits ``[B, ..., K]``.

    - ``kl``: ``T^2 KL(teacher || student)``.
    - ``l1``: the mean over the classes of ``|s - t|`` (DFAD, TA-DFKD); without a temperature.
    - ``js``: the Jensen-Shannon divergence over ln 2, from 0 to 1, at this temperature.
    - ``js-published``: as the code of DeepInversion, PRE-DFKD and TA-DFKD has it: T = 3; p, q and their mean m clamped to
      [.01, .99]; ``KL(m || p) / 2 + KL(m || q) / 2`` over B *and* K; the result clamped to [0, 1]. With 100 classes and
      predictions that are not sharp it is negative, so that the clamp makes it 0, without a gradient.
    """
    weight = of_rows(weight, student_logits.shape[:-1])
    if kind == "kl":
        return functional.kl_div(student_logits, teacher_logits, temperature, weight=weight, reduction="sum")
    if kind == "l1":
        return ((student_logits - teacher_logits).abs().mean(-1) * weight).sum()
    if kind == "js":
        nats = functional.js_div(student_logits, teacher_logits, temperature, weight=weight, reduction="sum")
        return nats / (math.log(2.0) * temperature**2)
    pair = [(logits / PUBLISHED_TEMPERATURE).softmax(-1) for logits in (student_logits, teacher_logits)]
    middle = (0.5 * (pair[0] + pair[1])).clamp(*PUBLISHED_RANGE)
    rows = [(middle * (middle.log() - p.clamp(*PUBLISHED_RANGE).log())).mean(-1) for p in pair]
    mean: Tensor = (0.5 * (rows[0] + rows[1]) * weight).sum()
    return mean.clamp(0.0, 1.0)


def class_prior(teacher: LogitStats, teacher_logits: Tensor, labels: Tensor | None, weight: Tensor) -> Tensor:
    """Cross-entropy of the teacher with its own prediction, ``logsumexp - max`` (DAFL), or with labels that were asked for,
    int64 ``[B]`` (DeepInversion, CMI, NAYER)."""
    rows = teacher.logsumexp - teacher.max
    if labels is not None:
        rows = F.cross_entropy(teacher_logits.float(), labels, reduction="none")
    total: Tensor = (rows * of_rows(weight, rows.shape)).sum()
    return total


def label_entropy(teacher: LogitStats, weight: Tensor) -> Tensor:
    """Mean entropy of the teacher's predictions, nats (the label-space alignment of MosaicKD)."""
    return (teacher.entropy * of_rows(weight, teacher.entropy.shape)).sum()


def balance(teacher_logits: Tensor, weight: Tensor) -> Tensor:
    """``sum p ln p`` of the mean prediction: lowest, ``-ln K``, where all classes are as likely."""
    weight = of_rows(weight, teacher_logits.shape[:-1])
    # a product of matrices would be of 16 bits in autocast
    mean = (weight[..., None] * teacher_logits.float().softmax(-1)).flatten(0, -2).sum(0)
    terms: Tensor = torch.special.xlogy(mean, mean.clamp(min=torch.finfo(mean.dtype).tiny))
    return terms.sum()


def mean_activation(latents: Tensor | None, weight: Tensor) -> Tensor:
    """Mean size ``|f|`` of what goes into the teacher's last layer, ``[B, d]`` (DAFL maximises it)."""
    assert latents is not None
    return (latents.float().abs().mean(1) * weight).sum()


def bn_statistics(moments: list[ChannelMoments], running: list[tuple[Tensor, Tensor]]) -> Tensor:
    """``sum |m - m_running|_2 + |v - v_running|_2`` over the teacher's batch norms: mean and biased variance of what goes into
    each, against its running statistics (DeepInversion, eq. 4)."""
    differences = [
        difference
        for (mean, var), (running_mean, running_var) in zip(moments, running, strict=True)
        for difference in (mean - running_mean, var - running_var)
    ]
    return torch.stack([_norm(difference) for difference in differences]).sum()


def total_variation(images: Tensor) -> Tensor:
    """Sum of four norms, each over the whole batch ``[B, C, H, W]``: of the differences of neighbours to the right, below, and
    on both diagonals (DeepInversion)."""
    right = images[..., :, :-1] - images[..., :, 1:]
    down = images[..., :-1, :] - images[..., 1:, :]
    rising = images[..., 1:, :-1] - images[..., :-1, 1:]
    falling = images[..., :-1, :-1] - images[..., 1:, 1:]
    return torch.stack([_norm(difference) for difference in (right, down, rising, falling)]).sum()


def l2_norm(images: Tensor) -> Tensor:
    """``|x|_2`` of the whole batch."""
    return _norm(images)


def _norm(x: Tensor) -> Tensor:
    """With a gradient of 0 at 0."""
    norm: Tensor = torch.linalg.vector_norm(x.float())
    return norm
