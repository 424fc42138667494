"""Selection of clean samples by a mixture of two Gaussians over their losses, batched, without leaving the device.

:class:`TwoGaussianMixture` is scikit-learn's ``GaussianMixture(2)`` for one column, for many problems at once;
:func:`select_clean` is the selection of TA-DFKD (and, with its arguments, of DivideMix) in one call.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from fastkd import _checks
from fastkd.ops import gmm as _ops

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Values: TypeAlias = Tensor | NDArray[Any]

__all__ = ["FitStatus", "TwoGaussianMixture", "select_clean"]


class FitStatus(enum.IntEnum):
    """How a fit ended. INVALID goes before CONSTANT and TOO_FEW, these before NON_FINITE, before CONVERGED and MAX_ITER.

    Values take part in a fit when they are finite and their sample weight is positive. Whatever the status,
    non-finite values have posterior 0 and are never selected.
    """

    CONVERGED = 0  #: the mean log-likelihood changed by less than tol
    MAX_ITER = 1  #: it still changed by more after max_iter iterations
    #: the values that take part are all equal: every finite value has posterior 1, and is selected but at threshold 1
    CONSTANT = 2
    TOO_FEW = 3  #: fewer than two values take part: with one as CONSTANT, with none nothing is selected
    NON_FINITE = 4  #: fitted without the NaN or infinite values among them
    #: on a GPU only, where the CPU raises: a sample weight of a finite value that is not finite or negative, negative initial
    #: parameters, lengths or offsets out of range; weights and means are 0, nothing is selected
    INVALID = 5


class TwoGaussianMixture:
    """Mixtures of two 1-D Gaussians by EM, one for each problem, after scikit-learn's ``GaussianMixture(2)``.

    >>> mixture = TwoGaussianMixture().fit(losses)          # losses: [n], or [B, n] for B mixtures at once
    >>> clean = mixture.predict_proba(losses)[..., 0]       # posterior of the component of lower mean

    Differences to scikit-learn: the start is deterministic (Lloyd's algorithm from the centres (min, max) and from a
    split at the mean, and the better of the two, where scikit-learn draws one k-means++ start at random); component 0
    always has the lower mean; no input raises for its values: equal, too few or non-finite ones are reported in
    ``status_``, and no result is ever NaN.

    Args:
        max_iter: EM iterations at most, >= 1.
        tol: a problem stops, by itself, once its mean log-likelihood changes by less than this.
        reg_covar: added to each variance, in squared units of the values (of [0, 1] with ``normalize``).
        normalize: map each problem to [0, 1] before the fit; parameters come back in the units of the values.
        monotone: let the posterior of the low component never rise with the value: it is taken at the values clamped to
            [low mean, high mean]. With unequal variances the plain posterior turns round beyond the means.
        warm_start: let ``fit`` start from the parameters of the fit before.

    Attributes end in an underscore and are there after ``fit``. They are float64 and on the device of the values, with
    component 0 of lower mean first; after a fit of ``[n]`` they have no leading B.
    """

    def __init__(
        self,
        *,
        max_iter: int = 10,
        tol: float = 1e-2,
        reg_covar: float = 5e-4,
        normalize: bool = False,
        monotone: bool = False,
        warm_start: bool = False,
    ) -> None:
        self.max_iter, self.tol, self.reg_covar = _ops.check_options(max_iter, tol, reg_covar)
        self.normalize = _checks.check_flag("normalize", normalize)
        self.monotone = _checks.check_flag("monotone", monotone)
        self.warm_start = _checks.check_flag("warm_start", warm_start)
        self._mixtures: _ops.Mixtures | None = None
        self._single = False

    def fit(
        self,
        values: Values,
        sample_weight: Values | None = None,
        lengths: Values | None = None,
        offsets: Values | None = None,
        *,
        init: tuple[Values, Values, Values] | None = None,
    ) -> TwoGaussianMixture:
        """Fits a mixture to each problem.

        Args:
            values: ``[n]`` (one problem), ``[B, n]``, or with ``offsets`` flat ``[total]``: float32, float64, bfloat16
                or float16 tensor, or numpy array. Non-finite values are left out. A column ``[n, 1]`` is refused: it
                would be n problems of one value.
            sample_weight: the shape of values, of a float or integer dtype or bool, finite, not negative: how often each
                value counts. Weights of values that are left out are not looked at.
            lengths: integer ``[B]``: only the first ``lengths[b]`` values of row b count.
            offsets: integer ``[B + 1]``: problem b is ``values[offsets[b] : offsets[b + 1]]``.
            init: weights, means and variances to start from, ``[B, 2]`` each (``[2]`` for one problem); a problem for
                which they are not all finite starts afresh.

        Lists and numpy arrays beside values on a GPU are copied there; tensors must be there already.

        Raises:
            ValueError, TypeError, RuntimeError: shapes or dtypes that do not fit, lengths or offsets out of range,
                a negative sample weight; on a GPU numbers in tensors never raise, see FitStatus.INVALID.
        """
        data = _checks.as_tensor("values", values)
        single = data.dim() == 1 and offsets is None
        start = None
        if init is not None:
            if not isinstance(init, (tuple, list)) or len(init) != 3:
                raise ValueError("fastkd: init must be three tensors, of weights, means and variances")
            weights, means, variances = (_rows(_checks.as_tensor("init", t, data.device), single) for t in init)
            start = (weights, means, _deviations(variances))
        elif self.warm_start and self._mixtures is not None:
            last = self._mixtures
            fitted = (last.iterations > 0)[:, None]
            start = (last.weights, last.means.where(fitted, torch.nan), last.deviations)
        self._mixtures = _ops.gmm_fit(
            data,
            sample_weight=_optional("sample_weight", sample_weight, data),
            lengths=_optional("lengths", lengths, data),
            offsets=_optional("offsets", offsets, data),
            init=start,
            normalize=self.normalize,
            max_iter=self.max_iter,
            tol=self.tol,
            reg_covar=self.reg_covar,
        )
        self._single = single
        return self

    def predict_proba(self, values: Values, lengths: Values | None = None, offsets: Values | None = None) -> Tensor:
        """Posterior of both components: ``[..., 2]``, low mean first, float32 (float64 for float64 values).

        Values, lengths and offsets as in :meth:`fit`, with as many problems. Non-finite values, and those beyond their
        problem's length, are (0, 1).
        """
        low, _ = self._posterior(values, lengths, offsets)
        return torch.stack((low, 1 - low), -1)

    def predict(self, values: Values, lengths: Values | None = None, offsets: Values | None = None) -> Tensor:
        """Component of each value: int64, 0 = low mean, 1 = high mean (and non-finite). Arguments as in :meth:`fit`."""
        low, _ = self._posterior(values, lengths, offsets)
        return (low < 0.5).long()

    def _posterior(self, values: Values, lengths: Values | None, offsets: Values | None) -> tuple[Tensor, Tensor]:
        if self._mixtures is None:
            raise RuntimeError("fastkd: this TwoGaussianMixture is not fitted, must be: call fit first")
        data = _checks.as_tensor("values", values)
        return _ops.gmm_posterior(
            data,
            self._mixtures,
            lengths=_optional("lengths", lengths, data),
            offsets=_optional("offsets", offsets, data),
            monotone=self.monotone,
        )

    def _attribute(self, name: str) -> Tensor:
        if self._mixtures is None:
            raise AttributeError("fastkd: this TwoGaussianMixture is not fitted, must be: call fit first")
        value: Tensor = getattr(self._mixtures, name)
        return value[0] if self._single else value

    @property
    def weights_(self) -> Tensor:
        """Weights, ``[B, 2]``; (1, 0) for CONSTANT and for TOO_FEW with one value, (0, 0) without any and for INVALID."""
        return self._attribute("weights")

    @property
    def means_(self) -> Tensor:
        """Means, ``[B, 2]``, in the units of the values."""
        return self._attribute("means")

    @property
    def deviations_(self) -> Tensor:
        """Standard deviations, ``[B, 2]``."""
        return self._attribute("deviations")

    @property
    def variances_(self) -> Tensor:
        """Variances, ``[B, 2]``; where the square of the deviation would be infinite, the largest float64."""
        return self.deviations_.square().clamp(max=torch.finfo(torch.float64).max)

    @property
    def n_iter_(self) -> Tensor:
        """EM iterations, int64 ``[B]``; 0 for CONSTANT, TOO_FEW and INVALID."""
        return self._attribute("iterations")

    @property
    def log_likelihood_(self) -> Tensor:
        """Mean log-likelihood before the last M-step, nats, ``[B]``: sklearn's ``lower_bound_``; 0 without a fit."""
        return self._attribute("log_likelihood")

    @property
    def status_(self) -> Tensor:
        """:class:`FitStatus`, int64 ``[B]``."""
        return self._attribute("status")

    @property
    def converged_(self) -> Tensor:
        """Bool ``[B]``: CONVERGED, CONSTANT, or NON_FINITE after fewer than ``max_iter`` iterations."""
        status = self.status_
        stopped = (status == FitStatus.NON_FINITE) & (self.n_iter_ < self.max_iter)
        return (status == FitStatus.CONVERGED) | (status == FitStatus.CONSTANT) | stopped

    def __repr__(self) -> str:
        return (
            f"TwoGaussianMixture(max_iter={self.max_iter}, tol={self.tol}, reg_covar={self.reg_covar}, "
            f"normalize={self.normalize}, monotone={self.monotone}, warm_start={self.warm_start})"
        )


def select_clean(
    losses: Values,
    threshold: float = 0.5,
    *,
    max_iter: int = 10,
    tol: float = 1e-2,
    reg_covar: float = 5e-4,
    normalize: bool = True,
    monotone: bool = False,
    sample_weight: Values | None = None,
    lengths: Values | None = None,
    offsets: Values | None = None,
) -> tuple[Tensor, Tensor]:
    """Which samples belong to the component of lower loss: min-max per batch, fit, ``posterior > threshold``.

    The selection of TA-DFKD, whose loss is the teacher's cross-entropy with its own prediction, and of DivideMix (Li et
    al., 2020), with the same defaults. Not differentiable; runs under ``torch.compile(fullgraph=True)``.

    Args:
        losses: ``[n]``, ``[B, n]`` for B independent batches, or with ``offsets`` flat ``[total]``; float32, float64,
            bfloat16 or float16 tensor, or numpy array. Non-finite losses are left out of the fit and never selected. A
            column ``[n, 1]`` is refused.
        threshold: in [0, 1].
        Other arguments as in :class:`TwoGaussianMixture` and its ``fit``.

    Returns:
        mask: bool, the shape of losses; posterior: float32 (float64 for float64 losses), the same shape. Equal losses
        are all selected, but at threshold 1, above which nothing is; see :class:`FitStatus` for this and the other
        special cases.

    Raises:
        ValueError, TypeError, RuntimeError: as :meth:`TwoGaussianMixture.fit`.
    """
    data = _checks.as_tensor("losses", losses)
    return _ops.gmm_select(
        data,
        sample_weight=_optional("sample_weight", sample_weight, data),
        lengths=_optional("lengths", lengths, data),
        offsets=_optional("offsets", offsets, data),
        normalize=normalize,
        max_iter=max_iter,
        tol=tol,
        reg_covar=reg_covar,
        monotone=monotone,
        threshold=threshold,
    )


def _optional(name: str, values: Values | None, data: Tensor) -> Tensor | None:
    return None if values is None else _checks.as_tensor(name, values, data.device)


def _deviations(variances: Tensor) -> Tensor:
    """With the sign of the variance, at which the operator looks."""
    exact = _ops.check_start("init_variances", variances).double()
    return exact.abs().sqrt().copysign(exact)


def _rows(pair: Tensor, single: bool) -> Tensor:
    return pair.unsqueeze(0) if single and pair.dim() == 1 else pair
