"""The suite on pytest: ``pytest benchmarks`` measures every case of every ``bench_*.py``; ``fastkd bench`` does the same
with a table and figures. ``--benchmark-disable`` only checks that all contenders do the work and do it right.

Options of pytest and pytest-benchmark work: ``-k``, ``--benchmark-json``, ``--benchmark-autosave``, ``--benchmark-compare``.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.case import Case, Settings
from benchmarks.machine import COPIED, copy_ceiling, free_memory, machine
from benchmarks.measure import OURS, Budget, Statistics, check, failure, measure
from benchmarks.results_file import ResultsFile, path_of
from benchmarks.table import row_lines

ROOT = Path(__file__).parents[1]
SESSION = pytest.StashKey["Session"]()
SPARE = 0.7  # of the free memory may be taken
RESERVE = 20.0  # seconds before --seconds are over, or a tenth of them, in which no case begins: it could not end


def pytest_addoption(parser: pytest.Parser) -> None:
    """The suite's own options."""
    group = parser.getgroup("fastkd")
    group.addoption("--device", default="cpu", help="cpu, cuda or cuda:<n>; default: %(default)s")
    group.addoption("--sizes", choices=("quick", "full", "gpu"), help="default: quick on a CPU, gpu on a GPU")
    group.addoption("--output", type=Path, help="results file; default: benchmarks/results/<machine>.json")
    group.addoption("--keep-rows", action="store_true", help="of the results file, but for the cases that are measured")
    group.addoption("--seconds", type=float, default=float("inf"), help="for everything; later cases are only named")
    group.addoption("--case-seconds", type=float, help="for the rounds of one contender; default: 1, on a GPU 0.2")
    group.addoption("--least-rounds", type=int, default=5, help="of each contender, however slow; default: %(default)s")
    group.addoption("--memory", type=float, help="gigabytes that a case may take; default: 70 %% of what is free")
    group.addoption("--large", type=int, default=Settings.nbytes, help="bytes on each side of the large cases of gpu")
    group.addoption("--no-compile", action="store_true", help="leave out the peers that torch.compile makes")


class Session:
    """One run of the suite: its settings, its rows so far, its file."""

    def __init__(self, config: pytest.Config) -> None:
        option = config.getoption
        device = torch.device(option("device"))
        if device.type == "cuda" and not torch.cuda.is_available():
            raise pytest.UsageError(f"--device is {device}, but torch finds no GPU here")
        on_gpu = device.type == "cuda"
        memory = option("memory")
        self.settings = Settings(
            device,
            option("sizes") or ("gpu" if on_gpu else "quick"),
            option("large"),
            not option("no_compile"),
            SPARE * free_memory(device) if memory is None else memory * 1e9,
        )
        self.budget = Budget(option("case_seconds") or (0.2 if on_gpu else 1.0), option("least_rounds"))
        self.deadline = time.monotonic() + max(option("seconds") - RESERVE, 0.9 * option("seconds"))
        self.config = config
        self.keep = bool(option("keep_rows"))
        self.rows: list[dict[str, Any]] = []
        self._results: ResultsFile | None = None
        self._ceiling = 0.0

    def ceiling(self) -> float:
        """Copy bandwidth of this run, measured before the first case; the results file begins with it."""
        if self._results is None:
            found = machine(self.settings.device)
            usual = path_of(found, full=self.settings.sizes == "full")
            results = ResultsFile(self.config.getoption("output") or usual)
            self.rows = results.read().get("rows", []) if self.keep else []
            self._ceiling = copy_ceiling(self.settings.device, min(self.settings.nbytes, COPIED))
            results.update(
                machine=found,
                command=_without_folders(self.config.invocation_params.args),
                sizes=self.settings.sizes,
                ceiling_gb_per_s=round(self._ceiling / 1e9, 2),
                rows=self.rows,
            )
            self._results = results
        return self._ceiling

    def add(self, primitive: str, rows: list[dict[str, Any]]) -> None:
        """Keeps and writes the rows of a case, and prints them where pytest has a screen."""
        rows = [{"primitive": primitive, **row} for row in rows]
        if self.keep:
            measured = {row["case"] for row in rows}
            self.rows = [row for row in self.rows if row["primitive"] != primitive or row["case"] not in measured]
        self.rows += rows
        assert self._results is not None
        self._results.update(rows=self.rows)
        screen = self.config.pluginmanager.get_plugin("terminalreporter")
        if screen is not None:
            with self.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
                screen.ensure_newline()
                for line in row_lines(rows):
                    screen.write_line(line)


def _without_folders(arguments: Iterable[object]) -> str:
    """The command that ran, wherever the source tree is."""
    return " ".join(["pytest", *(str(a).replace(f"{ROOT}/", "").replace(str(ROOT), ".") for a in arguments)])


def pytest_configure(config: pytest.Config) -> None:
    """Settings, before the cases are made of them."""
    config.stash[SESSION] = Session(config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each case of the module's ``cases(settings)``."""
    if "case" in metafunc.fixturenames:
        cases = list(metafunc.module.cases(metafunc.config.stash[SESSION].settings))
        metafunc.parametrize("case", cases, ids=[case.name for case in cases])


@pytest.fixture
def contest(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[Case], None]:
    """Measures a case: all its contenders in turns, their times in pytest-benchmark's records, the rows in our file."""
    session = request.config.stash[SESSION]
    primitive = request.module.__name__.rpartition("bench_")[2]

    def statistics_of(case: Case, contender: str) -> Statistics:
        # A fixture has one contender, whose rounds follow each other. Ours take turns: a copy of the fixture for each, and
        # its times recorded the way `pedantic` does.
        own = copy.copy(benchmark)
        own.name, own.fullname, own.group = (
            f"{case.name}: {contender}",
            f"{primitive}::{case.name}::{contender}",
            case.name,
        )
        own.extra_info = {"contender": contender, "primitive": primitive}
        statistics: Statistics = own._make_stats(iterations=1).stats
        return statistics

    def run(case: Case) -> None:
        benchmark._mode = "contest"  # used, though not called
        refusal = _refusal(case, session)
        if benchmark.disabled:
            if refusal is not None:
                pytest.skip(refusal)
            check(case.build())
            return
        ceiling = session.ceiling()
        try:
            if refusal is None:
                statistics = partial(statistics_of, case)
                rows = measure(case, session.settings, ceiling, session.budget, statistics)
            else:
                rows = [{"case": case.name, "contender": OURS, "not_measured": refusal}]
        except Exception as problem:
            session.add(primitive, [failure(case, problem)])
            raise
        session.add(primitive, rows)
        if refusal is not None:
            pytest.skip(refusal)
        if session.settings.device.type == "cuda":
            torch.cuda.empty_cache()

    return run


def _refusal(case: Case, session: Session) -> str | None:
    if time.monotonic() > session.deadline:
        return "out of time"
    if case.nbytes > session.settings.memory:
        return f"needs {case.nbytes / 1e9:.2g} GB, {session.settings.memory / 1e9:.2g} GB may be taken"
    return None
