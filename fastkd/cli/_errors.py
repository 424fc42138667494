"""Errors that a command answers with one line."""

from __future__ import annotations


class UsageError(Exception):
    """Something that the user can put right; its message is one line, shown instead of a traceback."""
