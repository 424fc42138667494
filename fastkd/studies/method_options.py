"""Options of the methods of a study, as they are typed: of all rows, or of one."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from fastkd._names import unknown_name
from fastkd.methods import registry as methods

__all__ = ["check_known", "check_options", "iterations_of", "options_of"]

_OPTION = re.compile(r"(?:[\w+-]+\.)?\w+=\S+")  # of elr+, too


def check_options(texts: Iterable[str]) -> None:
    """Raises a ValueError that names the first that is not NAME=VALUE or ROW.NAME=VALUE."""
    for text in texts:
        if not _OPTION.fullmatch(text):
            raise ValueError(f"fastkd: method_options has {text!r}, must be NAME=VALUE or ROW.NAME=VALUE")


def check_known(texts: Iterable[str], rows: Mapping[str, tuple[str, Collection[str]]]) -> None:
    """Whether what the texts say is of a row that there is, and of an option that its method has, or for all rows one of any.

    Args:
        rows: by name, the method, and options that the row itself sets.

    Raises:
        ValueError: an unknown name, answered with the nearest; an option that a row sets itself.
    """
    options = {row: set(methods.find(method).options()) for row, (method, _) in rows.items()}
    for text in texts:
        row, dot, name = text.partition("=")[0].rpartition(".")
        if dot and row not in rows:
            raise unknown_name("row", row, rows)
        of = options[row] if dot else set().union(*options.values())
        if name not in of:
            raise unknown_name(f"{row}'s option" if dot else "option of the methods", name, of)
        if dot and name in rows[row][1]:
            raise ValueError(f"fastkd: method_options has {text!r}, must not have {name}, by which {row} is what it is")


def options_of(texts: Iterable[str], row: str, method: str, fixed: dict[str, Any]) -> dict[str, Any]:
    """The options of a row: what the texts say of all rows, of those that its method has, then of this one, then what it is."""
    found: dict[str, Any] = {}
    known = set(methods.find(method).options())
    for text in sorted(texts, key=lambda text: "." in text.partition("=")[0]):
        place, _, value = text.partition("=")
        whose, _, name = place.rpartition(".")
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
