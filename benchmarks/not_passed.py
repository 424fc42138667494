"""A plugin of pytest, ``-p benchmarks.not_passed``: its cache has, at any time, the tests that have not passed yet.

pytest itself writes what has failed when it ends. One that is killed, or hangs, leaves with this what ``--last-failed`` needs:
what failed, what was being run, what was not begun. Under xdist a test whose worker crashed counts as failed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.pytest_cache import LAST_FAILED, RUNNING, write

EVERY = 0.5  # seconds


def pytest_configure(config: pytest.Config) -> None:
    """Of the process that sees all tests; workers of xdist see some."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(NotPassed(config))


class NotPassed:
    """Follows one run."""

    def __init__(self, config: pytest.Config) -> None:
        cache: Any = config.cache
        self._cache: Path = cache.mkdir("fastkd").parents[1]
        self._again = bool(config.getoption("lf"))
        self._left: dict[str, bool] = {}
        self._over: set[str] = set()
        self._running: dict[str, bool] = {}
        self._written = 0.0

    def _expect(self, names: Iterable[str]) -> None:
        self._left |= {name: True for name in names if name not in self._over}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Without xdist."""
        self._expect(item.nodeid for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: Sequence[str]) -> None:
        """With it: what a worker has collected, which all of them do."""
        self._expect(ids)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported."""
        if report.failed:
            self._left[report.nodeid] = True

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A test begins."""
        self._running[nodeid] = True
        write(self._cache, RUNNING, self._running)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A part of a test is over; the failure of a crash is all that is heard of it."""
        name = report.nodeid
        if report.failed:
            self._left[name] = True
        elif report.skipped or report.when == "call":
            self._left.pop(name, None)
            self._over.add(name)
        if report.failed or report.when == "teardown":
            self._running.pop(name, None)
            write(self._cache, RUNNING, self._running)
        # workers that start while only the last failures are run read the list: it must stay what it was
        if not self._again and time.monotonic() > self._written + EVERY:
            write(self._cache, LAST_FAILED, self._left)
            self._written = time.monotonic()

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        """After pytest's own plugin, which leaves out what was not run."""
        write(self._cache, LAST_FAILED, self._left)
