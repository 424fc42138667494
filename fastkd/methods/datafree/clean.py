"""Which generated images the teacher vouches for (TA-DFKD), chosen without a look at the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastkd.functional import LogitStats
from fastkd.selection import select_clean

__all__ = ["Chosen", "choose", "clean_mask", "losses_of"]


@dataclass
class Chosen:
    """Places for so many samples, filled with those that were selected."""

    index: Tensor
    """int64 ``[size]``: which of the candidates are in each place. Where fewer were selected than there are places they come
    again, in turn, so that nothing else gets into a batch norm."""
    weight: Tensor
    """``[size]``, equal, of sum 1; all 0 where no candidate was selected."""
    filled: Tensor
    """Scalar, the share of the places that have a sample of their own."""


def losses_of(teacher: LogitStats, usable: Tensor) -> Tensor:
    """The teacher's cross-entropy with its own prediction, ``logsumexp - max``, ``[B]``; NaN where a sample is not usable."""
    return (teacher.logsumexp - teacher.max).detach().where(usable, torch.nan)


def clean_mask(losses: Tensor, threshold: float) -> Tensor:
    """:func:`fastkd.select_clean` of each batch, of ``[B]`` or ``[rounds, B]`` losses, all by one call."""
    return select_clean(losses, threshold)[0]


def choose(mask: Tensor, size: int) -> Chosen:
    """The first ``size`` of the candidates, bool ``[N]``, that were selected."""
    count = mask.sum()
    order = torch.argsort(mask.to(torch.uint8), descending=True, stable=True)
    kept = count.clamp(max=size)
    places = torch.arange(size, device=mask.device)
    index = order.index_select(0, places % kept.clamp(min=1))
    weight = (count > 0).float().expand(size) / size
    return Chosen(index, weight, kept / size)
