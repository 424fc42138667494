"""What the size of the patches does: the student's accuracy, and how alike the patches are. Needs matplotlib."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from fastkd._figures import BLUE, DASHED, GREEN, GREY, INK, ORANGE, RED, canvas, plain_axes
from fastkd.studies.study import Accuracies

__all__ = ["patch_sizes"]

COLOURS = (BLUE, ORANGE, GREEN, RED)  # of the columns

Curve = Mapping[int, float]
"""By size, in pixels of the paper's images."""


def patch_sizes(
    sizes: Mapping[str, int], accuracies: Accuracies, distances: Accuracies, published: Mapping[str, tuple[str, Curve]]
) -> Figure:
    """Test accuracy, and the Frechet distance of the patches, by their size (Table 4 of the paper).

    Args:
        sizes: by row.
        accuracies, distances: column -> row -> seed -> value; of rows of other names nothing is drawn.
        published: by column, the paper's images and its accuracies in %, dashed.
    """
    figure = canvas(9.2, 4.0)
    left, right = figure.subplots(1, 2)
    columns = [column for column, rows in accuracies.items() if any(row in sizes for row in rows)]
    for number, column in enumerate(columns):
        colour = COLOURS[number % len(COLOURS)]
        _curve(left, sizes, accuracies[column], 100.0, colour, column)
        _curve(right, sizes, distances.get(column, {}), 1.0, colour, column)
        if column in published:
            name, theirs = published[column]
            label = f"{column}: the paper's, {name}"
            left.plot(list(theirs), list(theirs.values()), color=colour, linestyle=DASHED, linewidth=1.2, label=label)
    plain_axes(left, "Accuracy by the size of the patches", "pixels, of images of 32 x 32", "test accuracy, %")
    plain_axes(right, "Distance of patches to the task's", "pixels, of images of 32 x 32", "Frechet distance")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(list(sizes.values())))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels([str(size) for size in sizes.values()])
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False, labelcolor=INK)
    return figure


def _curve(
    axes: Axes, sizes: Mapping[str, int], rows: Mapping[str, Mapping[int, float]], scale: float, colour: str, name: str
) -> None:
    """The mean over the seeds, and each of them as a dot."""
    there = {size: [scale * value for value in rows[row].values()] for row, size in sizes.items() if row in rows}
    means = [statistics.fmean(values) for values in there.values()]
    axes.plot(list(there), means, color=colour, linewidth=1.8, label=name)
    dots = [(size, value) for size, values in there.items() for value in values]
    if dots:
        axes.plot(*zip(*dots, strict=True), ".", color=colour, markersize=5, markeredgecolor=GREY, markeredgewidth=0.3)
