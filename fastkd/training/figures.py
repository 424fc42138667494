"""The curves of a training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from fastkd._files import write_whole
from fastkd.training.metrics import Line

__all__ = ["save_curves"]

BLUE, ORANGE, GREEN, RED, INK, GREY = "#0b6fb8", "#e07b1a", "#2a9d6f", "#b23a48", "#22303c", "#8a949e"
TERMS = (BLUE, ORANGE, GREEN, RED)  # the colours of the loss's terms, in this order


def save_curves(lines: Sequence[Line], path: str | Path, title: str = "") -> None:
    """Loss and its terms, accuracy, and learning rate over the epochs, as PNG.

    Args:
        lines: of :func:`fastkd.training.read_metrics`, one or more.

    Raises:
        ValueError: no line.
    """
    if not lines:
        raise ValueError("fastkd: lines is empty, must be one epoch or more to draw curves")
    figure = Figure(figsize=(14, 4.4), dpi=130, layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.12))
    FigureCanvasAgg(figure)
    loss, accuracy, rate = figure.subplots(1, 3, width_ratios=(1.25, 1.25, 0.8))
    _losses(loss, lines)
    _accuracies(accuracy, lines)
    _plain(rate, "Learning rate", "")
    _draw(rate, lines, "learning_rate", INK, "")
    rate.set_ylim(bottom=0)
    if title:
        figure.suptitle(title, x=0.012, ha="left", color=INK)
    write_whole(Path(path), lambda file: figure.savefig(file, format="png"))


def _losses(axes: Axes, lines: Sequence[Line]) -> None:
    _plain(axes, "Loss on the training images", "mean over the epoch")
    names = list(dict.fromkeys(name for line in lines for name in line))
    # the trainer's own lines name the terms between the loss and the accuracy
    terms = names[names.index("loss") + 1 : names.index("accuracy")]
    _draw(axes, lines, "loss", INK, "loss", width=2.4)
    if len(terms) > 1:
        for i, name in enumerate(terms):
            _draw(axes, lines, name, TERMS[i % len(TERMS)], name.removesuffix("_loss"))
    if "test_loss" in names:
        _draw(axes, lines, "test_loss", GREY, "test images, cross-entropy")
    axes.set_ylim(bottom=min(0.0, *(line["loss"] for line in lines)))
    axes.legend(frameon=False, loc="upper right")


def _accuracies(axes: Axes, lines: Sequence[Line]) -> None:
    _plain(axes, "Accuracy", "% of images right")
    percent = [{name: 100 * value if name.endswith("accuracy") else value for name, value in x.items()} for x in lines]
    _draw(axes, percent, "accuracy", BLUE, "training (as augmented)")
    if any("test_accuracy" in line for line in lines):
        _draw(axes, percent, "test_accuracy", ORANGE, "test", width=2.4)
        last = next(line for line in reversed(percent) if "test_accuracy" in line)
        axes.set_title(f"{last['test_accuracy']:.2f} % at the end", loc="right", color=ORANGE)
    axes.legend(frameon=False, loc="lower right")


def _draw(axes: Axes, lines: Sequence[Line], name: str, colour: str, label: str, *, width: float = 1.6) -> None:
    points = [(line["epoch"], line[name]) for line in lines if name in line]
    marker = "o" if len(points) <= 25 else ""
    axes.plot(*zip(*points, strict=True), color=colour, linewidth=width, label=label, marker=marker, markersize=3.5)


def _plain(axes: Axes, title: str, y: str) -> None:
    axes.set_title(title, loc="left", color=INK, fontweight="bold")
    axes.set_xlabel("epoch", color=INK)
    axes.set_ylabel(y, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, length=3)
    axes.grid(axis="y", color="#e4e7ea", linewidth=0.8)
    axes.set_axisbelow(True)
