"""What was drawn from a collection, and what is to be expected: numbers that stay on the device.

``counts`` says how often each item was drawn, int64 ``[N]``; :func:`draw_counts` makes it. Every function but this one and
:func:`underflowed`, which say something of each item, returns a float64 tensor ``[]``. All results are on the device of the
argument, made without waiting for the device and with shapes that depend on shapes alone, so that all can be captured in a
CUDA graph and compiled into one; ``.item()`` is left to who wants to see a number.
TypeError and ValueError say which argument has another dtype or shape than here.

Skip ratio and uniformity are those of "Distillation from heterogeneous unlabeled collections" (Begon & Geurts, Tables 4
and 6).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd import _checks

__all__ = [
    "draw_counts",
    "effective_sample_size",
    "expected_skip_ratio",
    "irrelevant_proportion",
    "relevant_draws",
    "skip_ratio",
    "underflow_ratio",
    "underflowed",
    "uniformity",
]


def draw_counts(indices: Tensor, items: int | None = None, *, out: Tensor | None = None) -> Tensor:
    """How often each item was drawn: int64 ``[items]``.

    Args:
        indices: int64, any shape. Those outside of ``[0, items)`` are not counted: a table without weight gives such.
        items: N, the items of the collection. Give this, or out.
        out: int64 ``[N]``, counts so far, to be added to in place and returned.

    Raises:
        TypeError, ValueError: indices or out not int64, out not a vector or on another device, neither or both of
        items and out, negative items.
    """
    _check("indices", indices, _INT64)
    if (items is None) == (out is None):
        raise ValueError(f"fastkd: items and out are {'neither' if out is None else 'both'} given, must be one of them")
    if items is not None:
        out = torch.zeros(_checks.check_size("items", items), dtype=torch.int64, device=indices.device)
    out = _check("out", out, _INT64)
    if out.dim() != 1 or out.device != indices.device:
        raise ValueError(
            f"fastkd: out has shape {tuple(out.shape)} on {out.device}, must have one dimension, on {indices.device}"
        )
    if out.shape[0] == 0:
        return out
    indices = indices.flatten()
    valid = (indices >= 0) & (indices < out.shape[0])
    return out.index_add_(0, torch.where(valid, indices, 0), valid.to(torch.int64))


def skip_ratio(counts: Tensor) -> Tensor:
    """Share of the collection that was never drawn; NaN of an empty one."""
    return (_check_vector("counts", counts, _INT64) == 0).double().mean()


def expected_skip_ratio(probabilities: Tensor, draws: int | Tensor) -> Tensor:
    """Mean of ``(1 - q_i)^draws``: the skip ratio to expect of ``draws`` draws with replacement.

    Args:
        probabilities: q, ``[N]``, a float dtype, each in [0, 1].
        draws: their number, an int of at least 0, or an integer tensor ``[]`` of it, such as ``counts.sum()``.
    """
    _check_vector("probabilities", probabilities, _checks.FLOATS)
    if isinstance(draws, Tensor):
        _check("draws", draws, _checks.INTEGERS)
        if draws.dim() != 0:
            raise ValueError(f"fastkd: draws has shape {tuple(draws.shape)}, must be (), one number")
    else:
        draws = _checks.check_count("draws", draws, 0, 2**63)
    # xlog1py: 0 log 0 = 0, where nothing is drawn of an item that is certain
    return torch.exp(torch.special.xlog1py(draws, -probabilities.double())).mean()


def uniformity(counts: Tensor) -> Tensor:
    """Entropy of the empirical distribution over the items drawn, divided by ln of their number: 1 = all equally often.

    Items never drawn do not count. 1 where a single item was drawn, NaN where none was.
    """
    _check_vector("counts", counts, _INT64)
    share = counts.double() / counts.sum()
    drawn = (counts > 0).sum()
    ratio = -torch.xlogy(share, share).sum() / drawn.double().log()
    ratio = ratio.clamp(max=1.0)  # which roundings may exceed
    return torch.where(drawn == 1, 1.0, ratio)


def irrelevant_proportion(counts: Tensor, relevant: Tensor) -> Tensor:
    """Share of irrelevant items among those drawn at least once; NaN where none was.

    Args:
        relevant: bool ``[N]``. Only an experiment that made its collection knows it; the method never does.
    """
    _check_pair("counts", counts, _INT64, "relevant", relevant, (torch.bool,))
    drawn = counts > 0
    return (drawn & ~relevant).sum().double() / drawn.sum()


def relevant_draws(counts: Tensor, relevant: Tensor) -> Tensor:
    """Share of relevant items among all draws, repetitions included; NaN where there was none."""
    _check_pair("counts", counts, _INT64, "relevant", relevant, (torch.bool,))
    return torch.where(relevant, counts, 0).sum().double() / counts.sum()


def effective_sample_size(weights: Tensor) -> Tensor:
    """``(sum w)^2 / sum w^2``: how many items, drawn uniformly, would be as diverse; from 1 to N.

    Kish, "Survey Sampling" (1965). One over it is the chance that two draws give the same item.

    Args:
        weights: ``[N]``, >= 0, of any scale and any float or integer dtype: probabilities, integer weights or counts. NaN
            where all are 0.
    """
    w = _check_vector("weights", weights, (*_checks.FLOATS, *_checks.INTEGERS)).double()
    if w.shape[0] == 0:
        return w.sum() / 0.0
    w = w / w.amax()  # squares of anything that float64 holds stay within its range
    return (w.sum() ** 2 / (w * w).sum()).clamp(1.0, w.shape[0])  # which roundings may exceed


def underflowed(scores: Tensor, weights: Tensor) -> Tensor:
    """Items of finite score that are never drawn, as their weight rounded to 0: bool ``[N]``.

    Args:
        scores: ``[N]``, of which the table was built, a float dtype.
        weights: int64 ``[N]``, :meth:`fastkd.AliasTable.weights`.
    """
    _check_pair("scores", scores, _checks.FLOATS, "weights", weights, _INT64)
    return scores.isfinite() & (weights == 0)


def underflow_ratio(scores: Tensor, weights: Tensor) -> Tensor:
    """Share of the items of finite score that are :func:`underflowed`; NaN where no score is finite."""
    return underflowed(scores, weights).sum().double() / scores.isfinite().sum()


_INT64 = (torch.int64,)


def _check(name: str, value: object, dtypes: Sequence[torch.dtype]) -> Tensor:
    if not isinstance(value, Tensor) and dtypes is _INT64:
        raise TypeError(f"fastkd: {name} is {type(value).__name__}, must be an int64 tensor")
    return _checks.check_dtype(name, value, dtypes)


def _check_vector(name: str, value: object, dtypes: Sequence[torch.dtype]) -> Tensor:
    vector = _check(name, value, dtypes)
    if vector.dim() != 1:
        raise ValueError(f"fastkd: {name} has shape {tuple(vector.shape)}, must be [N], one for each item")
    return vector


def _check_pair(
    name: str, value: object, dtypes: Sequence[torch.dtype], other: str, its: object, its_dtypes: Sequence[torch.dtype]
) -> None:
    """Vectors over the same items."""
    first, second = _check_vector(name, value, dtypes), _check_vector(other, its, its_dtypes)
    if first.shape != second.shape:
        raise ValueError(
            f"fastkd: {other} has shape {tuple(second.shape)}, must be that of {name}, {tuple(first.shape)}"
        )
