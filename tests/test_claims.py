"""Mathematical claims of docstrings and of docs/methods.md that no other test would find false; one test a claim.

The rest are in the tests of the primitives: truth, ends, infinities and reductions of the divergences in test_divergence and
test_losses, relations in test_relation, EM in test_gmm, draws and tables in test_alias and test_samplers, places in
test_crop_offsets, statistics in test_statistics, formulas of the papers in test_methods, test_online and test_bss.
"""

from __future__ import annotations

import inspect
import math
import re
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd
from fastkd import AliasTable, CollectionSampler, TwoGaussianMixture, functional, select_clean, statistics
from fastkd.data import digits
from fastkd.data.labels import symmetric_noise
from fastkd.methods import (
    AT,
    BSS,
    DML,
    FSP,
    ONE,
    SP,
    Baseline,
    FeatureTap,
    Hinton,
    JointLogits,
    Loss,
    Method,
    Outputs,
    registry,
)
from fastkd.methods.loop import optimise
from fastkd.methods.relational import similarities
from fastkd.methods.representation import attention
from fastkd.models import registry as networks
from fastkd.models.convnet import ConvNet, count_parameters
from fastkd.models.resnet import ResNet, resnet
from fastkd.ops.crop import crop_offsets
from fastkd.reference import alias as plain_alias
from fastkd.reference import crop as plain_crop
from fastkd.reference import divergence as plain
from fastkd.reference import gmm as plain_gmm
from fastkd.reference import relation as plain_relation
from fastkd.selection import FitStatus
from fastkd.training import TrainingSettings
from fastkd.training.metrics import Running
from fastkd.training.optimisation import make_optimiser

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]


@pytest.fixture
def pair(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Logits of a student and a teacher."""
    student, teacher = (3 * torch.randn(6, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(loss, of)[0]


# ---- fastkd.functional --------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [functional.kl_div, functional.js_div, functional.soft_cross_entropy])
def test_gradients_keep_their_size_as_t_grows(loss: Any, pair: tuple[Tensor, Tensor]) -> None:
    """By T^2: to a limit that is not 0; of forward KL it is that of ``|s - t|^2 / 2K`` of centred logits."""
    student, teacher = pair
    sizes = [gradient(loss(student, teacher, t), student).norm().item() for t in (1e3, 1e4)]
    assert sizes[0] > 0.01
    assert sizes[1] == pytest.approx(sizes[0], rel=1e-2)
    centred = [x - x.mean(1, keepdim=True) for x in (student, teacher)]
    if loss is functional.kl_div:
        limit = (centred[0] - centred[1]).detach() / (9 * len(student))
        torch.testing.assert_close(gradient(loss(student, teacher, 1e5), student), limit, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_cross_entropy_is_forward_kl_plus_the_teachers_entropy(
    temperature: float, pair: tuple[Tensor, Tensor]
) -> None:
    student, teacher = pair
    entropy = temperature**2 * fastkd.logit_stats(teacher, temperature).entropy.mean()
    soft, kl = (f(student, teacher, temperature) for f in (functional.soft_cross_entropy, functional.kl_div))
    torch.testing.assert_close(soft, kl + entropy)
    torch.testing.assert_close(gradient(soft, student), gradient(kl, student))


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_js_div_at_its_ends_is_kl_by_convention(beta: float, pair: tuple[Tensor, Tensor]) -> None:
    student, teacher = pair
    direction = "reverse" if beta else "forward"
    torch.testing.assert_close(
        functional.js_div(student, teacher, 2.0, beta=beta),
        functional.kl_div(student, teacher, 2.0, direction=direction),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("of", [functional.js_div, "reference"])
@pytest.mark.parametrize("end", ["forward", "reverse"])
def test_generalised_jensen_shannon_tends_to_0_and_its_slope_to_kl(
    end: Any, of: Any, pair: tuple[Tensor, Tensor]
) -> None:
    """So KL is no limit of the divergence; of the divergence over beta, or over 1 - beta, it is."""
    student, teacher = (x.detach() for x in pair)
    kl = functional.kl_div(student, teacher, direction=end).item()

    def js(beta: float) -> float:
        if of == "reference":
            return plain.divergence(student, teacher, kind="jensen_shannon", beta=beta).item()
        return functional.js_div(student, teacher, beta=beta).item()

    at = {share: js(share if end == "forward" else 1 - share) for share in (1e-2, 1e-4, 1e-6)}
    assert at[1e-2] > at[1e-4] > at[1e-6] > 0
    assert at[1e-6] < 1e-4 * kl
    assert at[1e-6] / 1e-6 == pytest.approx(kl, rel=1e-2)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 4.0])
def test_jensen_shannon_is_at_most_ln_2(temperature: float, pair: tuple[Tensor, Tensor]) -> None:
    student, teacher = (x.detach() for x in pair)
    rows = functional.js_div(student, teacher, temperature, reduction="none") / temperature**2
    assert (rows <= math.log(2) * (1 + 1e-12)).all()
    apart = torch.eye(2, dtype=torch.float64)[:1] * 1e4
    assert functional.js_div(apart, apart.flip(1)).item() == pytest.approx(math.log(2), rel=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.2, 0.5])
def test_jensen_shannon_is_symmetric(beta: float, pair: tuple[Tensor, Tensor]) -> None:
    """Where beta is 0.5; any other is that of 1 - beta with the sides in turn."""
    student, teacher = pair
    one, other = (
        functional.js_div(student, teacher, 2.0, beta=beta),
        functional.js_div(teacher, student, 2.0, beta=1 - beta),
    )
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("dtype", "smallest"), [(torch.float32, -126), (torch.float64, -1022)])
def test_probabilities_below_the_smallest_normal_number_count_as_0(dtype: torch.dtype, smallest: int) -> None:
    """``p log p`` of a class that the student masks: inf where p counts."""
    for exponent, counts in ((smallest + 2, True), (smallest - 2, False)):
        teacher = torch.tensor([[0.0, exponent * math.log(2)]], dtype=dtype)
        student = torch.tensor([[0.0, -math.inf]], dtype=dtype)
        assert functional.kl_div(student, teacher).isinf() == counts


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_gradient_of_an_infinite_divergence_points_back(temperature: float) -> None:
    student = torch.tensor([[0.0, 1.0, -math.inf]], requires_grad=True)
    teacher = torch.tensor([[0.5, 0.0, 2.0]])
    loss = functional.kl_div(student, teacher, temperature)
    p, q = (x.detach().div(temperature).softmax(1) for x in (teacher, student))
    assert loss.isinf()
    torch.testing.assert_close(gradient(loss, student), temperature * (q - p))


def test_mean_is_torchs_and_batchmean_the_mathematical_one(pair: tuple[Tensor, Tensor]) -> None:
    student, teacher = pair
    log_q, p = student.log_softmax(1), teacher.softmax(1)
    for reduction in ("mean", "batchmean", "sum"):
        theirs = F.kl_div(log_q, p, reduction=reduction)
        torch.testing.assert_close(functional.kl_div(student, teacher, reduction=reduction), theirs)  # type: ignore[arg-type]
    target = torch.tensor([-100, 0, 0, -100, 0, 0])
    for reduction, share in (("batchmean", 4), ("mean", 4 * 9)):
        rows = functional.kl_div(student, teacher, target=target, reduction="none")
        ours = functional.kl_div(student, teacher, target=target, reduction=reduction)  # type: ignore[arg-type]
        torch.testing.assert_close(ours, rows.sum() / share)
        weight = torch.tensor([1.0, 0.0, 2.0, 5.0, 1.0, 1.0], dtype=torch.float64)
        ours = functional.kl_div(student, teacher, target=target, weight=weight, reduction=reduction)  # type: ignore[arg-type]
        torch.testing.assert_close(ours, (rows * weight).sum() / share)  # weights do not change the count


def test_logit_stats_give_the_cross_entropy_and_the_probability_of_the_prediction(pair: tuple[Tensor, Tensor]) -> None:
    _, logits = pair
    stats = fastkd.logit_stats(logits)
    predicted = logits.argmax(1)
    torch.testing.assert_close(stats.logsumexp - stats.max, F.cross_entropy(logits, predicted, reduction="none"))
    torch.testing.assert_close((stats.max - stats.logsumexp).exp(), logits.softmax(1).amax(1))
    p = logits.softmax(1)
    torch.testing.assert_close(stats.entropy, -(p * p.log()).sum(1))  # nats


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_losses_of_16_bits_are_float32(dtype: torch.dtype, pair: tuple[Tensor, Tensor]) -> None:
    student, teacher = (logits.detach().to(dtype) for logits in pair)
    losses = [f(student, teacher) for f in (functional.kl_div, functional.js_div, functional.soft_cross_entropy)]
    losses += [functional.kd_loss(student, teacher, torch.arange(6)), functional.relation_loss(student, teacher)]
    stats = functional.logit_stats(student)
    assert stats.argmax.dtype == torch.int64
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert {t.dtype for t in (*losses, stats.max, stats.mean, stats.logsumexp, stats.entropy)} == {wanted}


def test_the_task_loss_is_0_where_alpha_is_1(pair: tuple[Tensor, Tensor]) -> None:
    loss, terms = functional.kd_loss(*pair, torch.arange(6), 3.0, 1.0, return_terms=True)
    assert terms["task_loss"] == 0
    torch.testing.assert_close(loss, functional.kl_div(*pair, 3.0))


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (fastkd.KLDivLoss, functional.kl_div),
        (fastkd.JSDivLoss, functional.js_div),
        (fastkd.KDLoss, functional.kd_loss),
        (fastkd.RelationLoss, functional.relation_loss),
    ],
)
def test_modules_have_the_defaults_of_their_functions(module: Any, function: Any) -> None:
    theirs = inspect.signature(function).parameters
    for name, argument in inspect.signature(module).parameters.items():
        assert argument.default == theirs[name].default, name


def test_relations_of_two_points_are_constant_and_of_one_there_are_none(generator: torch.Generator) -> None:
    ours, theirs = (torch.randn(2, 4, generator=generator).requires_grad_() for _ in range(2))
    loss, terms = functional.relation_loss(ours, theirs, return_terms=True)
    assert terms["angle_loss"] == 0
    assert terms["distance_loss"].abs() < 1e-12  # either distance is its own mean
    loss, terms = functional.relation_loss(ours[:1], theirs[:1], return_terms=True)
    assert loss == 0
    assert gradient(loss, ours).abs().sum() == 0


def test_points_count_as_1e_6_apart_in_distances_and_coincide_in_angles_at_1e_12() -> None:
    def points(gap: float) -> Tensor:  # two of them, at right angles to the plane of the others
        plane = [[0.0, 0.0, -gap / 2], [0.0, 0.0, gap / 2], [0.0, 1.0, 0.0], [2.0, 1.0, 0.0]]
        return torch.tensor(plane, dtype=torch.float64)

    def change(name: str, a: float, b: float) -> float:
        terms = [functional.relation_loss(points(gap), points(1.0), return_terms=True)[1][name] for gap in (a, b)]
        return (terms[0] - terms[1]).abs().item()

    assert change("distance_loss", 0.0, 1e-6) < 1e-12
    assert change("distance_loss", 1e-6, 1e-5) > 1e-8
    assert change("angle_loss", 0.0, 0.9e-12) == pytest.approx(0.0, abs=1e-12)
    assert change("angle_loss", 0.9e-12, 1.1e-12) > 1e-3
    assert change("angle_loss", 1.1e-12, 1e-6) < 1e-5  # a direction at once
    close = points(0.9e-12).requires_grad_()
    coincident = gradient(functional.relation_loss(close, points(1.0), 0.0, 50.0), close)
    assert coincident.abs().max() < 1e3  # through the pair it would be 1e12


# ---- selection ----------------------------------------------------------------------------------


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


# ---- statistics, scores, sampling ---------------------------------------------------------------


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


# ---- methods, and docs/methods.md ---------------------------------------------------------------

DOCUMENT = (Path(__file__).parent.parent / "docs" / "methods.md").read_text()
ROWS = {cells[1]: cells for line in DOCUMENT.splitlines() if len(cells := [c.strip() for c in line.split("|")]) == 8}
WEIGHTS = {"r": "task_weight", "a": "kd_weight", "b": "feature_weight", "T": "temperature"}


@pytest.mark.parametrize("name", registry.NAMES)
def test_the_weights_of_the_documents_table_are_the_defaults(name: str) -> None:
    settings: dict[str, Any] = {"student_channels": 1, "teacher_channels": 1} if name == "fitnet" else {}
    method = registry.create(name, **settings)
    cells = ROWS[name]
    assert cells[2] == f"`{type(method).__name__}`"
    given = re.findall(r"([rabT]) ([0-9.]+)", cells[3])
    assert given
    for letter, value in given:
        assert getattr(method, WEIGHTS[letter]) == float(value), letter
    if name.startswith("rkd"):
        weights = {"rkd-d": (25, 0), "rkd-a": (0, 50), "rkd-da": (25, 50)}[name]
        assert (method.distance_weight, method.angle_weight) == weights
        assert name == "rkd-da" or f"{max(weights)} \N{MULTIPLICATION SIGN}" in cells[4]
    if name == "one":
        assert f"first {80}/{300}" in cells[4]
        assert method.ramp_share == 80 / 300
        assert method.branches == 3
    if name == "dml":
        assert method.networks == 2


def test_the_documents_table_is_whole() -> None:
    assert set(registry.NAMES) <= set(ROWS)


def outputs(seed: int, *features: tuple[int, ...]) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    return Outputs(logits, {f"f{i}": torch.randn(4, *s, generator=generator).double() for i, s in enumerate(features)})


def distance(method: Method, student: Outputs, teacher: Outputs) -> float:
    return method(student, teacher, torch.zeros(4, dtype=torch.int64)).terms[method.term].item()


def test_fsp_grows_with_the_fourth_power_of_the_activations() -> None:
    method = FSP(["f0", "f1"])
    student, teacher = (outputs(seed, (2, 4, 4), (3, 4, 4)) for seed in (1, 2))
    scaled = [o._replace(features={k: 3 * f for k, f in o.features.items()}) for o in (student, teacher)]
    assert distance(method, *scaled) == pytest.approx(3**4 * distance(method, student, teacher))


@pytest.mark.parametrize("scale", [0.1, 7.0])
def test_attention_and_similarities_have_norm_1_whatever_the_scale(scale: float) -> None:
    feature = outputs(1, (3, 4, 4)).features["f0"]
    for made in (attention(feature), similarities(feature)):
        torch.testing.assert_close(made.norm(dim=1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(attention(scale * feature), attention(feature))
    torch.testing.assert_close(similarities(scale * feature), similarities(feature))


@pytest.mark.parametrize("side", [2, 4, 8])
def test_a_squared_distance_of_attention_weighs_b_over_the_places(side: int) -> None:
    student, teacher = (outputs(seed, (3, side, side)) for seed in (1, 2))
    squared = (attention(student.features["f0"]) - attention(teacher.features["f0"])).square().sum(1).mean().item()
    assert distance(AT(["f0"]), student, teacher) == pytest.approx(1000.0 / side**2 * squared)


def test_at_weighs_191_for_maps_of_14_by_14() -> None:
    images = torch.zeros(1, 1, 14, 14)
    method = registry.create("at", resnet(8, in_channels=1), resnet(8, in_channels=1, seed=1), images)
    assert f"{method.feature_weight:.0f}" == "191"
    assert "(191 for 14 \N{MULTIPLICATION SIGN} 14)" in DOCUMENT
    large = registry.create("at", resnet(8), resnet(8, seed=1), torch.zeros(1, 3, 64, 64))
    assert large.feature_weight == 1000.0


def test_sp_is_the_squared_frobenius_norm_over_b_squared() -> None:
    student, teacher = (outputs(seed, (3, 4, 4)) for seed in (1, 2))
    squared = (similarities(student.features["f0"]) - similarities(teacher.features["f0"])).norm() ** 2
    assert distance(SP(["f0"]), student, teacher) == pytest.approx(3000.0 * squared.item() / 16)


class Largest(TorchDispatchMode):
    """The largest tensor that an operator makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_the_products_of_fsp_are_never_there() -> None:
    student, teacher = (outputs(seed, (8, 6, 6), (10, 6, 6)) for seed in (1, 2))
    with Largest() as made:
        FSP(["f0", "f1"])(student, teacher, torch.zeros(4, dtype=torch.int64))
    assert made.elements < 4 * 8 * 10 * 6 * 6 / 2


@pytest.mark.parametrize("progress", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_the_schedule_of_bss(progress: float) -> None:
    student, teacher = outputs(1), outputs(2)
    terms = BSS()(student, teacher, torch.zeros(4, dtype=torch.int64), progress).terms
    soft = functional.soft_cross_entropy(student.logits, teacher.logits, 3.0).item() / 9.0  # type: ignore[arg-type]
    assert terms["kd_loss"].item() == pytest.approx((3 * (1 - progress) + 1) * soft)
    assert BSS().attack_weight(progress) == pytest.approx(max(2 * (1 - 4 * progress / 3), 0), abs=1e-12)


def test_the_ramp_of_one_is_from_exp_minus_5_to_1() -> None:
    method = ONE()
    ramp = [method.ramp(epoch / 300) for epoch in range(301)]
    assert ramp[0] == pytest.approx(math.exp(-5))
    assert ramp == sorted(ramp)
    assert ramp[79] < 1.0
    assert set(ramp[80:]) == {1.0}


def test_the_terms_add_up_and_are_weighted() -> None:
    student, teacher = outputs(1), outputs(2)
    target = torch.arange(4)
    one, three = (Hinton(task_weight=w, kd_weight=2 * w)(student, teacher, target) for w in (1.0, 3.0))
    for name in ("task_loss", "kd_loss"):
        assert three.terms[name].item() == pytest.approx(3 * one.terms[name].item())
    assert sum(one.terms.values()).item() == pytest.approx(one.total.item())
    assert one.terms["task_loss"].item() == pytest.approx(Baseline()(student, None, target).total.item())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_dml_is_multiplied_by_the_square_of_its_temperature(temperature: float) -> None:
    joint = JointLogits(outputs(seed).logits for seed in (1, 2, 3))  # type: ignore[misc]
    mutual = DML(3, temperature=temperature)(Outputs(joint), None, torch.zeros(4, dtype=torch.int64)).terms
    log_p = [(logits / temperature).log_softmax(1) for logits in joint]
    pairs = [F.kl_div(p, q.exp(), reduction="batchmean") for p in log_p for q in log_p if p is not q]
    assert mutual["mutual_loss"].item() == pytest.approx(temperature**2 * sum(pairs).item() / 2)


def test_a_step_returns_the_logits_of_the_first_network() -> None:
    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(4, 5))

    with torch.random.fork_rng(devices=[]):
        student, images = DML().student_from(make), torch.randn(3, 1, 2, 2)
    _, logits = DML().step(FeatureTap(student), None, images, torch.arange(3))
    assert torch.equal(logits, student.networks[0](images))


def test_the_gate_of_one_begins_alike_whatever_the_networks() -> None:
    method = ONE(branches=2)
    students = [method.student_from(lambda seed, first=first: resnet(8, seed=first + seed)) for first in (0, 5)]
    assert not torch.equal(*(student.trunk[0].weight for student in students))
    for ours, theirs in zip(*(student.gate.parameters() for student in students), strict=True):
        assert torch.equal(ours, theirs)


def test_where_nothing_qualifies_for_bss_the_students_statistics_move_for_a_loss_of_0() -> None:
    images, target = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(1)), torch.zeros(4).long()
    teacher, student = (nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(4, 5)) for _ in range(2))
    with torch.no_grad():
        teacher[2].bias[1] = 100.0  # all of another class than the labels'
    loss, _ = BSS().step(FeatureTap(student), FeatureTap(teacher.eval()), images, target)
    assert loss.terms["boundary_loss"] == 0
    assert student[0].num_batches_tracked == 2


def test_optimise_goes_down_half_a_cosine_to_zero() -> None:
    """Of a constant gradient, a step of Adam is as long as the learning rate."""
    model = nn.Linear(1, 1, bias=False)
    places = [model.weight.item()]
    optimise(
        model,
        lambda: 3 * model.weight.sum(),
        steps=20,
        learning_rate=0.5,
        weight_decay=0.0,
        on_step=lambda _: places.append(model.weight.item()),
    )
    rates = [before - after for before, after in pairwise(places)]
    assert rates == pytest.approx([0.25 * (1 + math.cos(math.pi * t / 20)) for t in range(20)], abs=1e-5)


# ---- models, data, training -------------------------------------------------------------------------


def test_sizes_of_residual_networks() -> None:
    for depth, parameters in ((8, 80e3), (110, 1.7e6)):
        with torch.device("meta"):
            network = resnet(depth)
        assert count_parameters(network) == pytest.approx(parameters, rel=0.03)
        shortcuts = sum(p.numel() for name, p in network.named_parameters() if "downsample" in name)
        assert f"{shortcuts:,} parameters fewer" in str(ResNet.__doc__)
    depths = [int(name.removeprefix("resnet")) for name in networks.TORCHVISION_RESNETS]
    assert [depth for depth in depths if depth % 6 == 2] == [50, 152]  # of either family


@pytest.mark.parametrize("stages", [2, 3, 4, 5])
def test_a_convnet_halves_the_image_after_each_half_of_its_stages(stages: int) -> None:
    x, sides = torch.zeros(1, 1, 8, 8), []
    for layer in ConvNet([2] * stages).features[:-1]:
        x = layer(x)
        if isinstance(layer, nn.Conv2d):
            sides.append(x.shape[-1])
    assert sides == [8] * (stages // 2) + [4] * (stages - stages // 2)
    assert x.shape[-1] == 2


def test_variations_of_digits(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    """Of two ramps, a pixel is its place in the digit; in the middle nothing outside of it is seen."""
    across = (0.5 + 0.1 * (torch.arange(8) - 3.5)).expand(8, 8)
    ramps = digits.Labelled(torch.stack([across, across.T])[:, None], torch.arange(2))
    noisy = digits.vary(digits.Labelled(torch.full((1, 1, 8, 8), 0.5), torch.zeros(1)), 2000, generator).images
    assert noisy[:, 0, 3:5, 3:5].std().item() == pytest.approx(0.05, rel=0.05)
    monkeypatch.setattr(torch, "randn", lambda shape, **_: torch.zeros(shape))
    varied = digits.vary(ramps, 4000, generator)
    assert varied.target.tolist() == [0, 1] * 2000
    place = (varied.images[:, 0, 3:5, 3:5] - 0.5) / 0.1
    shift = place.mean((1, 2))
    along, aside = (place.diff(dim=d).mean((1, 2)) for d in (2, 1))  # change of the place by a pixel to the right, down
    along, aside = torch.where(varied.target == 0, along, aside), torch.where(varied.target == 0, aside, -along)
    scale, angle = torch.hypot(along, aside), torch.atan2(aside, along).rad2deg()
    for value, limits in ((scale, (0.85, 1.15)), (angle, (-15.0, 15.0)), (shift, (-1.0, 1.0))):
        low, high = limits
        reach = (value.min().item() - low) / (high - low), (value.max().item() - low) / (high - low)
        assert -1e-4 < reach[0] < 0.01
        assert 0.99 < reach[1] < 1 + 1e-4


def test_symmetric_noise_from_all_classes_at_rate_r_is_ours_at_r_times_9_tenths() -> None:
    target = torch.arange(10).repeat(100)
    theirs = torch.where(torch.arange(1000) < 500, torch.arange(1000) // 10 % 10, target)  # each class as often
    ours, _ = symmetric_noise(target, 0.5 * (10 - 1) / 10, 10, seed=0)
    assert (ours != target).sum() == (theirs != target).sum() == 450


def test_numbers_of_a_training_are_means_over_images_not_batches() -> None:
    running = Running(torch.device("cpu"))
    logits = torch.eye(2)[[0] * 6]
    running.add(Loss(torch.tensor(1.0), {}), logits[:2], torch.zeros(2, dtype=torch.int64))
    running.add(Loss(torch.tensor(3.0), {}), logits, torch.ones(6, dtype=torch.int64))
    assert running.read() == {"loss": (2 * 1 + 6 * 3) / 8, "accuracy": 2 / 8}


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_weight_decay_is_of_all_parameters(optimiser: Any) -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Linear(2, 2))
    for parameter in network.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    settings = TrainingSettings(optimiser=optimiser, learning_rate=0.1, momentum=0.0, nesterov=False, weight_decay=0.5)
    make_optimiser(network.parameters(), settings).step()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, 1 - 0.1 * 0.5), msg=name)


# ---- fastkd.patches, fastkd.reference ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_normalisation_is_in_float64_and_rounded_once_or_by_way_of_float32(dtype: torch.dtype) -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    exact = torch.tensor([(Fraction(x, 255) - Fraction(0.3)) / Fraction(0.7) for x in range(256)], dtype=torch.float64)
    expected = exact.float().to(dtype) if dtype.itemsize == 2 else exact.to(dtype)
    ours = fastkd.random_crop_flip(images, 0, None, 0.0, 0.3, 0.7, dtype).flatten()
    torch.testing.assert_close(ours, expected, rtol=4e-16 if dtype == torch.float64 else 0, atol=1e-16)


def test_padding_is_black_before_normalisation_not_the_mean() -> None:
    white = torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)
    out = fastkd.random_crop_flip(white, 4, 10, 0.0, 0.5, 0.25)
    assert out.unique().tolist() == [-2.0, 2.0]
    assert (out == 2.0).sum() == 4


@pytest.mark.parametrize("seed", [0, 5, 2**62])
def test_places_are_48_bits_and_flips_are_exact_to_2_to_the_minus_32(seed: int) -> None:
    y, x, flip, rest = plain_crop.philox(seed, 2, 0)
    words = [y << 16 | rest >> 16, x << 16 | rest & 0xFFFF]

    def drawn(count: int, probability: float) -> tuple[list[int], bool]:
        ranges = (0, count), (0, count)
        offsets, flips = crop_offsets(torch.tensor([seed]), 1, 1, *ranges, probability)
        return offsets.flatten().tolist(), bool(flips)

    assert drawn(2**48, flip / 2**32) == (words, False)
    assert drawn(1000, (flip + 1) / 2**32) == ([word * 1000 >> 48 for word in words], True)


def test_references_are_differentiable_again() -> None:
    x, y = (outputs(seed).logits[:3].detach().requires_grad_() for seed in (1, 2))  # type: ignore[index]
    for kind in ("forward", "reverse", "jensen_shannon", "soft_cross_entropy"):
        assert torch.autograd.gradgradcheck(
            lambda s, t, k=kind: plain.divergence(s, t, kind=k, temperature=2.0), (x, y)
        )
    assert torch.autograd.gradgradcheck(lambda s, t: plain_relation.relation_loss(s, t, 1.0, 1.0), (x, y))
    images = torch.rand(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([[[-1, 1], [0, 0]]])
    assert torch.autograd.gradgradcheck(lambda i: plain_crop.crop(i, offsets, (2, 2)).pow(3).sum(), images)


def test_forms_of_crop_give_the_same_patches(generator: torch.Generator) -> None:
    images = torch.randn(2, 3, 7, 9, generator=generator)
    offsets = torch.tensor([[[0, 0], [3, 4], [1, 2]], [[4, 5], [2, 0], [4, 1]]])
    expected = plain_crop.crop(images, offsets, (3, 4))
    for form in (plain_crop.crop_by_index, plain_crop.crop_by_grid_sample):
        assert torch.equal(form(images, offsets, (3, 4)), expected)


def test_the_reference_philox_is_that_of_its_authors() -> None:
    """Known answers of Random123, which take (counter, key) as here (index, stream, seed)."""
    assert [f"{w:08x}" for w in plain_alias.philox(0, 0, 0)] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    assert list(plain_alias.philox(5, 2, 7)) == plain_crop.philox(5, 2, 7)


def test_the_alias_reference_rounds_halves_to_even() -> None:
    half = math.ldexp(1, -46)
    assert plain_alias.exp2_fixed(-half, 0.0, 1.0) == plain_alias.exp2_fixed(0.0, 0.0, 1.0)
    assert plain_alias.exp2_fixed(-3 * half, 0.0, 1.0) == plain_alias.exp2_fixed(-4 * half, 0.0, 1.0)
