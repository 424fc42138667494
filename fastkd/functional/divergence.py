"""Divergences of raw logits. Conventions: :mod:`fastkd.functional`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Union, overload

from torch import Tensor

from fastkd._checks import check_choice, check_row_reduction, check_share, check_tensor, is_zero
from fastkd.ops import divergence as _ops
from fastkd.ops import divergence_shard as _divergence_shard  # noqa: F401  registers its operator

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Reduction = Literal["none", "sum", "batchmean", "mean"]
RowReduction = Literal["none", "sum", "batchmean"]
Direction = Literal["forward", "reverse"]
Group = Union["ProcessGroup", "DeviceMesh"]
DIRECTIONS = ("forward", "reverse")


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
    group: Group | None = None,
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
        group: the ranks that hold the other classes of the same rows, where the vocabulary is sharded: see
            :mod:`fastkd.functional`. A process group, or a mesh of one dimension.

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
        group=group,
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
    group: Group | None = None,
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
        group=group,
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
    group: Group | None = None,
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
        group=group,
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
    reduction: RowReduction = ...,
    ignore_index: int = ...,
    weight: Tensor | None = ...,
    dim: int = ...,
    group: Group | None = ...,
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
    reduction: RowReduction = ...,
    ignore_index: int = ...,
    weight: Tensor | None = ...,
    dim: int = ...,
    group: Group | None = ...,
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
    reduction: RowReduction = "batchmean",
    ignore_index: int = -100,
    weight: Tensor | None = None,
    dim: int = -1,
    group: Group | None = None,
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
        group=group,
    )
    return (loss, {"cross_entropy": terms[0], "kl_div": terms[1]}) if return_terms else loss
