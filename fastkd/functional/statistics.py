"""What one read of logits or of maps tells, differentiable."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastkd.ops import divergence as _divergence_ops
from fastkd.ops import moments as _moments_ops


class LogitStats(NamedTuple):
    """Per-row statistics of ``z = logits / temperature``; each ``[...]``, float32 (float64 for float64 logits)."""

    max: Tensor
    argmax: Tensor
    mean: Tensor
    logsumexp: Tensor
    entropy: Tensor


def logit_stats(logits: Tensor, temperature: float = 1.0, *, dim: int = -1) -> LogitStats:
    """Maximum, argmax (int64), mean, logsumexp and softmax entropy (nats) of each row of ``z = logits / temperature``.

    One pass, differentiable in all but argmax. ``logsumexp - max`` is the cross-entropy with the predicted class,
    ``exp(max - logsumexp)`` the top probability.

    Args:
        logits: ``[..., K]``, float32, float64, bfloat16 or float16.
        temperature: T > 0.
        dim: dimension of the classes, if not the last: 1 for maps ``[B, K, H, W]``, of which each statistic is ``[B, H, W]``.

    Returns:
        :class:`LogitStats` of tensors ``[...]``.
    """
    return LogitStats(*_divergence_ops.logit_stats(logits, temperature, dim))


class ChannelMoments(NamedTuple):
    """Mean and biased variance of each channel; ``[C]`` or ``[N, C]``, float32 (float64 for float64 maps)."""

    mean: Tensor
    var: Tensor


def channel_moments(x: Tensor, *, per_sample: bool = False) -> ChannelMoments:
    """Mean and variance of each channel of maps, in one read: what batch normalisation measures in training.

    With the running statistics of a teacher's batch normalisations they make the loss of data-free distillation
    (DeepInversion; Yin et al., CVPR 2020, arXiv:1912.08795, eq. 4), and, ``per_sample``, the score by which 1C-Sum tells a
    teacher's own data from others (Begon & Geurts, 2021). Differentiable; the gradient is one read and one write.

    No digit of the variance is lost to a mean that is far from 0, or to an outlier: sums are of differences, in float64 (on a
    GPU of a few numbers in float32, merged in float64). The bits do not depend on the number of threads. A channel (with
    ``per_sample``, of a sample) that holds NaN or an infinity has moments and gradients that are not finite; others do not
    notice.

    Args:
        x: ``[N, C, ...]`` of 2 to 5 dimensions, none of them 0; float32, float64, bfloat16 or float16. Contiguous and
            channels-last maps are taken as they lie, and so are their gradients; others are copied.
        per_sample: over the pixels of each sample, ``[N, C]``; else over samples and pixels, ``[C]``.

    Returns:
        :class:`ChannelMoments`. The variance is divided by the count, as ``torch.var(correction=0)``.

    Raises:
        TypeError, ValueError: x that is no tensor of floats, or of another shape.
    """
    return ChannelMoments(*_moments_ops.channel_moments(x, per_sample))
