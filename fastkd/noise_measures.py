"""How well wrong labels were found, where it is known which are wrong: what :mod:`fastkd.noise` measures.

Numbers are tensors on the device of the arguments; ``.item()`` is left to who wants to see them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastkd import _checks

if TYPE_CHECKING:
    from fastkd.selection import Values

__all__ = ["Detection", "Sweep", "measure", "sweep"]


class Detection(NamedTuple):
    """How well wrong labels were found. Shares are float64 ``[]``, counts int64 ``[]``."""

    precision: Tensor
    """Share of wrong ones among the labels that were called noisy; NaN where none was."""
    recall: Tensor
    """Share of those called noisy among the wrong ones; NaN where none is wrong."""
    f1: Tensor
    """``2 TP / (2 TP + FP + FN)``, the harmonic mean of both; NaN where no label is wrong and none was called so."""
    true_positives: Tensor
    """Wrong, and called noisy."""
    false_positives: Tensor
    """Right, and called noisy."""
    false_negatives: Tensor
    """Wrong, and not called noisy."""
    true_negatives: Tensor
    """Right, and not called noisy."""


class Sweep(NamedTuple):
    """The same for T thresholds of a score: a label is called noisy where ``score <= threshold``. All float64."""

    thresholds: Tensor
    """``[T]``"""
    precision: Tensor
    """``[T]``, as in :class:`Detection`, with its NaN."""
    recall: Tensor
    """``[T]``"""
    f1: Tensor
    """``[T]``"""
    best_threshold: Tensor
    """``[]``: the first one of highest F1. Where no thresholds were given, it lies halfway to the next higher score, if any,
    so that ``<`` and ``<=`` are the same. NaN where no threshold finds a wrong label."""
    roc_auc: Tensor
    """``[]``: area under the ROC curve, of all scores: how often a wrong label has a lower score than a right one, where equal
    ones count half. NaN unless there are both."""
    average_precision: Tensor
    """``[]``: precision, averaged over the wrong labels: each at its own score as the threshold. NaN where none is wrong."""


def measure(noisy: Values, truth: Values) -> Detection:
    """How well the labels that were called noisy are those that are wrong.

    Args:
        noisy: bool ``[N]``, such as ``find(...).noisy``.
        truth: bool ``[N]``, which labels are wrong, such as ``labels != true_labels``; on the same device if it is a tensor.

    Raises:
        TypeError, ValueError: another dtype, shape or device.
    """
    called = _vector("noisy", _checks.as_tensor("noisy", noisy), (torch.bool,))
    wrong = _truth(truth, called, "noisy")
    both, found, all_wrong = (called & wrong).sum(), called.sum(), wrong.sum()
    shares = _shares(both, found, all_wrong)
    return Detection(*shares, both, found - both, all_wrong - both, len(wrong) - found - all_wrong + both)


def sweep(score: Values, truth: Values, thresholds: Values | None = None) -> Sweep:
    """Precision, recall and F1 over the threshold of a score, areas under curves, by one sort.

    Args:
        score: how sure it is that a label is right, such as ``find(...).score``: floats ``[N]``, higher is surer; NaN is
            refused, for which a GPU is waited for.
        truth: as of :func:`measure`.
        thresholds: floats ``[T]``; all N scores by default, in ascending order.

    Raises:
        TypeError, ValueError: another dtype, shape or device, or NaN.
    """
    data = _vector("score", _checks.as_tensor("score", score), _checks.FLOATS).detach()
    wrong = _truth(truth, data, "score")
    asked = None
    if thresholds is not None:
        if not isinstance(thresholds, Tensor):
            thresholds = np.asarray(thresholds)  # of a list, torch makes float32
        asked = _vector("thresholds", _checks.as_tensor("thresholds", thresholds, data.device), _checks.FLOATS)
        asked = _together("thresholds", asked, data, "score").detach().double()
    ordered, order = data.double().sort(stable=True)
    if len(data) and bool(ordered[-1].isnan()):  # which sort puts last
        raise ValueError(f"fastkd: score has NaN at {int(data.isnan().nonzero()[0])}, must be numbers")
    wrong_so_far = torch.zeros(len(data) + 1, dtype=torch.int64, device=data.device)
    torch.cumsum(wrong[order], 0, out=wrong_so_far[1:])
    below, upto = (torch.searchsorted(ordered, ordered, right=right) for right in (False, True))
    at = ordered if asked is None else asked
    found = upto if asked is None else torch.searchsorted(ordered, asked.contiguous(), right=True)
    all_wrong = wrong_so_far[-1]
    precision, recall, f1 = _shares(wrong_so_far[found], found, all_wrong)

    best = torch.full((), torch.nan, dtype=torch.float64, device=data.device)
    if len(at):
        highest, index = f1.nan_to_num(-1.0).max(0)
        threshold = at[index]
        if asked is None:
            threshold = (threshold + ordered[upto[index].clamp(max=len(data) - 1)]) / 2
        best = torch.where(highest > 0, threshold, best)

    is_wrong = wrong[order]
    right_so_far = torch.arange(len(data) + 1, device=data.device) - wrong_so_far
    all_right = right_so_far[-1]
    behind = all_right - (right_so_far[upto] + right_so_far[below]).double() / 2
    area = torch.where(is_wrong, behind, 0.0).sum() / (all_wrong.double() * all_right)
    average = torch.where(is_wrong, wrong_so_far[upto].double() / upto, 0.0).sum() / all_wrong
    return Sweep(at, precision, recall, f1, best, area, average)


def _shares(both: Tensor, found: Tensor, wrong: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Precision, recall and F1."""
    right = both.double()
    return right / found, right / wrong, 2 * right / (found + wrong)


def _truth(truth: Values, of: Tensor, name: str) -> Tensor:
    wrong = _vector("truth", _checks.as_tensor("truth", truth, of.device), (torch.bool,))
    if wrong.shape != of.shape:
        raise ValueError(f"fastkd: truth has shape {tuple(wrong.shape)}, must be that of {name}, {tuple(of.shape)}")
    return _together("truth", wrong, of, name)


def _vector(name: str, values: Tensor, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    if _checks.check_dtype(name, values, dtypes).dim() != 1:
        raise ValueError(f"fastkd: {name} has shape {tuple(values.shape)}, must have one dimension")
    return values


def _together(name: str, values: Tensor, others: Tensor, whose: str) -> Tensor:
    if values.device != others.device:
        raise ValueError(f"fastkd: {name} is on {values.device}, must be on {others.device}, as {whose}")
    return values
