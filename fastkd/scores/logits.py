"""Scores of images by the teacher's logits. Higher = more alike the teacher's own task."""

from __future__ import annotations

from torch import Tensor

from fastkd._checks import check_dtype
from fastkd.functional import logit_stats

__all__ = ["max_softmax", "negative_energy", "negative_entropy", "t1000"]


def t1000(logits: Tensor) -> Tensor:
    """The largest softmax probability at temperature 1000, to first order: ``(1 + (max z - mean z) / 1000) / K``.

    The whole signal sits in the fourth digit, where a float32 softmax at that temperature rounds most of it away; the
    linear form keeps it, and its order of two rows is that of ``max z - mean z``. The error is of second order, below
    ``((max z - min z) / 1000)^2 / K`` while logits stay within a few hundred of each other.

    Args:
        logits: the teacher's, ``[..., K]``, float32, float64, bfloat16 or float16.

    Returns:
        float64 ``[...]``.

    Raises:
        TypeError, ValueError: another dtype, no tensor, or no classes.

    Source: Liang et al., "Enhancing the reliability of out-of-distribution image detection in neural networks" (ICLR
    2018), without their input perturbation, as Begon & Geurts use it in "Distillation from heterogeneous unlabeled
    collections", section 2.1.
    """
    stats = logit_stats(check_dtype("logits", logits))
    return (1.0 + (stats.max.double() - stats.mean.double()) / 1000.0) / logits.shape[-1]


def max_softmax(logits: Tensor) -> Tensor:
    """The largest softmax probability. Arguments, result and errors as of :func:`t1000`.

    Source: Hendrycks & Gimpel, "A baseline for detecting misclassified and out-of-distribution examples in neural networks"
    (ICLR 2017).
    """
    stats = logit_stats(check_dtype("logits", logits))
    return (stats.max.double() - stats.logsumexp.double()).exp()


def negative_entropy(logits: Tensor) -> Tensor:
    """The entropy of the softmax in nats, negated. Arguments, result and errors as of :func:`t1000`."""
    return -logit_stats(check_dtype("logits", logits)).entropy.double()


def negative_energy(logits: Tensor) -> Tensor:
    """``logsumexp z``, the negative of the energy. Arguments, result and errors as of :func:`t1000`.

    Source: Liu et al., "Energy-based out-of-distribution detection" (NeurIPS 2020), at temperature 1.
    """
    return logit_stats(check_dtype("logits", logits)).logsumexp.double()
