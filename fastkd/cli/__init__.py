"""The commands of ``fastkd``: one file, one dataclass each, whose fields are its options."""

from __future__ import annotations

import sys

import tyro
from rich.console import Console

from fastkd._library import build_info
from fastkd.cli._errors import UsageError
from fastkd.cli.bench import Bench
from fastkd.cli.demo import Demo
from fastkd.cli.info import Info

DESCRIPTION = (
    "Knowledge distillation, fast. `fastkd COMMAND --help` tells more of each command, `fastkd --version` the version."
)


def run(arguments: list[str]) -> int:
    """Parses the arguments, runs the command, returns its exit status; ends the process on help and unknown options."""
    if arguments == ["--version"]:
        print(f"fastkd {build_info()['version']}")
        return 0
    command = tyro.cli(
        Demo | Bench | Info,
        prog="fastkd",
        description=DESCRIPTION,
        args=arguments or ["--help"],
    )
    try:
        return command(Console()) or 0
    except UsageError as error:
        print(f"fastkd {type(command).__name__.lower()}: {error}", file=sys.stderr)
        return 2
