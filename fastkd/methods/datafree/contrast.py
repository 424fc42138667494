"""The contrastive term of CMI: every generated image is to be another, and not one of those before."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fastkd.methods.datafree.bank import Bank

__all__ = ["Contrast", "instance_discrimination"]


def instance_discrimination(views: Tensor, others: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """``-log exp(s_ii / t) / (exp(s_ii / t) + sum of the negatives)``, mean over i: embeddings ``[B, d]`` of one view against
    those of the other view of the same images, with the other images of the batch and ``negatives`` ``[M, d]`` to be told
    from. All of norm 1."""
    logits = torch.cat([views @ others.T, views @ negatives.T], 1) / temperature
    return F.cross_entropy(logits, torch.arange(len(views), device=views.device))


class Contrast(nn.Module):
    """A head on the teacher's description of an image, and a bank of the descriptions of images made before.

    Fang et al., "Contrastive Model Inversion for Data-Free Knowledge Distillation" (IJCAI 2021), eq. 5 and 6; the head of two
    layers is trained with the generator.

    Args:
        features: numbers that the teacher describes an image by.
        capacity: negatives in the bank.
        temperature: t.
    """

    def __init__(self, features: int, capacity: int, *, width: int = 128, temperature: float = 0.1) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(features, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width))
        self.bank = Bank(capacity, features=(features,))
        self.temperature = temperature

    def forward(self, whole: Tensor, part: Tensor, negatives: Tensor) -> Tensor:
        """The term, of descriptions ``[B, features]`` of the images and of a part of each, and of earlier ones ``[M, ...]``."""
        count = len(whole)
        embedded = F.normalize(self.head(torch.cat([whole, part, negatives])), dim=1)
        first, second, others = embedded[:count], embedded[count : 2 * count], embedded[2 * count :].detach()
        return instance_discrimination(second, first, others, self.temperature)
