"""Contenders of a case: checked, then timed in turns, then their memory; and the rows that say so."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from benchmarks.case import BEST_PEER, Case, Run, Settings, Work
from benchmarks.clock import Clock, clock_for
from benchmarks.machine import pages_kept, peak_memory

OURS = "fastkd"


class Statistics(Protocol):
    """What pytest-benchmark makes of the times of a contender."""

    median: float
    q1: float
    q3: float
    rounds: int

    def update(self, duration: float) -> None:
        """One more time, in seconds."""
        ...


@dataclass(frozen=True)
class Budget:
    """How long the rounds of one contender may take, and how many there are at least and at most.

    Work that takes longer than that by itself has ``least_slow`` rounds.
    """

    seconds: float = 1.0
    least: int = 5
    least_slow: int = 3
    most: int = 501

    def rounds(self, seconds_each: float) -> int:
        """For work that takes so long."""
        if seconds_each > self.seconds:
            return min(self.least_slow, self.least)
        return max(self.least, min(self.most, int(self.seconds / max(seconds_each, 1e-9))))


def check(work: Work) -> dict[str, float | None]:
    """The relative error of each contender that did the work; a peer that did not becomes missing, with the reason.
    None where a result cannot be compared.

    Raises:
        ArithmeticError: fastkd's own result is wrong.
    """
    error = work.error(work.ours())
    if not error <= work.tolerance:
        raise ArithmeticError(f"fastkd is wrong: relative error {error:.2g}, allowed {work.tolerance:g}")
    errors: dict[str, float | None] = {OURS: error}
    for peer, run in list(work.peers.items()):
        try:
            result = run()
            error = float("nan") if peer in work.incomparable else work.error(result)
        except Exception as problem:
            work.leave_out(peer, first_line(problem))
            continue
        if peer in work.incomparable:
            errors[peer] = None
        elif error <= work.peer_tolerance:
            errors[peer] = error
        else:
            work.leave_out(peer, f"its result differs: relative error {error:.2g}")
    return errors


def first_line(problem: Exception) -> str:
    """What went wrong, for a cell of the table."""
    if isinstance(problem, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return "out of memory"
    if isinstance(problem, ModuleNotFoundError):
        return f"{problem.name} is not installed"
    return f"{type(problem).__name__}: {problem}".splitlines()[0][:160]


def take_turns(contenders: dict[str, Run], clock: Clock, budget: Budget, update: Callable[[str, float], None]) -> None:
    """Times all contenders in turns, so that a noisy machine hurts all alike; a slow one has fewer turns, spread evenly."""
    rounds = {}
    for name, run in contenders.items():
        begun = time.perf_counter()
        clock.seconds(run)
        rounds[name] = budget.rounds(time.perf_counter() - begun)  # of a turn, which is more than one run
    most = max(rounds.values())
    gc.collect()
    for turn in range(most):
        for name, run in contenders.items():
            if (turn + 1) * rounds[name] // most > turn * rounds[name] // most:
                update(name, clock.seconds(run))


def measure(
    case: Case, settings: Settings, ceiling: float, budget: Budget, statistics_of: Callable[[str], Statistics]
) -> list[dict[str, Any]]:
    """Rows of a case: fastkd, its peers, and the peers that are missing. ``statistics_of`` names a contender's statistics.

    Raises:
        Exception: the work cannot be made, or fastkd cannot do it, or does it wrong.
    """
    with _threads(case.threads), ExitStack() as stack:
        work = case.build()
        if work.pages_kept and settings.device.type == "cpu":
            stack.enter_context(pages_kept())
        errors = check(work)
        contenders = {OURS: work.ours, **work.peers}
        clock = clock_for(settings.device, latency=work.latency, cold=work.cold, in_a_row=work.in_a_row)
        statistics = {name: statistics_of(name) for name in contenders}
        scale = {name: work.scale.get(name, 1.0) for name in contenders}
        least = max(budget.least, min(work.least_rounds, budget.most))
        enough = replace(budget, least=least, least_slow=max(budget.least_slow, least if work.least_rounds else 0))
        take_turns(contenders, clock, enough, lambda name, t: statistics[name].update(t * scale[name]))
        rows: list[dict[str, Any]] = [
            {
                "case": case.name,
                "contender": name,
                "threads": torch.get_num_threads(),
                "ms": found.median * 1e3,
                "quartiles_ms": [found.q1 * 1e3, found.q3 * 1e3],
                "rounds": found.rounds,
                "relative_error": errors[name],
                # of a run of a part of the work, or of a captured graph, it would say nothing
                "peak_bytes": None if scale[name] != 1 else peak_memory(contenders[name], settings.device),
            }
            for name, found in statistics.items()
        ]
    if work.floor_bytes is not None:
        for row in rows:
            row["floor_bytes"] = work.floor_bytes
            row["percent_of_ceiling"] = 100 * work.floor_bytes / (row["ms"] * 1e-3) / ceiling
    for row in rows:
        if row["contender"] in work.own:
            row["own"] = True
    _compare_with_peers(rows, work, ceiling)
    return rows + [{"case": case.name, "contender": peer, "missing": why} for peer, why in work.missing.items()]


def _compare_with_peers(rows: list[dict[str, Any]], work: Work, ceiling: float) -> None:
    """Ratios of all rows to fastkd's, the first; there the best peer, what became of the targets, and why."""
    ours, *peers = rows
    for row in peers:
        row["ratio"] = row["ms"] / ours["ms"]
    ratios = {row["contender"]: row["ratio"] for row in peers}
    if ratios:
        best = min(ratios, key=lambda peer: ratios[peer])
        ours |= {"best_peer": best, "ratio": ratios[best]}
        ratios[BEST_PEER] = ratios[best]
    targets = [_target(peer, ratios.get(peer), wanted) for peer, wanted in work.targets.items()]
    if work.target_percent is not None:
        targets.append(_target("% of ceiling", ours["percent_of_ceiling"], work.target_percent))
    if work.target_ms is not None:
        targets.append(_target("ms", ours["ms"], work.target_ms, at_most=True))
    if targets:
        ours["targets"] = targets
    missed = [target for target in targets if target["met"] is False]
    reasons = [_limit(target, rows, work.floor_bytes, ceiling) for target in missed]
    if missed and any([*reasons, work.reason]):
        ours["reason"] = " ".join(filter(None, [*reasons, work.reason]))


def _limit(target: dict[str, Any], rows: list[dict[str, Any]], floor_bytes: int | None, ceiling: float) -> str:
    """That the bytes alone take too long, where they do."""
    peer = rows[0].get("best_peer") if target["of"] == BEST_PEER else target["of"]
    peer_ms = next((row["ms"] for row in rows if row["contender"] == peer), None)
    if floor_bytes is None or peer_ms is None:
        return ""
    floor_ms = floor_bytes / ceiling * 1e3
    if rows[0]["ms"] <= floor_ms:  # its data are in a cache, which is faster than a copy
        return ""
    if peer_ms / floor_ms >= target["wanted"]:
        return ""
    return (
        f"The {floor_bytes / 1e6:.3g} MB that must move take {floor_ms:.2g} ms at the rate of a copy in this run: with memory "
        f"that fast no more than {peer_ms / floor_ms:.2g} times as fast as {peer} is possible."
    )


def _target(of: str, measured: float | None, wanted: float, *, at_most: bool = False) -> dict[str, Any]:
    """``of``: a peer, BEST_PEER, "% of ceiling" or "ms". ``met`` is None where the peer is missing."""
    met = None if measured is None else measured <= wanted if at_most else measured >= wanted
    return {"of": of, "wanted": wanted, "measured": measured, "met": met}


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def failure(case: Case, problem: Exception) -> dict[str, Any]:
    """The row of a case that could not be measured."""
    return {"case": case.name, "contender": OURS, "error": first_line(problem)}
