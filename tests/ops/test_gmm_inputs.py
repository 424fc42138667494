"""gmm at its edges: degenerate problems, what a fuzzer finds, what torch asks of an operator, and what must raise."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastkd
from fastkd import _C, TwoGaussianMixture, build_info, select_clean
from fastkd.ops import gmm as ops
from fastkd.selection import FitStatus

pytestmark = pytest.mark.cuda_kernels
NAN, INF = math.nan, math.inf
LARGEST, SMALLEST = 1.7976931348623157e308, 5e-324

# ---- inputs that break other mixtures -----------------------------------------------------------

C, M, K, F, X = FitStatus.CONVERGED, FitStatus.MAX_ITER, FitStatus.CONSTANT, FitStatus.TOO_FEW, FitStatus.NON_FINITE
DEGENERATE = {  # name: values, status, mask
    "empty": ([], F, ""),
    "one": ([3.0], F, "1"),
    "two": ([1.0, 2.0], C, "10"),
    "two_equal": ([2.0, 2.0], K, "11"),
    "all_equal": ([0.7] * 9, K, "1" * 9),
    "all_zero": ([0.0] * 5, K, "1" * 5),
    "signed_zeros": ([0.0, -0.0, 0.0], K, "111"),
    "all_largest": ([LARGEST] * 4, K, "1111"),
    "all_but_one": ([0.0] * 20 + [1.0], C, "1" * 20 + "0"),
    "one_below": ([1.0] * 20 + [0.0], C, "0" * 20 + "1"),
    "two_values": ([5.0, 1.0, 5.0, 1.0, 1.0], C, "01011"),
    "one_ulp": ([1.0, 1.0 + 2**-52, 1.0], C, "101"),
    "one_outlier": ([0.1, 0.12, 0.13, 0.11, 9.0], C, "11110"),
    "huge_outlier": ([0.1, 0.12, 0.13, 0.11, 1e300], C, "11110"),
    "huge_outlier_below": ([0.1, 0.12, 0.13, 0.11, -1e300], C, "00001"),
    "outlier_in_many": ([0.001 * (i % 10) for i in range(500)] + [1.0], C, "1" * 500 + "0"),
    "nan": ([NAN, 1.0, 1.1, 5.0, 5.1], X, "01100"),
    "inf": ([1.0, 1.1, INF, 5.0, 5.1], X, "11000"),
    "minus_inf": ([1.0, 1.1, -INF, 5.0, 5.1], X, "11000"),
    "all_nan": ([NAN] * 4, F, "0000"),
    "all_inf": ([INF, -INF], F, "00"),
    "nan_and_one": ([NAN, 2.0], F, "01"),
    "nan_and_equal": ([NAN, 2.0, INF, 2.0], K, "0101"),
    "1e300": ([1e300, 1.1e300, 5e300, 5.1e300], C, "1100"),
    "largest": ([-LARGEST, -LARGEST * 0.9, LARGEST, LARGEST * 0.95], C, "1100"),
    "1e-300": ([1e-300, 1.1e-300, 5e-300, 5.1e-300], C, "1100"),
    "subnormal": ([0.0, SMALLEST, 9 * SMALLEST, 10 * SMALLEST], C, "1100"),
    "two_subnormals": ([0.0, SMALLEST], C, "10"),
    "far_from_zero": ([1e16, 1e16 + 2, 1e16 + 20, 1e16 + 22], C, "1100"),
}


@pytest.mark.parametrize("reg_covar", [5e-4, 0.0])
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_problems(device: torch.device, name: str, reg_covar: float) -> None:
    values, status, mask = DEGENERATE[name]
    x = torch.tensor(values, dtype=torch.float64, device=device)
    expected = torch.tensor([c == "1" for c in mask], dtype=torch.bool)
    selected, posterior = select_clean(x, reg_covar=reg_covar)
    assert selected.tolist() == expected.tolist()
    mixture = TwoGaussianMixture(normalize=True, reg_covar=reg_covar).fit(x)
    assert int(mixture.status_) == status
    assert (mixture.predict(x) == 0).tolist() == expected.tolist()
    fitted = [mixture.weights_, mixture.means_, mixture.deviations_, mixture.variances_, mixture.log_likelihood_]
    assert all(t.isfinite().all() for t in [*fitted, posterior])
    if status in (K, F):
        assert posterior.tolist() == expected.double().tolist()
        assert int(mixture.n_iter_) == 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):  # what the narrower dtype still tells apart
        narrow = x.to(dtype)
        same, _ = select_clean(narrow, reg_covar=reg_covar)
        assert same.tolist() == select_clean(narrow.double(), reg_covar=reg_covar)[0].tolist()


@pytest.mark.parametrize("name", ["all_equal", "1e300", "largest", "one_outlier", "nan", "far_from_zero", "two_values"])
def test_degenerate_problems_without_normalisation(device: torch.device, name: str) -> None:
    values, status, mask = DEGENERATE[name]
    x = torch.tensor(values, dtype=torch.float64, device=device)
    selected, _ = select_clean(x, normalize=False)
    assert selected.tolist() == [c == "1" for c in mask]
    assert int(TwoGaussianMixture().fit(x).status_) == status


def test_weights_that_leave_nothing(device: torch.device) -> None:
    x = torch.tensor([1.0, 1.1, 5.0, 5.1], device=device)
    for weight, status, mask in (
        ([0, 0, 0, 0], F, [False] * 4),
        ([0, 0, 2, 0], F, [True] * 4),
        ([0, 1e-300, 2, 0], C, [True, True, False, False]),
        ([SMALLEST, SMALLEST, 1e308, 1e308], C, None),
    ):
        w = torch.tensor(weight, dtype=torch.float64, device=device)
        mixture = TwoGaussianMixture(normalize=True).fit(x, sample_weight=w)
        assert int(mixture.status_) == status
        assert mixture.means_.isfinite().all()
        selected, posterior = select_clean(x, sample_weight=w)
        assert posterior.isfinite().all()
        assert mask is None or selected.tolist() == mask
    x[0] = NAN
    assert int(TwoGaussianMixture().fit(x, sample_weight=[0.0, 1, 1, 1]).status_) == X


@pytest.mark.parametrize("odd", [NAN, INF, -1.0])
def test_weights_of_what_is_left_out(odd: float, device: torch.device, reads_values: bool) -> None:
    """Losses that are not finite are not in the fit, whatever they weigh."""
    x = torch.tensor([0.1, NAN, 0.3, 5.0, INF, 5.2], device=device)
    weight = torch.ones_like(x)
    expected = select_clean(x, sample_weight=weight)
    weight[[1, 4]] = odd
    for ours, theirs in zip(select_clean(x, sample_weight=weight), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert int(TwoGaussianMixture().fit(x, sample_weight=weight).status_) == X
    weight[2] = odd
    if reads_values:
        with pytest.raises(RuntimeError, match="sample_weight of problem 0"):
            select_clean(x, sample_weight=weight)
    else:
        assert not select_clean(x, sample_weight=weight)[0].any()


def test_posterior_of_point_masses(device: torch.device) -> None:
    """Deviations of 0, which only the caller can give: the nearer mean wins, and where both are, the weights."""
    x = torch.tensor([-LARGEST, 0.0, 0.4, 0.6, 1.0, LARGEST, NAN], dtype=torch.float64, device=device)
    mixtures = ops.gmm_fit(x)
    for means, weights, expected in (
        ((0.0, 1.0), (0.5, 0.5), [1, 1, 1, 0, 0, 0, 0]),
        ((0.0, 0.0), (0.25, 0.75), [None, 0.25, None, None, None, None, 0]),
        ((1.0, 1.0), (1.0, 0.0), [1] * 6 + [0]),
    ):
        pairs = (torch.tensor([pair], dtype=torch.float64, device=device) for pair in (weights, means, (0.0, 0.0)))
        posterior, _ = ops.gmm_posterior(x, ops.Mixtures(*pairs, *mixtures[3:]))
        assert posterior.isfinite().all()
        for p, wanted in zip(posterior.tolist(), expected, strict=True):
            assert wanted is None or p == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("reg_covar", [0.0, SMALLEST, 5e-4, LARGEST])
@pytest.mark.parametrize("span", [SMALLEST, 1e-160, 1.0, 1e160, LARGEST])
def test_starts_far_off_and_of_no_width(device: torch.device, span: float, reg_covar: float) -> None:
    x = torch.tensor([0.0, span], dtype=torch.float64, device=device)
    for means, deviations in itertools.product(
        ((0.0, 0.0), (1.0, 1.0), (-LARGEST, LARGEST)), ((0.0, 0.0), (0.0, LARGEST), (1.0, 1.0))
    ):
        pairs = (torch.tensor([pair], dtype=torch.float64, device=device) for pair in ((0.0, 1.0), means, deviations))
        mixtures = ops.gmm_fit(x, init=tuple(pairs), reg_covar=reg_covar, max_iter=3)
        assert all(t.isfinite().all() for t in (*mixtures, *ops.gmm_posterior(x, mixtures)))


def test_max_iter_and_tol(device: torch.device) -> None:
    values = torch.rand(5, 100, generator=torch.Generator().manual_seed(0)).to(device)
    values[1, :] = 3.0
    mixture = TwoGaussianMixture(max_iter=4, tol=0).fit(values)
    assert mixture.n_iter_.tolist() == [4, 0, 4, 4, 4]
    assert mixture.converged_.tolist() == [False, True, False, False, False]
    easy = TwoGaussianMixture(max_iter=50, tol=1e9).fit(values)
    assert easy.n_iter_.tolist() == [2, 0, 2, 2, 2]
    assert easy.converged_.all()


edges = st.sampled_from([0.0, 1.0, -1.0, NAN, INF, -INF, LARGEST, -LARGEST, SMALLEST, 2.0**-1022, 1e-160, 1e160, 0.5])
numbers = st.one_of(edges, st.floats(width=64), st.floats(0, 1), st.integers(0, 3).map(float))


@settings(max_examples=300)
@given(
    values=st.lists(numbers, max_size=40),
    weighted=st.booleans(),
    data=st.data(),
    normalize=st.booleans(),
    monotone=st.booleans(),
    reg_covar=st.sampled_from([0.0, SMALLEST, 5e-4, 1.0, 1e300]),
    max_iter=st.integers(1, 12),
    isa=st.sampled_from(["baseline", "avx2", "avx512"]),
)
def test_no_input_gives_nan(
    values: list[float],
    weighted: bool,
    data: st.DataObject,
    normalize: bool,
    monotone: bool,
    reg_covar: float,
    max_iter: int,
    isa: str,
) -> None:
    n = len(values)
    weight = init = None
    if weighted:
        weight = data.draw(st.lists(st.floats(0, LARGEST), min_size=n, max_size=n))
        weight = torch.tensor(weight, dtype=torch.float64)
    if data.draw(st.booleans()):
        pairs = [data.draw(st.lists(numbers, min_size=2, max_size=2)) for _ in range(3)]
        weights, means, deviations = (torch.tensor([pair], dtype=torch.float64) for pair in pairs)
        init = (weights.abs(), means, deviations.abs())
    best = build_info()["cpu_instruction_set_best"]
    order = ["baseline", "avx2", "avx512"]
    _C.set_instruction_set(min(isa, best, key=order.index))
    try:
        for dtype in (torch.float64, torch.float32):
            x = torch.tensor(values, dtype=torch.float64).to(dtype)
            options = {"normalize": normalize, "reg_covar": reg_covar, "max_iter": max_iter, "init": init}
            mixtures = ops.gmm_fit(x, sample_weight=weight, **options)
            probe = torch.cat([x, torch.tensor([0.0, LARGEST, -LARGEST, 1.0, NAN], dtype=dtype)])
            posterior, mask = ops.gmm_posterior(probe, mixtures, monotone=monotone)
            assert all(t.isfinite().all() for t in (*mixtures, posterior))
            assert ((posterior >= 0) & (posterior <= 1)).all()
            assert not mask[~probe.isfinite()].any()
            assert (mixtures.means[:, 0] <= mixtures.means[:, 1]).all()
            assert (mixtures.deviations >= 0).all()
            assert 0 <= int(mixtures.status) <= 4
            if mixtures.weights[0, 0] > 0:
                assert float(mixtures.weights.sum()) == pytest.approx(1)
            if init is not None and all(t.isfinite().all() for t in init):  # a posterior of any parameters at all
                weights, means, deviations = init
                other = mixtures._replace(weights=weights, means=means.sort().values, deviations=deviations)
                posterior, _ = ops.gmm_posterior(probe, other, monotone=monotone)
                assert ((posterior >= 0) & (posterior <= 1)).all()
    finally:
        _C.set_instruction_set(best)


# ---- torch, and errors --------------------------------------------------------------------------


def samples(device: torch.device) -> list[tuple]:
    """Positional arguments of gmm_fit."""
    values = torch.rand(3, 20).to(device)
    weight, lengths = torch.ones_like(values), torch.tensor([20, 3, 0], device=device)
    offsets = torch.tensor([0, 5, 5, 60], device=device)
    start = tuple(torch.rand(3, 2, dtype=torch.float64, device=device) for _ in range(3))
    none = (None, None, None)
    return [
        (values, None, None, None, *none, False, 10, 1e-2, 5e-4),
        (values.half(), None, lengths, weight.bfloat16(), *start, True, 3, 0.0, 0.0),
        (values.reshape(-1).double(), offsets, None, weight.reshape(-1), *none, True, 3, 0.0, 1.0),
        (values[:0], None, None, None, *none, False, 10, 1e-2, 5e-4),
        (values[:, :0], None, None, None, *none, False, 10, 1e-2, 5e-4),
    ]


@pytest.mark.parametrize("case", range(5))
def test_opcheck(device: torch.device, case: int) -> None:
    arguments = samples(device)[case]
    torch.library.opcheck(torch.ops.fastkd.gmm_fit.default, arguments)
    parameters = torch.ops.fastkd.gmm_fit.default(*arguments)[:3]
    torch.library.opcheck(torch.ops.fastkd.gmm_posterior.default, (*arguments[:3], *parameters, case % 2 == 1, 0.5))
    torch.library.opcheck(torch.ops.fastkd.gmm_select.default, (*arguments[:4], *arguments[7:], case % 2 == 1, 0.5))


def test_compiles_as_one_graph(device: torch.device) -> None:
    values = torch.rand(3, 50).to(device)
    offsets = torch.tensor([0, 20, 20, 150], device=device)

    def dense(x: Tensor) -> tuple[Tensor, Tensor]:
        mask, posterior = select_clean(x * 2, monotone=True)
        return mask, posterior + 1

    def ragged(x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        return select_clean(x.reshape(-1), 0.4, offsets=offsets, sample_weight=torch.ones_like(x).reshape(-1))

    for function, arguments in ((dense, (values,)), (dense, (values[0],)), (ragged, (values, offsets))):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(compiled, function(*arguments), strict=True))


ERRORS = {  # name: call, exception, what the message says
    "max_iter": (lambda x: TwoGaussianMixture(max_iter=0), ValueError, "max_iter is 0, must be at least 1"),
    "tol": (lambda x: TwoGaussianMixture(tol=-1e-3), ValueError, "tol is -0.001, must be finite and not negative"),
    "tol_nan": (lambda x: TwoGaussianMixture(tol=NAN), ValueError, "tol is nan, must be"),
    "reg_covar": (lambda x: TwoGaussianMixture(reg_covar=-1.0), ValueError, "reg_covar is -1.0, must be"),
    "reg_covar_inf": (lambda x: select_clean(x, reg_covar=INF), ValueError, "reg_covar is inf, must be finite"),
    "threshold": (lambda x: select_clean(x, 1.5), ValueError, r"threshold is 1.5, must be in \[0, 1\]"),
    "scalar": (lambda x: select_clean(x[0, 0]), ValueError, r"losses has shape \(\), must be \[n\] or \[B, n\]"),
    "dims": (lambda x: select_clean(x[None]), ValueError, r"losses has shape \(1, 2, 6\), must be \[n\]"),
    "dtype": (lambda x: select_clean(x.int()), TypeError, "losses has dtype torch.int32, must be a float dtype"),
    "complex": (lambda x: select_clean(x.cfloat()), TypeError, "losses has dtype torch.complex64"),
    "weight_shape": (
        lambda x: select_clean(x, sample_weight=x[0]),
        ValueError,
        r"sample_weight has shape \(6,\), must be that of losses, \(2, 6\)",
    ),
    "negative_weight": (
        lambda x: select_clean(x, sample_weight=torch.tensor([[1.0] * 6, [1.0, -1, 1, 1, 1, 1]])),
        RuntimeError,
        "sample_weight of problem 1 has a negative, infinite or NaN element",
    ),
    "nan_weight": (lambda x: select_clean(x, sample_weight=x * NAN), RuntimeError, "sample_weight of problem 0"),
    "lengths_shape": (
        lambda x: select_clean(x, lengths=torch.tensor([1, 2, 3])),
        ValueError,
        r"losses and lengths have shapes \(2, 6\) and \(3,\), must be \[B, n\] and \[B\]",
    ),
    "lengths_flat": (
        lambda x: select_clean(x[0], lengths=torch.tensor([1])),
        ValueError,
        r"must be \[B, n\] and \[B\]",
    ),
    "lengths_long": (
        lambda x: select_clean(x, lengths=torch.tensor([1, 7])),
        RuntimeError,
        r"lengths\[1\] is 7, must be in \[0, 6\]",
    ),
    "lengths_negative": (lambda x: select_clean(x, lengths=torch.tensor([-1, 7])), RuntimeError, r"lengths\[0\] is -1"),
    "lengths_float": (lambda x: select_clean(x, lengths=torch.ones(2)), TypeError, "lengths has dtype torch.float32"),
    "both": (
        lambda x: select_clean(x, lengths=torch.ones(2).int(), offsets=torch.ones(2).int()),
        ValueError,
        "lengths and offsets are both given, must be at most one",
    ),
    "offsets_dims": (lambda x: select_clean(x, offsets=torch.tensor([0, 12])), ValueError, r"\[total\] and \[B \+ 1\]"),
    "offsets_first": (lambda x: select_clean(x[0], offsets=torch.tensor([1, 6])), RuntimeError, r"offsets\[0\] is 1"),
    "offsets_falls": (
        lambda x: select_clean(x[0], offsets=torch.tensor([0, 4, 3, 6])),
        RuntimeError,
        r"offsets\[2\] is 3, must be at least offsets\[1\], 4",
    ),
    "offsets_last": (
        lambda x: select_clean(x[0], offsets=torch.tensor([0, 5])),
        RuntimeError,
        r"offsets\[1\] is 5, must be the number of values, 6",
    ),
    "not_fitted": (lambda x: TwoGaussianMixture().predict(x), RuntimeError, "not fitted, must be: call fit first"),
    "no_attribute": (lambda x: TwoGaussianMixture().means_, AttributeError, "not fitted, must be: call fit first"),
    "other_problems": (
        lambda x: TwoGaussianMixture().fit(x).predict(x[0]),
        ValueError,
        "values hold 1 problems, must be as many as mixtures, 2",
    ),
    "init_shape": (
        lambda x: TwoGaussianMixture().fit(x, init=(torch.ones(2), torch.ones(2), torch.ones(2))),
        ValueError,
        r"init_weights has shape \(2,\), must be \(2, 2\)",
    ),
    "init_negative": (
        lambda x: ops.gmm_fit(x, init=(torch.ones(2, 2), torch.ones(2, 2), -torch.ones(2, 2))),
        RuntimeError,
        r"init_deviations\[0, 0\] is -1, must not be negative",
    ),
    "init_negative_variance": (
        lambda x: TwoGaussianMixture().fit(x, init=(torch.ones(2, 2), torch.ones(2, 2), -torch.ones(2, 2))),
        RuntimeError,
        r"init_deviations\[0, 0\] is -1, must not be negative",
    ),
    "warm_start_shape": (
        lambda x: TwoGaussianMixture(warm_start=True).fit(x).fit(x[:1]),
        ValueError,
        r"init_weights has shape \(2, 2\), must be \(1, 2\)",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    call, exception, message = ERRORS[name]
    with pytest.raises(exception, match="fastkd: .*" + message):
        call(torch.arange(12.0).reshape(2, 6))


@pytest.mark.parametrize("step", [1, 3])
def test_one_problem_is_a_batch_of_one(device: torch.device, step: int) -> None:
    """[n], whatever the stride of its values, against [1, n]: the same bits, of fit, posterior and selection."""
    values = torch.rand(200 * step, generator=torch.Generator().manual_seed(step)).to(device)[::step]
    weight = torch.linspace(0.0, 2.0, 200).to(device)
    batch, batch_weight = values.contiguous()[None], weight[None]
    fit, batch_fit = ops.gmm_fit(values, sample_weight=weight), ops.gmm_fit(batch, sample_weight=batch_weight)
    for one, many in zip(fit, batch_fit, strict=True):
        assert torch.equal(one, many)
    of_select = ops.gmm_select(values, sample_weight=weight), ops.gmm_select(batch, sample_weight=batch_weight)
    of_fit = ops.gmm_posterior(values, fit), ops.gmm_posterior(batch, batch_fit)
    for ones, manys in (of_select, of_fit):
        for one, many in zip(ones, manys, strict=True):
            assert one.shape == (200,)
            assert torch.equal(one, many[0])


def test_operator_errors() -> None:
    fit, posterior = torch.ops.fastkd.gmm_fit.default, torch.ops.fastkd.gmm_posterior.default
    select = torch.ops.fastkd.gmm_select.default
    x, pair = torch.rand(2, 6), torch.rand(2, 2, dtype=torch.float64)
    none = (None, None, None)
    for call, message in (
        (lambda: fit(x, None, None, None, *none, False, 0, 0.0, 0.0), "max_iter is 0"),
        (lambda: fit(x, None, None, None, *none, False, 1, NAN, 0.0), "tol is nan"),
        (
            lambda: fit(x, None, None, None, pair, None, None, False, 1, 0.0, 0.0),
            "init_weights, init_means and init_deviations are given in part",
        ),
        (lambda: fit(x, None, None, x[:1], *none, False, 1, 0.0, 0.0), r"sample_weight has shape \(1, 6\)"),
        (lambda: fit(x.int(), None, None, None, *none, False, 1, 0.0, 0.0), "values has dtype int32"),
        (
            lambda: posterior(x, None, None, pair, pair * NAN, pair, False, 0.5),
            r"means\[0, 0\] is -?nan, must be finite",
        ),
        (lambda: posterior(x, None, None, pair, pair, pair.float(), False, 0.5), "deviations has dtype float32"),
        (lambda: posterior(x, None, None, pair, pair, pair, False, NAN), "threshold is nan"),
        (lambda: posterior(x[None], None, None, pair, pair, pair, False, 0.5), r"values has shape \(1, 2, 6\)"),
        (
            lambda: posterior(x[0], None, None, pair, pair, pair, False, 0.5),
            r"weights has shape \(2, 2\), must be \(1, 2\)",
        ),
        (lambda: select(x, None, None, None, False, 10, 0.0, 0.0, False, 2.0), "threshold is 2"),
        (lambda: select(x, None, None, x[:1], False, 10, 0.0, 0.0, False, 0.5), r"sample_weight has shape \(1, 6\)"),
    ):
        with pytest.raises(RuntimeError, match="fastkd: " + message):
            call()


def test_exports() -> None:
    assert fastkd.select_clean is select_clean
    assert "max_iter=10" in repr(TwoGaussianMixture())
