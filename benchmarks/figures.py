"""Figures of a results file: times as fast as the peers, share of the copy ceiling against size, scaling with threads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.measure import OURS
from benchmarks.table import best_peer, three_digits
from fastkd._figures import BLUE, DASHED, GREEN, GREY, INK, ORANGE, canvas, frame

COLOURS = (BLUE, ORANGE, GREEN, "#a2417e", "#7a6a2f", "#5b5fc7")
SLOWER = "#d62728"
MOST_BARS = 70  # more would not be read: then the best peer of each case alone
THREADS = re.compile(r"^(.*), (\d+) threads?$")
Rows = list[dict[str, Any]]


def save(document: dict[str, Any], stem: Path) -> list[Path]:
    """Writes ``<stem>-speedup.png``, ``-ceiling.png`` and, where threads were varied, ``-threads.png``."""
    rows = [row for row in document["rows"] if "ms" in row]
    colours = dict(zip(dict.fromkeys(row["primitive"] for row in rows), COLOURS * 3, strict=False))
    machine = document["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    title = f"{where}, torch {machine['torch']}, {machine['date']}"
    plain = [row for row in rows if not THREADS.match(row["case"])]
    written = []
    for name, draw, chosen in (
        ("speedup", _speedups, [row for row in plain if "ratio" in row]),
        ("ceiling", _ceiling, [row for row in plain if row.get("percent_of_ceiling")]),
        ("threads", _threads, [row for row in rows if THREADS.match(row["case"])]),
    ):
        if chosen:
            figure = draw(chosen, colours)
            figure.suptitle(title, fontsize=9, color=GREY, x=0.01, ha="left")
            path = stem.with_name(f"{stem.name}-{name}.png")
            figure.savefig(path)
            written.append(path)
    return written


def _plain(axes: Axes) -> None:
    frame(axes)
    axes.tick_params(labelsize=8)


def _speedups(rows: Rows, colours: dict[str, str]) -> Figure:
    """A bar for each peer of each case."""
    peers = [row for row in rows if row["contender"] != OURS]
    if len(peers) > MOST_BARS:
        best = {row["case"]: row["best_peer"] for row in rows if row["contender"] == OURS}
        peers = [row for row in peers if best[row["case"]] == row["contender"]]
    figure = canvas(9.5, 1.2 + 0.19 * len(peers) + 0.12 * len({row["case"] for row in peers}))
    axes = figure.add_subplot()
    _plain(axes)
    place, before, ticks, labels = 0.0, None, [], []
    for row in peers:
        place += 1.0 if row["case"] == before else 1.6
        before = row["case"]
        colour = colours[row["primitive"]] if row["ratio"] >= 1 else SLOWER
        axes.barh(place, row["ratio"] - 1, left=1, height=0.8, color=colour)
        end, gap = (max(row["ratio"], 1), place), (3, 0)
        axes.annotate(three_digits(row["ratio"]), end, gap, textcoords="offset points", va="center", fontsize=7)
        ticks.append(place)
        labels.append(f"{row['case']}   {row['contender']}")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.axvline(1, color=INK, linewidth=0.8)
    axes.set_yticks(ticks, labels, fontsize=7)
    axes.set_ylim(place + 1, 0.4)
    axes.set_xlabel("times as fast as this peer (the peer's time over fastkd's)", fontsize=8, color=INK)
    return figure


def _ceiling(rows: Rows, colours: dict[str, str]) -> Figure:
    """fastkd and the best peer of each case, joined."""
    figure = canvas(8.5, 5.2)
    axes = figure.add_subplot()
    _plain(axes)
    cases: dict[str, Rows] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    named: set[str] = set()
    for of_case in cases.values():
        ours = next((row for row in of_case if row["contender"] == OURS), None)
        if ours is None:
            continue
        colour, primitive = colours[ours["primitive"]], ours["primitive"]
        size, share = ours["floor_bytes"], ours["percent_of_ceiling"]
        for peer in of_case:
            if peer["contender"] == ours.get("best_peer"):
                axes.plot([size, size], [peer["percent_of_ceiling"], share], color=colour, linewidth=0.8, alpha=0.5)
                axes.plot(size, peer["percent_of_ceiling"], "o", color=colour, markersize=4, fillstyle="none")
        axes.plot(size, share, "o", color=colour, markersize=6, label=None if primitive in named else primitive)
        named.add(primitive)
    axes.axhline(100, color=GREY, linewidth=1, linestyle=DASHED)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("bytes that the work must move", fontsize=8, color=INK)
    axes.set_ylabel("% of the copy bandwidth of the same run", fontsize=8, color=INK)
    axes.legend(frameon=False, fontsize=8, title="full: fastkd, hollow: best peer", title_fontsize=8)
    return figure


def _threads(rows: Rows, colours: dict[str, str]) -> Figure:
    """Time of one thread over the time of n."""
    series: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
    peers: dict[str, str | None] = {}  # the best one with the fewest threads, for all counts
    for row in rows:
        match = THREADS.match(row["case"])
        assert match is not None
        peer = peers.setdefault(match[1], best_peer({"rows": rows}, row["case"]))
        if row["contender"] in (OURS, peer):
            series.setdefault((match[1], row["contender"], row["primitive"]), []).append((int(match[2]), row["ms"]))
    figure = canvas(7.5, 4.8)
    axes = figure.add_subplot()
    _plain(axes)
    most = 1
    for (work, contender, primitive), points in series.items():
        counts, times = zip(*sorted(points), strict=True)
        if counts[0] != 1:
            continue  # there is nothing to be faster than
        most = max(most, *counts)
        style = "-o" if contender == OURS else ":o"
        axes.plot(counts, [times[0] / t for t in times], style, color=colours[primitive], markersize=4,
                  label=f"{work}, {contender}")  # fmt: skip
    axes.plot([1, most], [1, most], color=GREY, linewidth=0.8, linestyle=DASHED)
    axes.set_xticks(sorted({row["threads"] for row in rows}))
    axes.set_xlabel("threads", fontsize=8, color=INK)
    axes.set_ylabel("times as fast as with one thread", fontsize=8, color=INK)
    axes.legend(frameon=False, fontsize=7)
    return figure
