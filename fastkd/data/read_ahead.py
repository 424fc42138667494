"""Work that is done while what came before it is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["on_host", "read_ahead"]

Item = TypeVar("Item")
Made = TypeVar("Made")


def read_ahead(work: Callable[[Item], Made], items: Iterable[Item], ahead: int) -> Generator[Made, None, None]:
    """``work(item)`` of each item, in order; by a thread, ``ahead`` items further than what was handed out, if that is not 0.

    Items are taken in the thread of who asks, so that they may be drawn from what is not to be shared. An error of the work
    is raised where its result is asked for. The thread ends with the iteration, also with one that is left early.
    """
    if ahead == 0:
        yield from map(work, items)
        return
    pending: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(1, "fastkd-read-ahead") as thread:
        try:
            for item in items:
                pending.append(thread.submit(work, item))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def on_host(numbers: Tensor) -> Callable[[], Tensor]:
    """What gives these numbers on the CPU: on a GPU the copy begins now, and whoever asks for it waits for it alone."""
    if numbers.device.type != "cuda":
        return numbers.cpu
    host = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(numbers.device))

    def wait() -> Tensor:
        copied.synchronize()
        return host

    return wait
