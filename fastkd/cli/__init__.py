"""The commands of ``fastkd``: one file, one dataclass each, whose fields are its options."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr

import tyro
from rich.console import Console

from fastkd._library import build_info
from fastkd.cli._config import expand
from fastkd.cli._errors import UsageError
from fastkd.cli.bench import Bench
from fastkd.cli.demo import Demo
from fastkd.cli.distill import Distill
from fastkd.cli.info import Info
from fastkd.cli.study import Study, Zoo

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
        with _one_line():
            command = _parse(name, arguments)
        return command(Console()) or 0
    except UsageError as error:
        print(f"fastkd {name}: {error}", file=sys.stderr)
        return 2


def _parse(name: str, arguments: list[str]) -> Callable[[Console], int | None]:
    """The command, with its options."""
    command: Callable[[Console], int | None]
    if name == "study":
        studies: dict[str, Callable[..., Zoo]] = {"zoo": Zoo}
        command = tyro.extras.subcommand_cli_from_dict(
            studies, prog="fastkd study", args=arguments[1:] or ["--help"], config=FLAT
        )
    else:
        command = tyro.cli(
            Demo | Distill | Study | Bench | Info,
            prog="fastkd",
            description=DESCRIPTION,
            args=arguments or ["--help"],
            config=FLAT,
        )
    return command


@contextmanager
def _one_line() -> Iterator[None]:
    """tyro answers a value that fastkd refuses with a box that names its own internals: what fastkd said is enough."""
    said = io.StringIO()
    said.isatty = sys.stderr.isatty  # type: ignore[method-assign]  # colours, where there would be some
    try:
        with redirect_stderr(said):
            yield
    except SystemExit:
        text = re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", said.getvalue())
        refused = re.search(r"Error parsing .*?: fastkd: (.*?) For full helptext", " ".join(text.split()))
        if refused:
            raise UsageError(refused[1]) from None
        raise
    finally:
        sys.stderr.write("" if sys.exc_info()[0] is UsageError else said.getvalue())
