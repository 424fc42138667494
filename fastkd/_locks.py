"""A lock that survives forks."""

from __future__ import annotations

import os
import threading
import weakref

__all__ = ["Lock"]


class Lock:
    """A re-entrant lock.

    A fork waits until no other thread holds one, so that a child never meets a lock that nobody will release, or what it
    guards in the middle of a change. Whoever holds one must not wait for another.
    """

    __slots__ = ("__weakref__", "_lock")

    def __init__(self) -> None:
        self._lock = threading.RLock()
        with _guard:
            _all.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()


_guard = threading.Lock()  # of the set
_all: weakref.WeakSet[Lock] = weakref.WeakSet()
_forking = threading.local()  # what the thread that forks holds


def _before_fork() -> None:
    with _guard:
        _forking.held = sorted(_all, key=id)  # one order, so that two threads can fork at once
    for lock in _forking.held:
        lock.__enter__()


def _after_fork() -> None:
    for lock in _forking.held:
        lock.__exit__()
    _forking.held = []


def _after_fork_in_child() -> None:
    global _guard
    _guard = threading.Lock()  # another thread may have held it
    _after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
