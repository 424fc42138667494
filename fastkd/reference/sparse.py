"""Plain-torch divergences from a sparse teacher, differentiable any number of times. Slow and memory-hungry; right."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fastkd.reference.divergence import _product


def _log_sum(log_values: Tensor) -> Tensor:
    """logsumexp over the last dimension; -inf where all are, without a gradient of nan."""
    none = (log_values == -torch.inf).all(-1)
    return torch.where(none, -torch.inf, torch.where(none[..., None], 0.0, log_values).logsumexp(-1))


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, -inf from 0 on."""
    below = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = below > -0.6931471805599453
    value = torch.where(near, (-torch.expm1(below)).log(), torch.log1p(-below.exp()))
    return torch.where(x < 0, value, -torch.inf)


def entries_mask(indices: Tensor, log_probs: Tensor, classes: int) -> Tensor:
    """``[..., classes]``, which classes have an entry."""
    given = log_probs > -torch.inf
    index = torch.where(given, indices, 0).long()
    return (
        torch.zeros(*index.shape[:-1], classes, dtype=torch.int64, device=index.device).scatter_add(
            -1, index, given.long()
        )
        > 0
    )


def outcomes(
    student_logits: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    tail: str,
    temperature: float | Tensor,
    tail_log_prob: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """log p and log q of what the divergence is over: the entries, then the bucket."""
    t = temperature[..., None] if isinstance(temperature, Tensor) and temperature.dim() > 0 else temperature
    given = log_probs > -torch.inf
    log_p = torch.where(given, log_probs, -torch.inf).to(student_logits.dtype)
    index = torch.where(given, indices, 0).long()
    every = F.log_softmax(student_logits / t, -1)
    log_q = torch.where(given, every.gather(-1, index), -torch.inf)
    if tail == "drop":
        return log_p, log_q
    if tail == "renormalize":
        return log_p - _log_sum(log_p)[..., None], log_q - _log_sum(log_q)[..., None]
    mask = entries_mask(indices, log_probs, student_logits.shape[-1])
    log_q_tail = _log_sum(torch.where(mask, -torch.inf, every))
    total = _log_sum(log_p)
    log_p_tail = _log1mexp(total) if tail_log_prob is None else tail_log_prob.to(log_p.dtype)
    log_p_tail = torch.where(mask.all(-1), -torch.inf, log_p_tail)
    log_p = torch.cat([log_p, log_p_tail[..., None]], -1)
    return log_p - _log_sum(log_p)[..., None], torch.cat([log_q, log_q_tail[..., None]], -1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _product(log_p.exp(), log_p - log_q).sum(-1)


def sparse_rows(
    student_logits: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    *,
    kind: str = "forward",
    tail: str = "bucket",
    temperature: float | Tensor = 1.0,
    beta: float = 0.5,
    teacher_tail_log_prob: Tensor | None = None,
) -> Tensor:
    """``T^2 D`` of each row: ``[..., K] -> [...]``, as :func:`fastkd.ops.sparse.sparse_divergence` has it."""
    log_p, log_q = outcomes(student_logits, indices, log_probs, tail, temperature, teacher_tail_log_prob)
    if kind == "jensen_shannon" and beta in (0, 1):
        kind = "forward" if beta == 0 else "reverse"
    if kind == "forward":
        value = _kl(log_p, log_q)
    elif kind == "reverse":
        value = _kl(log_q, log_p)
    else:
        m = beta * log_p.exp() + (1 - beta) * log_q.exp()
        log_m = torch.where(m > 0, m, 1.0).log()
        value = beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
    return value * temperature**2


def sample_teacher(
    teacher_logits: Tensor, draws: int, temperature: float = 1.0, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """As :func:`fastkd.ops.sparse.sample_teacher`, by torch's own draws: the same distribution, other numbers."""
    drawn = torch.multinomial(
        torch.softmax(teacher_logits.double() / temperature, -1), draws, True, generator=generator
    )
    drawn = drawn.sort(-1).values
    counts = (drawn[:, :, None] == drawn[:, None, :]).sum(-1)
    first = torch.ones_like(drawn, dtype=torch.bool)
    first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    order = (~first).to(torch.int64).argsort(dim=-1, stable=True)
    kept = first.gather(-1, order)
    log_probs = torch.where(kept, (counts.gather(-1, order) / draws).log(), -torch.inf)
    return torch.where(kept, drawn.gather(-1, order), 0), log_probs.float()


def sparse_divergence(
    student_logits: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    target: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    kd_scale: float = 1.0,
    task_scale: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "batchmean",
    **options: object,
) -> Tensor:
    """The whole of :func:`fastkd.ops.sparse.sparse_divergence`, formula by formula."""
    rows = kd_scale * sparse_rows(student_logits, indices, log_probs, **options)  # type: ignore[arg-type]
    classes = student_logits.shape[-1]
    valid = torch.ones_like(rows, dtype=torch.bool)
    if target is not None:
        valid = target != ignore_index
        if task_scale != 0:
            flat = student_logits.reshape(-1, classes), target.reshape(-1)
            task = F.cross_entropy(*flat, ignore_index=ignore_index, reduction="none")
            rows = rows + task_scale * task.reshape(rows.shape)
    if weight is not None:
        rows = torch.where(weight == 0, 0.0, rows * weight)
    rows = torch.where(valid, rows, 0.0)
    if reduction == "none":
        return rows
    count = {"sum": torch.ones(()), "batchmean": valid.sum().clamp(min=1), "mean": valid.sum().clamp(min=1) * classes}
    return rows.sum() / count[reduction]
