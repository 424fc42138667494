"""A study's results as a table, beside the published figures, and as a figure."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastkd._figures import BLUE, DASHED, GREY, INK, canvas, frame
from fastkd._files import write_whole
from fastkd.studies.study import Accuracies, Study

__all__ = ["as_markdown", "markdown", "overview", "save"]


def save(
    folder: Path, study: Study, accuracies: Accuracies, teachers: Accuracies, about: Mapping[str, Any]
) -> list[Path]:
    """Writes ``results.json`` (each run), ``table.md`` and ``accuracy.png``.

    Args:
        teachers: of the runs' teachers.
        about: what was run, for the JSON; ``what`` and ``command`` are needed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    document = {**about, "accuracies": accuracies, "teachers": teachers}
    figure = _figure(study, accuracies, teachers)
    table, numbers = markdown(study, accuracies, teachers, about), json.dumps(document, indent=1, default=str) + "\n"
    parts: dict[str, Callable[[BinaryIO], object]] = {
        "table.md": lambda file: file.write(table.encode()),
        "accuracy.png": lambda file: figure.savefig(file, format="png"),
        "results.json": lambda file: file.write(numbers.encode()),
    }
    for name, write in parts.items():
        write_whole(folder / name, write)
    return [folder / name for name in parts]


def summary(seeds: Mapping[int, float]) -> str:
    """Mean and standard deviation in %."""
    values = [100 * value for value in seeds.values()]
    mean = f"{statistics.fmean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def markdown(study: Study, accuracies: Accuracies, teachers: Accuracies, about: Mapping[str, Any]) -> str:
    """A table for each column: ours, the difference to our baseline, and the paper's."""
    lines = [f"{about['what']}", "", f"`{about['command']}`", "", as_markdown(overview(study, accuracies, teachers))]
    for column, rows in accuracies.items():
        where, published = study.published(column)
        head = ["", "test accuracy, %", "to the baseline", "seeds", f"published: {where}"]
        head[0] = study.row_name or study.row_option.removesuffix("s")
        shown = [True, True, bool(study.baseline), True, bool(where)]  # no column that nothing is in
        lines += [f"## {column}", "", _line(head, shown), "|---" * sum(shown) + "|"]
        for row in in_order(study, rows):
            seeds, theirs = rows[row], published.get(row)
            gain = _gain(seeds, rows.get(study.baseline, {}))
            figure = f"{theirs.mean:.2f} ± {theirs.std:.2f}" if theirs else None
            lines.append(_line([row, summary(seeds), gain, str(len(seeds)), figure], shown))
        lines += [
            _line([f"the teacher, {name}", summary(seeds), None, str(len(seeds)), None], shown)
            for name, seeds in teachers.get(column, {}).items()
        ]
        lines.append("")
    return "\n".join(lines)


def _line(cells: Iterable[str | None], shown: Iterable[bool]) -> str:
    """A line of a table, of those cells that are shown; None is a cell that is always empty."""
    return (
        "".join("| " if cell is None else f"| {cell} " for cell, is_shown in zip(cells, shown, strict=True) if is_shown)
        + "|"
    )


def overview(study: Study, accuracies: Accuracies, teachers: Accuracies) -> list[list[str]]:
    """One table: a row of names of columns, then one for each row of the study and teacher, mean and deviation in %."""
    found = in_order(study, {row for rows in accuracies.values() for row in rows})
    named: dict[str, dict[str, Mapping[int, float]]] = {
        row: {column: rows[row] for column, rows in accuracies.items() if row in rows} for row in found
    }
    for column, networks in teachers.items():
        for name, seeds in networks.items():
            named.setdefault(f"the teacher, {name}", {})[column] = seeds
    return [
        ["", *accuracies],
        *(
            [name, *(summary(cells[column]) if column in cells else "" for column in accuracies)]
            for name, cells in named.items()
        ),
    ]


def in_order(study: Study, rows: Iterable[str]) -> list[str]:
    """The study's own first, in its order, then others."""
    names = list(dict.fromkeys((*study.all_rows, *study.row_names())))
    return sorted(rows, key=names.index)


def as_markdown(rows: list[list[str]]) -> str:
    """A table whose first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n"


def _gain(seeds: Mapping[int, float], baseline: Mapping[int, float]) -> str:
    """Mean of the differences, seed by seed, and their standard error: the seeds share data, labels and first weights."""
    gains = [100 * (seeds[seed] - baseline[seed]) for seed in seeds if seed in baseline]
    if not gains or seeds is baseline:
        return ""
    mean = f"{statistics.fmean(gains):+.2f}"
    return f"{mean} ± {statistics.stdev(gains) / len(gains) ** 0.5:.2f}" if len(gains) > 1 else mean


def _figure(study: Study, accuracies: Accuracies, teachers: Accuracies) -> Figure:
    """A panel for each column: a bar from the baseline's mean to the row's, a dot for each seed."""
    columns = min(4, len(accuracies))
    rows = -(-len(accuracies) // columns)
    figure = canvas(1.2 + 3.3 * columns, 0.5 + 3.5 * rows)
    for i, (column, of_rows) in enumerate(accuracies.items()):
        _panel(figure.add_subplot(rows, columns, i + 1), study, column, of_rows, teachers.get(column, {}))
    return figure


def _panel(
    axes: Axes,
    study: Study,
    column: str,
    rows: Mapping[str, Mapping[int, float]],
    teachers: Mapping[str, Mapping[int, float]],
) -> None:
    names = in_order(study, rows)[::-1]
    start = 100 * statistics.fmean(rows[study.baseline].values()) if study.baseline in rows else 0.0
    for place, name in enumerate(names):
        values = [100 * value for value in rows[name].values()]
        mean = statistics.fmean(values)
        axes.barh(place, mean - start, left=start, height=0.6, color=BLUE if mean >= start else GREY, alpha=0.8)
        axes.plot(values, [place] * len(values), ".", color=INK, markersize=4)
    axes.axvline(start, color=INK, linewidth=1)
    for seeds in teachers.values():
        axes.axvline(100 * statistics.fmean(seeds.values()), color=GREY, linewidth=1.2, linestyle=DASHED)
    frame(axes)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_title(column, fontsize=10, loc="left", color=INK)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("test accuracy, % (dashed: the teacher)", fontsize=8, color=INK)
    axes.margins(x=0.06)
