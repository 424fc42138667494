"""A run of the suite from Python: pytest with a progress bar in the place of its own screen, then a table and figures."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from benchmarks import figures
from benchmarks.machine import machine
from benchmarks.results_file import RESULTS, path_of
from benchmarks.table import markdown, table

HERE = Path(__file__).parent
PIPE_WIDTH = 120  # columns where the output goes to a file


def primitives() -> list[str]:
    """Names of the bench files."""
    return sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def output_for(device: str, *, full: bool, complete: bool) -> Path:
    """The results file of this machine; that of a selection must not take the place of a complete one."""
    folder = RESULTS if complete else HERE.parent / "build" / "bench"
    return path_of(machine(torch.device(device)), folder, full=full)


def read(path: Path) -> dict[str, Any]:
    """A results file of this suite.

    Raises:
        OSError: it cannot be read. ValueError: it is something else.
    """
    try:
        document: dict[str, Any] = json.loads(path.read_text())
        known = all("contender" in row and "case" in row for row in document["rows"])
        known = known and "cpu" in document["machine"] and document["ceiling_gb_per_s"] >= 0
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise ValueError("it is not a results file of this suite")
    return document


def check_match(expression: str) -> None:
    """Raises a ValueError for what pytest's -k cannot read: pytest itself would say so in lines of its own."""
    from _pytest.mark.expression import Expression

    try:
        Expression.compile(expression)
    except Exception as error:  # SyntaxError, or ParseError of older ones
        raise ValueError(str(error)) from None


def run(arguments: list[str], output: Path, console: Console) -> tuple[Path, bool]:
    """Measures; the results file, and whether every case could be measured. ``arguments`` of pytest.

    Raises:
        ValueError: no case was chosen.
    """
    screen = _Screen(console)
    # without pytest's own screen, and so without options of pyproject.toml that are about it
    quiet = ["-p", "no:terminal", "-o", "addopts=", "-p", "no:cacheprovider", "--rootdir", str(HERE.parent)]
    with TemporaryDirectory() as storage:  # pytest-benchmark makes .benchmarks/ whether or not it is to store anything
        quiet += ["--benchmark-storage", f"file://{storage}"]
        status = pytest.main([*arguments, *quiet, "--output", str(output)], plugins=[screen])
    if screen.finished == 0:
        raise ValueError(f"nothing was measured: {pytest.ExitCode(status).name.lower().replace('_', ' ')}")
    return output, status == pytest.ExitCode.OK


def show(document: dict[str, Any], path: Path, console: Console, *, as_markdown: bool = False) -> None:
    """The table on the console, the figures beside the file; or the table as markdown alone."""
    if as_markdown:
        console.out(markdown(document), highlight=False)
        return
    wide = console if console.is_terminal else Console(width=PIPE_WIDTH)
    wide.print(table(document))
    console.print(f"\nnumbers  {path}", highlight=False, soft_wrap=True)
    for figure in figures.save(document, path.with_suffix("")):
        console.print(f"figure   {figure}", highlight=False, soft_wrap=True)


class _Screen:
    """A plugin of pytest: a bar with the case that is being measured; failures as they come."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description:<44}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._bar = Progress(*columns, console=console)
        self._task = TaskID(0)
        self.finished = 0

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._task = self._bar.add_task("copy bandwidth", total=len(session.items))
        self._bar.start()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._bar.update(self._task, description=nodeid.partition("[")[2].rstrip("]"))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._bar.console.print(report.longreprtext, style="red", highlight=False, markup=False)

    def pytest_runtest_logfinish(self) -> None:
        self._bar.advance(self._task)
        self.finished += 1

    def pytest_sessionfinish(self) -> None:
        self._bar.stop()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._bar.console.print(str(report.longrepr), style="red", highlight=False, markup=False)
