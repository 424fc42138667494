"""The relational loss of embeddings."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from fastkd.ops import relation as _ops


@overload
def relation_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    distance_weight: float = ...,
    angle_weight: float = ...,
    *,
    return_terms: Literal[False] = ...,
) -> Tensor: ...


@overload
def relation_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    distance_weight: float = ...,
    angle_weight: float = ...,
    *,
    return_terms: Literal[True],
) -> tuple[Tensor, dict[str, Tensor]]: ...


def relation_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    *,
    return_terms: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Relational distillation (RKD; Park et al., CVPR 2019, arXiv:1904.05068): the geometry of a batch of embeddings.

    ``distance_weight`` times the mean over all B^2 pairs of ``smooth_l1(D(s) - D(t))``, where ``D`` are distances over the
    mean of those between different points (eq. 3 to 5), and ``angle_weight`` times the mean over all B^3 triples of
    ``smooth_l1(psi(s) - psi(t))``, where ``psi[a, b, c]`` is the cosine at point ``a`` between ``b`` and ``c``, 0 where one of
    them is ``a`` (eq. 6 and 7); beta = 1. Time is O(B^2 d + B^3), memory O(B^2 + B d), in float64 inside: points close
    together, far from the origin keep their digits.

    Different points count as at least 1e-6 apart in the distance term. Points that coincide (are no more than 1e-12 apart)
    have no direction from one to the other: their cosines are 0, and no gradient goes through that pair. The batch should hold
    at least three points: of two, every cosine is a constant; of one, there is no pair, and loss and gradient are 0.

    Args:
        student_features: ``[B, ...]``, float32, float64, bfloat16 or float16; more dimensions are flattened to ``[B, d]``.
        teacher_features: ``[B, ...]``, any of those dtypes, any number of features. It gets a gradient where it requires
            one, which takes the time of the angles once more.
        distance_weight, angle_weight: not negative; a term of weight 0 is not computed (RKD-A, RKD-D).
        return_terms: also return ``{"distance_loss": ..., "angle_loss": ...}``, the unweighted terms, detached, for logging
            (0 where not computed).

    Returns:
        float32 (float64 where either side is), scalar. NaN, with gradients of NaN, where a feature is not finite, or two
        points are 1e154 apart or more: squares of such distances are beyond float64.

    Raises:
        TypeError, ValueError: features that are no float tensors, have fewer than two dimensions or none of size above 0;
            batches that differ; weights that are negative or not finite.
    """
    loss, terms = _ops.relation(student_features, teacher_features, distance_weight, angle_weight)
    return (loss, {"distance_loss": terms[0], "angle_loss": terms[1]}) if return_terms else loss
