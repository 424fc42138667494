"""The commands of ``fastkd``: one file, one dataclass each, whose fields are its options."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr

import tyro
from rich.console import Console

from fastkd._build_info import build_info
from fastkd.cli._config import expand
from fastkd.cli._errors import UsageError
from fastkd.cli.bench import Bench
from fastkd.cli.cache_teacher import CacheTeacher
from fastkd.cli.demo import Demo
from fastkd.cli.detect_noise import DetectNoise
from fastkd.cli.distill import command_for, load_plugin_of
from fastkd.cli.info import Info
from fastkd.cli.methods import Methods
from fastkd.cli.score import Score
from fastkd.cli.study import Studies, commands

FLAT = (tyro.conf.OmitArgPrefixes,)  # --epochs, not --training.epochs
DESCRIPTION = (
    "Knowledge distillation, fast. `fastkd COMMAND --help` tells more of each command, `fastkd --version` the version."
)


def run(arguments: list[str]) -> int:
    """Parses the arguments, runs the command, returns its exit status; ends the process on help and unknown options."""
    if arguments == ["--version"]:
        print(f"fastkd {build_info()['version']}")
        return 0
    name = "".join(arguments[:1])
    try:
        arguments = expand(arguments)
        load_plugin_of(arguments)  # which may have methods and studies, and with them options
        with _one_line(name):
            command = _parse(name, arguments)
        return command(Console()) or 0
    except UsageError as error:
        print(f"fastkd {name}: {error}", file=sys.stderr)
        return 2


def _parse(name: str, arguments: list[str]) -> Callable[[Console], int | None]:
    """The command, with its options."""
    command: Callable[[Console], int | None]
    if name == "study":
        command = tyro.extras.subcommand_cli_from_dict(
            commands(), prog="fastkd study", args=arguments[1:] or ["--help"], config=FLAT
        )
    else:
        distill = command_for(arguments)
        command = tyro.extras.subcommand_cli_from_dict(
            {
                "demo": Demo,
                "distill": distill,
                "score": Score,
                "detect-noise": DetectNoise,
                "cache-teacher": CacheTeacher,
                "methods": Methods,
                "study": Studies,
                "bench": Bench,
                "info": Info,
            },
            prog="fastkd",
            description=DESCRIPTION,
            args=arguments or ["--help"],
            config=FLAT,
        )
    return command


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """tyro answers with a box, which for a value that fastkd refuses also names its own internals: one line says it.

    Raises:
        UsageError: a value that is refused.
        SystemExit: on help, and on unknown options, after the line.
    """
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            yield
    except SystemExit as ended:
        if not ended.code or not said.getvalue():
            sys.stderr.write(said.getvalue())
            raise
        message = _message(said.getvalue())
        if not message.startswith("unrecognized options"):
            raise UsageError(message) from None
        print(f"fastkd {name}: {message}", file=sys.stderr)
        raise


def _message(box: str) -> str:
    """What tyro's box says, in one line."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()
    parts: list[list[str]] = [[]]  # between the rules across the box, as lines
    for line in lines[1 if lines[0].startswith("╭") else 2 :]:  # after the title; without UTF-8 it is no frame
        bare = line.strip("│╰╯ ")
        if bare and not bare.strip("─-"):
            parts.append([])
        elif bare:
            parts[-1].append(bare)
    first, *more = [part for part in parts if part and not part[0].startswith("For full helptext")]
    message = " ".join(first)
    if refused := re.fullmatch(r"Error parsing .*?: fastkd: (.*)", message):
        return refused[1]
    kind = re.search(
        r"Argument helptext: (--?\S+ .*?)(?: [A-Z][a-z]|$)", " ".join(line for part in more for line in part)
    )
    if wrong := re.fullmatch(r"Error parsing (.*?): (.*)", message):
        # of an option that may be left out: of each type that it is not
        why = re.sub(r"no type matching .* could be instantiated from \['(.*?)'\]\..*", r"'\1'", wrong[2])
        must = kind[1].replace("{None}|", "") if kind else ""
        return f"{wrong[1]}: {why}" + (f"; must be {must}" if must else "")
    hints = [part for part in more if part[0].startswith(("Perhaps", "Available"))]
    # of an option like it only the name and the kind of its value: the line after is its help
    hint = "; ".join(" ".join(part[:2]) for part in hints)
    return message[:1].lower() + message[1:] + (f"; {hint[:1].lower()}{hint[1:]}" if hint else "")
