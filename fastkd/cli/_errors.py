"""Errors that a command answers with one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UsageError(Exception):
    """Something that the user can put right; its message is one line, shown instead of a traceback."""


@contextmanager
def usage_errors() -> Iterator[None]:
    """What fastkd itself refuses inside the ``with`` block is the user's to put right; other errors keep their traceback."""
    try:
        yield
    except (TypeError, ValueError, OSError, ImportError, FloatingPointError, RuntimeError) as error:
        message = str(error)
        if not message.startswith("fastkd: "):
            raise
        raise UsageError(" ".join(message.removeprefix("fastkd: ").split())) from None
