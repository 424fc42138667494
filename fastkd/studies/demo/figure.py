"""The demo's figure: how fast the students learn, what the score sees, what is drawn."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from fastkd._figures import BLUE, DASHED, GREEN, GREY, INK, ORANGE, canvas, plain_axes
from fastkd.studies.demo.experiment import Arm, Results

COLOURS = (INK, BLUE, ORANGE)  # labelled, biased, uniform
RELEVANT, IRRELEVANT = GREEN, "#b9bfc6"
TILE_ROWS, TILE_COLUMNS = 4, 15


def save(results: Results, path: Path) -> None:
    """Draws the figure and writes it as PNG."""
    figure = canvas(12.5, 7.4, pad=0.12)
    grid = figure.add_gridspec(2, 2, height_ratios=(1.75, 1))
    _learning_curves(figure.add_subplot(grid[0, 0]), results)
    _score_histogram(figure.add_subplot(grid[0, 1]), results)
    _drawn_images(
        figure.add_subplot(grid[1, 0]), results, results.biased, f"Biased draws, IQPR {results.biased.iqpr:g}"
    )
    _drawn_images(figure.add_subplot(grid[1, 1]), results, results.uniform, "Uniform draws")
    figure.savefig(path)


def _learning_curves(axes: Axes, results: Results) -> None:
    plain_axes(axes, "Students: test accuracy while they learn", "steps", "% of test digits right")
    steps = torch.tensor(results.curve_steps)
    axes.axhline(100 * results.teacher_accuracy, color=GREY, linewidth=1.2, linestyle=DASHED, label="the teacher")
    for arm, colour in zip(results.arms, COLOURS, strict=True):
        runs = 100 * torch.tensor(arm.curves)
        axes.plot(steps, runs.mean(0), color=colour, linewidth=2.2, label=arm.name)
        if len(runs) > 1:
            axes.fill_between(steps, runs.amin(0), runs.amax(0), color=colour, alpha=0.14, linewidth=0)
    early = min(statistics.fmean(results.accuracy(arm, 0.1)) for arm in results.arms)
    axes.set_ylim(max(0, 100 * early - 15), 101)  # the first steps, near chance, would flatten the rest
    axes.set_xlim(0, results.settings.steps)
    axes.legend(frameon=False, loc="lower right")


def _score_histogram(axes: Axes, results: Results) -> None:
    plain_axes(
        axes, "What the T1000 score sees", "teacher's largest logit above the mean logit", "% of images, or of draws"
    )
    margin = (results.scores * 10 - 1) * 1000  # back from T1000 to logits
    relevant = results.collection.relevant
    low, high = margin.min().item(), margin.max().item()
    edges = torch.linspace(low, high + 1e-6, 41).tolist()
    share = torch.full_like(margin, 100 / len(margin))
    axes.hist(
        [margin[~relevant], margin[relevant]],
        bins=edges,
        weights=[share[~relevant], share[relevant]],
        stacked=True,
        color=[IRRELEVANT, RELEVANT],
        label=["collection: photo patches", "collection: digits"],
    )
    assert results.biased.probabilities is not None
    axes.hist(
        margin,
        bins=edges,
        weights=100 * results.biased.probabilities,
        histtype="step",
        color=BLUE,
        linewidth=2,
        label=f"biased draws, IQPR {results.biased.iqpr:g}",
    )
    axes.legend(frameon=False, loc="upper right")


def _drawn_images(axes: Axes, results: Results, arm: Arm, title: str) -> None:
    """The first images that such a table draws, framed by what they are."""
    assert arm.probabilities is not None
    generator = torch.Generator().manual_seed(results.settings.seed)
    drawn = torch.multinomial(arm.probabilities, TILE_ROWS * TILE_COLUMNS, replacement=True, generator=generator)
    relevant = results.collection.relevant[drawn]
    axes.imshow(_mosaic(results.collection.images[drawn, 0], relevant), interpolation="nearest")
    axes.set_title(title, loc="left", color=INK, fontweight="bold")
    axes.set_title(f"{int(relevant.sum())} of {len(drawn)} are digits", loc="right", color=RELEVANT)
    axes.axis("off")


def _mosaic(images: Tensor, relevant: Tensor) -> Any:
    """``[n, 8, 8]`` grey images as one RGB picture, each in a frame of the colour of its kind."""
    side, frame, gap = 8 * 6, 4, 3
    cell = side + 2 * (frame + gap)
    tiles = torch.ones(len(images), cell, cell, 3)
    for kind, colour in ((True, RELEVANT), (False, IRRELEVANT)):
        rgb = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        tiles[relevant == kind, gap : cell - gap, gap : cell - gap] = rgb
    inside = slice(gap + frame, gap + frame + side)
    tiles[:, inside, inside] = images.repeat_interleave(6, 1).repeat_interleave(6, 2)[..., None]
    rows = tiles.reshape(TILE_ROWS, TILE_COLUMNS, cell, cell, 3).transpose(1, 2)
    return rows.reshape(TILE_ROWS * cell, TILE_COLUMNS * cell, 3).numpy()
