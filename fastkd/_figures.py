"""How fastkd's figures look: their colours, a canvas, plain axes. Needs matplotlib, so imported where a figure is drawn."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

__all__ = ["BLUE", "DASHED", "GREEN", "GREY", "INK", "ORANGE", "PALE", "RED", "canvas", "frame", "plain_axes"]

BLUE, ORANGE, GREEN, RED = "#0b6fb8", "#e07b1a", "#2a9d6f", "#b23a48"
INK, GREY, PALE = "#22303c", "#8a949e", "#e4e7ea"
DASHED = (0, (4, 3))


def canvas(width: float, height: float, pad: float | None = None) -> Figure:
    """A figure of this size, in inches, apart from pyplot's state: a library must not change which window is current.

    Args:
        pad: around the axes, in inches; matplotlib's by default.
    """
    layout = ConstrainedLayoutEngine(h_pad=pad, w_pad=pad)
    figure = Figure(figsize=(width, height), dpi=130, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def frame(axes: Axes) -> None:
    """No box around, and quiet ticks."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, length=3)
    axes.set_axisbelow(True)


def plain_axes(axes: Axes, title: str, x: str, y: str) -> None:
    """Titles, a frame, and lines to read the values off."""
    axes.set_title(title, loc="left", color=INK, fontweight="bold")
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.grid(axis="y", color=PALE, linewidth=0.8)
    frame(axes)
