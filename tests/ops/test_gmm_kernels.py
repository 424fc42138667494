"""CUDA kernels of gmm: every team against the reference, geometry, and numbers that the CPU would raise for."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import emulated
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastkd import TwoGaussianMixture, select_clean
from fastkd.ops import gmm as ops
from fastkd.reference import gmm as reference
from fastkd.selection import FitStatus

NAN = math.nan
LANES = {0: 4, 1: 8, 2: 32}  # of a problem, by team
CLUSTER = 3
EMULATED = (4, 32 << 10)  # multiprocessors and shared memory of the device that tests/emulated is
H200 = (132, 227 << 10)


class Plan(NamedTuple):
    team: int
    capacity: int
    scalars_offset: int
    blocks: int
    threads: int
    cluster: int
    shared_bytes: int


def plan(
    problems: int, values: int, *, weighted: bool = False, max_cluster: int = 16, device: tuple[int, int] = H200
) -> Plan:
    emulated.load()
    return Plan(*torch.ops.fastkd_emulated.plan_gmm_fit(problems, values, weighted, max_cluster, *device))


# ---- geometry -----------------------------------------------------------------------------------


@settings(max_examples=500)
@given(
    problems=st.integers(1, 2**27 - 1) | st.integers(1, 5000),
    each=st.integers(0, 2**40) | st.integers(0, 100_000),
    weighted=st.booleans(),
    max_cluster=st.sampled_from([1, 8, 16]),
    device=st.sampled_from([H200, EMULATED, (108, 163 << 10), (16, 99 << 10)]),
)
def test_every_problem_has_a_team(
    problems: int, each: int, weighted: bool, max_cluster: int, device: tuple[int, int]
) -> None:
    if problems * each >= 2**62:
        return
    p = plan(problems, problems * each, weighted=weighted, max_cluster=max_cluster, device=device)
    assert 0 < p.blocks < 2**31
    assert p.threads % 32 == 0
    assert 1 <= p.cluster <= max_cluster
    assert p.blocks % p.cluster == 0
    assert p.shared_bytes <= device[1]
    assert p.capacity * p.threads * (16 if weighted else 8) <= p.shared_bytes - p.scalars_offset
    assert p.scalars_offset % 8 == 0
    if p.team == CLUSTER:
        assert p.blocks == problems * p.cluster
        threads = p.threads * p.cluster
    else:
        assert (p.cluster, p.scalars_offset) == (1, 0)
        assert p.blocks <= 2**16  # they take turns
        assert min(2**16, problems) * LANES[p.team] <= p.blocks * p.threads
        threads = LANES[p.team]
    if each <= (13_500 if weighted else 20_000) and device == H200:  # all of a problem is kept
        assert p.capacity * threads >= each


def test_teams() -> None:
    assert plan(100_000, 6_400_000).team == 0
    assert plan(100_000, 20_000_000).team == 1
    assert plan(1000, 1000 * 1024).team == 2
    assert plan(1000, 64_000).team == 2  # few problems: more threads for each
    assert (plan(1, 1024).team, plan(1, 1024).cluster) == (CLUSTER, 1)
    assert plan(1, 50_000).cluster == 16
    assert plan(1, 50_000, max_cluster=1).cluster == 1
    assert plan(100, 100 * 50_000).cluster == 2  # what one block cannot keep
    assert plan(2**31 - 1, 2**40).team == 2
    with pytest.raises(RuntimeError, match=r"problems are 4294967296, must be fewer than 2\^32"):
        plan(2**32, 2**32)


@given(elements=st.integers(1, 2**50), pack=st.sampled_from([2, 4, 8]))
def test_posterior_takes_every_element(elements: int, pack: int) -> None:
    emulated.load()
    chunk, blocks, threads = torch.ops.fastkd_emulated.plan_gmm_posterior(elements, pack, 132)
    assert chunk % (threads * pack) == 0
    assert blocks == min(-(-elements // chunk), 2**20)  # they take turns


# ---- teams --------------------------------------------------------------------------------------


def problems_of(count: int, n: int, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    noise, separation = rng.uniform(0.1, 0.8, (count, 1)), rng.uniform(0.3, 3, (count, 1))
    return torch.from_numpy(reference.sample_losses("gamma", (count, n), noise, separation, rng))


def assert_fits(
    mixtures: ops.Mixtures, values: list[Tensor], weights: list[Tensor] | None = None, **options: float
) -> list[reference.Mixture]:
    """Parameters within 1e-6 of the reference's for each problem, which are returned."""
    truths = []
    for b, x in enumerate(values):
        truth = reference.fit(x.double().numpy(), None if weights is None else weights[b].double().numpy(), **options)
        assert int(mixtures.status[b]) == truth.status, b
        assert int(mixtures.iterations[b]) == truth.iterations, b
        for ours, theirs in zip(
            (mixtures.weights, mixtures.means, mixtures.deviations.square()), truth.mixture, strict=True
        ):
            np.testing.assert_allclose(ours[b].cpu(), theirs, rtol=1e-6, atol=1e-9, err_msg=f"problem {b}")
        assert float(mixtures.log_likelihood[b]) == pytest.approx(truth.log_likelihood, rel=1e-6, abs=1e-6)
        truths.append(truth.mixture)
    return truths


TEAMS = {  # problems, values of each, the team that takes them on the emulated device
    "4 lanes": (131, 13, 0),
    "8 lanes": (130, 97, 1),
    "warp": (17, 401, 2),
    "warp, overflow": (17, 1024, 2),
    "block": (3, 401, CLUSTER),
    "cluster": (1, 4099, CLUSTER),
    "cluster, overflow": (1, 8191, CLUSTER),
}


@pytest.mark.cuda_kernels
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", TEAMS)
def test_every_team(device: torch.device, backend: str, name: str, weighted: bool) -> None:
    problems, n, team = TEAMS[name]
    if backend.startswith("emulated"):
        p = plan(problems, problems * n, weighted=weighted, max_cluster=1 if "no" in backend else 16, device=EMULATED)
        assert p.team == team
        threads = p.threads * p.cluster if team == CLUSTER else LANES[team]
        if "overflow" in name and (weighted or "cluster" not in name):
            assert p.capacity * threads < n
    values = problems_of(problems, n)
    values[0, n // 2] = NAN
    weight = torch.rand(values.shape, generator=torch.Generator().manual_seed(1)) + 0.1 if weighted else None
    on_device = values.to(device)
    sample_weight = None if weight is None else weight.to(device)
    options = {"normalize": True, "max_iter": 2, "tol": 1e-4}
    mixtures = ops.gmm_fit(on_device, sample_weight=sample_weight, **options)
    checked = range(0, problems, max(1, problems // 20))  # the reference takes its time
    part = ops.Mixtures(*(t[checked] for t in mixtures))
    truths = assert_fits(
        part, [values[b] for b in checked], None if weight is None else [weight[b] for b in checked], **options
    )
    posterior, mask = ops.gmm_posterior(on_device, mixtures)
    expected = np.stack(
        [reference.posterior(values[b].double().numpy(), truth) for b, truth in zip(checked, truths, strict=True)]
    )
    np.testing.assert_allclose(posterior[checked].cpu(), expected, rtol=0, atol=2e-6)
    near = np.abs(expected - 0.5) < 2e-6
    assert near.sum() <= 1e-3 * near.size
    assert ((mask[checked].cpu().numpy() != (expected > 0.5)) <= near).all()


@pytest.mark.cuda_kernels
@pytest.mark.parametrize("weighted", [False, True])
def test_ragged_of_very_unequal_sizes(device: torch.device, weighted: bool) -> None:
    """The sizes are in device memory: whatever team was chosen for their mean must do."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(0, 6, (140,), generator=generator)
    sizes[[3, 70, 139]] = torch.tensor([700, 1, 333])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    values = problems_of(1, int(offsets[-1]))[0]
    weight = torch.rand(values.shape, generator=generator) + 0.1 if weighted else None
    flat, bounds = values.to(device), offsets.to(device)
    mixtures = ops.gmm_fit(
        flat, offsets=bounds, sample_weight=None if weight is None else weight.to(device), max_iter=3, tol=0.0
    )
    parts = [values[a:b] for a, b in itertools.pairwise(offsets.tolist())]
    weights = None if weight is None else [weight[a:b] for a, b in itertools.pairwise(offsets.tolist())]
    truths = assert_fits(mixtures, parts, weights, max_iter=3, tol=0.0)
    posterior, mask = ops.gmm_posterior(flat, mixtures, offsets=bounds)
    expected = np.concatenate(
        [reference.posterior(x.double().numpy(), truth) for x, truth in zip(parts, truths, strict=True)]
    )
    np.testing.assert_allclose(posterior.cpu(), expected, rtol=0, atol=2e-6)
    assert torch.equal(mask, posterior > 0.5)


@pytest.mark.cuda_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_posterior_of_rows_on_no_boundary(device: torch.device, dtype: torch.dtype) -> None:
    wide = problems_of(7, 53).to(dtype).to(device)
    mixtures = ops.gmm_fit(wide)
    whole, _ = ops.gmm_posterior(wide, mixtures)
    for first in range(3):
        lengths = torch.tensor([0, 1, 7, 40, 50, 13, 2], device=device)
        posterior, mask = ops.gmm_posterior(wide[:, first:], mixtures, lengths=lengths)
        keep = torch.arange(53 - first, device=device) < lengths[:, None]
        assert torch.equal(posterior, whole[:, first:].where(keep, 0))
        assert torch.equal(mask, posterior > 0.5)


# ---- numbers that the CPU raises for ------------------------------------------------------------


def invalid(mixtures: ops.Mixtures, reg_covar: float = 5e-4) -> list[int]:
    """Which problems are INVALID; their results are as promised, and nothing is NaN."""
    assert all(t.isfinite().all() for t in mixtures)
    bad = (mixtures.status == FitStatus.INVALID).nonzero()[:, 0]
    assert not mixtures.weights[bad].any()
    assert not mixtures.means[bad].any()
    assert not mixtures.iterations[bad].any()
    assert not mixtures.log_likelihood[bad].any()
    torch.testing.assert_close(mixtures.deviations[bad], torch.full_like(mixtures.deviations[bad], reg_covar**0.5))
    return bad.tolist()


@pytest.mark.cuda_kernels
@pytest.mark.parametrize("problems", [4, 20])  # blocks, warps
def test_bad_numbers_spoil_their_problem_only(device: torch.device, reads_values: bool, problems: int) -> None:
    values = problems_of(problems, 50).to(device)
    good = ops.gmm_fit(values)

    def check(mixtures: ops.Mixtures, bad: list[int], untouched: bool = True) -> None:
        assert invalid(mixtures) == bad
        if untouched:
            rest = [b for b in range(problems) if b not in bad]
            assert all(torch.equal(a[rest], g[rest]) for a, g in zip(mixtures, good, strict=True))

    if reads_values:
        with pytest.raises(RuntimeError, match="sample_weight of problem 1"):
            ops.gmm_fit(
                values, sample_weight=torch.full_like(values, -1).where(torch.arange(problems)[:, None] == 1, 1)
            )
        return
    for number in (-1.0, NAN, math.inf):
        weight = torch.ones_like(values)
        weight[1, 7] = number
        mixtures = ops.gmm_fit(values, sample_weight=weight)
        check(mixtures, [1], untouched=False)
        posterior, mask = ops.gmm_posterior(values, mixtures)
        assert not posterior[1].any()
        assert not mask[1].any()
        assert mask[0].any()
    lengths = torch.full((problems,), 50, device=device)
    lengths[0], lengths[2] = 51, -1
    mixtures = ops.gmm_fit(values, lengths=lengths)
    check(mixtures, [0, 2])
    posterior, mask = ops.gmm_posterior(values, good, lengths=lengths)
    assert not posterior[[0, 2]].any()
    assert not mask[[0, 2]].any()
    assert torch.equal(posterior[3:], ops.gmm_posterior(values, good)[0][3:])
    for i in (0, 2):  # weights and deviations
        start = [t.clone() for t in good[:3]]
        start[i][3, 1] = -1
        assert invalid(ops.gmm_fit(values, init=tuple(start))) == [3]
    assert not select_clean(values, sample_weight=-torch.ones_like(values))[0].any()
    fitted = TwoGaussianMixture(warm_start=True).fit(values, lengths=lengths).fit(values)  # starts afresh
    assert torch.equal(fitted.means_[0], good.means[0])


@pytest.mark.cuda_kernels
def test_bad_offsets_stay_inside(device: torch.device, reads_values: bool) -> None:
    if reads_values:
        return  # errors: test_gmm_inputs.py
    values = problems_of(1, 60)[0].to(device)
    far = 2**62
    for offsets, bad in (
        ([1, 20, 40, 60], [0]),
        ([0, 20, 40, 59], [2]),
        ([0, 40, 20, 60], [1]),
        ([0, 20, 61, 60], [1, 2]),
        ([-far, far, 20, 60], [0, 1]),
        ([0, -5, 20, 60], [0, 1]),
        ([1], []),
    ):
        bounds = torch.tensor(offsets, device=device)
        mixtures = ops.gmm_fit(values, offsets=bounds)
        assert invalid(mixtures) == bad
        posterior, mask = ops.gmm_posterior(values, mixtures, offsets=bounds)
        assert posterior.isfinite().all()
        assert torch.equal(mask, posterior > 0.5)
    assert not ops.gmm_posterior(values, mixtures, offsets=bounds)[0].any()  # of no problem


@pytest.mark.cuda_kernels
def test_bad_parameters_have_posterior_0(device: torch.device, reads_values: bool) -> None:
    values = problems_of(3, 30).to(device)
    good = ops.gmm_fit(values)
    expected, _ = ops.gmm_posterior(values, good)
    for i, number in ((0, -1.0), (0, NAN), (1, NAN), (1, math.inf), (2, -1.0), (2, math.inf)):
        parameters = [t.clone() for t in good[:3]]
        parameters[i][1, 0] = number
        mixtures = ops.Mixtures(*parameters, *good[3:])
        if reads_values:
            with pytest.raises(RuntimeError, match=r"must (be finite|not be negative)"):
                ops.gmm_posterior(values, mixtures)
            continue
        posterior, mask = ops.gmm_posterior(values, mixtures)
        assert not posterior[1].any()
        assert not mask[1].any()
        assert torch.equal(posterior[[0, 2]], expected[[0, 2]])
