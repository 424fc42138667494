"""Functional forms of the losses: of logits, and of embeddings (:func:`relation_loss`).

Logits go in raw: no softmax before the call.

Conventions, the same everywhere: ``p = softmax(teacher_logits / T)``, ``q = softmax(student_logits / T)``; every
divergence is multiplied by ``T^2`` (Hinton et al., 2015), so that gradients keep their size as T grows; sums run in
float32 or better, and losses of bfloat16 and float16 logits come back in float32. The teacher gets a gradient where
its logits require one; wrap the teacher in ``torch.no_grad()`` where they should not.

Masked classes may be ``-inf`` on either side or both (0 log 0 = 0). Where the divergence itself is infinite (the "to"
side gives a class probability 0 that the "from" side does not), the loss of that row is ``inf``; the gradient of the
"to" side (the student's, in forward KL) is still ``T (q - p)``, finite and pointing back to a finite loss, while the
"from" side has no derivative there and gets ``nan`` or ``inf`` in that row. Mask such classes on both sides.
Probabilities below the smallest normal number of the arithmetic (2^-126; float64: 2^-1022) count as 0.

Maps: with ``dim=1``, logits ``[B, K, H, W]`` have a row a pixel, and so on for any number of dimensions. What is ``[...]``
below (target, weight, temperature, losses without a reduction) is then ``[B, H, W]``, and "batchmean" is the mean over the
valid pixels, not their sum over the number of images. Channels-last logits are taken as they lie, and so are their
gradients. Of logits in NCHW order each side is copied, once, to have the classes of a pixel side by side, and its gradient
is copied back. Each gradient has the memory format of its logits; student and teacher may have different ones.

A row that holds ``nan``, ``+inf``, or ``-inf`` only has a loss and gradients of ``nan``; rows that are ignored or have
weight 0 are not looked at. First derivatives only, in reverse mode (``backward``, ``torch.func.grad``).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

from torch import Tensor

from fastkd._checks import check_choice, check_row_reduction, check_share, check_tensor, is_zero
from fastkd.ops import divergence as _ops
from fastkd.ops import moments as _moments_ops
from fastkd.ops import relation as _relation_ops

Reduction = Literal["none", "sum", "batchmean", "mean"]
Direction = Literal["forward", "reverse"]
DIRECTIONS = ("forward", "reverse")

__all__ = [
    "ChannelMoments",
    "LogitStats",
    "channel_moments",
    "js_div",
    "kd_loss",
    "kl_div",
    "logit_stats",
    "relation_loss",
    "soft_cross_entropy",
]


def kl_div(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    direction: Direction = "forward",
    reduction: Reduction = "batchmean",
    target: Tensor | None = None,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    dim: int = -1,
) -> Tensor:
    """``T^2 KL(p || q)`` (forward; Hinton et al., 2015) or ``T^2 KL(q || p)`` (reverse) from raw logits, in one pass.

    Args:
        student_logits: ``[..., K]``, float32, float64, bfloat16 or float16.
        teacher_logits: the same shape; of two dtypes the wider one is taken for both.
        temperature: T > 0, a number or a tensor that broadcasts to ``[...]`` (one for each row).
        direction: ``forward`` = KL(teacher || student), ``reverse`` = KL(student || teacher).
        reduction: ``none`` -> ``[...]``; ``sum``; ``batchmean`` = sum / valid rows (the mathematical KL);
            ``mean`` = sum / (valid rows * K), as ``torch.nn.functional.kl_div`` has it.
        target: int64 ``[...]``; rows whose target is ``ignore_index`` are left out of loss, gradient and count.
        weight: broadcasts to ``[...]``, a float dtype, factor of each row; does not change the count.
        dim: dimension of the classes, if not the last: 1 for maps ``[B, K, H, W]``, whose rows ``[B, H, W]`` are pixels.

    Returns:
        float32 (float64 for float64 logits), scalar or ``[...]``.

    Raises:
        TypeError, ValueError, RuntimeError: shapes that differ, logits that are not floats, T <= 0, a target or a dim out of
        range.
        Rows that are left out, by ignore_index or weight 0, may hold anything, in temperature and target too.
        On a GPU, numbers in tensors are not looked at before the launch, as that would wait for the device: a target or a
        temperature of a row that is out of range makes the loss and the gradients of that row NaN there.
    """
    check_choice("direction", direction, DIRECTIONS)
    return _ops.divergence(
        student_logits,
        teacher_logits,
        target,
        kind=direction,
        temperature=temperature,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        dim=dim,
    )[0]


def js_div(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    beta: float = 0.5,
    reduction: Reduction = "batchmean",
    target: Tensor | None = None,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    dim: int = -1,
) -> Tensor:
    """Generalised Jensen-Shannon divergence, ``T^2 [beta KL(p || m) + (1 - beta) KL(q || m)]``, in nats.

    ``m = beta p + (1 - beta) q``. ``beta = 0.5`` is the classic one: symmetric, at most ln 2 before T^2, and its square
    root is a metric.

    At the ends ``beta = 0`` is forward KL and ``beta = 1`` reverse KL, by the convention of GKD (Agarwal et al., 2023,
    arXiv:2306.13649). These are not its limits: the divergence tends to 0 at both ends, and it is ``js_div / beta``
    (at 1: ``js_div / (1 - beta)``) that tends to the KL. Other arguments as in :func:`kl_div`.
    """
    beta = check_share("beta", beta)
    return _ops.divergence(
        student_logits,
        teacher_logits,
        target,
        kind="jensen_shannon",
        temperature=temperature,
        beta=beta,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        dim=dim,
    )[0]


def soft_cross_entropy(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    reduction: Reduction = "batchmean",
    target: Tensor | None = None,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    dim: int = -1,
) -> Tensor:
    """``-T^2 sum_k p_k log q_k``: forward KL plus the teacher's entropy; the student's gradient is that of forward KL.

    Arguments as in :func:`kl_div`.
    """
    return _ops.divergence(
        student_logits,
        teacher_logits,
        target,
        kind="soft_cross_entropy",
        temperature=temperature,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        dim=dim,
    )[0]


@overload
def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    temperature: float | Tensor = ...,
    alpha: float = ...,
    *,
    direction: Direction = ...,
    reduction: Literal["none", "sum", "batchmean"] = ...,
    ignore_index: int = ...,
    weight: Tensor | None = ...,
    dim: int = ...,
    return_terms: Literal[False] = ...,
) -> Tensor: ...


@overload
def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    temperature: float | Tensor = ...,
    alpha: float = ...,
    *,
    direction: Direction = ...,
    reduction: Literal["none", "sum", "batchmean"] = ...,
    ignore_index: int = ...,
    weight: Tensor | None = ...,
    dim: int = ...,
    return_terms: Literal[True],
) -> tuple[Tensor, dict[str, Tensor]]: ...


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    temperature: float | Tensor = 4.0,
    alpha: float = 0.9,
    *,
    direction: Direction = "forward",
    reduction: Literal["none", "sum", "batchmean"] = "batchmean",
    ignore_index: int = -100,
    weight: Tensor | None = None,
    dim: int = -1,
    return_terms: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """``(1 - alpha) CE(student, target) + alpha T^2 KL`` in one pass over the logits (Hinton et al., 2015).

    Args:
        target: int64 ``[...]``, classes; rows whose target is ``ignore_index`` are left out of both terms.
        alpha: weight of the distillation term, in [0, 1]. At 0 neither temperature nor what the teacher's logits hold is looked
            at. At 1 the target still says which rows count, and must be classes or ``ignore_index``, as in :func:`kl_div`.
        reduction: ``batchmean`` = sum / valid rows for both terms; ``sum``; ``none`` -> ``[...]``.
        return_terms: also return ``{"cross_entropy": ..., "kl_div": ...}``, the unweighted terms, detached, for logging
            (where ``alpha`` is 1 the task loss is not computed, and 0; so is the distillation loss where it is 0).
        Other arguments as in :func:`kl_div`.
    """
    check_tensor("target", target)
    check_choice("direction", direction, DIRECTIONS)
    alpha = check_share("alpha", alpha)
    check_row_reduction(reduction)
    if is_zero(alpha):
        temperature = 1.0  # of a term that is not there
    loss, terms = _ops.divergence(
        student_logits,
        teacher_logits,
        target,
        kind=direction,
        temperature=temperature,
        weight=weight,
        kd_scale=alpha,
        task_scale=1.0 - alpha,
        ignore_index=ignore_index,
        reduction=reduction,
        dim=dim,
    )
    return (loss, {"cross_entropy": terms[0], "kl_div": terms[1]}) if return_terms else loss


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
    loss, terms = _relation_ops.relation(student_features, teacher_features, distance_weight, angle_weight)
    return (loss, {"distance_loss": terms[0], "angle_loss": terms[1]}) if return_terms else loss


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
    return LogitStats(*_ops.logit_stats(logits, temperature, dim))


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
