"""Rows of a results file as text: lines while they come, a table with colours at the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from benchmarks.case import BEST_PEER
from benchmarks.measure import OURS

if TYPE_CHECKING:
    from rich.table import Table

SAME_BYTES = 1 << 20  # peaks of memory below this are not told apart from nothing
WHY_NOT = ("error", "missing", "not_measured")
CAPTION = (
    "±: half the spread of the middle half of the rounds. ratio: the peer's time over fastkd's. ceiling: bytes that the work "
    "must move, over its time, over the rate of a copy in the same run. memory: at the peak, beyond the inputs, results "
    "included. target: what fastkd wants; red where it is missed."
)


def cells(row: dict[str, Any]) -> tuple[str, str, str, str, str]:
    """Time, spread, ratio to fastkd, share of the ceiling, memory of one row."""
    low, high = row["quartiles_ms"]
    share, peak = row.get("percent_of_ceiling"), row.get("peak_bytes")
    return (
        time_text(row["ms"]),
        f"±{50 * (high - low) / row['ms']:.0f} %",
        f"{three_digits(row['ratio'])}x" if row["contender"] != OURS else "",
        "" if share is None else f"{share:.0f} %" if share >= 1 else "<1 %",
        "" if peak is None else "<1 MB" if peak < SAME_BYTES else f"{peak / 1e6:,.0f} MB",
    )


def time_text(ms: float) -> str:
    """With three digits, in the unit that fits."""
    if ms >= 1000:
        return f"{three_digits(ms / 1000)} s"
    return f"{three_digits(ms)} ms" if ms >= 1 else f"{three_digits(ms * 1000)} us"


def three_digits(x: float) -> str:
    """No exponent, no more than the measurement can say."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def reason_of(row: dict[str, Any]) -> str | None:
    """Why a row has no figures, if it has none."""
    return next((f"{key.replace('_', ' ')}: {row[key]}" for key in WHY_NOT if key in row), None)


def target_text(target: dict[str, Any]) -> str:
    """``>= 8x``, ``>= 90 %``, ``<= 6 us``."""
    if target["of"] == "ms":
        return f"<= {time_text(target['wanted'])}"
    return f">= {target['wanted']:g}{' %' if target['of'] == '% of ceiling' else 'x'}"


def row_lines(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """A line each."""
    for row in rows:
        head = f"{row['case']:44} {row['contender']:30}"
        why = reason_of(row)
        if why is not None:
            yield f"{head} {why}"
            continue
        time, spread, ratio, share, memory = cells(row)
        missed = "".join(
            f"  MISSED {target_text(t)} {t['of']}: {t['measured']:.3g}"
            for t in row.get("targets", ())
            if t["met"] is False
        )
        yield f"{head} {time:>9} {spread:>6} {ratio:>9} {share:>6} {memory:>9}{missed}"


def table(document: dict[str, Any]) -> Table:
    """The table of a results file."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    machine = document["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads, {machine['instruction_set']}"
    result = Table(
        title=f"{where}\ntorch {machine['torch']}, copy ceiling {document['ceiling_gb_per_s']:g} GB/s, {machine['date']}",
        caption="\n".join([CAPTION, *footnotes(document)]),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for column in ("", "time", "±", "ratio", "ceiling", "memory", "target"):
        result.add_column(
            column, justify="right" if column else "left", no_wrap=bool(column), min_width=None if column else 30
        )
    before, targets = None, {}
    for row in document["rows"]:
        if row["case"] != before:
            before = row["case"]
            targets = {t["of"]: t for t in row.get("targets", ())}
            result.add_row(Text(before, style="bold"))
        ours = row["contender"] == OURS
        name = Text(f"  {row['contender']}", style="cyan" if ours else "")
        why = reason_of(row)
        if why is not None:
            name.append(f"  {why}")
            name.stylize("red" if "error" in row else "dim")
            wanted = [targets[row["contender"]]] if row["contender"] in targets else []
            result.add_row(name, *[""] * 5, Text(" ".join(map(target_text, wanted)), style="yellow"))
            continue
        time, spread, ratio, share, memory = cells(row)
        own = [t for of, t in targets.items() if of == row["contender"] or (ours and of in ("ms", "% of ceiling"))]
        if row["contender"] == best_peer(document, before) and BEST_PEER in targets:
            own.append(targets[BEST_PEER])
        result.add_row(
            name,
            time,
            spread,
            Text(ratio, style="red" if row.get("ratio", 1.0) < 1 else "green"),
            share,
            memory,
            Text("\n").join(Text(target_text(t), style="green" if t["met"] else "red") for t in own),
        )
    return result


def best_peer(document: dict[str, Any], case: str | None) -> str | None:
    """The fastest peer of a case."""
    return next(
        (row.get("best_peer") for row in document["rows"] if row["case"] == case and row["contender"] == OURS), None
    )


def footnotes(document: dict[str, Any]) -> list[str]:
    """Why targets are missed."""
    return [f"{row['case']}: {row['reason']}" for row in document["rows"] if "reason" in row]


def markdown(document: dict[str, Any]) -> str:
    """A row for each case, for documents: fastkd's time, how many times as fast as each peer it is, ceiling, memory."""
    lines = ["| work | time | times as fast as | ceiling | memory |", "|---|---|---|---|---|"]
    for row in document["rows"]:
        if row["contender"] != OURS or "ms" not in row:
            continue
        peers = (
            peer for peer in document["rows"] if peer["case"] == row["case"] and "ratio" in peer and peer is not row
        )
        ratios = "; ".join(f"{peer['contender']} {three_digits(peer['ratio'])}x" for peer in peers)
        time, _, _, share, memory = cells(row)
        lines.append(f"| {row['case']} | {time} | {ratios} | {share} | {memory} |")
    return "\n".join([*lines, *(f"\n{note}" for note in footnotes(document))])
