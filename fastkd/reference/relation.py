"""Plain-torch relational distillation, differentiable any number of times: all B^3 angles at once. Slow; right."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

LEAST_SQUARED_DISTANCE = 1e-12
LEAST_DISTANCE = 1e-12  # closer points coincide: no direction leads from one to the other


def _differences(x: Tensor) -> Tensor:
    """``[a, b] = x_b - x_a``: ``[B, ...] -> [B, B, d]``."""
    x = x.flatten(1)
    return x[None] - x[:, None]


def distances(x: Tensor) -> Tensor:
    """Distances over the mean of the positive ones, ``[B, B]``: eq. 3 and 4 of Park et al. (2019)."""
    squared = _differences(x).square().sum(-1).clamp(min=LEAST_SQUARED_DISTANCE)
    diagonal = torch.eye(len(x), dtype=torch.bool, device=x.device)
    distance = torch.where(diagonal, 1.0, squared).sqrt()
    distance = torch.where(diagonal, 0.0, distance)
    return distance / distance.sum() * (len(x) * (len(x) - 1))


def angles(x: Tensor) -> Tensor:
    """``[a, b, c]``: the cosine at ``x_a`` between ``x_b`` and ``x_c``, 0 where one is ``x_a`` itself: eq. 6."""
    difference = _differences(x)
    squared = difference.square().sum(-1, keepdim=True)
    coincide = squared <= LEAST_DISTANCE**2
    direction = torch.where(coincide, difference * 0.0, difference / torch.where(coincide, 1.0, squared).sqrt())
    return direction @ direction.mT


def relation_terms(student_features: Tensor, teacher_features: Tensor) -> tuple[Tensor, Tensor]:
    """The distance and the angle term, unweighted: means over all B^2 pairs and all B^3 triples."""
    if len(student_features) < 2:
        zero = student_features.sum() * 0.0 + teacher_features.sum() * 0.0
        return zero, zero
    return (
        F.smooth_l1_loss(distances(student_features), distances(teacher_features)),
        F.smooth_l1_loss(angles(student_features), angles(teacher_features)),
    )


def relation_loss(
    student_features: Tensor, teacher_features: Tensor, distance_weight: float = 25.0, angle_weight: float = 50.0
) -> Tensor:
    """The whole of :func:`fastkd.functional.relation_loss`, formula by formula."""
    terms = relation_terms(student_features, teacher_features)
    return sum((w * term for w, term in zip((distance_weight, angle_weight), terms, strict=True) if w), terms[0] * 0.0)
