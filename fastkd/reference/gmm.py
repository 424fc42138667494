"""Plain numpy mixtures of two 1-D Gaussians, one problem at a time, in float64: the formulas and nothing else.

Semantics as in :mod:`fastkd.ops.gmm`. Squares are taken in the units of the values (or of [0, 1] with ``normalize``),
so inputs whose squares overflow or underflow are beyond it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

EPS = float(np.finfo(np.float64).eps)


class Mixture(NamedTuple):
    """Parameters: ``[2]`` each."""

    weights: Array
    means: Array
    variances: Array

    def in_order(self) -> Mixture:
        """The component of lower mean first."""
        return self if self.means[0] <= self.means[1] else Mixture(*(a[::-1].copy() for a in self))


class Fit(NamedTuple):
    """A mixture, and how it came about; status as in :class:`fastkd.selection.FitStatus`."""

    mixture: Mixture
    iterations: int
    log_likelihood: float
    status: int


def sample_losses(
    kind: str, shape: tuple[int, ...], noise: float | Array, separation: float | Array, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Values drawn like the losses of a classifier, of which a fraction ``noise`` belongs to mislabelled samples.

    kind: ``gamma`` (skewed), ``normal``, or ``cross-entropy`` (of random logits with ten classes).
    """
    noisy = rng.random(shape) < noise
    if kind == "gamma":
        values = np.where(noisy, rng.gamma(4, 0.25, shape) + separation, rng.gamma(1.2, 0.25, shape))
    elif kind == "normal":
        values = np.where(noisy, rng.normal(1 + separation, 0.3, shape), rng.normal(0.5, 0.15, shape))
    elif kind == "cross-entropy":
        margin = np.asarray(1 + 2 * separation)[..., None]
        logits, label = rng.normal(0, 1, (*shape, 10)), rng.integers(0, 10, (*shape, 1))
        np.put_along_axis(logits, label, np.take_along_axis(logits, label, -1) + margin, -1)
        label = np.where(noisy[..., None], rng.integers(0, 10, (*shape, 1)), label)
        values = (np.log(np.exp(logits).sum(-1, keepdims=True)) - np.take_along_axis(logits, label, -1))[..., 0]
    else:
        raise ValueError(f"kind is {kind!r}")
    return values.astype(np.float32)


def log_densities(values: Array, mixture: Mixture) -> Array:
    """``log(w_k N(x; m_k, v_k))``: ``[n] -> [n, 2]``."""
    weights, means, variances = mixture
    squares = (values[:, None] - means) ** 2 / variances
    densities: Array = np.log(np.maximum(weights, 1e-300)) - 0.5 * (np.log(2 * np.pi * variances) + squares)
    return densities


def e_step(values: Array, weight: Array, mixture: Mixture) -> tuple[Array, float]:
    """Responsibilities ``[n, 2]`` and the weighted mean log-likelihood."""
    log_joint = log_densities(values, mixture)
    log_total = np.logaddexp(log_joint[:, 0], log_joint[:, 1])
    return np.exp(log_joint - log_total[:, None]), float(weight @ log_total / weight.sum())


def m_step(values: Array, weight: Array, responsibilities: Array, reg_covar: float) -> Mixture:
    """scikit-learn's M-step; its 10 eps are in units of the mean sample weight."""
    r = weight[:, None] * responsibilities
    n = r.sum(0) + 10 * EPS * weight.mean()
    means = r.T @ values / n
    variances = (r * (values[:, None] - means) ** 2).sum(0) / n + reg_covar
    floor = (EPS * (values.max() - values.min())) ** 2  # the rounding of the values themselves
    return Mixture(n / n.sum(), means, np.maximum(variances, floor))


def lloyd(values: Array, weight: Array, threshold: float, cap: int = 300) -> tuple[NDArray[np.bool_], float]:
    """Lloyd's algorithm for two clusters from a threshold: which values are low, and the sum of squares between."""
    below = values <= threshold
    mean = float(np.average(values, weights=weight))
    for _ in range(cap):
        low = float(np.average(values[below], weights=weight[below]))
        high = float(np.average(values[~below], weights=weight[~below]))
        following = values <= low + 0.5 * (high - low)
        if (following == below).all():
            break
        below = following
    return below, float(weight[below].sum() * (low - mean) ** 2 + weight[~below].sum() * (high - mean) ** 2)


def initial_split(values: Array, weight: Array) -> NDArray[np.bool_]:
    """The better of the local optima of k-means found from the centres (min, max) and from a split at the mean."""
    outer, outer_between = lloyd(values, weight, values.min() + 0.5 * (values.max() - values.min()))
    inner, inner_between = lloyd(values, weight, float(np.average(values, weights=weight)))
    return inner if inner_between > outer_between else outer


def fit(
    values: Array,
    sample_weight: Array | None = None,
    *,
    start: Mixture | None = None,
    normalize: bool = False,
    max_iter: int = 10,
    tol: float = 1e-2,
    reg_covar: float = 5e-4,
) -> Fit:
    """The whole fit of one problem, ``[n]``."""
    values = np.asarray(values, np.float64)
    weight = np.ones_like(values) if sample_weight is None else np.asarray(sample_weight, np.float64)
    finite = np.isfinite(values)
    keep = finite & (weight > 0)
    x, weight = values[keep], weight[keep]
    spread = np.full(2, reg_covar)
    if len(x) == 0:
        return Fit(Mixture(np.zeros(2), np.zeros(2), spread), 0, 0.0, 3)
    if x.min() == x.max():
        return Fit(Mixture(np.array([1.0, 0.0]), np.full(2, x[0]), spread), 0, 0.0, 3 if len(x) == 1 else 2)
    shift, scale = (x.min(), x.max() - x.min()) if normalize else (0.0, 1.0)
    u = (x - shift) / scale
    if start is None:
        below = initial_split(u, weight)
        mixture = m_step(u, weight, np.stack([below, np.logical_not(below)], 1).astype(np.float64), reg_covar)
    else:
        weights = np.asarray(start.weights, np.float64)
        mixture = Mixture(weights / weights.sum(), (start.means - shift) / scale, start.variances / scale**2)
    bound, iteration, converged = -math.inf, 0, False
    while iteration < max_iter and not converged:
        iteration += 1
        responsibilities, log_likelihood = e_step(u, weight, mixture)
        mixture = m_step(u, weight, responsibilities, reg_covar)
        converged = abs(log_likelihood - bound) < tol
        bound = log_likelihood
    result = Mixture(mixture.weights, mixture.means * scale + shift, mixture.variances * scale**2).in_order()
    return Fit(result, iteration, bound - math.log(scale), 4 if not finite.all() else 0 if converged else 1)


def posterior(values: Array, mixture: Mixture, *, monotone: bool = False) -> Array:
    """Posterior of the low component: ``[n] -> [n]``; 0 where the value is not finite."""
    values = np.asarray(values, np.float64)
    finite = np.isfinite(values)
    if mixture.weights.min() == 0:
        return np.where(finite, float(mixture.weights[0] > 0), 0.0)
    x = np.where(finite, values, 0.0)
    if monotone:
        x = np.clip(x, *mixture.means)
    log_joint = log_densities(x, mixture)
    low = np.exp(log_joint[:, 0] - np.logaddexp(log_joint[:, 0], log_joint[:, 1]))
    return np.where(finite, low, 0.0)
