"""How long the loss of one training step takes, fused and in plain torch, measured side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fastkd._threads import one_thread
from fastkd.functional import kl_div

__all__ = ["LossTiming", "interleaved_medians", "time_loss"]


class LossTiming(NamedTuple):
    """Medians in seconds for forward and backward of the loss on ``rows x classes`` logits."""

    rows: int
    classes: int
    fused: float
    eager: float


def interleaved_medians(contenders: list[Callable[[], None]], *, rounds: int, calls: int) -> list[float]:
    """Median seconds of one call of each contender.

    They take turns, so that a busy machine slows all of them alike. Few calls a turn are best: a turn shorter than the
    scheduler's time slice is mostly undisturbed, a longer one never is.
    """
    times: list[list[float]] = [[] for _ in contenders]
    for round_ in range(rounds + 2):  # two to warm up
        for contender, its_times in zip(contenders, times, strict=True):
            start = time.perf_counter()
            for _ in range(calls):
                contender()
            if round_ >= 2:
                its_times.append((time.perf_counter() - start) / calls)
    return [statistics.median(its_times) for its_times in times]


def time_loss(rows: int, classes: int, temperature: float, device: torch.device, *, rounds: int = 500) -> LossTiming:
    """Times ``fastkd.functional.kl_div`` against the usual lines of torch, forward and backward, on random logits.

    On one thread, as the demo trains: work this small gains nothing from more, and on a busy machine loses a lot.
    """
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(rows, classes, generator=generator).to(device) for _ in range(2))
    student.requires_grad_()

    def fused() -> Tensor:
        return kl_div(student, teacher, temperature)

    def eager() -> Tensor:
        log_q = F.log_softmax(student / temperature, -1)
        p = F.softmax(teacher / temperature, -1)
        return F.kl_div(log_q, p, reduction="batchmean") * temperature**2

    def step(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def forward_and_backward() -> None:
            student.grad = None
            loss().backward()

        def and_wait() -> None:
            forward_and_backward()
            torch.cuda.synchronize(device)

        return and_wait if device.type == "cuda" else forward_and_backward

    with one_thread():
        return LossTiming(rows, classes, *interleaved_medians([step(fused), step(eager)], rounds=rounds, calls=2))
