"""Batched mixtures of two 1-D Gaussians: ``torch.ops.fastkd.gmm_fit``, ``gmm_posterior`` and ``gmm_select``.

The semantics are those of scikit-learn's ``GaussianMixture(2)`` on one column: the same E-step, M-step (with
``reg_covar`` and its 10 eps), mean log-likelihood and stopping rule. The start is deterministic: Lloyd's algorithm to
convergence, from the centres (min, max) and from a split at the mean, and the better of the two. Nothing here is
differentiable; values are detached.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd import _checks
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
    init: Sequence[Tensor] | None = None,
    normalize: bool = False,
    max_iter: int = 10,
    tol: float = 1e-2,
    reg_covar: float = 5e-4,
) -> Mixtures:
    """Fits a mixture to each of B problems.

    Args:
        values: ``[n]`` (B = 1), ``[B, n]``, or with ``offsets`` flat ``[total]``; float32, float64, bfloat16 or
            float16. NaN and infinite values are left out.
        sample_weight: the shape of values, a float or integer dtype or bool, finite, not negative; values of weight 0 are
            left out. Weights of values that are left out are not looked at.
        lengths: integer ``[B]``: only the first ``lengths[b]`` values of row b count.
        offsets: integer ``[B + 1]``: problem b is ``values[offsets[b] : offsets[b + 1]]``.
        init: weights, means and standard deviations, ``[B, 2]`` each, to start EM from instead of Lloyd's algorithm;
            a problem for which they are not all finite starts afresh.
        normalize: map each problem to [0, 1] before the fit, so that ``reg_covar`` is relative to the squared range.
        max_iter: EM iterations at most, >= 1.
        tol: a problem stops once its mean log-likelihood changes by less than this.
        reg_covar: added to each variance.
    """
    max_iter, tol, reg_covar = check_options(max_iter, tol, reg_covar)
    normalize = _checks.check_flag("normalize", normalize)
    values, lengths, offsets = _problems_to_fit("values", values, lengths, offsets)
    sample_weight = _sample_weight(sample_weight, "values", values)
    weights, means, deviations = None, None, None
    if init is not None:
        if not isinstance(init, (tuple, list)) or len(init) != 3:
            raise ValueError("fastkd: init must be three tensors, of weights, means and variances")
        problems = _count(values, offsets)
        weights, means, deviations = (_pairs(name, t, problems) for name, t in zip(_INIT, init, strict=True))
    return Mixtures(
        *call_by_name(
            "gmm_fit",
            values,
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
    threshold = _checks.check_between("threshold", threshold, 0.0, 1.0)
    monotone = _checks.check_flag("monotone", monotone)
    values, lengths, offsets = _problems("values", values, lengths, offsets)
    problems = _count(values, offsets)
    if mixtures.weights.shape[0] != problems:
        raise ValueError(
            f"fastkd: values hold {problems} problems, must be as many as mixtures, {mixtures.weights.shape[0]}"
        )
    posterior, mask = call_by_name("gmm_posterior", values, offsets, lengths, *mixtures[:3], monotone, threshold)
    return posterior, mask


def gmm_select(
    losses: Tensor,
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
    """:func:`gmm_posterior` of the losses by their own :func:`gmm_fit`; on a GPU rows take one launch.

    Returns:
        mask, posterior: in this order, as :func:`fastkd.select_clean` has them.
    """
    max_iter, tol, reg_covar = check_options(max_iter, tol, reg_covar)
    threshold = _checks.check_between("threshold", threshold, 0.0, 1.0)
    normalize, monotone = _checks.check_flag("normalize", normalize), _checks.check_flag("monotone", monotone)
    losses, lengths, offsets = _problems_to_fit("losses", losses, lengths, offsets)
    sample_weight = _sample_weight(sample_weight, "losses", losses)
    posterior, mask = call_by_name(
        "gmm_select", losses, offsets, lengths, sample_weight, normalize, max_iter, tol, reg_covar, monotone, threshold
    )
    return mask, posterior


_INDICES = (*_checks.INTEGERS, torch.uint16, torch.uint32, torch.uint64)


def _count(values: Tensor, offsets: Tensor | None) -> int:
    """Of problems."""
    if offsets is not None:
        return offsets.shape[0] - 1
    return values.shape[0] if values.dim() == 2 else 1


def _sample_weight(sample_weight: Tensor | None, name: str, values: Tensor) -> Tensor | None:
    """Weights of a float dtype, in the shape of the values."""
    if sample_weight is None:
        return None
    _checks.check_dtype("sample_weight", sample_weight, (*_checks.FLOATS, *_INDICES, torch.bool))
    if sample_weight.shape != values.shape:
        raise ValueError(
            f"fastkd: sample_weight has shape {tuple(sample_weight.shape)}, must be that of {name}, "
            f"{tuple(values.shape)}"
        )
    if not sample_weight.is_floating_point():
        sample_weight = sample_weight.double()
    return sample_weight.detach()


_INIT = ("init_weights", "init_means", "init_deviations")


def check_start(name: str, t: Tensor) -> Tensor:
    """A parameter to start from, of any real dtype."""
    return _checks.check_dtype(name, t, (*_checks.FLOATS, *_INDICES))


def _pairs(name: str, t: Tensor, problems: int) -> Tensor:
    check_start(name, t)
    if t.shape != (problems, 2):
        raise ValueError(f"fastkd: {name} has shape {tuple(t.shape)}, must be ({problems}, 2)")
    return t.detach().double()


def check_options(max_iter: int, tol: float, reg_covar: float) -> tuple[int, float, float]:
    """These, where a fit can run with them."""
    max_iter = _checks.check_count("max_iter", max_iter, 1, 2**63)
    return max_iter, _checks.check_not_negative("tol", tol), _checks.check_not_negative("reg_covar", reg_covar)


def _problems_to_fit(
    name: str, values: Tensor, lengths: Tensor | None, offsets: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """:func:`_problems`, of which each is more than a row of a column that is meant as one."""
    values, lengths, offsets = _problems(name, values, lengths, offsets)
    if values.dim() == 2 and values.size(1) == 1 and values.size(0) > 1:
        raise ValueError(
            f"fastkd: {name} has shape {tuple(values.shape)}, which is {values.shape[0]} problems of one value each; one "
            f"problem is [n] ({name}.squeeze(1)), many are [B, n]"
        )
    return values, lengths, offsets


def _problems(
    name: str, values: Tensor, lengths: Tensor | None, offsets: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Values as the operators take them: ``[n]``, ``[B, n]``, or flat with offsets; lengths and offsets as int64."""
    if _checks.check_tensor(name, values).dtype not in _checks.FLOATS:
        raise TypeError(
            f"fastkd: {name} has dtype {values.dtype}, must be a float dtype, {_checks.names(_checks.FLOATS)}"
        )
    if values.requires_grad:
        values = values.detach()
    if (
        lengths is None and offsets is None and values.dim() in (1, 2)
    ):  # most calls, the small and quick ones among them
        return values, None, None
    if lengths is not None and offsets is not None:
        raise ValueError("fastkd: lengths and offsets are both given, must be at most one of them")
    for argument, index in (("lengths", lengths), ("offsets", offsets)):
        if index is not None and _checks.check_tensor(argument, index).dtype not in _INDICES:
            raise TypeError(f"fastkd: {argument} has dtype {index.dtype}, must be an integer dtype")
    if offsets is not None:
        if values.dim() != 1 or offsets.dim() != 1 or offsets.shape[0] < 1:
            raise ValueError(
                f"fastkd: {name} and offsets have shapes {tuple(values.shape)} and {tuple(offsets.shape)}, "
                "must be [total] and [B + 1]"
            )
        return values, None, offsets.to(torch.int64)
    if values.dim() not in (1, 2):
        raise ValueError(f"fastkd: {name} has shape {tuple(values.shape)}, must be [n] or [B, n]")
    if lengths is not None:
        if values.dim() != 2 or lengths.shape != values.shape[:1]:
            raise ValueError(
                f"fastkd: {name} and lengths have shapes {tuple(values.shape)} and {tuple(lengths.shape)}, "
                "must be [B, n] and [B]"
            )
        lengths = lengths.to(torch.int64)
    return values, lengths, None


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
    problems = _count(values, offsets)
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
