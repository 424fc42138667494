"""Distillation of relations: how the samples of a batch lie to each other, by distances and angles (RKD) or by
similarities (SP). The student's features may have other sizes than the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fastkd import _checks, functional
from fastkd.methods.method import WeightedMethod
from fastkd.methods.registry import register
from fastkd.models.layers import FeatureLayers

__all__ = ["RKD", "SP"]


@register("sp", family="relational", paper="Tung & Mori, ICCV 2019")
class SP(WeightedMethod):
    """``b ||G_s - G_t||_F^2 / B^2``, ``G = rows of F F^T, each of L2 norm 1``, ``[B, B]``, with ``F = [B, C H W]``.

    Tung & Mori, "Similarity-Preserving Knowledge Distillation" (ICCV 2019), Eq. 1 to 4.

    Args:
        layers, teacher_layers: one of each, features ``[B, ...]`` of any size.
    """

    term: ClassVar[str] = "similarity_loss"

    @staticmethod
    def layers_of(layers: FeatureLayers) -> tuple[str, ...]:
        return layers.stages[-1:]

    def __init__(
        self,
        layers: Sequence[str] = ("layer3",),
        teacher_layers: Sequence[str] | None = None,
        *,
        task_weight: float = 1.0,
        kd_weight: float = 0.0,
        feature_weight: float = 3000.0,
        temperature: float = 4.0,
        standardize: bool = False,
    ) -> None:
        super().__init__(
            task_weight, kd_weight, feature_weight, temperature, layers, teacher_layers, standardize=standardize
        )
        self.check_layers(1, 1)

    def distance(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        ours, theirs = self.embeddings(0, student, teacher)
        return F.mse_loss(similarities(ours), similarities(theirs))


@register("rkd-da", family="relational", paper="Park et al., CVPR 2019")
@register("rkd-a", family="relational", paper="Park et al., CVPR 2019", distance_weight=0.0)
@register("rkd-d", family="relational", paper="Park et al., CVPR 2019", angle_weight=0.0)
class RKD(WeightedMethod):
    """``b (d D + a A)``: distances of pairs of samples and angles of triples, by :func:`fastkd.functional.relation_loss`.

    Park et al., "Relational Knowledge Distillation" (CVPR 2019). RKD-D is ``angle_weight=0``, RKD-A ``distance_weight=0``,
    RKD-DA has both.

    Args:
        distance_weight, angle_weight: d and a.
        layers, teacher_layers: one of each, embeddings ``[B, ...]`` of any size.
    """

    term: ClassVar[str] = "relation_loss"

    @staticmethod
    def layers_of(layers: FeatureLayers) -> tuple[str, ...]:
        return (layers.embedding,)

    def __init__(
        self,
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
        layers: Sequence[str] = ("avgpool",),
        teacher_layers: Sequence[str] | None = None,
        *,
        task_weight: float = 1.0,
        kd_weight: float = 0.0,
        feature_weight: float = 1.0,
        temperature: float = 4.0,
        standardize: bool = False,
    ) -> None:
        super().__init__(
            task_weight, kd_weight, feature_weight, temperature, layers, teacher_layers, standardize=standardize
        )
        self.check_layers(1, 1)
        self.distance_weight = _checks.check_not_negative("distance_weight", distance_weight)
        self.angle_weight = _checks.check_not_negative("angle_weight", angle_weight)

    @property
    def reads_features(self) -> bool:
        return super().reads_features and (self.distance_weight != 0.0 or self.angle_weight != 0.0)

    def distance(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        ours, theirs = self.embeddings(0, student, teacher)
        return functional.relation_loss(
            ours, theirs, distance_weight=self.distance_weight, angle_weight=self.angle_weight
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, distance_weight={self.distance_weight}, angle_weight={self.angle_weight}"


def similarities(features: Tensor) -> Tensor:
    """``[B, ...]`` -> ``[B, B]``: inner products of samples, each row of norm 1."""
    rows = features.flatten(1)
    return F.normalize(rows @ rows.T)
