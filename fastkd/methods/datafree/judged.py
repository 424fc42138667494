"""Images that were made, and what the teacher says to them: its logits at a glance, or all that it is watched for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastkd.functional import LogitStats, logit_stats
from fastkd.methods.datafree.watched_teacher import Seen, WatchedTeacher

__all__ = ["Glanced", "Judged", "glance", "judge", "own_losses"]


@dataclass
class Glanced:
    """A batch of images, by one run of the teacher."""

    images: Tensor
    """``[B, C, H, W]``."""
    logits: Tensor
    """The teacher's, ``[B, ..., K]``; those of images that are not usable are 0."""
    usable: Tensor
    """bool ``[B]``: images and logits are finite."""


@dataclass
class Judged(Glanced):
    """The same, closely: for the terms of a loss. Images that are not usable are 0, and count in no term of single images."""

    labels: Tensor | None
    """int64 ``[B]``, the classes that they are asked to be of, if any."""
    seen: Seen
    """Of the teacher."""
    stats: LogitStats
    """Of its logits."""


@torch.no_grad()
def glance(teacher: WatchedTeacher, images: Tensor) -> Glanced:
    """The teacher's logits for images ``[B, C, H, W]``; no activation is kept, and no image copied."""
    logits, usable = _usable(teacher(images), _finite(images))
    return Glanced(images, logits, usable)


def judge(teacher: WatchedTeacher, images: Tensor, labels: Tensor | None = None) -> Judged:
    """What the teacher says to images ``[B, C, H, W]``, differentiable in them."""
    whole = _finite(images.detach())
    images = images.where(whole[:, None, None, None], 0.0)
    seen = teacher.look(images)
    logits, usable = _usable(seen.logits, whole)
    return Judged(images, logits, usable, labels, seen, logit_stats(logits))


@torch.no_grad()
def own_losses(batches: Sequence[Glanced]) -> Tensor:
    """The teacher's cross-entropy with its own prediction, ``logsumexp - max``, ``[batches, B]``; of maps the mean over the
    pixels. NaN where an image is not usable. All in one call."""
    stats = logit_stats(torch.stack([batch.logits for batch in batches]))
    usable = torch.stack([batch.usable for batch in batches])
    losses = stats.logsumexp - stats.max
    if losses.dim() > 2:
        losses = losses.flatten(2).mean(2)
    return losses.where(usable, torch.nan)


def _usable(logits: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    usable = whole & _finite(logits.detach())
    return logits.where(usable.view(-1, *[1] * (logits.dim() - 1)), 0.0), usable


def _finite(rows: Tensor) -> Tensor:
    """Which rows are, bool ``[B]``, in one pass; their sum need not be a number that float16 has."""
    return rows.flatten(1).sum(1, dtype=torch.promote_types(rows.dtype, torch.float32)).isfinite()
