"""Images that were made, and what the teacher says to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastkd.functional import LogitStats, logit_stats
from fastkd.methods.datafree.watched_teacher import Seen, WatchedTeacher

__all__ = ["Judged", "judge"]


@dataclass
class Judged:
    """A batch of images, by one run of the teacher."""

    images: Tensor
    """``[B, C, H, W]``; those with a value that is not finite do not count, and are all 0 where it was looked at closely."""
    labels: Tensor | None
    """int64 ``[B]``, the classes that they are asked to be of, if any."""
    seen: Seen
    """Of the teacher; the logits of images that do not count are 0."""
    stats: LogitStats
    """Of its logits."""
    usable: Tensor
    """bool ``[B]``: images and logits are finite."""

    @property
    def logits(self) -> Tensor:
        """The teacher's, ``[B, K]``."""
        return self.seen.logits

    @property
    def losses(self) -> Tensor:
        """The teacher's cross-entropy with its own prediction, ``logsumexp - max``, ``[B]``; NaN where an image does not
        count."""
        return (self.stats.logsumexp - self.stats.max).detach().where(self.usable, float("nan"))


def judge(teacher: WatchedTeacher, images: Tensor, labels: Tensor | None = None, *, closely: bool = True) -> Judged:
    """What the teacher says to images ``[B, C, H, W]``, differentiable in them.

    Args:
        closely: whether all is seen that the teacher is watched for, and images that do not count are 0, as the terms of a loss
            want it; else the logits alone, for which no activation is kept and no image copied.
    """
    whole = _finite(images.detach())
    if closely:
        images = images.where(whole[:, None, None, None], 0.0)
        seen = teacher.look(images)
    else:
        seen = Seen(teacher(images), {}, [], [], None, None)
    usable = whole & _finite(seen.logits.detach())
    seen = seen._replace(logits=seen.logits.where(usable[:, None], 0.0))
    return Judged(images, labels, seen, logit_stats(seen.logits), usable)


def _finite(rows: Tensor) -> Tensor:
    """Which rows are, bool ``[B]``, in one pass; their sum need not be a number that float16 has."""
    return rows.flatten(1).sum(1, dtype=torch.promote_types(rows.dtype, torch.float32)).isfinite()
