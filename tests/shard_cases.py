"""Losses over several ranks that are threads of this process: each has its part of the classes, and waits for the others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from fastkd.ops._rank_group import RankGroup
from fastkd.ops.divergence import divergence

T = TypeVar("T")
PATIENCE = 60  # seconds for another rank


def in_lockstep(ranks: int, work: Callable[[RankGroup], T]) -> list[T]:
    """``work(group)`` of each rank. One runs at a time, until it waits for what the others have."""
    turn, barrier = threading.Lock(), threading.Barrier(ranks, timeout=PATIENCE)
    told: list[Tensor] = [torch.empty(0)] * ranks
    results: list[T | BaseException] = [RuntimeError("did not run")] * ranks

    def wait() -> None:
        turn.release()
        try:
            barrier.wait()
        finally:
            turn.acquire()

    def reduce(group: RankGroup, values: Tensor, how: str) -> Tensor:
        told[group.rank] = values
        wait()
        stacked = torch.stack(told)
        result = stacked.amax(0) if how == "max" else stacked.sum(0)
        wait()
        return result

    def run(rank: int) -> None:
        with turn:
            try:
                results[rank] = work(RankGroup("lockstep", rank, ranks))
            except BaseException as error:
                results[rank] = error
                barrier.abort()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RankGroup, "reduce", reduce)
        patch.setattr(RankGroup, "of", classmethod(lambda cls, group: group))
        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    wrong = [result for result in results if isinstance(result, BaseException)]
    wrong.sort(key=lambda error: isinstance(error, threading.BrokenBarrierError))  # what broke it comes first
    if wrong:
        raise wrong[0]
    return results  # type: ignore[return-value]


def sharded(sizes: Sequence[int], loss: Callable[..., Tensor] | None = None) -> Callable[..., Tensor]:
    """The divergence over ranks with so many classes each, as a function of the logits of all.

    All have the same loss; its gradient for each rank's logits is that rank's.
    """
    of = loss or (lambda *args, **options: divergence(*args, **options)[0])

    def over_ranks(student: Tensor, teacher: Tensor, *args: object, **options: object) -> Tensor:
        parts = list(zip(student.split(list(sizes), -1), teacher.split(list(sizes), -1), strict=True))
        losses = in_lockstep(len(sizes), lambda group: of(*parts[group.rank], *args, group=group, **options))
        for other in losses[1:]:
            assert torch.equal(torch.nan_to_num(other, 7.0), torch.nan_to_num(losses[0], 7.0))
        return _OfEach.apply(*losses)  # type: ignore[no-any-return, no-untyped-call]

    return over_ranks


class _OfEach(torch.autograd.Function):
    """One of several losses that are the same, whose gradient is that of each."""

    @staticmethod
    def forward(ctx: object, *losses: Tensor) -> Tensor:
        return losses[0].clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(grad for _ in ctx.needs_input_grad)  # type: ignore[attr-defined]
