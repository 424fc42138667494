"""A lock that survives forks."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

__all__ = ["Lock"]


_RLock: Any = type(threading.RLock())


class Lock(_RLock):  # type: ignore[misc]
    """A re-entrant lock, threading.RLock, whose steps are C: an object around one would double what it costs.

    A fork waits until no other thread holds one, so that a child never meets a lock that nobody will release, or what it
    guards in the middle of a change. Whoever holds one must not wait for another.
    """

    def __init__(self) -> None:
        super().__init__()
        with _guard:
            _all.add(self)


_guard = threading.Lock()  # of the set
_all: weakref.WeakSet[Lock] = weakref.WeakSet()
_forking = threading.local()  # what the thread that forks holds


def _before_fork() -> None:
    with _guard:
        _forking.held = sorted(_all, key=id)  # one order, so that two threads can fork at once
    for lock in _forking.held:
        lock.acquire()


def _after_fork() -> None:
    for lock in _forking.held:
        lock.release()
    _forking.held = []


def _after_fork_in_child() -> None:
    global _guard
    _guard = threading.Lock()  # another thread may have held it
    _after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
