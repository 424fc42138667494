"""Options of the methods of a study, as they are typed: of all rows, or of one."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from typing import Any

from fastkd._names import unknown_name
from fastkd.methods import registry as methods

__all__ = ["check_options", "iterations_of", "options_of"]

_OPTION = re.compile(r"(?:[\w-]+\.)?\w+=\S+")


def check_options(texts: Iterable[str]) -> None:
    """Raises a ValueError that names the first that is not NAME=VALUE or ROW.NAME=VALUE."""
    for text in texts:
        if not _OPTION.fullmatch(text):
            raise ValueError(f"fastkd: method_options has {text!r}, must be NAME=VALUE or ROW.NAME=VALUE")


def options_of(texts: Iterable[str], row: str, method: str, fixed: dict[str, Any]) -> dict[str, Any]:
    """The options of a row: what the texts say of all rows, of those that its method has, then of this one, then what it is.

    Raises:
        ValueError: an option of this row that its method does not have.
    """
    found: dict[str, Any] = {}
    known = set(methods.find(method).options())
    for text in sorted(texts, key=lambda text: "." in text.partition("=")[0]):
        place, _, value = text.partition("=")
        whose, dot, name = place.rpartition(".")
        if dot and whose == row and name not in known:
            raise unknown_name(f"{row}'s option", name, known)
        if name in known and whose in ("", row):
            found[name] = _value(value)
    return {**found, **fixed}


def iterations_of(method: str, options: dict[str, Any], updates: int) -> int:
    """So many iterations that the student makes these updates, where the method has ``student_steps``; else as many."""
    known = methods.find(method).options()
    if "student_steps" not in known:
        return updates
    steps: int = options.get("student_steps", known["student_steps"].default)
    return max(1, round(updates / steps))


def _value(text: str) -> Any:
    """A number, True or False, or the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
