"""What is kept of a row of a teacher's logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastkd.ops.sparse import sample_teacher

__all__ = ["Targets", "drawn_log_probs", "top_k_log_probs"]


class Targets(NamedTuple):
    """Of each row."""

    indices: Tensor
    """int64 ``[..., k]``: classes."""
    log_probs: Tensor
    """float32 ``[..., k]``, of all classes together: they do not add up to one."""
    tail_log_prob: Tensor
    """float32 ``[...]``: the logarithm of what all other classes have together, -inf where there is nothing."""


def top_k_log_probs(logits: Tensor, k: int, temperature: float = 1.0) -> Targets:
    """The k largest of ``log_softmax(logits / temperature)``, in descending order, and the tail.

    The tail is a logsumexp over the other classes: 1 less the sum of the k would be rounding noise where it is small. All is
    taken in float32 (of float64 logits in float64), from the distance of each logit to the largest, so that a low temperature
    magnifies no rounding; of the rows there are two such copies at a time. A row that holds NaN, +inf, or nothing but -inf has
    NaN.

    Args:
        logits: ``[..., V]`` of any float dtype.
        k: from 1 to V.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    scaled = (wide - wide.amax(-1, keepdim=True)).div_(temperature)
    top, indices = scaled.topk(k, dim=-1)
    rest = scaled.scatter_(-1, indices, -torch.inf).logsumexp(-1)
    whole = torch.logaddexp(top.logsumexp(-1), rest)
    return Targets(indices, (top - whole.unsqueeze(-1)).float(), (rest - whole).float())


def drawn_log_probs(logits: Tensor, draws: int, seed: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Draws from each row, as :func:`fastkd.functional.sample_teacher` makes them, from a given seed.

    A row that holds NaN, +inf, or nothing but -inf has NaN, as in :func:`top_k_log_probs`; the operator itself raises on a CPU.

    Args:
        logits: ``[S, V]`` of any float dtype.

    Returns:
        indices: int64 ``[S, k]``, and log_probs: float32 ``[S, k]``; k = min(draws, V), as no row has more classes.
    """
    right = logits.amax(-1, keepdim=True).isfinite()
    if not right.all():
        logits = torch.where(right, logits, 0.0)
    indices, log_probs = sample_teacher(logits, torch.tensor([seed], device=logits.device), draws, temperature)
    k = min(draws, logits.shape[-1])
    return indices[:, :k], torch.where(right, log_probs[:, :k], torch.nan)
