"""Figures of wrong labels, by what is in them."""

from __future__ import annotations

import io
import warnings
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from refusals import NAN, refuses

from fastkd import noise
from fastkd.noise_figures import score_histogram, sweep_curves

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]

SCORE = torch.tensor([0.01, 0.015, 0.5, 0.99, 1.0, 1.0])
WRONG = torch.tensor([True, True, False, False, True, False])


def drawn(figure: Figure) -> Figure:
    """Without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(io.BytesIO(), format="png")
    return figure


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def bars(figure: Figure) -> list[int]:
    """Heights of all bars that there are."""
    axes: Any = figure.axes[0]
    return [int(bar.get_height()) for bar in axes.patches if bar.get_height()]


def test_scores_of_right_and_wrong_labels() -> None:
    figure = drawn(score_histogram(SCORE, WRONG, 0.5))
    assert legend(figure) == ["right labels (3)", "wrong labels (3)", "threshold 0.5"]
    assert bars(figure) == [1, 2, 2, 1]
    assert figure.axes[0].lines[0].get_xdata()[0] == 0.5  # type: ignore[index]


def test_scores_without_the_truth() -> None:
    assert legend(drawn(score_histogram(SCORE, noisy=SCORE < 0.3))) == ["others (4)", "called noisy (2)"]
    assert legend(drawn(score_histogram(SCORE.half()))) == ["samples (6)"]
    assert legend(score_histogram(SCORE, WRONG, noisy=SCORE < 0.3))[0] == "right labels (3)"


@pytest.mark.parametrize("score", [SCORE[:0], SCORE[:1], torch.full((3,), NAN), torch.zeros(4, dtype=torch.float64)])
def test_few_scores(score: torch.Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn(score_histogram(score, torch.zeros(len(score), dtype=torch.bool)))


def test_curves_over_the_threshold() -> None:
    """In the order of the thresholds, whatever theirs is."""
    at = torch.tensor([1.0, 0.0, 0.5])
    figure = drawn(sweep_curves(noise.sweep(SCORE, WRONG, at), 0.5))
    precision, recall, f1, threshold = figure.axes[0].lines
    assert list(recall.get_xdata()) == [0.0, 0.5, 1.0]  # type: ignore[arg-type]
    assert list(recall.get_ydata()) == pytest.approx([0.0, 200 / 3, 100.0])  # type: ignore[arg-type]
    assert list(precision.get_ydata()) == pytest.approx([NAN, 200 / 3, 50.0], nan_ok=True)  # type: ignore[arg-type]
    assert list(f1.get_ydata()) == pytest.approx([0.0, 200 / 3, 200 / 3])  # type: ignore[arg-type]
    assert list(threshold.get_xdata()) == [0.5, 0.5]  # type: ignore[arg-type]
    assert legend(figure) == ["precision", "recall", "F1", "threshold 0.5"]
    assert figure.axes[0].get_title(loc="right") == "best threshold 1, ROC AUC 72.2 %"


def test_curves_where_nothing_is_wrong_and_of_one_threshold() -> None:
    figure = drawn(sweep_curves(noise.sweep(SCORE, torch.zeros(6, dtype=torch.bool), [0.5])))
    assert figure.axes[0].get_title(loc="right") == ""


def test_refused() -> None:
    refuses("score has shape", lambda: score_histogram(SCORE[None]))
    refuses("score has dtype", lambda: score_histogram(WRONG))
    refuses("truth has dtype", lambda: score_histogram(SCORE, SCORE))
    refuses("truth has shape", lambda: score_histogram(SCORE, WRONG[:2]))
    refuses("noisy has shape", lambda: score_histogram(SCORE, noisy=WRONG[:2]))
    refuses("found has no thresholds", lambda: sweep_curves(noise.sweep(SCORE[:0], WRONG[:0])))
