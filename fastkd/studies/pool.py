"""Work side by side in processes that end with this one."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from itertools import islice
from multiprocessing import active_children, get_context, parent_process
from typing import TypeVar

import torch

__all__ = ["Pool"]

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


class Pool:
    """Processes for work on items, or this process where one is enough.

    The standard library's executor, with what long work wants and it lacks: no more is handed out than can run, so that an
    end loses little; Ctrl-C ends all processes at once; and they end where this one is killed.

    Args:
        jobs: processes side by side. On a CPU the threads are shared out among them: small networks gain more by two
            processes than by two threads.
    """

    def __init__(self, jobs: int, device: torch.device) -> None:
        self._jobs, self._device = jobs, device
        self._executor: ProcessPoolExecutor | None = None

    @contextmanager
    def open(self) -> Iterator[Pool]:
        """With processes inside of the block. Left by an exception, they end at once."""
        if self._jobs <= 1:
            yield self
            return
        threads = torch.get_num_threads()
        if self._device.type == "cpu":
            threads = max(1, threads // self._jobs)
        others = set(active_children())
        self._executor = ProcessPoolExecutor(self._jobs, get_context("spawn"), _begin, (threads,))
        try:
            yield self
        except BaseException:
            for process in set(active_children()) - others:
                process.terminate()
            raise
        finally:
            self._executor.shutdown(cancel_futures=True)
            self._executor = None

    def outcomes(
        self, work: Callable[[Item], Outcome], items: Sequence[Item]
    ) -> Iterator[tuple[Item, Outcome | Exception]]:
        """Each item and what ``work`` made of it, as they come; or why it failed, which keeps no other from running.

        ``work`` goes to the processes: a function of a module, or functools.partial of one.
        """
        if self._executor is None:
            for item in items:
                try:
                    yield item, work(item)
                except Exception as error:
                    yield item, error
            return
        waiting = iter(items)
        pending: dict[Future[Outcome], Item] = {}
        while True:
            # no more than can run: an executor cannot take back what it has handed out
            for item in islice(waiting, self._jobs - len(pending)):
                pending[self._executor.submit(work, item)] = item
            if not pending:
                return
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                why = future.exception()
                if isinstance(why, BrokenExecutor):  # a process was killed: there is nobody left to go on
                    raise why
                yield pending.pop(future), why if isinstance(why, Exception) else future.result()


def _begin(threads: int) -> None:
    """In a new process of the pool."""
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all of them; the first process ends the others
    parent = parent_process()
    assert parent is not None

    def end_with_parent() -> None:  # which may be killed: nobody would take the result, or tell it to end
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
