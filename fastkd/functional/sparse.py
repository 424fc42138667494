"""Divergences of raw student logits from a sparse teacher. Conventions: :mod:`fastkd.functional`.

The teacher is k classes of each row and the logarithms of their probabilities at temperature T, as a cache of logits on disk or
a server gives them: ``log_probs, indices = torch.log_softmax(teacher_logits / T, -1).topk(k)``. What becomes of all the other
classes, the tail, is ``tail``:

- ``"bucket"``: they are one outcome more, on both sides. The divergence is over these k + 1 outcomes: never negative, 0 where
  both sides agree on them, no more than that of the full distributions, and equal to it at k = K. The teacher's part is
  ``1 - sum p``, in float64; give it as ``teacher_tail_log_prob`` where it is known, as what is left of rounded
  probabilities is worth no more than their rounding (float32: 1e-7, bfloat16: 1e-2).
- ``"renormalize"``: both sides are softmaxes over the k classes alone. The student learns nothing of the others.
- ``"drop"``: the sum runs over the k classes, of probabilities of all. Most trainers have this one; it may be negative, its
  minimum over the student is not at the teacher, and it is what :func:`sample_teacher` is for.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from fastkd._checks import check_choice, check_row_reduction, check_share, check_size, check_tensor, is_zero
from fastkd._seeding import check_generator, draw_seed
from fastkd.functional.divergence import DIRECTIONS, Direction, Reduction, RowReduction
from fastkd.ops import sparse as _ops

Tail = Literal["bucket", "renormalize", "drop"]


def sample_teacher(
    teacher_logits: Tensor,
    k: int,
    temperature: float = 1.0,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """An unbiased sparse teacher: ``k`` draws from ``softmax(teacher_logits / T)`` of each row, as counts.

    Random sparse targets of "Sparse Logit Sampling" (arXiv:2503.16870): the probabilities of the k largest classes teach the
    student to overrate them, whatever is done with the tail; counts of draws do not, as their mean is the teacher. They are for
    ``tail="drop"``, whose gradient is then ``T (q - count / k)``, with that of the full divergence as its mean.

    Draws are with replacement; repeated ones are merged. They depend on the seed, the row's number and the logits alone: not on
    threads or device.

    Args:
        teacher_logits: ``[..., K]``, a float dtype; of probabilities take the logarithm. No gradient goes there.
        k: draws of each row, >= 1; may be more than K.
        temperature: T > 0, a number.
        generator: of the device of the logits, for the seed; the default one of the device if None.

    Returns:
        indices: int64 ``[..., k]``, different classes in increasing order, then zeros.
        log_probs: float32 ``[..., k]``, log(count / k), then -inf, which is padding to the losses.

    Raises:
        TypeError, ValueError, RuntimeError: logits that are no floats or have no classes, k < 1, T <= 0, a generator of another
        device; a row that holds NaN, +inf or nothing but -inf: on a GPU its log_probs are NaN.
    """
    check_tensor("teacher_logits", teacher_logits)
    k = check_size("k", k, 1)
    check_generator(generator)
    limits = torch.iinfo(torch.int64)
    seed = draw_seed(limits.min, limits.max, teacher_logits.device, generator)
    return _ops.sample_teacher(teacher_logits, seed, k, temperature)


def sparse_kl_div(
    student_logits: Tensor,
    teacher_indices: Tensor,
    teacher_log_probs: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    direction: Direction = "forward",
    tail: Tail = "bucket",
    reduction: Reduction = "batchmean",
    target: Tensor | None = None,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    teacher_tail_log_prob: Tensor | None = None,
) -> Tensor:
    """``T^2 KL(p || q)`` (forward) or ``T^2 KL(q || p)`` (reverse) where the teacher is known at k classes of each row.

    The student's logits are read once, and nothing of their size is made but their gradient.

    Args:
        student_logits: ``[..., K]``, float32, float64, bfloat16 or float16. They alone get a gradient.
        teacher_indices: ``[..., k]``, int64 or int32: classes, all different within a row; 1 <= k <= K.
        teacher_log_probs: ``[..., k]``, a float dtype: log softmax(teacher_logits / T) of those classes. An entry of -inf is
            padding, for rows with fewer classes: its index is not looked at.
        temperature: T > 0, a number or a tensor that broadcasts to ``[...]``; the one of ``teacher_log_probs``.
        tail: ``bucket``, ``renormalize`` or ``drop``: see :mod:`fastkd.functional.sparse`.
        teacher_tail_log_prob: ``[...]``, a float dtype: log of the probability that the teacher has for all other classes
            together, where it is known; for ``bucket``.
        direction, reduction, target, ignore_index, weight: as in :func:`fastkd.functional.kl_div`.

    Returns:
        float32 (float64 for float64 logits), scalar or ``[...]``. A row of padding alone has a loss of 0.

    Raises:
        TypeError, ValueError, RuntimeError: shapes that do not fit, other dtypes, T <= 0, classes out of range or twice in a
        row, log-probabilities that are NaN, above 0, or of a row that add up to more than 1 (1e-3 above is taken for
        rounding, and what rounds to 16 bits may be as far off as that makes it). On a GPU numbers in tensors are not looked at
        before the launch: there such a row's loss and gradient are NaN.
    """
    check_choice("direction", direction, DIRECTIONS)
    return _ops.sparse_divergence(
        student_logits,
        teacher_indices,
        teacher_log_probs,
        target,
        kind=direction,
        tail=tail,
        temperature=temperature,
        weight=weight,
        teacher_tail_log_prob=teacher_tail_log_prob,
        ignore_index=ignore_index,
        reduction=reduction,
    )[0]


def sparse_js_div(
    student_logits: Tensor,
    teacher_indices: Tensor,
    teacher_log_probs: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    beta: float = 0.5,
    tail: Tail = "bucket",
    reduction: Reduction = "batchmean",
    target: Tensor | None = None,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    teacher_tail_log_prob: Tensor | None = None,
) -> Tensor:
    """Generalised Jensen-Shannon divergence of a sparse teacher; beta as in :func:`fastkd.functional.js_div`.

    Unlike reverse KL it is finite where the teacher gives the tail nothing. Other arguments as in :func:`sparse_kl_div`.
    """
    beta = check_share("beta", beta)
    return _ops.sparse_divergence(
        student_logits,
        teacher_indices,
        teacher_log_probs,
        target,
        kind="jensen_shannon",
        tail=tail,
        temperature=temperature,
        beta=beta,
        weight=weight,
        teacher_tail_log_prob=teacher_tail_log_prob,
        ignore_index=ignore_index,
        reduction=reduction,
    )[0]


@overload
def sparse_kd_loss(
    student_logits: Tensor,
    teacher_indices: Tensor,
    teacher_log_probs: Tensor,
    target: Tensor,
    temperature: float | Tensor = ...,
    alpha: float = ...,
    *,
    direction: Direction = ...,
    tail: Tail = ...,
    reduction: RowReduction = ...,
    ignore_index: int = ...,
    weight: Tensor | None = ...,
    teacher_tail_log_prob: Tensor | None = ...,
    return_terms: Literal[False] = ...,
) -> Tensor: ...


@overload
def sparse_kd_loss(
    student_logits: Tensor,
    teacher_indices: Tensor,
    teacher_log_probs: Tensor,
    target: Tensor,
    temperature: float | Tensor = ...,
    alpha: float = ...,
    *,
    direction: Direction = ...,
    tail: Tail = ...,
    reduction: RowReduction = ...,
    ignore_index: int = ...,
    weight: Tensor | None = ...,
    teacher_tail_log_prob: Tensor | None = ...,
    return_terms: Literal[True],
) -> tuple[Tensor, dict[str, Tensor]]: ...


def sparse_kd_loss(
    student_logits: Tensor,
    teacher_indices: Tensor,
    teacher_log_probs: Tensor,
    target: Tensor,
    temperature: float | Tensor = 1.0,
    alpha: float = 0.9,
    *,
    direction: Direction = "forward",
    tail: Tail = "bucket",
    reduction: RowReduction = "batchmean",
    ignore_index: int = -100,
    weight: Tensor | None = None,
    teacher_tail_log_prob: Tensor | None = None,
    return_terms: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """``(1 - alpha) CE(student, target) + alpha T^2 KL`` from a sparse teacher, in one pass over the logits.

    Args:
        target: int64 ``[...]``, classes; rows whose target is ``ignore_index`` are left out of both terms.
        alpha: weight of the distillation term, in [0, 1]. At 0 neither temperature nor what the teacher's tensors hold is
            looked at.
        reduction: ``batchmean`` = sum / valid rows for both terms; ``sum``; ``none`` -> ``[...]``.
        return_terms: also return ``{"cross_entropy": ..., "kl_div": ...}``, as :func:`fastkd.functional.kd_loss` does.
        Other arguments as in :func:`sparse_kl_div`.
    """
    check_tensor("target", target)
    check_choice("direction", direction, DIRECTIONS)
    alpha = check_share("alpha", alpha)
    check_row_reduction(reduction)
    if is_zero(alpha):
        temperature = 1.0  # of a term that is not there
    loss, terms = _ops.sparse_divergence(
        student_logits,
        teacher_indices,
        teacher_log_probs,
        target,
        kind=direction,
        tail=tail,
        temperature=temperature,
        weight=weight,
        teacher_tail_log_prob=teacher_tail_log_prob,
        kd_scale=alpha,
        task_scale=1.0 - alpha,
        ignore_index=ignore_index,
        reduction=reduction,
    )
    return (loss, {"cross_entropy": terms[0], "kl_div": terms[1]}) if return_terms else loss
