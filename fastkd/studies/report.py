"""A study's results as a table, beside the published figures, and as a figure."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Figure_

from fastkd._figures import BLUE, DASHED, GREEN, GREY, INK, ORANGE, PALE, RED, canvas, frame
from fastkd._files import write_whole
from fastkd.studies.study import Accuracies, Figure, Published, Spread, Study

__all__ = ["as_markdown", "markdown", "overview", "save"]

COURSE_COLOURS = (BLUE, ORANGE, GREEN)  # three to a kind of line
STYLES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))
COLUMN_COLOURS = (BLUE, ORANGE, GREEN, RED, GREY)
MARKERS = ("o", "s", "^", "D")  # each of all colours


def save(
    folder: Path,
    study: Study,
    accuracies: Accuracies,
    teachers: Accuracies,
    about: Mapping[str, Any],
    figures: Mapping[str, Accuracies] | None = None,
) -> list[Path]:
    """Writes ``results.json`` (each run), ``table.md`` and ``accuracy.png``; ``course.png`` where accuracies on the way are
    known, ``spread.png`` where the study asks for it, and figures of its own. Of dense networks, mean IoU stands where the
    accuracy does, in ``mean-iou.png``, too.

    Args:
        teachers: of the runs' teachers.
        about: what was run, for the JSON; ``what`` and ``command`` are needed.
        figures: by name, what else the runs came to: those that the study shows, and those on the way, as
            ``test_accuracy_at_10``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {figure.name for figure in study.figures_shown()} | ({study.spread.figure} if study.spread else set())
    shown = {name: of for name, of in (figures or {}).items() if name in wanted or name.startswith(_course(study))}
    document = {
        **about,
        "measure": study.measure.heading,
        "accuracies": accuracies,
        "teachers": teachers,
        **({"figures": shown} if shown else {}),
    }
    figure = _figure(study, accuracies, teachers)
    table = markdown(study, accuracies, teachers, about, shown)
    numbers = json.dumps(document, indent=1, default=str) + "\n"
    parts: dict[str, Callable[[BinaryIO], object]] = {
        "table.md": lambda file: file.write(table.encode()),
        f"{study.measure.heading.lower().replace(' ', '-')}.png": lambda file: figure.savefig(file, format="png"),
        "results.json": lambda file: file.write(numbers.encode()),
    }
    if any(name.startswith(_course(study)) for name in shown):
        course = course_figure(study, shown)
        parts["course.png"] = lambda file: course.savefig(file, format="png")
    if study.spread and study.spread.figure in shown:
        spread = spread_figure(study, study.spread, shown[study.spread.figure])
        parts["spread.png"] = lambda file: spread.savefig(file, format="png")
    for name, picture in study.pictures(accuracies, shown).items():
        parts[f"{name}.png"] = partial(picture.savefig, format="png")
    for name, write in parts.items():
        write_whole(folder / name, write)
    return [folder / name for name in parts]


def _course(study: Study) -> str:
    """How figures on the way are called, before the share of the training in %."""
    return f"{study.measure.student}_at_"


def summary(seeds: Mapping[int, float], scale: float = 100.0) -> str:
    """Mean and standard deviation, of shares in %."""
    values = [scale * value for value in seeds.values()]
    mean = f"{statistics.fmean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def markdown(
    study: Study,
    accuracies: Accuracies,
    teachers: Accuracies,
    about: Mapping[str, Any],
    figures: Mapping[str, Accuracies] | None = None,
) -> str:
    """A table for each column: ours, the difference to our baseline, and the paper's; of the spread over the columns, where
    the study asks for it; one for each of the study's figures.
    """
    lines = [f"{about['what']}", "", f"`{about['command']}`", "", as_markdown(overview(study, accuracies, teachers))]
    for column, rows in accuracies.items():
        where, published = study.published(column)
        head = ["", f"test {study.measure.heading}, %", "to the baseline", "seeds", f"published: {where}"]
        head[0] = study.row_name or study.row_option.removesuffix("s")
        shown = [True, True, study.baseline in rows, True, bool(where)]  # no column that nothing is in
        lines += [f"## {column}", "", _line(head, shown), "|---" * sum(shown) + "|"]
        for row in in_order(study, rows):
            seeds, theirs = rows[row], published.get(row)
            gain = _gain(seeds, rows.get(study.baseline, {}))
            figure = None if theirs is None else _published(theirs)
            lines.append(_line([row, summary(seeds), gain, str(len(seeds)), figure], shown))
        lines += [
            _line([f"the teacher, {name}", summary(seeds), None, str(len(seeds)), None], shown)
            for name, seeds in teachers.get(column, {}).items()
        ]
        lines.append("")
    there = [one for one in study.figures_shown() if figures and one.name in figures]
    more = [_figure_table(study, one, figures[one.name]) for one in there if figures]
    if study.spread:
        more = [*_spread_tables(study, study.spread, accuracies, figures or {}), *more]
    return "\n".join(lines) + "".join(more)


def _spread_tables(
    study: Study, spread: Spread, accuracies: Accuracies, figures: Mapping[str, Accuracies]
) -> Iterator[str]:
    """What each row comes to over the columns: of the accuracy, and of the study's figure."""
    what = f"Mean and deviation are of the means of the {spread.over}; lowest and highest are single runs."
    yield f"\n## Over the {spread.over}\n\n{what}\n"
    yield _spread_table(study, spread.over, f"test {study.measure.heading}", accuracies, {})
    if spread.figure in figures:
        published = next((one.published for one in study.figures_shown() if one.name == spread.figure), {})
        yield _spread_table(study, spread.over, spread.heading, figures[spread.figure], published)


def _spread_table(
    study: Study,
    over: str,
    heading: str,
    values: Accuracies,
    published: Mapping[str, Mapping[str, Published]],
) -> str:
    head = [
        study.row_name or study.row_option.removesuffix("s"),
        "mean",
        "deviation",
        "lowest",
        "highest",
        over,
        "runs",
    ]
    head.append("published")
    shown = [True] * 7 + [bool(published)]
    lines = [f"\n### {heading}, %\n", _line(head, shown), "|---" * sum(shown) + "|"]
    for row in in_order(study, {row for rows in values.values() for row in rows}):
        of_columns = [[100 * value for value in rows[row].values()] for rows in values.values() if row in rows]
        mean, deviation = _mean_and_deviation([statistics.fmean(runs) for runs in of_columns])
        runs = [value for of_column in of_columns for value in of_column]
        theirs = [rows[row].mean for column, rows in published.items() if row in rows and column in values]
        cells = [row, mean, deviation, f"{min(runs):.2f}", f"{max(runs):.2f}", str(len(of_columns)), str(len(runs))]
        cells.append(" ± ".join(filter(None, _mean_and_deviation(theirs))) if theirs else "")
        lines.append(_line(cells, shown))
    return "\n".join(lines) + "\n"


def _mean_and_deviation(values: list[float]) -> tuple[str, str]:
    """The deviation of one value is none."""
    return f"{statistics.fmean(values):.2f}", f"{statistics.stdev(values):.2f}" if len(values) > 1 else ""


def _figure_table(study: Study, figure: Figure, values: Accuracies) -> str:
    """Ours and the paper's, of all columns."""
    columns = [column for column in study.all_columns if column in values]
    head = ["", *(text for column in columns for text in (column, "published"))]
    shown = [True, *(good for column in columns for good in (True, column in figure.published))]
    lines = [f"\n## {figure.heading}\n", _line(head, shown), "|---" * sum(shown) + "|"]
    for row in in_order(study, {row for column in columns for row in values[column]}):
        cells: list[str | None] = [row]
        for column in columns:
            theirs = figure.published.get(column, {}).get(row)
            ours = values[column].get(row)
            cells += [
                "" if ours is None else summary(ours, figure.scale),
                "" if theirs is None else _published(theirs),
            ]
        lines.append(_line(cells, shown))
    return "\n".join(lines) + "\n"


def _published(figure: Published) -> str:
    """Without a deviation where the paper gives none."""
    return f"{figure.mean:.2f} ± {figure.std:.2f}" if figure.std else f"{figure.mean:.2f}"


def course_figure(study: Study, figures: Mapping[str, Accuracies]) -> Figure_:
    """The accuracy on the way: a panel for each column, the mean of the seeds of each row."""
    way = _course(study)
    places = sorted(int(name.removeprefix(way)) for name in figures if name.startswith(way))
    columns = [c for c in study.all_columns if any(c in figures[f"{way}{place}"] for place in places)]
    at = {place: figures[f"{way}{place}"] for place in places}
    names = in_order(study, {row for of_columns in at.values() for rows in of_columns.values() for row in rows})
    figure = canvas(2.4 + 4.2 * len(columns), 3.8)
    axes = None
    for i, column in enumerate(columns):
        axes = figure.add_subplot(1, len(columns), i + 1, sharey=axes)
        for number, row in enumerate(names):
            there = [place for place in places if row in at[place].get(column, {})]
            means = [100 * statistics.fmean(at[place][column][row].values()) for place in there]
            colour, style = COURSE_COLOURS[number % len(COURSE_COLOURS)], STYLES[number // 3 % len(STYLES)]
            axes.plot(there, means, color=colour, linestyle=style, linewidth=1.2, label=row if i == 0 else None)
        frame(axes)
        axes.set_title(column, fontsize=10, loc="left", color=INK)
        axes.set_xlabel("share of the training, %", fontsize=8, color=INK)
        axes.tick_params(labelsize=8)
        if i == 0:
            axes.set_ylabel(f"test {study.measure.heading}, %", fontsize=8, color=INK)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return figure


def spread_figure(study: Study, spread: Spread, values: Accuracies) -> Figure_:
    """A box for each row, of its runs of all columns, each of them a dot."""
    columns = [column for column in study.all_columns if column in values]
    names = in_order(study, {row for column in columns for row in values[column]})
    figure = canvas(2.2 + 0.62 * max(3, len(names)), 4.2)
    axes = figure.add_subplot()
    axes.axhline(0, color=GREY, linewidth=1, linestyle=DASHED)
    runs = [[100 * value for c in columns for value in values[c].get(name, {}).values()] for name in names]
    axes.boxplot(
        runs,
        positions=range(len(names)),
        widths=0.66,
        whis=(0, 100),  # to the farthest run: a failure is no outlier, it is what the figure is about
        patch_artist=True,
        boxprops={"facecolor": PALE, "edgecolor": GREY},
        medianprops={"color": INK, "linewidth": 1.6},
        whiskerprops={"color": GREY},
        capprops={"color": GREY},
        zorder=2,
    )
    for i, column in enumerate(columns):
        offset = 0.5 * ((i + 0.5) / len(columns) - 0.5)
        dots = [(n + offset, 100 * v) for n, name in enumerate(names) for v in values[column].get(name, {}).values()]
        marker = MARKERS[i // len(COLUMN_COLOURS) % len(MARKERS)]
        colour = COLUMN_COLOURS[i % len(COLUMN_COLOURS)]
        axes.plot(*zip(*dots, strict=True), marker, color=colour, markersize=3.6, label=column, zorder=3)
    frame(axes)
    axes.grid(axis="y", color=PALE, linewidth=0.8)
    slanted: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if len(names) > 4 else {}
    axes.set_xticks(range(len(names)), names, fontsize=8, **slanted)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_ylabel(f"{spread.heading}, %", fontsize=8, color=INK)
    axes.set_title("lower and shorter is better; a dot is a run", fontsize=9, loc="left", color=INK)
    figure.legend(loc="outside right center", title=spread.over, fontsize=8, title_fontsize=8, frameon=False)
    return figure


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
    rows, names = list(rows), list(study.all_rows)
    if not set(rows) <= set(names):  # to ask for all names takes a while
        names = list(dict.fromkeys((*names, *study.row_names())))
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


def _figure(study: Study, accuracies: Accuracies, teachers: Accuracies) -> Figure_:
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
    hint = " (dashed: the teacher)" if teachers else ""
    axes.set_xlabel(f"test {study.measure.heading}, %{hint}", fontsize=8, color=INK)
    axes.margins(x=0.06)
