"""The relational loss of embeddings."""

from __future__ import annotations

from torch import Tensor, nn

from fastkd import functional
from fastkd._checks import check_not_negative


class RelationLoss(nn.Module):
    """Relational distillation of embeddings (RKD). Arguments as in :func:`fastkd.functional.relation_loss`.

    >>> criterion = fastkd.RelationLoss(distance_weight=25.0, angle_weight=50.0)
    >>> loss = task_loss + criterion(student_embedding, teacher_embedding)
    """

    def __init__(self, distance_weight: float = 25.0, angle_weight: float = 50.0) -> None:
        super().__init__()
        self.distance_weight = check_not_negative("distance_weight", distance_weight)
        self.angle_weight = check_not_negative("angle_weight", angle_weight)

    def forward(self, student_features: Tensor, teacher_features: Tensor) -> Tensor:
        """The loss of embeddings ``[B, ...]``, of any number of features each."""
        return functional.relation_loss(student_features, teacher_features, self.distance_weight, self.angle_weight)

    def extra_repr(self) -> str:
        return f"distance_weight={self.distance_weight}, angle_weight={self.angle_weight}"
