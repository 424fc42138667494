"""Figures of wrong labels, as :mod:`fastkd.noise` finds them. They need matplotlib, so import this where they are drawn."""

from __future__ import annotations

import math

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fastkd._checks import check_dtype
from fastkd._figures import BLUE, DASHED, GREEN, GREY, INK, ORANGE, canvas, plain_axes
from fastkd.noise_measures import Sweep

__all__ = ["score_histogram", "sweep_curves"]

BINS = 50


def score_histogram(
    score: Tensor, truth: Tensor | None = None, threshold: float | None = None, noisy: Tensor | None = None
) -> Figure:
    """How the scores of samples are distributed; where the truth is known, those of right and of wrong labels, else those that
    are called noisy and the others. Bars are of logarithmic height, as most samples are at the ends.

    Args:
        score: floats ``[N]`` in [0, 1], 1 is right; what is not is left out.
        truth: bool ``[N]``, which labels are wrong.
        threshold: of the score, drawn as a line.
        noisy: bool ``[N]``, which are called noisy.

    Raises:
        TypeError, ValueError: other dtypes or shapes.

    Source: Zong et al., arXiv:2209.01334, figure 2.
    """
    values = check_dtype("score", score).detach().cpu().double()
    if values.dim() != 1:
        raise ValueError(f"fastkd: score has shape {tuple(values.shape)}, must be [N]")
    groups = [("samples", GREY, torch.ones_like(values, dtype=torch.bool))]
    for name, chosen, right, wrong in (
        ("noisy", noisy, "others", "called noisy"),
        ("truth", truth, "right labels", "wrong labels"),
    ):
        if chosen is None:
            continue
        if check_dtype(name, chosen, (torch.bool,)).shape != values.shape:
            raise ValueError(f"fastkd: {name} has shape {tuple(chosen.shape)}, must be {tuple(values.shape)}, as score")
        groups = [(right, BLUE, ~chosen.cpu()), (wrong, ORANGE, chosen.cpu())]
    figure = canvas(7.0, 4.0, pad=0.1)
    axes = figure.subplots()
    plain_axes(axes, "Scores of the labels", "score: how sure it is that the label is right", "samples")
    edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64).tolist()
    highest = 1.0
    for name, colour, rows in groups:
        label = f"{name} ({int(rows.sum()):,})"
        finite = values[rows & values.isfinite()].numpy()
        heights, _, _ = axes.hist(finite, bins=edges, color=colour, alpha=0.55, label=label)
        highest = max(highest, float(torch.as_tensor(heights).max()))
    axes.set(xlim=(0, 1), ylim=(0.7, 2 * highest))
    if axes.dataLim.ymax > 0:  # there are bars
        axes.set_yscale("log")
    _draw_threshold(axes, threshold)
    _legend(figure, axes)
    return figure


def sweep_curves(found: Sweep, threshold: float | None = None) -> Figure:
    """Precision, recall and F1 over the threshold.

    Args:
        found: of one threshold or more.
        threshold: that was used, drawn as a line.

    Raises:
        ValueError: no threshold.

    Source: Zong et al., arXiv:2209.01334, figure 3.
    """
    at = found.thresholds.cpu()
    if len(at) == 0:
        raise ValueError("fastkd: found has no thresholds, must have one or more")
    order = at.argsort(stable=True)
    figure = canvas(7.0, 4.0, pad=0.1)
    axes = figure.subplots()
    plain_axes(axes, "Wrong labels found", "threshold of the score", "%")
    curves = (("precision", BLUE, found.precision), ("recall", GREEN, found.recall), ("F1", ORANGE, found.f1))
    for name, colour, values in curves:
        percent = 100 * values.cpu()[order]
        axes.plot(at[order].numpy(), percent.numpy(), color=colour, linewidth=2.4 if name == "F1" else 1.6, label=name)
    low, high = float(at.min()), float(at.max())
    axes.set(ylim=(0, 102), xlim=(low, high) if high > low else (low - 0.5, low + 0.5))
    best, area = float(found.best_threshold), float(found.roc_auc)
    said = [f"best threshold {best:.3g}"] if math.isfinite(best) else []
    said += [f"ROC AUC {100 * area:.1f} %"] if math.isfinite(area) else []
    axes.set_title(", ".join(said), loc="right", color=GREY, fontsize=9)
    _draw_threshold(axes, threshold)
    _legend(figure, axes)
    return figure


def _draw_threshold(axes: Axes, threshold: float | None) -> None:
    if threshold is not None:
        axes.axvline(threshold, color=INK, linestyle=DASHED, linewidth=1.4, label=f"threshold {threshold:g}")


def _legend(figure: Figure, axes: Axes) -> None:
    """Below: bars and curves leave no place inside."""
    lines, names = axes.get_legend_handles_labels()
    figure.legend(lines, names, frameon=False, fontsize=9, ncols=len(names), loc="outside lower center")
