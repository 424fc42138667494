"""Options from a file: TOML or YAML, with the names of the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from fastkd.cli._errors import UsageError


def expand(arguments: list[str]) -> list[str]:
    """``command --config FILE ...`` -> ``command <options of the file> ...``: what is said later, on the command line, counts.

    A file holds ``name: value`` as the options are called, with ``-`` or ``_``, in sections or not: ``epochs = 30``,
    ``methods = ["hinton", "at"]``, ``flip = false``.

    Raises:
        UsageError: a file that is not there or not TOML or YAML, or names another one; an option whose value is empty.
    """
    rest: list[str] = []
    options: list[str] = []
    waiting = False
    _refuse_empty(arguments)
    for argument in arguments:
        if waiting:
            options += _options(Path(argument))
            waiting = False
        elif argument == "--config":
            waiting = True
        elif argument.startswith("--config="):
            options += _options(Path(argument.removeprefix("--config=")))
        else:
            rest.append(argument)
    if waiting:
        raise UsageError("--config needs a file, *.toml, *.yaml or *.yml")
    first = next((i for i, argument in enumerate(rest) if argument.startswith("-")), len(rest))
    _refuse_empty(options)
    return rest[:first] + options + rest[first:]


_MAY_BE_EMPTY = ("--match", "-k")


def _refuse_empty(arguments: list[str]) -> None:
    """An empty path would be the working directory; what a shell makes of a variable that is not set is no value."""
    option = ""
    for argument in arguments:
        named, equals, value = argument.partition("=")
        option = named if argument.startswith("-") else option
        if (not argument or (equals and not value and argument.startswith("--"))) and option not in _MAY_BE_EMPTY:
            raise UsageError(f"{option or 'an argument'} is empty, must have a value")


def _options(path: Path) -> list[str]:
    options: list[str] = []
    for name, value in _flat(_read(path)):
        flag = "--" + name.replace("_", "-")
        if flag in ("--config", "--help", "--h"):
            raise UsageError(f"--config {path}: unrecognized options: {name}")
        if isinstance(value, bool):
            options.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list):
            options += [flag, *map(str, value)]
        else:
            options += [flag, str(value)]
    return options


def _flat(table: dict[str, Any]) -> list[tuple[str, Any]]:
    return [
        pair
        for name, value in table.items()
        for pair in (_flat(value) if isinstance(value, dict) else [(str(name), value)])
    ]


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UsageError(f"--config {path} cannot be read: {why}") from None
    table: dict[str, Any]
    try:
        if path.suffix == ".toml":
            table = _toml(text)
        elif path.suffix in (".yaml", ".yml"):
            import yaml

            table = yaml.safe_load(text) or {}
            if not isinstance(table, dict):
                raise ValueError("it is no mapping of names to values")
        else:
            raise UsageError(f"--config is {path}, must be a name that ends in .toml, .yaml or .yml")
    except Exception as error:  # YAMLError is none of Python's own, and is not there where yaml is not
        if isinstance(error, (UsageError, ImportError)):
            raise
        raise UsageError(f"--config {path} is not {path.suffix[1:].upper()}: {' '.join(str(error).split())}") from None
    return table


def _toml(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)
