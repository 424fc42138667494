"""Mathematical claims, as in test_claims: of sample selection, statistics, scores, tables and samplers."""

from __future__ import annotations

import inspect
import math
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkd import AliasTable, CollectionSampler, TwoGaussianMixture, select_clean, statistics
from fastkd.reference import alias as plain_alias
from fastkd.reference import gmm as plain_gmm
from fastkd.selection import FitStatus

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]


# ---- selection -----------------------------------------------------------------------------------


@pytest.fixture
def losses(generator: torch.Generator) -> Tensor:
    """Two overlapping components of unequal variance."""
    low = 0.3 * torch.randn(120, generator=generator, dtype=torch.float64)
    return torch.cat([low, 1.2 + 0.8 * torch.randn(60, generator=generator, dtype=torch.float64)])


def log_likelihood(values: Tensor, mixture: TwoGaussianMixture) -> float:
    parameters = plain_gmm.Mixture(mixture.weights_.numpy(), mixture.means_.numpy(), mixture.variances_.numpy())
    weight = torch.ones(len(values), dtype=torch.float64).numpy()
    return plain_gmm.e_step(values.numpy(), weight, parameters)[1]


def test_log_likelihood_is_that_before_the_last_m_step(losses: Tensor) -> None:
    fits = [TwoGaussianMixture(max_iter=n, tol=0.0).fit(losses) for n in range(1, 8)]
    for before, after in pairwise(fits):
        assert after.log_likelihood_.item() == pytest.approx(log_likelihood(losses, before), rel=1e-9)


@pytest.mark.parametrize("tol", [1e-2, 1e-3, 1e-4])
def test_a_fit_stops_at_the_first_change_below_tol(tol: float, losses: Tensor) -> None:
    mixture = TwoGaussianMixture(max_iter=200, tol=tol).fit(losses)
    steps = [TwoGaussianMixture(max_iter=n, tol=0.0).fit(losses) for n in range(1, int(mixture.n_iter_) + 1)]
    changes = [abs(b.log_likelihood_.item() - a.log_likelihood_.item()) for a, b in pairwise(steps)]
    assert changes[-1] < tol
    assert all(change >= tol for change in changes[:-1])
    assert mixture.converged_


def test_reg_covar_is_in_squared_units_of_the_values_or_of_the_unit_interval() -> None:
    values = torch.tensor([0.0, 0.0, 10.0, 10.0], dtype=torch.float64)
    torch.testing.assert_close(
        TwoGaussianMixture(reg_covar=0.25).fit(values).variances_, torch.full((2,), 0.25).double()
    )
    scaled = TwoGaussianMixture(reg_covar=1e-4, normalize=True).fit(values)
    torch.testing.assert_close(scaled.variances_, torch.full((2,), 1e-4 * 10.0**2).double())


def test_the_plain_posterior_turns_round_and_the_monotone_one_is_that_of_clamped_values(losses: Tensor) -> None:
    grid = torch.linspace(-8, 8, 2001, dtype=torch.float64)
    plain_one, monotone = (TwoGaussianMixture(monotone=m).fit(losses) for m in (False, True))
    p, repaired = (m.predict_proba(grid)[:, 0] for m in (plain_one, monotone))
    assert (p.diff() > 0.01).any()
    assert (repaired.diff() <= 0).all()
    low, high = plain_one.means_.tolist()
    torch.testing.assert_close(repaired, plain_one.predict_proba(grid.clamp(low, high))[:, 0])


def test_select_clean_is_the_posterior_of_a_normalised_fit_above_the_threshold(losses: Tensor) -> None:
    for threshold in (0.0, 0.3, 0.5, 0.9, 1.0):
        mask, posterior = select_clean(losses, threshold)
        expected = TwoGaussianMixture(normalize=True).fit(losses).predict_proba(losses)[:, 0]
        torch.testing.assert_close(posterior, expected)
        assert torch.equal(mask, posterior > threshold)


@pytest.mark.parametrize("values", [[0.7] * 4, [0.7], [0.7, 0.7, math.nan, math.inf]])
def test_equal_losses_are_all_selected_but_at_threshold_1(values: list[float]) -> None:
    losses = torch.tensor(values)
    for threshold in (0.0, 0.5, 0.999, 1.0):
        mask, posterior = select_clean(losses, threshold)
        assert torch.equal(posterior, losses.isfinite().float())
        assert torch.equal(mask, losses.isfinite() & torch.tensor(threshold < 1.0))


def test_predict_is_posterior_below_half(losses: Tensor) -> None:
    mixture = TwoGaussianMixture().fit(losses)
    proba = mixture.predict_proba(losses)
    assert torch.equal(mixture.predict(losses), (proba[:, 0] < 0.5).long())
    torch.testing.assert_close(proba.sum(1), torch.ones_like(losses))


def test_a_variance_too_large_for_float64_is_its_largest_number() -> None:
    largest = torch.finfo(torch.float64).max
    values = largest * torch.tensor([-1.0, -0.9, 1.0, 0.95], dtype=torch.float64)
    mixture = TwoGaussianMixture(normalize=True).fit(values)
    assert mixture.deviations_.square().isinf().all()
    assert mixture.variances_.tolist() == [largest, largest]


def test_a_fit_without_its_nan_is_converged_after_fewer_than_max_iter(losses: Tensor) -> None:
    values = torch.cat([losses, torch.tensor([math.nan])])
    for max_iter in (1, 200):
        mixture = TwoGaussianMixture(max_iter=max_iter, tol=1e-3).fit(values)
        assert mixture.status_ == FitStatus.NON_FINITE
        assert mixture.converged_ == (max_iter == 200)


def test_the_defaults_are_those_of_dividemix() -> None:
    def defaults(function: Any, *names: str) -> list[Any]:
        return [inspect.signature(function).parameters[name].default for name in names]

    assert defaults(TwoGaussianMixture, "max_iter", "tol", "reg_covar") == [10, 1e-2, 5e-4]
    names = ("max_iter", "tol", "reg_covar", "threshold", "normalize", "monotone")
    assert defaults(select_clean, *names) == [10, 1e-2, 5e-4, 0.5, True, False]


# ---- statistics, scores, sampling ----------------------------------------------------------------


def test_one_over_the_effective_sample_size_is_the_chance_of_two_equal_draws(generator: torch.Generator) -> None:
    weights = torch.rand(50, generator=generator, dtype=torch.float64) ** 3
    p = [Fraction(w) for w in weights.tolist()]
    chance = sum(w * w for w in p) / sum(p) ** 2
    assert 1 / statistics.effective_sample_size(weights).item() == pytest.approx(float(chance), rel=1e-12)


@pytest.mark.parametrize("power", [0, 1, 5, 50])
def test_effective_sample_size_is_from_1_to_n(power: int, generator: torch.Generator) -> None:
    size = statistics.effective_sample_size(torch.rand(50, generator=generator) ** power).item()
    assert 1 - 1e-12 <= size <= 50 + 1e-12
    assert power > 0 or size == pytest.approx(50)


def test_uniformity_is_below_1_but_for_equal_counts() -> None:
    assert statistics.uniformity(torch.tensor([0, 3, 3, 0, 3])).item() == pytest.approx(1.0)
    assert 0 < statistics.uniformity(torch.tensor([0, 3, 3, 0, 4])).item() < 1 - 1e-4


def test_a_weight_underflows_near_2_to_the_minus_52_of_all() -> None:
    scores = torch.tensor([0.0, -50.0, -54.0], dtype=torch.float64) * math.log(2)
    table = AliasTable(scores, 1.0, seed=1)
    assert table.underflowed(scores).tolist() == [False, False, True]
    assert int(table.weights().sum()) < 2**52


def test_every_statistic_but_two_is_a_float64_number() -> None:
    counts, relevant, scores = torch.arange(4), torch.arange(4) > 1, torch.zeros(4)
    calls: dict[str, tuple[Any, ...]] = {
        "skip_ratio": (counts,),
        "expected_skip_ratio": (scores, 3),
        "uniformity": (counts,),
        "irrelevant_proportion": (counts, relevant),
        "relevant_draws": (counts, relevant),
        "effective_sample_size": (torch.ones(4),),
        "underflow_ratio": (scores, counts),
    }
    for name, arguments in calls.items():
        result = getattr(statistics, name)(*arguments)
        assert (result.dtype, result.shape) == (torch.float64, ()), name
    assert set(statistics.__all__) - set(calls) == {"draw_counts", "underflowed"}
    assert statistics.draw_counts(counts, 9).shape == (9,)
    assert statistics.underflowed(scores, counts).tolist() == [True, False, False, False]


def fixed_point(scores: list[float], counts: list[int]) -> list[int]:
    """``plain_alias.weights`` where each score is that of as many items: of more than a list can hold."""
    powers = [power for score in scores if (power := plain_alias.exp2_fixed(score, max(scores), 1 / math.log(2)))]
    partition = sum(n * ((mantissa >> -floor) + 1) for n, (mantissa, floor) in zip(counts, powers, strict=True))
    exponent = 51 - max(0, (partition - 1).bit_length() - 32)
    shifts = [32 - exponent - floor for _, floor in powers]
    return [(m + (1 << s >> 1)) >> s if s > 0 else m << -s for (m, _), s in zip(powers, shifts, strict=True)]


def test_total_variation_is_below_1_3e_6_for_2_to_the_31() -> None:
    """Items that round up from half a unit, beside some that make the unit as large as it gets."""
    few, repeated = [0.0, -0.3, -3.0, -20.0], [5, 1, 3, 2]
    expanded = [score for score, n in zip(few, repeated, strict=True) for _ in range(n)]
    weights = [w for w, n in zip(fixed_point(few, repeated), repeated, strict=True) for _ in range(n)]
    assert plain_alias.weights(expanded, 1.0)[0] == weights

    def distance(*halvings: float) -> float:
        scores = [-math.log(2) * t for t in halvings]
        counts = [1] * (len(scores) - 1) + [2**31 - len(scores) + 1]
        w, p = fixed_point(scores, counts), [math.exp(score) for score in scores]
        total, partition = (sum(n * x for n, x in zip(counts, of, strict=True)) for of in (w, p))
        assert total < 2**52
        return 0.5 * sum(n * abs(a / total - b / partition) for n, a, b in zip(counts, w, p, strict=True))

    worst = distance(0.0, 1 - 1e-6, 49.999)
    assert 1.2e-6 < worst < 1.3e-6
    assert all(distance(0.0, t) < 1e-6 for t in (1.0, 10.5, 31.0, 40.3, 48.999, 49.999, 50.999, 60.0))


def test_a_table_is_by_default_the_plain_softmax_and_seeded_by_torch(generator: torch.Generator) -> None:
    scores = torch.randn(50, generator=generator)
    assert torch.equal(AliasTable(scores).weights(), AliasTable(scores, 1.0).weights())
    with torch.random.fork_rng(devices=[]):
        seeds = []
        for _ in range(2):
            torch.manual_seed(3)
            seeds.append([AliasTable(scores).state_dict()["seed"] for _ in range(2)])
    assert seeds[0] == seeds[1]
    assert seeds[0][0] != seeds[0][1]


def test_draws_by_a_generator_are_the_first_of_its_seed(generator: torch.Generator) -> None:
    table = AliasTable(torch.randn(500, generator=generator), seed=1)
    few, many = (table.sample(n, torch.Generator().manual_seed(3)) for n in (40, 300))
    assert torch.equal(few, many[:40])
    assert torch.equal(table.sample(40), table.sample_at(1, 0, 40))  # the own stream stayed


def test_epochs_of_ranks_are_of_a_multiple_of_their_number(generator: torch.Generator) -> None:
    table = AliasTable(torch.randn(500, generator=generator))
    ranks = [CollectionSampler(table, 100, seed=9, rank=rank, world_size=3) for rank in range(3)]
    for epoch in range(3):
        merged = [index for row in zip(*ranks, strict=True) for index in row]
        assert merged == table.sample_at(9, 102 * epoch, 102).tolist()


def test_total_variation_is_about_1e_9_for_millions(generator: torch.Generator) -> None:
    scores = 3 * torch.randn(2_000_000, generator=generator, dtype=torch.float64)
    distance = 0.5 * (AliasTable(scores, 1.0, seed=1).probabilities() - scores.softmax(0)).abs().sum()
    assert distance < 5e-9


def test_bytes_of_a_table() -> None:
    def bytes_of(items: int) -> int:
        return 8 * items + 24 * math.ceil(items / 4096) + 32

    for items in (1, 4096, 4097, 100_000):
        assert AliasTable(torch.zeros(items), 1.0, seed=1).nbytes == bytes_of(items)
    assert f"{bytes_of(10**9):,}" in str(AliasTable.__doc__)
