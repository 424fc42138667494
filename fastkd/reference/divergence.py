"""Plain-torch divergences, differentiable any number of times. Slow and memory-hungry; right."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def _product(probability: Tensor, factor: Tensor) -> Tensor:
    """``probability * factor`` with 0 * inf = 0, in value and gradient."""
    positive = probability > 0
    return torch.where(positive, probability, 0.0) * torch.where(positive, factor, 0.0)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last dimension."""
    return _product(log_p.exp(), log_p - log_q).sum(-1)


def divergence_rows(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    kind: str = "forward",
    temperature: float | Tensor = 1.0,
    beta: float = 0.5,
) -> Tensor:
    """``T^2 D`` of each row: ``[..., K] -> [...]``. Kinds as in :func:`fastkd.ops.divergence.divergence`."""
    t = temperature[..., None] if isinstance(temperature, Tensor) and temperature.dim() > 0 else temperature
    log_q = F.log_softmax(student_logits / t, -1)
    log_p = F.log_softmax(teacher_logits / t, -1)
    if kind == "forward":
        value = _kl(log_p, log_q)
    elif kind == "reverse":
        value = _kl(log_q, log_p)
    elif kind == "soft_cross_entropy":
        value = _product(log_p.exp(), -log_q).sum(-1)
    elif kind == "jensen_shannon":
        m = beta * log_p.exp() + (1 - beta) * log_q.exp()
        log_m = torch.where(m > 0, m, 1.0).log()
        value = beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
    else:
        raise ValueError(f"kind is {kind!r}")
    return value * temperature**2


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    kind: str = "forward",
    temperature: float | Tensor = 1.0,
    beta: float = 0.5,
    weight: Tensor | None = None,
    kd_scale: float = 1.0,
    task_scale: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "batchmean",
) -> Tensor:
    """The whole of :func:`fastkd.ops.divergence.divergence`, formula by formula."""
    rows = kd_scale * divergence_rows(student_logits, teacher_logits, kind=kind, temperature=temperature, beta=beta)
    valid = torch.ones_like(rows, dtype=torch.bool)
    if target is not None:
        valid = target != ignore_index
        if task_scale != 0:
            classes = student_logits.shape[-1]
            task = F.cross_entropy(
                student_logits.reshape(-1, classes), target.reshape(-1), ignore_index=ignore_index, reduction="none"
            )
            rows = rows + task_scale * task.reshape(rows.shape)
    if weight is not None:
        rows = rows * weight
        rows = torch.where(weight == 0, 0.0, rows)
    rows = torch.where(valid, rows, 0.0)
    count = valid.sum().clamp(min=1)
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    if reduction == "batchmean":
        return rows.sum() / count
    return rows.sum() / (count * student_logits.shape[-1])


def logit_stats(logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """max, argmax, mean, logsumexp, entropy of ``z = logits / temperature`` over the last dimension."""
    z = logits / temperature
    maximum, argmax = z.max(-1)
    log_p = F.log_softmax(z, -1)
    entropy = -_product(log_p.exp(), log_p).sum(-1)
    return maximum, argmax, z.mean(-1), z.logsumexp(-1), entropy
