"""The curves of a training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from fastkd._figures import BLUE, GREEN, GREY, INK, ORANGE, RED, canvas, plain_axes
from fastkd._files import write_whole
from fastkd.training.metrics import EpochMetrics

__all__ = ["save_curves"]

TERMS = (BLUE, ORANGE, GREEN, RED)  # the colours of the loss's terms, in this order


def save_curves(lines: Sequence[EpochMetrics], path: str | Path, title: str = "") -> None:
    """Loss and its terms, accuracy, and learning rate over the epochs, as PNG.

    Args:
        lines: of :func:`fastkd.training.read_metrics`, one or more.

    Raises:
        ValueError: no line.
    """
    if not lines:
        raise ValueError("fastkd: lines is empty, must be one epoch or more to draw curves")
    figure = canvas(14, 4.4, pad=0.12)
    loss, accuracy, rate = figure.subplots(1, 3, width_ratios=(1.25, 1.25, 0.8))
    _losses(loss, lines)
    _accuracies(accuracy, lines)
    _plain(rate, "Learning rate", "")
    _draw(rate, lines, "learning_rate", INK, "")
    rate.set_ylim(bottom=0)
    if title:
        figure.suptitle(title, x=0.012, ha="left", color=INK)
    write_whole(Path(path), lambda file: figure.savefig(file, format="png"))


def _losses(axes: Axes, lines: Sequence[EpochMetrics]) -> None:
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


def _accuracies(axes: Axes, lines: Sequence[EpochMetrics]) -> None:
    _plain(axes, "Accuracy", "% of images right")
    percent = [{name: 100 * value if name.endswith("accuracy") else value for name, value in x.items()} for x in lines]
    _draw(axes, percent, "accuracy", BLUE, "training (as augmented)")
    if any("test_accuracy" in line for line in lines):
        _draw(axes, percent, "test_accuracy", ORANGE, "test", width=2.4)
        last = next(line for line in reversed(percent) if "test_accuracy" in line)
        axes.set_title(f"{last['test_accuracy']:.2f} % at the end", loc="right", color=ORANGE)
    axes.legend(frameon=False, loc="lower right")


def _draw(axes: Axes, lines: Sequence[EpochMetrics], name: str, colour: str, label: str, *, width: float = 1.6) -> None:
    points = [(line["epoch"], line[name]) for line in lines if name in line]
    marker = "o" if len(points) <= 25 else ""
    axes.plot(*zip(*points, strict=True), color=colour, linewidth=width, label=label, marker=marker, markersize=3.5)


def _plain(axes: Axes, title: str, y: str) -> None:
    plain_axes(axes, title, "epoch", y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
