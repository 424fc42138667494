"""Logits without their height and spread, of which a student is to learn nothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["standardized"]


def standardized(logits: Tensor) -> Tensor:
    """``(z - mean) / (std + 1e-7)`` of each row ``[..., K]``, K >= 2, in float32 or better; the std with K - 1, not K.

    Sun et al., "Logit Standardization in Knowledge Distillation" (CVPR 2024), its Z-score pre-process, with the std and the
    1e-7 of the authors' code. A row that holds an infinity becomes NaN. In a row of equal logits, as of a layer that begins
    with zeros, the gradient is 1e7 times the one that comes in.
    """
    if logits.shape[-1] < 2:
        raise ValueError(
            f"fastkd: logits have shape {tuple(logits.shape)}, must have 2 classes or more to be standardised"
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    centred = logits - logits.mean(-1, keepdim=True)  # the mean matters to no softmax, but to the rounding
    # what torch.std is, which takes five times as long on a CPU
    std = centred.norm(dim=-1, keepdim=True) / math.sqrt(logits.shape[-1] - 1)
    standard: Tensor = centred / (std + 1e-7)
    return standard
