"""Relational distillation: ``torch.ops.fastkd.relation`` and its backward.

The forward pass leaves the gradient of the loss with respect to the squared distances of all pairs, ``[B, B]`` in float64;
the backward pass turns it into that of the features, scaled by the incoming gradient before it is rounded, so that a loss
scale (GradScaler) finds what float16 alone would have lost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd import _library as _library  # registers the operators
from fastkd._checks import check_dtype, check_not_negative
from fastkd.ops._autograd import call_in_backward, register_autograd, save_tensors, transforms_active
from fastkd.ops._fake import register_fake
from fastkd.ops._numbers import call_by_name

_relation = torch.ops.fastkd.relation.default
_relation_backward = torch.ops.fastkd.relation_backward.default

_ONCE = (
    "fastkd: the gradient of relation_loss cannot be differentiated again (create_graph=True); "
    "use the plain-torch form in fastkd.reference.relation for second derivatives"
)


def relation(
    student_features: Tensor, teacher_features: Tensor, distance_weight: float, angle_weight: float
) -> tuple[Tensor, Tensor]:
    """``distance_weight * distance + angle_weight * angle``; the core of :func:`fastkd.functional.relation_loss`.

    Args:
        student_features: ``[B, ...]``, float32, float64, bfloat16 or float16; B > 0.
        teacher_features: ``[B, ...]``, any of those dtypes, any number of features.
        distance_weight, angle_weight: finite, not negative; a term of weight 0 is not computed.

    Returns:
        loss: float32 (float64 where either side is); terms: ``[2]``, distance and angle term, unweighted, detached.
    """
    check_features("student_features", student_features)
    check_features("teacher_features", teacher_features)
    if student_features.shape[0] != teacher_features.shape[0]:
        raise ValueError(
            f"fastkd: teacher_features has shape {tuple(teacher_features.shape)}, must hold as many points as "
            f"student_features, which has {tuple(student_features.shape)}"
        )
    if student_features.device != teacher_features.device:
        raise ValueError(
            f"fastkd: teacher_features is on {teacher_features.device}, must be where student_features is, "
            f"on {student_features.device}"
        )
    distance_weight = check_not_negative("distance_weight", distance_weight)
    angle_weight = check_not_negative("angle_weight", angle_weight)
    gradients = torch.is_grad_enabled()
    loss, terms, _, _ = call_by_name(
        "relation",
        student_features if student_features.dim() == 2 else student_features.flatten(1),
        teacher_features if teacher_features.dim() == 2 else teacher_features.flatten(1),
        distance_weight,
        angle_weight,
        gradients and student_features.requires_grad,
        gradients and teacher_features.requires_grad,
    )
    return loss, terms


def check_features(name: str, value: Tensor) -> None:
    check_dtype(name, value)
    if value.dim() < 2 or value.numel() == 0:
        raise ValueError(f"fastkd: {name} has shape {tuple(value.shape)}, must be [batch, features...], none of them 0")


@register_fake("relation")
def _relation_fake(
    student_features: Tensor,
    teacher_features: Tensor,
    distance_weight: float,
    angle_weight: float,
    student_gradient: bool,
    teacher_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    points = student_features.shape[0]
    wide = torch.float64 in (student_features.dtype, teacher_features.dtype)
    dtype = torch.float64 if wide else torch.float32
    return (
        student_features.new_empty([], dtype=dtype),
        student_features.new_empty([2], dtype=dtype),
        student_features.new_empty([points, points] if student_gradient else [0], dtype=torch.float64),
        student_features.new_empty([points, points] if teacher_gradient else [0], dtype=torch.float64),
    )


@register_fake("relation_backward")
def _relation_backward_fake(features: Tensor, pairs: Tensor, grad_loss: Tensor) -> Tensor:
    return features.new_empty(list(features.shape))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, terms, *pairs = output
    student_features, teacher_features, *ctx.weights, student_gradient, teacher_gradient, numbers = inputs
    features, made = (student_features, teacher_features), (student_gradient, teacher_gradient)
    ctx.set_materialize_grads(False)
    if transforms_active():  # an outer level must not take the pairs for constants
        ctx.mark_non_differentiable(terms)
        ctx.ahead = False
    else:
        ctx.mark_non_differentiable(terms, *pairs)
        ctx.ahead = all(made[i] or not features[i].requires_grad for i in (0, 1))
    if ctx.ahead:
        save_tensors(ctx, (*(features[i] if made[i] else None for i in (0, 1)), None, *pairs))
    else:
        save_tensors(ctx, (*features, numbers))


def _backward(ctx: Any, grad_loss: Tensor | None, _terms: None, *second: Tensor | None) -> tuple[Tensor | None, ...]:
    if any(g is not None for g in second):
        raise RuntimeError(_ONCE)
    needed = ctx.needs_input_grad[:2]
    if grad_loss is None or not any(needed):
        return (None,) * 7
    student_features, teacher_features, numbers, *pairs = ctx.saved_tensors
    features = student_features, teacher_features
    if not ctx.ahead:
        pairs = _relation(*features, *ctx.weights, *needed, numbers)[2:]
    gradients = (
        call_in_backward(_relation_backward, x, p, grad_loss) if n else None
        for x, p, n in zip(features, pairs, needed, strict=True)
    )
    return (*gradients, *(None,) * 5)


register_autograd("relation", _backward, setup_context=_setup_context)


def _no_second_derivative(*_: Any) -> None:
    raise RuntimeError(_ONCE)


register_autograd("relation_backward", _no_second_derivative, setup_context=lambda *_: None)
