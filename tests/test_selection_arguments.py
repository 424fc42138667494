"""Mixtures: every entry takes and refuses the same shapes, dtypes and numbers."""

from __future__ import annotations

import fractions
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from refusals import DTYPES, INF, NAN, refuses
from torch import Tensor

from fastkd import TwoGaussianMixture, select_clean
from fastkd.ops import gmm

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]

N = 8
LOSSES = torch.tensor([0.1, 0.2, 0.15, 0.12, 2.0, 2.1, 1.9, 0.11])
FITTED = TwoGaussianMixture().fit(LOSSES)
MIXTURES = gmm.gmm_fit(LOSSES)
# name of the values; what fits, and what takes a fit
FITS: dict[str, tuple[str, Callable[..., Any]]] = {
    "fit": ("values", lambda x, **more: TwoGaussianMixture().fit(x, **more)),
    "select_clean": ("losses", lambda x, **more: select_clean(x, **more)),
    "gmm_fit": ("values", lambda x, **more: gmm.gmm_fit(torch.as_tensor(x), **more)),
    "gmm_select": ("losses", lambda x, **more: gmm.gmm_select(torch.as_tensor(x), **more)),
}
POSTERIORS: dict[str, tuple[str, Callable[..., Any]]] = {
    "predict": ("values", lambda x, **more: FITTED.predict(x, **more)),
    "predict_proba": ("values", lambda x, **more: FITTED.predict_proba(x, **more)),
    "gmm_posterior": ("values", lambda x, **more: gmm.gmm_posterior(torch.as_tensor(x), MIXTURES, **more)),
}
ENTRIES = {**FITS, **POSTERIORS}


@pytest.mark.parametrize("column", [lambda x: x[:, None], lambda x: x[:, None].numpy(), lambda x: x[:, None].double()])
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_column_is_no_problem(entry: str, column: Callable[[Tensor], Any]) -> None:
    name, call = ENTRIES[entry]
    message = (
        "has shape .* 8 problems of one value" if entry in FITS else "hold 8 problems, must be as many as mixtures, 1"
    )
    with pytest.raises(ValueError, match=f"fastkd: {name} {message}"):
        call(column(LOSSES))


@pytest.mark.parametrize("entry", FITS)
def test_a_column_with_lengths_or_of_meta_tensors(entry: str) -> None:
    name, call = FITS[entry]
    for column, more in (
        (LOSSES[:, None], {"lengths": torch.ones(N, dtype=torch.int64)}),
        (LOSSES[:, None], {"sample_weight": torch.ones(N, 1)}),
        (LOSSES[:, None].to("meta"), {}),
        (LOSSES[:, None].clone().requires_grad_(), {}),
    ):
        with pytest.raises(ValueError, match=f"fastkd: {name} has shape .* problems of one value each"):
            call(column, **more)
    call(LOSSES[None, :1])  # one problem of one value
    call(LOSSES, offsets=torch.arange(N + 1))  # asked for in so many words
    call(LOSSES[:0, None])


@pytest.mark.parametrize("shape", [(), (1, 2, N), (2, 2, 2, 2)])
@pytest.mark.parametrize("entry", ENTRIES)
def test_shapes_of_values(entry: str, shape: tuple[int, ...]) -> None:
    name, call = ENTRIES[entry]
    refuses(f"{name} has shape", lambda: call(torch.ones(shape)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entry", ENTRIES)
def test_dtypes_of_mixtures(entry: str, dtype: torch.dtype) -> None:
    name, call = ENTRIES[entry]
    refuses(f"{name} has dtype", lambda: call(LOSSES.to(dtype)))
    integer = dtype in (torch.int64, torch.int32, torch.uint8)
    rows, lengths, offsets = LOSSES[None], torch.tensor([N]).to(dtype), torch.tensor([0, N]).to(dtype)
    for argument, values, index in (("lengths", rows, lengths), ("offsets", LOSSES, offsets)):
        if integer:
            call(values, **{argument: index})
        else:
            refuses(f"{argument} has dtype", lambda v=values, a=argument, i=index: call(v, **{a: i}))
    if entry not in FITS:
        return
    weight = torch.ones(N).to(dtype)
    if integer or dtype == torch.bool:  # how often a value counts
        call(LOSSES, sample_weight=weight)
    else:
        refuses("sample_weight has dtype", lambda: call(LOSSES, sample_weight=weight))
    if entry in ("fit", "gmm_fit"):
        pair = torch.ones(1, 2)
        for i, argument in enumerate(("init_weights", "init_means", "init_(deviations|variances)")):
            start = [pair, pair, pair]
            start[i] = pair.to(dtype)
            if integer:
                call(LOSSES, init=tuple(start))
            else:
                refuses(argument, lambda s=start: call(LOSSES, init=tuple(s)))


def numbers(result: Any) -> Tensor:
    return (
        result.means_ if isinstance(result, TwoGaussianMixture) else result[0] if isinstance(result, tuple) else result
    )


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if not entry.startswith("gmm")])
def test_what_is_no_tensor(entry: str) -> None:
    name, call = ENTRIES[entry]
    expected = numbers(call(LOSSES))
    for same in (
        LOSSES.numpy(),
        LOSSES.tolist(),
        LOSSES.clone().requires_grad_(),
    ):  # numpy and lists are read as torch does
        assert torch.equal(numbers(call(same)), expected)
    for wrong in (None, "losses", object(), {"a": 1}, [[1.0, 2.0], [1.0]], np.array(["a"]), np.array([None])):
        refuses(name, lambda w=wrong: call(w))
        if wrong is not None:
            refuses("lengths", lambda w=wrong: call(LOSSES[None], lengths=w))
            refuses("offsets", lambda w=wrong: call(LOSSES, offsets=w))


OPTIONS: dict[str, list[Any]] = {
    "max_iter": [0, -1, 2.5, 10.0, NAN, True, "10", None, torch.tensor([10]), 2**63],
    "tol": [-1e-3, NAN, INF, -INF, "0.1", None, 1j, torch.tensor(0.1), [0.1], 10**400],
    "reg_covar": [-1.0, NAN, INF, "0.1", None, torch.tensor(0.1), 10**400],
    "threshold": [-0.1, 1.1, NAN, INF, "0.5", None, torch.tensor(0.5)],
    "normalize": [1, 0, "yes", None, 1.0, torch.tensor(True)],
    "monotone": [1, 0, "yes", None, 1.0, torch.tensor(True)],
    "warm_start": [1, 0, "yes", None],
}
GOOD: dict[str, list[Any]] = {
    "max_iter": [1, np.int64(3), np.int32(3)],
    "tol": [0, 0.0, 1, np.float32(0.1), fractions.Fraction(1, 10)],
    "reg_covar": [0, np.float64(0.1)],
    "threshold": [0, 1, np.float32(0.5)],
    "normalize": [True, np.True_],
    "monotone": [False, np.False_],
    "warm_start": [True, np.False_],
}
WHERE: dict[str, dict[str, Callable[[dict[str, Any]], Any]]] = {
    "TwoGaussianMixture": {"": lambda more: TwoGaussianMixture(**more).fit(LOSSES).predict(LOSSES)},
    "select_clean": {"": lambda more: select_clean(LOSSES, **more)},
    "gmm_fit": {"": lambda more: gmm.gmm_fit(LOSSES, **more)},
    "gmm_select": {"": lambda more: gmm.gmm_select(LOSSES, **more)},
    "gmm_posterior": {"": lambda more: gmm.gmm_posterior(LOSSES, MIXTURES, **more)},
}
TAKES = {
    "TwoGaussianMixture": ("max_iter", "tol", "reg_covar", "normalize", "monotone", "warm_start"),
    "select_clean": ("max_iter", "tol", "reg_covar", "threshold", "normalize", "monotone"),
    "gmm_fit": ("max_iter", "tol", "reg_covar", "normalize"),
    "gmm_select": ("max_iter", "tol", "reg_covar", "threshold", "normalize", "monotone"),
    "gmm_posterior": ("threshold", "monotone"),
}


@pytest.mark.parametrize(("entry", "option"), [(e, o) for e, options in TAKES.items() for o in options])
def test_options_of_mixtures(entry: str, option: str) -> None:
    call = WHERE[entry][""]
    for value in OPTIONS[option]:
        refuses(f"{option} is", lambda v=value: call({option: v}))
        if entry == "TwoGaussianMixture":  # and already when it is made
            refuses(f"{option} is", lambda v=value: TwoGaussianMixture(**{option: v}))
    for value in GOOD[option]:
        call({option: value})


@pytest.mark.parametrize("option", ["max_iter", "tol", "reg_covar", "normalize", "monotone"])
def test_options_that_are_changed_later(option: str) -> None:
    """As scikit-learn's users do."""
    for value in OPTIONS[option]:
        mixture = TwoGaussianMixture()
        setattr(mixture, option, value)
        refuses(f"{option} is", lambda m=mixture: m.fit(LOSSES).predict(LOSSES))


@pytest.mark.parametrize("init", [(), (torch.ones(1, 2),) * 2, (torch.ones(1, 2),) * 4, torch.ones(3, 1, 2), "abc"])
def test_a_start_is_of_three(init: Any) -> None:
    for entry in ("fit", "gmm_fit"):
        refuses("init must be three tensors", lambda e=entry: FITS[e][1](LOSSES, init=init))
