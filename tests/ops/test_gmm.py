"""gmm: against scikit-learn step by step, against the numpy reference, and every input that breaks other mixtures."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_limits
from torch import Tensor

from fastkd import _C, TwoGaussianMixture, build_info, select_clean
from fastkd.ops import gmm as ops
from fastkd.reference import gmm as reference
from fastkd.reference.gmm import sample_losses
from fastkd.selection import FitStatus

pytestmark = pytest.mark.cuda_kernels
NAN = math.nan
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def batch(problems: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    rng = np.random.default_rng(seed)
    noise, separation = rng.uniform(0.1, 0.8, (problems, 1)), rng.uniform(0.3, 3, (problems, 1))
    return torch.from_numpy(sample_losses("gamma", (problems, n), noise, separation, rng)).to(dtype)


def all_outputs(mixtures: ops.Mixtures, posterior: Tensor) -> Tensor:
    return torch.cat([t.double().flatten() for t in (*mixtures, posterior)])


def on(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.to(device) for t in tensors)


@pytest.fixture
def allowed(reads_values: bool) -> Callable[[float], float]:
    """A tolerance as it is for the CPU, but 1e-6 for CUDA kernels, whose E-step takes its exponential in fp32."""
    return lambda tolerance: tolerance if reads_values else 1e-6


def assert_same(actual: ops.Mixtures, expected: ops.Mixtures, fixed_order: bool) -> None:
    """The same fit, maybe by another number of threads: the same bits where these do not count."""
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0 if fixed_order else 1e-6, atol=0 if fixed_order else 1e-9)


# ---- truth: scikit-learn ------------------------------------------------------------------------

STEPS, REG = 10, 1e-6


@cache
def sklearn_steps() -> tuple[Tensor, Tensor, list[np.ndarray], np.ndarray]:
    """1,000 random mixtures: values [1000, 300], lengths; after 0 to 10 EM steps parameters [3, 1000, 2]; bounds."""
    rng = np.random.default_rng(0)
    problems = 1000
    lengths = rng.integers(2, 300, problems)
    values = np.zeros((problems, 300))
    states = [np.zeros((3, problems, 2)) for _ in range(STEPS + 1)]
    bounds = np.zeros((STEPS + 1, problems))
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for b, n in enumerate(lengths):
            share = rng.uniform(0.05, 0.95)
            centre, width = rng.normal(0, 2, 2), rng.uniform(0.05, 1.5, 2)
            component = (rng.random(n) < share).astype(int)
            values[b, :n] = rng.normal(centre[component], width[component])
            x = values[b, :n, None]
            model = GaussianMixture(
                2,
                reg_covar=REG,
                weights_init=[1 - share, share],
                means_init=rng.choice(x[:, 0], 2, replace=False)[:, None],
                precisions_init=1 / rng.uniform(0.2, 3, (2, 1, 1)),
            )
            model._initialize_parameters(x, np.random.RandomState(0))
            model.covariances_ = 1 / model.precisions_init
            for step in range(STEPS + 1):
                if step > 0:
                    bounds[step, b], log_resp = model._e_step(x)
                    model._m_step(x, log_resp)
                state = np.stack([model.weights_, model.means_.ravel(), model.covariances_.ravel()])
                states[step][:, b] = state[:, np.argsort(state[1], kind="stable")]
    return torch.from_numpy(values), torch.from_numpy(lengths), states, bounds


def test_every_em_step_is_that_of_sklearn(device: torch.device, few: bool, allowed: Callable[[float], float]) -> None:
    values, lengths, states, bounds = sklearn_steps()
    part = 16 if few else len(values)
    values, lengths = on(device, values[:part], lengths[:part])
    states, bounds = [s[:, :part] for s in states], bounds[:, :part]
    tolerance = {"rtol": allowed(1e-7), "atol": allowed(1e-9)}
    weights, means, variances = (torch.from_numpy(s).to(device) for s in states[0])
    mixture = TwoGaussianMixture(max_iter=1, tol=0, reg_covar=REG)
    for step in range(1, STEPS + 1):  # a chain of single steps, each from where the last one came out
        mixture.fit(values, lengths=lengths, init=(weights, means, variances))
        weights, means, variances = mixture.weights_, mixture.means_, mixture.variances_
        for name, ours, theirs in zip(
            ("weights", "means", "variances"), (weights, means, variances), states[step], strict=True
        ):
            np.testing.assert_allclose(ours.cpu(), theirs, **tolerance, err_msg=f"{name} after step {step}")
        np.testing.assert_allclose(mixture.log_likelihood_.cpu(), bounds[step], **tolerance)
    at_once = ops.gmm_fit(
        values,
        lengths=lengths,
        init=tuple(torch.from_numpy(s).to(device) for s in (states[0][0], states[0][1], states[0][2] ** 0.5)),
        max_iter=STEPS,
        tol=0.0,
        reg_covar=REG,
    )
    np.testing.assert_allclose(at_once.means.cpu(), states[STEPS][1], **tolerance)


@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-3, 1e-5])
def test_stops_where_sklearn_stops(device: torch.device, allowed: Callable[[float], float], tol: float) -> None:
    rng = np.random.default_rng(1)
    for n, separation in itertools.product((50, 300), (0.3, 1.0, 3.0)):
        x = sample_losses("gamma", (n,), 0.4, separation, rng).astype(np.float64)
        start = (np.array([0.5, 0.5]), np.quantile(x, [0.2, 0.9]), np.array([0.05, 0.3]))
        model = GaussianMixture(
            2,
            max_iter=40,
            tol=tol,
            reg_covar=5e-4,
            weights_init=start[0],
            means_init=start[1][:, None],
            precisions_init=1 / start[2][:, None, None],
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(x[:, None])
        ours = TwoGaussianMixture(max_iter=40, tol=tol).fit(torch.from_numpy(x).to(device), init=start)
        assert int(ours.n_iter_) == model.n_iter_
        assert bool(ours.converged_) == model.converged_
        assert float(ours.log_likelihood_) == pytest.approx(model.lower_bound_, rel=allowed(1e-9))
        np.testing.assert_allclose(ours.means_.cpu(), np.sort(model.means_.ravel()), rtol=allowed(1e-8))


@cache
def sklearn_masks() -> list[tuple[np.ndarray, np.ndarray]]:
    """360 data sets drawn like losses, and the masks of scikit-learn for five seeds of its own start: [n], [5, n]."""
    result = []
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in ("gamma", "normal", "cross-entropy"):
            rng = np.random.default_rng(0)
            for n, noise, separation in itertools.product(
                (128, 512, 1024, 2048), (0.05, 0.1, 0.2, 0.4, 0.6, 0.9), (0.0, 0.5, 1.0, 2.0, 4.0)
            ):
                x = sample_losses(kind, (n,), noise, separation, rng)
                unit = ((x - x.min()).astype(np.float64) / (x.max() - x.min()))[:, None]
                masks = []
                for seed in range(5):
                    model = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=seed).fit(unit)
                    masks.append(model.predict_proba(unit)[:, model.means_.argmin()] > 0.5)
                result.append((x, np.stack(masks)))
    return result


def test_mask_is_as_close_to_sklearn_as_sklearn_to_itself(cpu: torch.device) -> None:
    """Were ours one more seed of scikit-learn, it would differ from the five as they differ from one another."""
    ours, theirs, pairs = [], [], []
    for x, masks in sklearn_masks():
        mask = select_clean(torch.from_numpy(x).to(cpu))[0].numpy()
        ours.append(np.mean(masks != mask))
        among = [np.mean(a != b) for a, b in itertools.combinations(masks, 2)]
        theirs.append(np.mean(among))
        pairs.append(np.max(among))
    assert np.mean(theirs) > 0  # the starts do differ, or the comparison says nothing
    assert np.mean(ours) <= np.mean(theirs)
    assert np.max(ours) <= np.max(pairs)


# ---- truth: the reference -----------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(
    device: torch.device,
    few: bool,
    allowed: Callable[[float], float],
    dtype: torch.dtype,
    weighted: bool,
    normalize: bool,
) -> None:
    generator = torch.Generator().manual_seed(0)
    for n in (2, 9, 401) if few else (2, 3, 7, 8, 9, 41, 401, 1271):
        values = batch(3, n, seed=n, dtype=dtype)
        weight = torch.rand(3, n, generator=generator, dtype=torch.float64) + 0.01 if weighted else None
        options = {"normalize": normalize, "max_iter": 7, "tol": 1e-3, "reg_covar": 1e-3}
        mixtures = ops.gmm_fit(
            values.to(device), sample_weight=None if weight is None else weight.to(device), **options
        )
        for monotone in (False, True):
            posterior, mask = ops.gmm_posterior(values.to(device), mixtures, monotone=monotone)
            assert posterior.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert torch.equal(mask, posterior > 0.5)
            for b in range(3):
                x = values[b].double().numpy()
                truth = reference.fit(x, None if weight is None else weight[b].numpy(), **options)
                assert int(mixtures.iterations[b]) == truth.iterations
                assert int(mixtures.status[b]) == truth.status
                assert float(mixtures.log_likelihood[b]) == pytest.approx(
                    truth.log_likelihood, rel=allowed(1e-10), abs=allowed(1e-12)
                )
                rtol = allowed(1e-9)
                np.testing.assert_allclose(mixtures.weights[b].cpu(), truth.mixture.weights, rtol=rtol)
                np.testing.assert_allclose(mixtures.means[b].cpu(), truth.mixture.means, rtol=rtol, atol=allowed(1e-12))
                np.testing.assert_allclose(mixtures.deviations[b].cpu() ** 2, truth.mixture.variances, rtol=rtol)
                expected = reference.posterior(x, truth.mixture, monotone=monotone)
                atol = allowed(1e-9 if dtype == torch.float64 else 1e-7)
                np.testing.assert_allclose(posterior[b].cpu(), expected, rtol=allowed(1e-7), atol=atol)


def test_mean_far_from_its_start_keeps_its_variance(device: torch.device, allowed: Callable[[float], float]) -> None:
    """A start whose mean is 1e5 deviations off: sums about the old mean alone would lose ten digits of the variance."""
    rng = np.random.default_rng(3)
    x = np.concatenate([rng.normal(0, 1e-6, 500), rng.normal(1, 1e-6, 500)])
    start = reference.Mixture(np.array([0.5, 0.5]), np.array([-0.1, 1.2]), np.array([1e-3, 1e-3]))
    truth = reference.fit(x, start=start, max_iter=1, reg_covar=0)
    mixture = TwoGaussianMixture(max_iter=1, reg_covar=0).fit(torch.from_numpy(x).to(device), init=tuple(start))
    np.testing.assert_allclose(mixture.variances_.cpu(), truth.mixture.variances, rtol=allowed(1e-8))


def test_large_problem_in_chunks_matches_reference(
    device: torch.device, few: bool, allowed: Callable[[float], float]
) -> None:
    n = 3_001 if few else 70_001
    values = torch.from_numpy(sample_losses("normal", (n,), 0.3, 1.0, np.random.default_rng(0)))
    values[2_345] = NAN
    mixture = TwoGaussianMixture(tol=0).fit(values.to(device))
    truth = reference.fit(values.double().numpy(), tol=0)
    np.testing.assert_allclose(mixture.means_.cpu(), truth.mixture.means, rtol=allowed(1e-10))
    np.testing.assert_allclose(mixture.variances_.cpu(), truth.mixture.variances, rtol=allowed(1e-10))
    assert int(mixture.status_) == FitStatus.NON_FINITE


# ---- structure ----------------------------------------------------------------------------------


def test_batch_is_the_loop_over_its_rows(device: torch.device, few: bool, fixed_order: bool) -> None:
    values = batch(37, 101, dtype=torch.float32).to(device)
    together = ops.gmm_fit(values)
    mask, posterior = select_clean(values)
    for b in range(0, len(values), 9 if few else 1):
        alone = ops.gmm_fit(values[b])
        assert_same(alone, ops.Mixtures(*(t[b : b + 1] for t in together)), fixed_order)
        row_mask, row_posterior = select_clean(values[b])
        assert torch.equal(row_mask, mask[b])
        torch.testing.assert_close(row_posterior, posterior[b], rtol=0, atol=0 if fixed_order else 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ragged_is_dense_with_lengths_is_the_loop(device: torch.device, fixed_order: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([0, 1, 2, 3, 50, 0, 17, 64, 33])
    dense = batch(len(lengths), 64, dtype=dtype)
    weight = torch.rand(dense.shape, generator=generator)
    keep = torch.arange(64) < lengths[:, None]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    dense, weight, lengths, offsets, keep = on(device, dense, weight, lengths, offsets, keep)
    flat, flat_weight = dense[keep], weight[keep]
    dense = dense.masked_fill(~keep, NAN)  # never looked at
    weight = weight.masked_fill(~keep, -1)

    padded = ops.gmm_fit(dense, lengths=lengths, sample_weight=weight)
    ragged = ops.gmm_fit(flat, offsets=offsets, sample_weight=flat_weight)
    assert_same(padded, ragged, fixed_order)
    assert not (padded.status == FitStatus.NON_FINITE).any()
    posterior, mask = ops.gmm_posterior(dense, padded, lengths=lengths)
    flat_posterior, flat_mask = ops.gmm_posterior(flat, ragged, offsets=offsets)
    torch.testing.assert_close(posterior[keep], flat_posterior, rtol=0, atol=0 if fixed_order else 1e-6)
    assert torch.equal(mask[keep], flat_mask)
    assert not posterior[~keep].any()
    assert not mask[~keep].any()
    for b in range(len(lengths)):
        part = slice(int(offsets[b]), int(offsets[b + 1]))
        alone = ops.gmm_fit(flat[part], sample_weight=flat_weight[part])
        assert_same(alone, ops.Mixtures(*(t[b : b + 1] for t in ragged)), fixed_order)


def test_rows_with_a_stride(device: torch.device) -> None:
    wide = batch(6, 100, dtype=torch.float32).to(device)
    for view in (wide[::2, 10:70], wide.t()[:50], wide[:, ::3]):
        packed = ops.gmm_fit(view.contiguous())
        assert all(torch.equal(a, b) for a, b in zip(ops.gmm_fit(view), packed, strict=True))
        assert torch.equal(select_clean(view)[1], select_clean(view.contiguous())[1])


def test_integer_weights_are_repeated_samples(device: torch.device, allowed: Callable[[float], float]) -> None:
    generator = torch.Generator().manual_seed(0)
    for n, normalize in itertools.product((5, 64, 501), (False, True)):
        values = batch(1, n, seed=n)[0]
        counts = torch.randint(0, 5, (n,), generator=generator)
        counts[values.argmax()] = counts[values.argmin()] = 1
        values, counts = on(device, values, counts)
        options = {"normalize": normalize, "tol": 0.0, "max_iter": 6}
        weighted = ops.gmm_fit(values, sample_weight=counts, **options)
        repeated = ops.gmm_fit(values.repeat_interleave(counts), **options)
        for a, b in zip(weighted, repeated, strict=True):
            torch.testing.assert_close(a, b, rtol=allowed(1e-11), atol=allowed(1e-13))
        scaled = ops.gmm_fit(values, sample_weight=counts.double() * 1e-200, **options)
        for a, b in zip(weighted, scaled, strict=True):
            torch.testing.assert_close(a, b, rtol=allowed(1e-11), atol=allowed(1e-13))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_any_dtype(device: torch.device, dtype: torch.dtype) -> None:
    values = batch(2, 77, dtype=torch.float32).to(device)
    weight = (torch.arange(154).reshape(2, 77) % 4).to(device)
    expected = ops.gmm_fit(values, sample_weight=weight)
    assert all(
        torch.equal(a, b) for a, b in zip(ops.gmm_fit(values, sample_weight=weight.to(dtype)), expected, strict=True)
    )


def test_affine_maps_change_nothing_with_normalize(device: torch.device, allowed: Callable[[float], float]) -> None:
    values = batch(5, 200).to(device)
    mask, posterior = select_clean(values)
    for scale, shift in ((1e-150, 0.0), (1e150, 0.0), (1e-300, 0.0), (1e300, 0.0), (3.0, 1e6)):
        other_mask, other = select_clean(values * scale + shift)
        torch.testing.assert_close(other, posterior, rtol=1e-6, atol=allowed(1e-7))
        assert (other_mask != mask).sum() == 0


def test_components_are_ordered_by_mean(device: torch.device, allowed: Callable[[float], float]) -> None:
    values = batch(50, 60).to(device)
    start = [torch.full((50, 2), 0.5), values[:, :2].sort(descending=True).values, torch.full((50, 2), 0.4)]
    mixture = TwoGaussianMixture(tol=0).fit(values, init=tuple(t.to(device) for t in start))
    assert (mixture.means_[:, 0] <= mixture.means_[:, 1]).all()
    swapped = TwoGaussianMixture(tol=0).fit(values, init=tuple(t.flip(-1).to(device) for t in start))
    torch.testing.assert_close(mixture.means_, swapped.means_, rtol=allowed(1e-9), atol=allowed(1e-12))
    torch.testing.assert_close(mixture.weights_, swapped.weights_, rtol=allowed(1e-9), atol=allowed(1e-12))


def test_warm_start_goes_on_where_the_last_fit_stopped(device: torch.device, allowed: Callable[[float], float]) -> None:
    values = batch(4, 300).to(device)
    values[2] = 1.0  # constant: starts afresh next time
    whole = TwoGaussianMixture(max_iter=6, tol=0).fit(values)
    parts = TwoGaussianMixture(max_iter=2, tol=0, warm_start=True).fit(values).fit(values).fit(values)
    torch.testing.assert_close(parts.means_, whole.means_, rtol=allowed(1e-12), atol=0)
    torch.testing.assert_close(parts.variances_, whole.variances_, rtol=allowed(1e-11), atol=0)
    values[2] = values[1]
    parts.fit(values)
    assert parts.status_[2] == FitStatus.MAX_ITER
    fresh = TwoGaussianMixture(max_iter=2, tol=0).fit(values)
    assert torch.equal(parts.means_[2], fresh.means_[2])
    single = TwoGaussianMixture(max_iter=3, tol=0, warm_start=True).fit(values[0]).fit(values[0])
    torch.testing.assert_close(single.means_, whole.means_[0], rtol=allowed(1e-12), atol=0)


def test_monotone_posterior_never_rises(device: torch.device) -> None:
    grid = torch.linspace(-50, 50, 4001, dtype=torch.float64).expand(64, -1).contiguous().to(device)
    values = batch(64, 40).to(device)
    mixtures = ops.gmm_fit(values, max_iter=3)
    plain, _ = ops.gmm_posterior(grid, mixtures)
    assert (plain.diff() > 1e-3).any()  # unequal variances do turn it round
    monotone, _ = ops.gmm_posterior(grid, mixtures, monotone=True)
    assert (monotone.diff() <= 0).all()
    between = (grid >= mixtures.means[:, :1]) & (grid <= mixtures.means[:, 1:])
    assert torch.equal(monotone[between], plain[between])
    mask, posterior = select_clean(values, monotone=True)
    order = values.argsort(-1)
    assert (posterior.gather(-1, order).diff() <= 0).all()
    assert (mask.gather(-1, order).int().diff() <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_select_is_posterior_of_fit(
    device: torch.device, fixed_order: bool, dtype: torch.dtype, weighted: bool
) -> None:
    values = batch(20, 65, dtype=dtype)
    values[3] = 1.0
    values[4, 7] = NAN
    values[5] = NAN
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(values.shape, generator=generator) if weighted else None
    lengths = torch.randint(0, 65, (20,), generator=generator)
    values, lengths = on(device, values, lengths)
    weight = None if weight is None else weight.to(device)
    offsets = torch.arange(0, 20 * 65 + 1, 65, device=device)
    fit = {"normalize": True, "max_iter": 3}
    for x, w, layout in (
        (values, weight, {"lengths": lengths}),
        (values[:3], None if weight is None else weight[:3], {}),
        (values.reshape(-1), None if weight is None else weight.reshape(-1), {"offsets": offsets}),
    ):
        mixtures = ops.gmm_fit(x, sample_weight=w, **layout, **fit)
        for monotone, threshold in ((False, 0.5), (True, 0.2)):
            rule = {"monotone": monotone, "threshold": threshold}
            mask, posterior = ops.gmm_select(x, sample_weight=w, **layout, **fit, **rule)
            expected, _ = ops.gmm_posterior(x, mixtures, **layout, **rule)
            torch.testing.assert_close(posterior, expected, rtol=0, atol=0 if fixed_order else 1e-6)
            assert torch.equal(mask, posterior > threshold)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.3, 0.5, 0.9, 1.0])
def test_mask_is_posterior_above_threshold(device: torch.device, dtype: torch.dtype, threshold: float) -> None:
    mask, posterior = select_clean(batch(3, 333, dtype=dtype).to(device), threshold)
    assert torch.equal(mask, posterior > threshold)


def test_predictions(device: torch.device) -> None:
    values = batch(3, 90, dtype=torch.float32).to(device)
    values[0, 3] = NAN
    mixture = TwoGaussianMixture(normalize=True).fit(values)
    proba, label = mixture.predict_proba(values), mixture.predict(values)
    _, posterior = select_clean(values)
    assert proba.shape == (3, 90, 2)
    assert torch.equal(proba[..., 0], posterior)
    torch.testing.assert_close(proba.sum(-1), torch.ones_like(posterior))
    assert torch.equal(label == 0, posterior >= 0.5)
    assert label.dtype == torch.int64
    assert label[0, 3] == 1
    assert mixture.weights_.shape == mixture.means_.shape == mixture.variances_.shape == (3, 2)
    assert mixture.n_iter_.shape == mixture.converged_.shape == mixture.status_.shape == (3,)
    single = TwoGaussianMixture().fit(values[1].cpu().numpy())
    assert single.weights_.shape == (2,)
    assert single.n_iter_.shape == ()
    assert single.predict_proba(values[1].cpu().numpy()[:7]).shape == (7, 2)
    assert float(single.weights_.sum()) == pytest.approx(1)


def test_values_that_require_grad_are_detached(device: torch.device) -> None:
    values = batch(1, 50)[0].to(device).requires_grad_()
    mask, posterior = select_clean(values, sample_weight=torch.ones_like(values).requires_grad_())
    assert not posterior.requires_grad
    assert torch.equal(mask, select_clean(values.detach())[0])


# ---- machine: threads, instruction sets ----------------------------------------------------------


@pytest.mark.parametrize(("problems", "n"), [(1, 1024), (40, 700), (1, 40_000), (3, 70_000)])
def test_bits_do_not_depend_on_threads(cpu: torch.device, problems: int, n: int) -> None:
    values = batch(problems, n, dtype=torch.float32)
    values[0, 5] = NAN
    weight = torch.rand(problems, n, generator=torch.Generator().manual_seed(0))
    lengths = torch.full((problems,), n)
    lengths[-1] -= 17
    values, weight, lengths = on(cpu, values, weight, lengths)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            for sample_weight in (None, weight):
                mixtures = ops.gmm_fit(values, lengths=lengths, sample_weight=sample_weight, tol=0.0, max_iter=4)
                results.append(all_outputs(mixtures, ops.gmm_posterior(values, mixtures, lengths=lengths)[0]))
    finally:
        torch.set_num_threads(threads)
    for plain, weighted in zip(results[::2], results[1::2], strict=True):
        assert torch.equal(plain, results[0])
        assert torch.equal(weighted, results[1])


def test_instruction_sets_agree() -> None:
    order = ["baseline", "avx2", "avx512"]
    best = build_info()["cpu_instruction_set_best"]
    values = batch(30, 1271)
    weight = torch.rand(values.shape, generator=torch.Generator().manual_seed(0))
    results = []
    try:
        for name in order[: order.index(best) + 1]:
            _C.set_instruction_set(name)
            parts = []
            for sample_weight in (None, weight):
                mixtures = ops.gmm_fit(values, sample_weight=sample_weight, tol=0.0)
                parts.append(all_outputs(mixtures, ops.gmm_posterior(values, mixtures)[0]))
            results.append(torch.cat(parts))
    finally:
        _C.set_instruction_set(best)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-12, atol=1e-14)
