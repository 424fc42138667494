"""The curves of a training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from fastkd._figures import BLUE, GREEN, GREY, INK, ORANGE, RED, canvas, plain_axes
from fastkd._files import write_whole
from fastkd.training.metrics import EpochMetrics, is_loss, is_share

__all__ = ["save_curves"]

TERMS = (BLUE, ORANGE, GREEN, RED)  # the colours of the loss's terms, in this order


def save_curves(lines: Sequence[EpochMetrics], path: str | Path, title: str = "") -> None:
    """Loss and its terms, accuracies where there are any, and learning rates over the epochs, as PNG.

    Args:
        lines: of :func:`fastkd.training.read_metrics`, one or more.

    Raises:
        ValueError: no line.
    """
    if not lines:
        raise ValueError("fastkd: lines is empty, must be one epoch or more to draw curves")
    figure = canvas(14, 4.4, pad=0.12)
    shares = [name for name in _names(lines) if is_share(name)]
    widths = (1.25, *([1.25] if shares else []), 0.8)
    loss, *accuracy, rate = figure.subplots(1, len(widths), width_ratios=widths)
    _losses(loss, lines)
    for axes in accuracy:
        _shares(axes, lines, shares)
    _rates(rate, lines)
    if title:
        figure.suptitle(title, x=0.012, ha="left", color=INK)
    write_whole(Path(path), lambda file: figure.savefig(file, format="png"))


def _losses(axes: Axes, lines: Sequence[EpochMetrics]) -> None:
    _plain(axes, "Loss on the training images", "mean over the epoch")
    terms = [name for name in _names(lines) if is_loss(name) and name not in ("loss", "test_loss")]
    if "loss" in _names(lines):
        _draw(axes, lines, "loss", INK, "loss", width=2.4)
    if len(terms) > 1 or "loss" not in _names(lines):
        for i, name in enumerate(terms):
            _draw(axes, lines, name, TERMS[i % len(TERMS)], name.removesuffix("_loss"))
    if "test_loss" in _names(lines):
        _draw(axes, lines, "test_loss", GREY, "test images, cross-entropy")
    axes.set_ylim(bottom=min(0.0, *(line.get("loss", 0.0) for line in lines), 0.0))
    if axes.lines:
        axes.legend(frameon=False, loc="upper right")


def _shares(axes: Axes, lines: Sequence[EpochMetrics], names: Sequence[str]) -> None:
    _plain(axes, "Accuracy", "% of images right" if "accuracy" in names else "%")
    percent = [{name: 100 * value if name in names else value for name, value in line.items()} for line in lines]
    others = [name for name in names if name not in ("accuracy", "test_accuracy")]
    labels = {"accuracy": "training (as augmented)", "test_accuracy": "test"}
    colours = {"accuracy": BLUE, "test_accuracy": ORANGE}
    colours |= {name: (GREEN, RED, GREY)[i % 3] for i, name in enumerate(others)}
    for name in names:
        width = 2.4 if name == "test_accuracy" else 1.6
        _draw(axes, percent, name, colours[name], labels.get(name, name.replace("_", " ")), width=width)
    if "test_accuracy" in names:
        last = next(line for line in reversed(percent) if "test_accuracy" in line)
        axes.set_title(f"{last['test_accuracy']:.2f} % at the end", loc="right", color=ORANGE)
    axes.legend(frameon=False, loc="lower right")


def _rates(axes: Axes, lines: Sequence[EpochMetrics]) -> None:
    _plain(axes, "Learning rate", "")
    names = [name for name in _names(lines) if name.endswith("learning_rate")]
    for i, name in enumerate(names):
        colour = INK if len(names) == 1 else TERMS[i % len(TERMS)]
        _draw(axes, lines, name, colour, name.removesuffix("_learning_rate"))
    axes.set_ylim(bottom=0)
    if len(names) > 1:
        axes.legend(frameon=False, loc="upper right")


def _names(lines: Sequence[EpochMetrics]) -> list[str]:
    return list(dict.fromkeys(name for line in lines for name in line))


def _draw(axes: Axes, lines: Sequence[EpochMetrics], name: str, colour: str, label: str, *, width: float = 1.6) -> None:
    points = [(line["epoch"], line[name]) for line in lines if name in line]
    marker = "o" if len(points) <= 25 else ""
    axes.plot(*zip(*points, strict=True), color=colour, linewidth=width, label=label, marker=marker, markersize=3.5)


def _plain(axes: Axes, title: str, y: str) -> None:
    plain_axes(axes, title, "epoch", y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
