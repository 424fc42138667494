"""Losses against torch eager and torch.compile: raw logits in, loss and student gradient out."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import fastkd
from benchmarks.harness import Case

TEMPERATURE = 4.0


def eager_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Forward KL as most distillation loops write it."""
    log_q = F.log_softmax(student_logits / TEMPERATURE, -1)
    p = F.softmax(teacher_logits / TEMPERATURE, -1)
    return F.kl_div(log_q, p, reduction="batchmean") * TEMPERATURE**2


def eager_js(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Jensen-Shannon from log-probabilities (TRL's formula at beta = 0.5)."""
    log_q, log_p = F.log_softmax(student_logits / TEMPERATURE, -1), F.log_softmax(teacher_logits / TEMPERATURE, -1)
    log_m = torch.logsumexp(torch.stack([log_q, log_p]), 0) - torch.tensor(2.0).log()
    kl_q = F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)
    kl_p = F.kl_div(log_m, log_p, reduction="batchmean", log_target=True)
    return (kl_q + kl_p) / 2 * TEMPERATURE**2


def cases() -> Iterator[Case]:
    """Shapes of the design's targets."""
    kl, js = fastkd.KLDivLoss(TEMPERATURE), fastkd.JSDivLoss(TEMPERATURE)
    compiled = torch.compile(eager_kl)
    shapes = (
        (512, 32000, {"torch eager": 15.0, "torch.compile": 4.0}, 9),
        (1024, 1000, {"torch eager": 8.0, "torch.compile": 4.0}, 41),
        (128, 10, {"torch eager": 1.3}, 401),
    )
    for rows, classes, targets, rounds in shapes:
        student, teacher = torch.randn(rows, classes, requires_grad=True), torch.randn(rows, classes)

        def step(loss, student=student, teacher=teacher):
            loss(student, teacher).backward()
            gradient, student.grad = student.grad, None  # freed by the harness, outside the clock
            return gradient

        torch.testing.assert_close(step(kl), step(eager_kl), rtol=1e-3, atol=1e-7)
        yield Case(
            f"KL {rows}x{classes}",
            lambda step=step: step(kl),
            {"torch eager": lambda step=step: step(eager_kl), "torch.compile": lambda step=step: step(compiled)},
            targets,
            rounds,
        )
        if classes == 32000:
            torch.testing.assert_close(step(js), step(eager_js), rtol=1e-2, atol=1e-7)
            peers = {"torch eager": lambda step=step: step(eager_js)}
            yield Case(f"JSD {rows}x{classes}", lambda step=step: step(js), peers, {"torch eager": 15.0}, 7)
