"""Which labels are probably wrong: by the losses, or by the probabilities that a network gave the samples.

:func:`find` says it of each sample, :func:`measure` and :func:`sweep` how well, where the truth is known. The network should
not know the labels that it is asked about by heart: take the losses of early epochs, or the probabilities of folds that it was
not trained on. ``fastkd detect-noise`` does all of this for files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from fastkd import _checks
from fastkd._names import unknown_name
from fastkd.functional import logit_stats
from fastkd.noise_measures import Detection, Sweep, measure, sweep
from fastkd.ops import gmm
from fastkd.statistics import draw_counts

if TYPE_CHECKING:
    from fastkd.selection import Values

__all__ = ["RULES", "Detection", "Findings", "Rule", "Sweep", "find", "measure", "sweep"]

Rule: TypeAlias = Literal["mixture", "probability", "confident", "disagreement"]
RULES: tuple[Rule, ...] = get_args(Rule)
_THRESHOLDS = {"mixture": 0.5, "probability": 0.05}  # by default, of the rules that have one
_CLOSE = 1e-6  # of two probabilities, below which cleanlab calls them equal
_LEAST_CLASS_THRESHOLD = 2e-6  # cleanlab's
_SUM_TOLERANCE = 0.01  # 16 bits are 0.002 off, three digits of ten classes 0.005
_MOST_CLASSES = 2**24  # of which a mixture each is fitted


@dataclass(frozen=True, eq=False)
class Findings:
    """What :func:`find` says of N samples; tensors on the device of its values."""

    noisy: Tensor
    """Bool ``[N]``: the label is probably wrong."""
    score: Tensor
    """How sure it is that the label is right, in [0, 1], 1 is right: ``[N]``, float32 (float64 for float64 values)."""
    suggested: Tensor | None
    """The most probable class of each sample, noisy or not, the first one of several: int64 ``[N]``. It may be the given label,
    even of a noisy sample, which is then just unlikely. -1 where the probabilities are not finite. None with losses."""
    rule: Rule
    threshold: float | None
    """Of the score; None where the rule has none."""
    class_thresholds: Tensor | None = None
    """Of confident learning: float64 ``[K]``, NaN for classes without a sample. None with other rules."""
    status: Tensor | None = None
    """:class:`fastkd.FitStatus` of each mixture: int64 ``[1]``, ``[K]`` with by_class. None with other rules."""

    @property
    def count(self) -> int:
        """How many are noisy. Waits for the device."""
        return int(self.noisy.sum())

    def ranked(self) -> Tensor:
        """Indices of the noisy samples, the lowest score first, of equal ones the lower index: int64. Waits for the device."""
        index = self.noisy.nonzero().squeeze(1)
        return index[self.score[index].argsort(stable=True)]


def find(
    labels: Values | None = None,
    probabilities: Values | None = None,
    *,
    logits: Values | None = None,
    losses: Values | None = None,
    rule: Rule = "mixture",
    threshold: float | None = None,
    by_class: bool = False,
) -> Findings:
    """Which of N labels are probably wrong, by one of four rules.

    >>> found = fastkd.noise.find(labels, probabilities, rule="confident")
    >>> found.ranked()[:10]                                 # the ten labels to look at first

    With p the probabilities of a sample and y its label:

    ``"mixture"``: two Gaussians are fitted to the losses ``-log p[y]`` of all samples, or with ``by_class`` to those of each
    class of labels, all in one call. The score is the posterior of the component of lower loss, and a sample is noisy where it
    is not above the threshold, 0.5 by default: :func:`fastkd.select_clean`, the division of DivideMix (Li et al., "DivideMix:
    Learning with noisy labels as semi-supervised learning", ICLR 2020, section 3.1). A loss that is not finite, such as that of
    ``p[y] = 0``, is left out of the fit, and its sample is noisy with score 0. Equal losses, or a single one, say nothing: no
    sample is noisy (but all are at threshold 1), and the status is CONSTANT or TOO_FEW.

    ``"probability"``: noisy where ``p[y] < threshold``, 0.05 by default, the fixed threshold of BLDR (Zong et al.,
    "Noise-robust bidirectional learning with dynamic sample reweighting", arXiv:2209.01334). The score is ``p[y]``.

    ``"confident"``: confident learning (Northcutt et al., "Confident learning: Estimating uncertainty in dataset labels", JAIR
    2021, eqs. 1 and 2). ``t_k`` is the mean of ``p[k]`` over the samples labelled k. Noisy where y is not the most probable
    class, and ``p[k] >= t_k`` for another class than y. The score is ``p[y]``, which they call self-confidence. Just this is
    what cleanlab 2.9 finds, ``find_label_issues(labels, probabilities, filter_by="confident_learning")``, with its tolerances:
    1e-6 below ``t_k``, which is at least 2e-6, still is above, and a ``p[y]`` 1e-6 below the largest still is the largest. It
    differs from the paper where the most probable class is below its threshold and two others, y the more probable of them,
    are above theirs: noisy here and in cleanlab, not in the paper. Probabilities of 32 and 16 bits are compared as cleanlab
    compares them in float64, with means that are not rounded. No sample counts for a class without samples.

    ``"disagreement"``: noisy where y is not the most probable class. The score is ``p[y]``.

    Args:
        labels: the given ones, an integer dtype, ``[N]``, each in [0, K): leave samples without a label out. With losses they
            are needed for ``by_class`` alone.
        probabilities: ``[N, K]``, in [0, 1], rows that sum to 1 within 0.01. A sample that has NaN among them counts nowhere:
            it is noisy with score 0, as nothing speaks for its label.
        logits: ``[N, K]``, before the softmax; log-probabilities are such, too. Where all rows are probabilities they are
            refused. A row that has NaN or inf, or nothing but -inf, is as one of NaN probabilities.
        losses: ``[N]``, of any loss that is lower for right labels.
        rule: with losses, ``"mixture"``.
        threshold: of the score, in [0, 1], for ``"mixture"`` and ``"probability"``.
        by_class: a mixture for each class. A class without samples has the status TOO_FEW. With losses K is the largest label
            and 1, at most 2^24.

        Give one of probabilities, logits and losses: float32, float64, bfloat16 or float16, as a tensor, an array or a list.
        Results are on its device, where labels must be, too, if they are a tensor. Labels, probabilities and logits are looked
        at, for which a GPU is waited for once; for nothing else it is.

    Raises:
        TypeError, ValueError: another dtype, shape or device, numbers out of range, arguments that do not go together.
    """
    kinds = {"probabilities": probabilities, "logits": logits, "losses": losses}
    given = [(kind, values) for kind, values in kinds.items() if values is not None]
    if len(given) != 1:
        raise ValueError(f"fastkd: {len(given)} of probabilities, logits and losses are given, must be one of them")
    kind, values = given[0]
    threshold, by_class = check_options(rule, threshold, by_class, kind)
    data = _checks.check_dtype(kind, _checks.as_tensor(kind, values)).detach()
    if kind == "losses":
        return _of_losses(data, labels, rule, threshold, by_class)

    if data.dim() != 2 or data.shape[1] == 0:
        raise ValueError(f"fastkd: {kind} has shape {tuple(data.shape)}, must be [N, K] with a class or more")
    if labels is None:
        raise ValueError(f"fastkd: labels is None, must be given with {kind}")
    target = _labels(labels, data, kind)
    softmax = rule == "confident"
    seen = _see_logits(data, target, softmax) if kind == "logits" else _see_probabilities(data, target)
    score = torch.where(seen.broken, 0.0, seen.own)
    limits = status = None
    if rule == "mixture":
        loss = torch.where(seen.broken, torch.nan, seen.loss)
        noisy, score, status = _divide(loss, target if by_class else None, data.shape[1], threshold)
    elif rule == "probability":
        assert threshold is not None
        noisy = score < threshold
    elif rule == "confident":
        noisy, limits = _confident(seen, target)
    else:
        noisy = seen.predicted != target
    suggested = torch.where(seen.broken, -1, seen.predicted)
    return Findings(noisy | seen.broken, score, suggested, rule, threshold, limits, status)


def check_options(rule: str, threshold: float | None, by_class: bool, kind: str) -> tuple[float | None, bool]:
    """The threshold, by default that of the rule, and ``by_class``, where they and the kind of values go together."""
    if rule not in RULES:
        raise unknown_name("rule", rule, RULES, listed=True)
    if kind == "losses" and rule != "mixture":
        raise ValueError(f"fastkd: rule is {rule!r}, must be 'mixture' with losses: they are no probabilities")
    by_class = _checks.check_flag("by_class", by_class)
    if by_class and rule != "mixture":
        raise ValueError(
            f"fastkd: by_class is True, must be False for rule {rule!r}: only mixtures are fitted by class"
        )
    if threshold is None:
        return _THRESHOLDS.get(rule), by_class
    if rule not in _THRESHOLDS:
        raise ValueError(f"fastkd: threshold is {threshold}, must be None for rule {rule!r}, which has none")
    return _checks.check_share("threshold", threshold), by_class


def _labels(labels: Values, data: Tensor, kind: str) -> Tensor:
    """As int64; what numbers they are is not looked at."""
    target = _checks.check_dtype("labels", _checks.as_tensor("labels", labels, data.device), _checks.INTEGERS)
    if target.shape != data.shape[:1]:
        raise ValueError(
            f"fastkd: labels has shape {tuple(target.shape)}, must be ({data.shape[0]},), one for each of the {kind}"
        )
    if target.device != data.device:
        raise ValueError(f"fastkd: labels is on {target.device}, must be on {data.device}, as the {kind}")
    return target.long()


def _of_losses(losses: Tensor, labels: Values | None, rule: Rule, threshold: float | None, by_class: bool) -> Findings:
    if losses.dim() != 1:
        raise ValueError(f"fastkd: losses has shape {tuple(losses.shape)}, must be [N]")
    if by_class and labels is None:
        raise ValueError("fastkd: labels is None, must be given with by_class")
    target = None if labels is None else _labels(labels, losses, "losses")
    classes = 0
    if target is not None and len(target):
        (most,) = _read(target, _MOST_CLASSES)
        classes = int(most) + 1
    noisy, score, status = _divide(losses, target if by_class else None, classes, threshold)
    return Findings(noisy, score, None, rule, threshold, status=status)


def _read(labels: Tensor, classes: int, *flags: Tensor) -> list[float]:
    """The largest label, and the flags, for which a GPU is waited for once; one sample or more.

    Raises:
        ValueError: a label that is not in [0, classes).
    """
    low, *numbers = torch.stack([labels.min().double(), labels.max().double(), *(f.double() for f in flags)]).tolist()
    if low < 0 or numbers[0] >= classes:
        sample = int(((labels < 0) | (labels >= classes)).nonzero()[0])
        hint = "; leave samples without a label out" if low < 0 else ""
        raise ValueError(f"fastkd: labels has {labels[sample]} at {sample}, must be in [0, {classes}){hint}")
    return numbers


class _Seen(NamedTuple):
    """What a network says of each sample, ``[N]``."""

    loss: Tensor
    """``-log p[y]``"""
    own: Tensor
    """``p[y]``"""
    highest: Tensor
    """The largest probability."""
    predicted: Tensor
    """The class that has it."""
    broken: Tensor
    """Whether the probabilities are not finite."""
    rows: Tensor | None
    """All probabilities, ``[N, K]``."""


def _see_probabilities(data: Tensor, labels: Tensor) -> _Seen:
    rows = _wide(data)
    highest, predicted = rows.max(1)  # NaN where one is, which is neither beyond nor off
    if len(rows):
        low, total = rows.amin(1), rows.sum(1)
        beyond = (low < -_CLOSE) | (highest > 1 + _CLOSE)
        off = (total - 1).abs() > _SUM_TOLERANCE
        _, is_beyond, is_off = _read(labels, rows.shape[1], beyond.any(), off.any())
        if is_beyond:
            sample = int(beyond.nonzero()[0])
            row = rows[sample]
            number = float(row[(row < -_CLOSE) | (row > 1 + _CLOSE)][0])
            raise ValueError(
                f"fastkd: probabilities has {number:g} at {sample}, must be in [0, 1]: logits and log-probabilities must "
                "be given as logits"
            )
        if is_off:
            sample = int(off.nonzero()[0])
            raise ValueError(
                f"fastkd: probabilities has a row at {sample} that sums to {float(total[sample]):g}, must sum to 1"
            )
    return _see_rows(rows, highest, predicted, labels)


def _see_logits(data: Tensor, labels: Tensor, softmax: bool) -> _Seen:
    """Without the probabilities of all classes unless they are needed: in logarithms no loss is infinite for its size."""
    rows = _wide(data)
    stats = logit_stats(data)
    if len(rows):
        classes = rows.shape[1]
        sums_to_1 = (classes * stats.mean - 1).abs().amax() < _SUM_TOLERANCE
        alike = (rows.amin() >= -_CLOSE) & (stats.max.amax() <= 1 + _CLOSE) & sums_to_1
        _, are_alike = _read(labels, classes, alike)
        if are_alike and classes > 1:
            raise ValueError(
                "fastkd: logits has only rows in [0, 1] that sum to 1, must be logits: give these as probabilities"
            )
    if softmax:
        rows = rows.softmax(1)
        return _see_rows(rows, *rows.max(1), labels)
    loss = stats.logsumexp - _of_labels(rows, labels)
    return _Seen(
        loss, (-loss).exp(), (stats.max - stats.logsumexp).exp(), stats.argmax, ~stats.logsumexp.isfinite(), None
    )


def _see_rows(rows: Tensor, highest: Tensor, predicted: Tensor, labels: Tensor) -> _Seen:
    own = _of_labels(rows, labels).clamp(0.0, 1.0)
    return _Seen(-own.log(), own, highest, predicted, highest.isnan(), rows)


def _wide(data: Tensor) -> Tensor:
    return data.float() if data.dtype.itemsize == 2 else data


def _of_labels(rows: Tensor, labels: Tensor) -> Tensor:
    return rows.gather(1, labels[:, None]).squeeze(1)


def _divide(
    losses: Tensor, labels: Tensor | None, classes: int, threshold: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy, posterior of the component of lower loss, status; with labels by a mixture for each class."""
    assert threshold is not None
    if labels is None:
        mixtures = gmm.gmm_fit(losses, normalize=True)
        posterior, clean = gmm.gmm_posterior(losses, mixtures, threshold=threshold)
        return ~clean, posterior, mixtures.status
    order = labels.argsort(stable=True)
    offsets = torch.zeros(classes + 1, dtype=torch.int64, device=labels.device)
    torch.cumsum(draw_counts(labels, classes), 0, out=offsets[1:])
    grouped = losses[order]
    mixtures = gmm.gmm_fit(grouped, offsets=offsets, normalize=True)
    posterior, clean = gmm.gmm_posterior(grouped, mixtures, offsets=offsets, threshold=threshold)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return ~clean[back], posterior[back], mixtures.status


def _confident(seen: _Seen, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy, and the thresholds of the classes, float64.

    cleanlab counts a sample for the one class above its threshold, or, where there are several, for the most probable of all
    classes, and then takes back those whose label is the most probable class. What is left is this: the label is not the most
    probable class, and another class is above its threshold.
    """
    rows = seen.rows
    assert rows is not None
    counted = ~seen.broken
    sums, counts = torch.zeros(2, rows.shape[1], dtype=torch.float64, device=rows.device)
    sums.index_add_(0, labels, torch.where(counted, seen.own, 0.0).double())
    counts.index_add_(0, labels, counted.double())
    thresholds = (sums / counts).clamp(min=_LEAST_CLASS_THRESHOLD)  # NaN where there is no sample
    exact = thresholds - _CLOSE
    least = exact.to(rows.dtype)  # rounded upwards: of numbers of this dtype the same ones reach it
    least = torch.where(least.double() < exact, least.nextafter(torch.full_like(least, torch.inf)), least)
    others = (rows >= least).scatter_(1, labels[:, None], False).any(1)
    near, highest = seen.own.double() + _CLOSE, seen.highest.double()
    most_probable = (seen.predicted == labels) | (near > highest) | ((near == highest) & (labels < seen.predicted))
    return others & ~most_probable, thresholds
