"""What became slower between two results files.

A machine is faster on one day than on another; the peers, which did not change, say by how much. So fastkd's time is taken
over the drift of its case: the median of what the times of its peers were multiplied by and of what those of all peers
were, in the median. Peers that are made of fastkd do not count. Slower means: by more than the tolerance after that, and the
middle halves of the rounds do not overlap either.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measure import OURS

SAME_MACHINE = ("gpu", "cpu", "threads", "instruction_set")
VERSIONS = ("torch", "numpy", "scipy", "scikit-learn", "kornia", "torchvision", "liger-kernel", "triton")


@dataclass(frozen=True)
class Change:
    """One case. ``verdict``: slower, faster, same; failed, not measured (now), gone, new; ``factor``: its time over the old
    one's and the drift.
    """

    case: str
    verdict: str
    before_ms: float | None = None
    after_ms: float | None = None
    drift: float = 1.0
    factor: float | None = None


def changes(old: dict[str, Any], new: dict[str, Any], tolerance: float) -> list[Change]:
    """All cases of both documents, in the order of the new one."""
    before, after = _by_case(old), _by_case(new)
    drifts = {case: _drifts(before[case], after[case]) for case in before.keys() & after.keys()}
    overall = statistics.median([drift for found in drifts.values() for drift in found] or [1.0])
    found = []
    for case, rows in after.items():
        ours, theirs = rows.get(OURS, {}), before.get(case, {}).get(OURS, {})
        if "error" in ours:
            found.append(Change(case, "failed", theirs.get("ms")))
        elif "ms" not in ours:
            found.append(Change(case, "not measured", theirs.get("ms")))
        elif "ms" not in theirs:
            found.append(Change(case, "new", after_ms=ours["ms"]))
        else:
            drift = statistics.median([*drifts[case], overall])
            found.append(_judge(case, theirs, ours, drift, tolerance))
    return found + [Change(case, "gone", before[case].get(OURS, {}).get("ms")) for case in before if case not in after]


def _judge(case: str, old: dict[str, Any], new: dict[str, Any], drift: float, tolerance: float) -> Change:
    factor = new["ms"] / old["ms"] / drift
    (old_low, old_high), (new_low, new_high) = old["quartiles_ms"], new["quartiles_ms"]
    verdict = "same"
    if factor > 1 + tolerance and new_low > old_high * drift:
        verdict = "slower"
    elif factor < 1 / (1 + tolerance) and new_high < old_low * drift:
        verdict = "faster"
    return Change(case, verdict, old["ms"], new["ms"], drift, factor)


def _by_case(document: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in document["rows"]:
        found.setdefault(row["case"], {})[row["contender"]] = row
    return found


def _drifts(old: dict[str, dict[str, Any]], new: dict[str, dict[str, Any]]) -> list[float]:
    both = (name for name in old.keys() & new.keys() if name != OURS and "own" not in new[name])
    return [new[name]["ms"] / old[name]["ms"] for name in both if "ms" in old[name] and "ms" in new[name]]


def report(old: dict[str, Any], new: dict[str, Any], tolerance: float, console: Console) -> bool:
    """Prints what changed; whether something became slower or fails now, or nothing could be compared."""
    for key in SAME_MACHINE + VERSIONS:
        was, now = (document["machine"].get(key) for document in (old, new))
        if was != now:
            console.print(f"[yellow]{key} was {was}, is {now}[/]: the two files differ in more than fastkd")
    found = changes(old, new, tolerance)
    table = Table(
        title=f"since {old['machine'].get('date')} (fastkd {old['machine'].get('fastkd')})", title_justify="left"
    )
    for column in ("work", "before", "now", "drift of the machine", "factor", "verdict"):
        table.add_column(column, justify="left" if column in ("work", "verdict") else "right")
    colours = {"slower": "red", "failed": "red", "faster": "green", "same": "dim"}
    for change in found:
        colour = colours.get(change.verdict, "yellow")
        times = [f"{ms:,.3f} ms" if ms is not None else "" for ms in (change.before_ms, change.after_ms)]
        factor = "" if change.factor is None else f"{change.factor:.2f}"
        drift = "" if change.factor is None else f"{change.drift:.2f}"
        table.add_row(change.case, *times, drift, factor, f"[{colour}]{change.verdict}[/]")
    console.print(table)
    bad = [change.case for change in found if change.verdict in ("slower", "failed")]
    compared = any(change.factor is not None for change in found)
    if bad:
        console.print(f"slower or failed: {', '.join(bad)}", style="red")
    elif compared:
        console.print("nothing became slower", style="green")
    else:
        console.print("nothing was compared: no case was measured in both", style="red")
    return bool(bad) or not compared
