"""``python -m benchmarks.watchdog --worker COMMAND``: runs cases that may hang or end their process, and names those that do.

COMMAND is a program that calls :func:`serve` with its cases. One that gives no answer in time is killed, one that
dies or reports a fault (after which a CUDA context is of no use) is given up, and a fresh one goes on with the next case.
What became of a case is printed and written to the results file as soon as it is known. Standard library only.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks import worker
from benchmarks.results_file import ResultsFile
from benchmarks.worker import Worker, WorkerError

OK = "ok"
NOT_RUN = "not run"
PATIENCE = 15.0  # seconds
START = 3  # times as many for a worker to start: on a fresh machine torch comes from a cold disk
RESERVE = 2.0  # seconds before --seconds are over


def serve(cases: Mapping[str, Callable[[], None]]) -> None:
    """The worker. A case that raises an AssertionError is wrong; after any other exception the process is not to be trusted."""

    def run(name: str) -> str:
        try:
            cases[name]()
        except AssertionError as wrong:
            return f"wrong: {_line(wrong)}"
        except Exception as problem:
            return f"fault: {type(problem).__name__}: {_line(problem)}"
        return OK

    worker.serve(list(cases), run)


def _line(problem: Exception) -> str:
    return " ".join(str(problem).split())[:200]


def watch(
    command: Sequence[str],
    results: ResultsFile,
    seconds: float,
    patience: float = PATIENCE,
    *,
    only_failed: bool = False,
) -> dict[str, str]:
    """What became of each case, which the results file has under ``cases``: "ok", or what was wrong with it.

    ``only_failed``: those that are not ok by the file, or all if it has none.
    """
    deadline = time.monotonic() + max(seconds - RESERVE, 0.9 * seconds)
    known: dict[str, str] = results.read().get("cases", {}) if only_failed else {}
    process: Worker | None = None

    def started() -> tuple[Worker, list[str]]:
        fresh = Worker(command)
        return fresh, fresh.answer(_within(START * patience, deadline))

    try:
        process, names = started()
        wanted = [name for name in names if known.get(name) != OK]
        known = {name: known.get(name, NOT_RUN) for name in names} | dict.fromkeys(wanted, NOT_RUN)
        results.update(cases=known)
        for place, name in enumerate(wanted, 1):
            if time.monotonic() >= deadline:
                print(f"out of time: {len(wanted) - place + 1} cases were not run", flush=True)
                break
            if process is None:
                process, _ = started()
            begun = time.monotonic()
            try:
                known[name] = process.ask(name, _within(patience, deadline))
            except WorkerError as error:
                known[name] = str(error)
                process = None
            results.update(cases=known)
            print(f"[{place}/{len(wanted)}] {name}: {known[name]} ({time.monotonic() - begun:.2f} s)", flush=True)
            if process is not None and known[name].startswith("fault"):
                process.stop()
                process = None
    except WorkerError as error:
        print(f"the worker could not be started: it {error}", flush=True)
    finally:
        if process is not None:
            process.stop()
    return known


def _within(patience: float, deadline: float) -> float:
    return min(patience, max(deadline - time.monotonic(), 0.1))


def summary(cases: Mapping[str, str]) -> str:
    """One line."""
    failed = [f"{name}: {status}" for name, status in cases.items() if status != OK]
    return "; ".join([f"{len(cases) - len(failed)} of {len(cases)} cases ok", *failed])


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if all cases are ok, now or before."""
    parser = argparse.ArgumentParser(prog="benchmarks.watchdog", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="for everything (default %(default)g)")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds for an answer (default %(default)g)")
    parser.add_argument("--output", type=Path, required=True, help="JSON file, whose other keys are kept")
    parser.add_argument("--only-failed", action="store_true", help="the cases that are not ok by that file")
    parser.add_argument("--worker", required=True, metavar="COMMAND", help="the program with the cases, as for a shell")
    options = parser.parse_args(arguments)
    results, command = ResultsFile(options.output), shlex.split(options.worker)
    cases = watch(command, results, options.seconds, options.patience, only_failed=options.only_failed)
    print(summary(cases))
    return int(not cases or any(status != OK for status in cases.values()))


if __name__ == "__main__":
    sys.exit(main())
