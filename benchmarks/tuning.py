"""``python -m benchmarks.tuning``: each value of each launch parameter (csrc/common/tuning.h) against the usual one.

A process for each value, which FASTKD_TUNING gives it; they take turns on the benchmarks' cases that the parameter is about, so
that a drifting clock hurts all alike, and each has its results checked first. Rows go to the results file, under ``tuning``,
as soon as a parameter is done; a table at the end says what wins, and by how much. It changes nothing: a winner becomes the
usual value by an edit of tuning.h, which names the results file.
"""

from __future__ import annotations

import argparse
import importlib
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import worker
from benchmarks.case import Case, Settings, Work
from benchmarks.clock import Clock, clock_for
from benchmarks.measure import check, first_line
from benchmarks.results_file import RESULTS, ResultsFile
from benchmarks.worker import Worker, WorkerError
from fastkd import _C

ROOT = Path(__file__).parents[1]
LARGE = 1 << 28  # bytes on each side of cases where bytes count
SMALL = 1 << 12  # the same where the kernels are emulated
MEMORY = 8e9  # bytes that a case may take: several processes have theirs at once
PATIENCE = 60.0  # seconds for an answer
RUNS = 5  # of a turn, of which it gives the median
TURNS = 9  # of each value
LEAST_TURNS = 3
RESERVE = 10.0  # seconds before --seconds are over, or a third of them, in which no parameter is begun
WORTH = 0.99  # of the usual time: less is a win, where no case became slower


@dataclass(frozen=True)
class Sweep:
    """The cases that a parameter is about: of all whose name matches, the last, which is the largest."""

    cases: Sequence[str]
    nbytes: int = LARGE


SWEEPS = {
    "divergence.resident_blocks": Sweep(
        [r"KL \d+x32000 bf16", r"KL \d+x128256 bf16", r"KL \d+x32000 fp32", r"JSD \d+x32000 bf16"]
    ),
    "divergence.forward_classes": Sweep(
        [r"KL forward only \d+x32000 bf16", r"KL forward only \d+x128256 bf16", r"KL forward only \d+x32000 fp32"]
    ),
    # rows so few that blocks share them
    "divergence.streaming_cluster": Sweep([r"logit_stats \d+x32000 bf16", r"logit_stats \d+x128256 bf16"], 1 << 22),
    "divergence.streaming_blocks": Sweep([r"logit_stats \d+x32000 bf16", r"logit_stats \d+x128256 bf16"], 1 << 22),
    # so few that one launch may take them all
    "divergence.one_launch_passes": Sweep([r"KL \d+x1000 bf16", r"KL \d+x1000 fp32"], 1 << 18),
    "divergence.lane_blocks": Sweep([r"KL \d+x1000 bf16", r"KL \d+x1000 fp32"]),
    "crop.rounds": Sweep([r"crop forward \d+x3x32x32 .* fp32", r"crop forward \d+x3x224x224 .* bf16"]),
    "crop.backward_rounds": Sweep([r"crop backward \d+x3x32x32 .* fp32", r"crop backward \d+x3x224x224 .* bf16"]),
    "batch.rounds": Sweep([r"draw_batch \d+x3x32x32 .* fp32", r"draw_batch \d+x3x32x32 .* bf16"]),
    "alias.draws_per_thread": Sweep([r"alias draw .*"]),
    "alias.build_blocks": Sweep([r"alias build .*"]),
    "alias.update_blocks": Sweep([r"alias update .*"]),
    "alias.quartile_blocks": Sweep([r"alias IQPR .*"]),
    "gmm.cluster_values": Sweep([r"GMM fit 1x1024 fp32", r"GMM fit 1x50000 fp32"]),
    "gmm.largest_cluster": Sweep([r"GMM fit 1x50000 fp32"]),
    # maps of few samples: large ones have blocks for all multiprocessors
    "relation.splits": Sweep([r"RKD 64x128 fp32", r"RKD 256x256 fp32"]),
    "moments.blocks": Sweep([r"moments \d+x64x56x56 fp32", r"moments \d+x64x56x56 channels-last bf16"], 1 << 24),
}


def cases_of(knob: str, device: torch.device, most: int = LARGE) -> list[Case]:
    """Those of its sweep, with at most so many bytes on a side."""
    sweep = SWEEPS[knob]
    suite = importlib.import_module(f"benchmarks.bench_{knob.partition('.')[0]}")
    settings = Settings(device, "gpu", min(sweep.nbytes, most), compile=False, memory=MEMORY)
    every = [case for case in suite.cases(settings) if case.nbytes <= MEMORY]
    found = []
    for pattern in sweep.cases:
        matching = [case for case in every if re.fullmatch(pattern, case.name)]
        if not matching:
            raise LookupError(f"no case is named {pattern}")
        found.append(matching[-1])
    return found


# ---- the process of a value --------------------------------------------------------------------------


def serve(knob: str, device: str) -> None:
    """Says that it has imported what it needs; then prepares the cases, then times one by its name, as it is asked."""
    emulated = device == "emulated"
    where = torch.device("cpu" if emulated else device)
    ready: dict[str, tuple[Work, Clock]] = {}

    def prepare() -> dict[str, str]:
        """Names of the cases, and what is wrong with them."""
        found = {}
        for case in cases_of(knob, where, SMALL if emulated else LARGE):
            try:
                work = case.build()
                work.peers.clear()
                check(work)
                ready[case.name] = work, clock_for(where, latency=work.latency)
                found[case.name] = ""
            except Exception as problem:
                found[case.name] = first_line(problem)
        return found

    def seconds(name: str) -> float:
        work, clock = ready[name]
        times = [clock.seconds(work.ours) for _ in range(1 if emulated else RUNS)]
        return statistics.median(times) * work.scale.get("fastkd", 1.0)

    with ExitStack() as stack:
        if emulated:
            sys.path.append(str(ROOT / "tests"))
            from emulated import emulated as emulated_kernels

            stack.enter_context(emulated_kernels(0))
        worker.serve("imported", lambda name: prepare() if name is None else seconds(name))


# ---- who starts them ---------------------------------------------------------------------------------


@dataclass
class Contest:
    """Processes of one parameter: the usual value first."""

    knob: str
    workers: dict[int, Worker]


def command_of(knob: str, device: str) -> list[str]:
    """Starts a process of the parameter."""
    return [sys.executable, "-m", "benchmarks.tuning", "--device", device, "--serve", knob]


def begin(knob: str, values: Sequence[int], device: str) -> Contest:
    """Starts them; they import, and leave the device alone."""
    command = command_of(knob, device)
    return Contest(knob, {value: Worker(command, {"FASTKD_TUNING": f"{knob}={value}"}) for value in values})


def measure(contest: Contest, until: float) -> list[dict[str, Any]]:
    """Rows of a parameter: a value and a case each, or a value and why it has none."""
    usual, *_ = contest.workers
    lost: dict[int, str] = {}
    wrong: dict[int, dict[str, str]] = {}
    times: dict[str, dict[int, list[float]]] = {}

    def each(call: Callable[[int, Worker], None]) -> None:
        for value, process in contest.workers.items():
            if value not in lost:
                try:
                    call(value, process)
                except WorkerError as error:
                    lost[value] = f"it {error}"

    def note(value: int, process: Worker) -> None:
        wrong[value] = process.answer(PATIENCE)

    def turn(case: str) -> Callable[[int, Worker], None]:
        def one(value: int, process: Worker) -> None:
            if wrong[value].get(case) == "":
                times.setdefault(case, {}).setdefault(value, []).append(process.ask(case, PATIENCE))

        return one

    each(lambda _, process: process.answer(PATIENCE))
    each(lambda _, process: process.send(None))
    each(note)
    cases = list(next(iter(wrong.values()), {}))
    for number in range(TURNS):
        if number >= LEAST_TURNS and time.monotonic() > until:
            break
        for case in cases:
            each(turn(case))
    for process in contest.workers.values():
        process.stop()
    rows: list[dict[str, Any]] = []
    for value in contest.workers:
        for case in cases:
            row = {"knob": contest.knob, "value": value, "usual": usual, "case": case}
            why = lost.get(value) or wrong[value].get(case)
            base, own = times.get(case, {}).get(usual, []), times.get(case, {}).get(value, [])
            if why or not base or not own:
                rows.append({**row, "error": why or "the usual value has no time"})
                continue
            ratios = sorted(mine / its for mine, its in zip(own, base, strict=False))
            quarter = len(ratios) // 4
            rows.append(
                {
                    **row,
                    "ms": statistics.median(own) * 1e3,
                    "of_usual": statistics.median(ratios),
                    "quartiles": [ratios[quarter], ratios[-1 - quarter]],
                    "turns": len(ratios),
                }
            )
    return rows or [{"knob": contest.knob, "value": v, "usual": usual, "error": why} for v, why in lost.items()]


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """Of the rows of one parameter: which value wins, by how much; a value that is slower somewhere does not."""
    knob, usual = rows[0]["knob"], rows[0]["usual"]
    means: dict[int, float] = {}
    for value in dict.fromkeys(row["value"] for row in rows):
        own = [row for row in rows if row["value"] == value]
        if value != usual and not any("error" in row or row["quartiles"][0] > 1 for row in own):
            means[value] = math.prod(row["of_usual"] for row in own) ** (1 / len(own))
    best = min(means, key=lambda value: means[value], default=usual)
    if best == usual or means[best] > WORTH:
        return f"{knob}: {usual} stays"
    return f"{knob}: {best} wins, {100 * (1 - means[best]):.1f} % less time than {usual}"


def line(row: dict[str, Any]) -> str:
    """Of the table."""
    head = f"{row['knob']:30} {row['value']:>8} {row.get('case', ''):44}"
    if "error" in row:
        return f"{head} {row['error']}"
    low, high = row["quartiles"]
    return f"{head} {row['ms']:9.4f} ms  x {row['of_usual']:.3f} ({low:.3f} to {high:.3f}, {row['turns']} turns)"


def sweep(asked: dict[str, list[int]], device: str, seconds: float, results: ResultsFile) -> list[dict[str, Any]]:
    """All rows. The processes of a parameter import while those of the one before measure."""
    deadline = time.monotonic() + max(seconds - RESERVE, 2 * seconds / 3)
    rows: list[dict[str, Any]] = []
    results.update(tuning=rows)
    left = list(asked)
    following = begin(left[0], asked[left[0]], device)
    try:
        while left:
            contest, following = following, None
            del left[0]
            if left:
                following = begin(left[0], asked[left[0]], device)
            share = (deadline - time.monotonic()) / (len(left) + 1)
            new = measure(contest, time.monotonic() + share)
            rows += new
            results.update(tuning=rows)
            print("\n".join(map(line, new)), flush=True)
            if left and time.monotonic() > deadline:
                print(f"out of time: not measured: {', '.join(left)}", flush=True)
                break
    finally:
        for process in following.workers.values() if following is not None else ():
            process.stop()
    return rows


def chosen(names: Sequence[str] | None) -> dict[str, list[int]]:
    """Parameter: the values to compare, the usual one first. ``names``: NAME or NAME=VALUE; all of them if there are none.

    Raises:
        ValueError: there is no such parameter or value.
    """
    knobs = _C.tuning()
    every = {name: [usual, *(v for v in values if v != usual)] for name, (_, usual, values) in knobs.items()}
    result: dict[str, list[int]] = {}
    for entry in names or every:
        name, _, value = entry.partition("=")
        if name not in every or (value and value not in map(str, every[name])):
            known = ", ".join(f"{name} ({', '.join(map(str, sorted(values)))})" for name, values in every.items())
            raise ValueError(f"{entry!r} is none of {known}")
        result[name] = [every[name][0], int(value)] if value else every[name]
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every value was measured that had its turn, and gave right results."""
    parser = argparse.ArgumentParser(prog="benchmarks.tuning", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, or emulated: a test of this tool (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=120.0, help="for everything (default %(default)g)")
    parser.add_argument("--output", type=Path, help="JSON file; default benchmarks/results/tuning.json")
    parser.add_argument("--only", nargs="+", metavar="NAME[=VALUE]", help="of the parameters, as crop.rounds=2")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve(options.serve, options.device)
        return 0
    try:
        asked = chosen(options.only)
    except ValueError as error:
        parser.error(f"--only: {error}")
    results = ResultsFile(options.output or RESULTS / "tuning.json")
    rows = sweep(asked, options.device, options.seconds, results)
    verdicts = [
        verdict([row for row in rows if row["knob"] == knob]) for knob in dict.fromkeys(r["knob"] for r in rows)
    ]
    print("", *verdicts, f"written to {results.path}", sep="\n")
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
