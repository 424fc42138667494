"""Batched mixtures of two 1-D Gaussians: ``torch.ops.fastkd.gmm_fit``, ``gmm_posterior`` and ``gmm_select``.

The semantics are those of scikit-learn's ``GaussianMixture(2)`` on one column: the same E-step, M-step (with
``reg_covar`` and its 10 eps), mean log-likelihood and stopping rule. The start is deterministic: Lloyd's algorithm to
convergence, from the centres (min, max) and from a split at the mean, and the better of the two. Nothing here is
differentiable; values are detached.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd import _library as _library  # registers the operators
from fastkd.ops._fake import register_fake
from fastkd.ops._numbers import call_by_name


class Mixtures(NamedTuple):
    """Parameters of B mixtures, float64, in the units of the values; component 0 has the lower mean."""

    weights: Tensor  # [B, 2]
    means: Tensor  # [B, 2]
    deviations: Tensor  # [B, 2], standard deviations
    iterations: Tensor  # [B], int64
    log_likelihood: Tensor  # [B], mean over the values, nats; of the parameters before the last M-step; 0 without a fit
    status: Tensor  # [B], int64, see fastkd.selection.FitStatus


def gmm_fit(
    values: Tensor,
    *,
    sample_weight: Tensor | None = None,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    init: tuple[Tensor, Tensor, Tensor] | None = None,
    normalize: bool = False,
    max_iter: int = 10,
    tol: float = 1e-2,
    reg_covar: float = 5e-4,
) -> Mixtures:
    """Fits a mixture to each of B problems.

    Args:
        values: ``[n]`` (B = 1), ``[B, n]``, or with ``offsets`` flat ``[total]``; float32, float64, bfloat16 or
            float16. NaN and infinite values are left out.
        sample_weight: the shape of values, finite, not negative; values of weight 0 are left out.
        lengths: integer ``[B]``: only the first ``lengths[b]`` values of row b count.
        offsets: integer ``[B + 1]``: problem b is ``values[offsets[b] : offsets[b + 1]]``.
        init: weights, means and standard deviations, ``[B, 2]`` each, to start EM from instead of Lloyd's algorithm;
            a problem for which they are not all finite starts afresh.
        normalize: map each problem to [0, 1] before the fit, so that ``reg_covar`` is relative to the squared range.
        max_iter: EM iterations at most, >= 1.
        tol: a problem stops once its mean log-likelihood changes by less than this.
        reg_covar: added to each variance.
    """
    check_options(max_iter, tol, reg_covar)
    rows, lengths, offsets = _problems(values, lengths, offsets)
    sample_weight = _sample_weight(sample_weight, values, rows)
    weights, means, deviations = None, None, None
    if init is not None:
        problems = rows.shape[0] if offsets is None else offsets.shape[0] - 1
        weights, means, deviations = (_pairs(name, t, problems) for name, t in zip(_INIT, init, strict=True))
    return Mixtures(
        *call_by_name(
            "gmm_fit",
            rows,
            offsets,
            lengths,
            sample_weight,
            weights,
            means,
            deviations,
            normalize,
            max_iter,
            tol,
            reg_covar,
        )
    )


def gmm_posterior(
    values: Tensor,
    mixtures: Mixtures,
    *,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    monotone: bool = False,
    threshold: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """Posterior of the low component of each value, and ``posterior > threshold``.

    Args:
        values, lengths, offsets: as in :func:`gmm_fit`.
        monotone: take the posterior at the values clamped to [low mean, high mean], where it falls; beyond, unequal
            variances make it turn round.
        threshold: in [0, 1].

    Returns:
        posterior: the shape of values, float32 (float64 for float64 values); 0 for values that are not finite or beyond
        their problem's length; mask: bool, the same shape.
    """
    _check_threshold(threshold)
    rows, lengths, offsets = _problems(values, lengths, offsets)
    problems = rows.shape[0] if offsets is None else offsets.shape[0] - 1
    if mixtures.weights.shape[0] != problems:
        raise ValueError(
            f"fastkd: values hold {problems} problems, must be as many as mixtures, {mixtures.weights.shape[0]}"
        )
    posterior, mask = call_by_name("gmm_posterior", rows, offsets, lengths, *mixtures[:3], monotone, threshold)
    return (posterior, mask) if rows.dim() == values.dim() else (posterior.squeeze(0), mask.squeeze(0))


def gmm_select(
    values: Tensor,
    *,
    sample_weight: Tensor | None = None,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    normalize: bool = False,
    max_iter: int = 10,
    tol: float = 1e-2,
    reg_covar: float = 5e-4,
    monotone: bool = False,
    threshold: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """:func:`gmm_posterior` of the values by their own :func:`gmm_fit`; on a GPU rows take one launch."""
    check_options(max_iter, tol, reg_covar)
    _check_threshold(threshold)
    rows, lengths, offsets = _problems(values, lengths, offsets)
    sample_weight = _sample_weight(sample_weight, values, rows)
    posterior, mask = call_by_name(
        "gmm_select", rows, offsets, lengths, sample_weight, normalize, max_iter, tol, reg_covar, monotone, threshold
    )
    return (posterior, mask) if rows.dim() == values.dim() else (posterior.squeeze(0), mask.squeeze(0))


def _check_threshold(threshold: float) -> None:
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"fastkd: threshold is {threshold}, must be in [0, 1]")


def _sample_weight(sample_weight: Tensor | None, values: Tensor, rows: Tensor) -> Tensor | None:
    """Weights of a float dtype, in the shape of rows, which is how the operators take the values."""
    if sample_weight is None:
        return None
    if sample_weight.shape != values.shape:
        raise ValueError(
            f"fastkd: sample_weight has shape {tuple(sample_weight.shape)}, must be that of values, "
            f"{tuple(values.shape)}"
        )
    if not sample_weight.is_floating_point():
        sample_weight = sample_weight.double()
    return sample_weight.detach().reshape(rows.shape)


_INIT = ("init_weights", "init_means", "init_deviations")


def _pairs(name: str, t: Tensor, problems: int) -> Tensor:
    if t.shape != (problems, 2):
        raise ValueError(f"fastkd: {name} has shape {tuple(t.shape)}, must be ({problems}, 2)")
    return t.detach().double()


def check_options(max_iter: int, tol: float, reg_covar: float) -> None:
    """Raises where a fit cannot run with these."""
    if max_iter < 1:
        raise ValueError(f"fastkd: max_iter is {max_iter}, must be at least 1")
    for name, value in (("tol", tol), ("reg_covar", reg_covar)):
        if not 0.0 <= value < math.inf:
            raise ValueError(f"fastkd: {name} is {value}, must be finite and not negative")


def _problems(
    values: Tensor, lengths: Tensor | None, offsets: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Values as the operators take them: ``[B, n]``, or flat with offsets; lengths and offsets as int64."""
    if not values.is_floating_point():
        raise TypeError(f"fastkd: values has dtype {values.dtype}, must be a float dtype")
    if lengths is not None and offsets is not None:
        raise ValueError("fastkd: lengths and offsets are both given, must be at most one of them")
    for name, index in (("lengths", lengths), ("offsets", offsets)):
        if index is not None and (index.is_floating_point() or index.dtype == torch.bool):
            raise TypeError(f"fastkd: {name} has dtype {index.dtype}, must be an integer dtype")
    values = values.detach()
    if offsets is not None:
        if values.dim() != 1 or offsets.dim() != 1 or offsets.shape[0] < 1:
            raise ValueError(
                f"fastkd: values and offsets have shapes {tuple(values.shape)} and {tuple(offsets.shape)}, "
                "must be [total] and [B + 1]"
            )
        return values, None, offsets.to(torch.int64)
    if values.dim() not in (1, 2):
        raise ValueError(f"fastkd: values has shape {tuple(values.shape)}, must be [n] or [B, n]")
    if lengths is not None:
        if values.dim() != 2 or lengths.shape != values.shape[:1]:
            raise ValueError(
                f"fastkd: values and lengths have shapes {tuple(values.shape)} and {tuple(lengths.shape)}, "
                "must be [B, n] and [B]"
            )
        lengths = lengths.to(torch.int64)
    return (values if values.dim() == 2 else values.unsqueeze(0)), lengths, None


@register_fake("gmm_fit")
def _gmm_fit_fake(
    values: Tensor,
    offsets: Tensor | None,
    lengths: Tensor | None,
    sample_weight: Tensor | None,
    init_weights: Tensor | None,
    init_means: Tensor | None,
    init_deviations: Tensor | None,
    normalize: bool,
    max_iter: int,
    tol: float,
    reg_covar: float,
) -> tuple[Tensor, ...]:
    problems = values.shape[0] if offsets is None else offsets.shape[0] - 1
    pairs = [values.new_empty([problems, 2], dtype=torch.float64) for _ in range(3)]
    return (
        *pairs,
        values.new_empty([problems], dtype=torch.int64),
        values.new_empty([problems], dtype=torch.float64),
        values.new_empty([problems], dtype=torch.int64),
    )


@register_fake("gmm_posterior")
def _gmm_posterior_fake(
    values: Tensor,
    offsets: Tensor | None,
    lengths: Tensor | None,
    weights: Tensor,
    means: Tensor,
    deviations: Tensor,
    monotone: bool,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    return _like(values)


def _like(values: Tensor) -> tuple[Tensor, Tensor]:
    """A posterior and a mask."""
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    shape = list(values.shape)
    return values.new_empty(shape, dtype=dtype), values.new_empty(shape, dtype=torch.bool)


@register_fake("gmm_select")
def _gmm_select_fake(
    values: Tensor,
    offsets: Tensor | None,
    lengths: Tensor | None,
    sample_weight: Tensor | None,
    normalize: bool,
    max_iter: int,
    tol: float,
    reg_covar: float,
    monotone: bool,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    return _like(values)
