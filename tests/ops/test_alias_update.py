"""Updates of alias tables, and tables whose scores or changes the CPU refuses and a GPU cannot."""

from __future__ import annotations

import math

import pytest
import torch
from alias_cases import lambda_of, stream_of

from fastkd import AliasTable
from fastkd.ops import alias as ops

INFINITY = math.inf
NO_ITEM = -(2**63)


@pytest.mark.cuda_kernels
@pytest.mark.parametrize("n", [1, 5, 4096, 10_000])
def test_update_equals_a_fresh_build_on_the_same_scale(
    device: torch.device, n: int, generator: torch.Generator
) -> None:
    scores = torch.randn(n, generator=generator)
    scores[0] = 9.0  # the reference stays
    table = ops.build(scores.to(device), lambda_of(1.0, device))
    indices = torch.randint(min(1, n - 1), n, (n // 3 + 1,), generator=generator)
    fresh = torch.randn(len(indices), generator=generator)
    if n == 1:
        fresh[:] = 9.0
    updated = scores.clone()
    for i, u in zip(indices.tolist(), fresh.tolist(), strict=True):  # of equal indices the last wins
        updated[i] = u
    ops.update(table, indices.to(device), fresh.to(device))
    expected = ops.build(updated.to(device), lambda_of(1.0, device))
    if expected.scale[2] == table.scale[2]:
        for ours, other in zip(table, expected, strict=True):
            assert torch.equal(ours, other)
    p = ops.weights(table).cpu().double()
    assert (p / p.sum() - torch.softmax(updated.double(), 0)).abs().sum() / 2 < 1e-8


@pytest.mark.cuda_kernels
@pytest.mark.parametrize("k", [1, 12, 25, 40])
def test_update_just_below_a_power_of_two(device: torch.device, k: int) -> None:
    # t rounds up to k in fixed point, while its floor in fp64 is k - 1
    scores = torch.zeros(10, dtype=torch.float64, device=device)
    kappa = ops.build(scores, lambda_of(math.log(2), device)).scale[1].item()
    score = k / kappa
    for _ in range(4):
        score = math.nextafter(score, 0)
        table = ops.build(scores, lambda_of(math.log(2), device))
        ops.update(table, torch.tensor([3], device=device), torch.tensor([score], dtype=torch.float64, device=device))
        weights = ops.weights(table)
        assert weights.sum() < 2**52
        assert float(weights[3] / weights[0]) == pytest.approx(2**k, rel=1e-2 if k == 40 else 1e-6)


@pytest.mark.cuda_kernels
def test_update_touches_only_its_blocks(device: torch.device, generator: torch.Generator) -> None:
    scores = torch.randn(5 * 4096, generator=generator).to(device)
    table = ops.build(scores, lambda_of(1.0, device))
    before = table.bins.clone()
    ops.update(table, torch.tensor([4096 * 2 + 5], device=device), torch.tensor([0.1], device=device))
    changed = (table.bins != before).nonzero().flatten() // 4096
    assert changed.unique().tolist() == [2]


@pytest.mark.cuda_kernels
@pytest.mark.parametrize("rise", [0.5, 3.0, 20.0, 43.0])
def test_update_far_above_the_old_maximum(device: torch.device, rise: float, generator: torch.Generator) -> None:
    scores = torch.randn(9000, generator=generator)
    table = ops.build(scores.to(device), lambda_of(1.0, device))
    indices = torch.arange(0, 9000, 7)
    updated = scores.clone()
    updated[indices] += rise
    ops.update(table, indices.to(device), updated[indices].to(device))
    weights = ops.weights(table).cpu()
    assert weights.sum() < 2**52
    assert torch.equal(table.block_weight.sum().cpu(), weights.sum())
    p = weights.double() / weights.sum()
    assert (p - torch.softmax(updated.double(), 0)).abs().sum() / 2 < 1e-8


@pytest.mark.cuda_kernels
@pytest.mark.filterwarnings("ignore:fastkd. after this update")
@pytest.mark.parametrize("gap", [0.0, 10.0, 20.0, 30.0])
@pytest.mark.parametrize("rises", [False, True])
def test_accuracy_after_the_heaviest_item_left_is_as_documented(
    device: torch.device, gap: float, rises: bool, generator: torch.Generator
) -> None:
    low = torch.randn(1000, generator=generator, dtype=torch.float64)
    high = low.clone()
    high[0] = low.max() + gap
    first, high, low = torch.zeros(1, dtype=torch.int64, device=device), high.to(device), low.to(device)
    table = AliasTable(low if rises else high, 1.0, seed=0)
    if rises:
        table.update(first, high[:1])
    table.update(first, low[:1])
    error = (table.probabilities() - torch.softmax(low, 0)).abs().sum() / 2
    assert error < 1000 / table.weights().sum() + 1e-9


def test_failed_updates_leave_the_table_as_it_was() -> None:
    scores = torch.tensor([0.0, 1.0, 2.0])
    for indices, fresh in (([0, 1, 2], [-INFINITY] * 3), ([1], [math.nan]), ([1], [1e6]), ([3], [0.0]), ([-1], [0.0])):
        table = ops.build(scores, lambda_of(1.0))
        before = [t.clone() for t in table]
        with pytest.raises(RuntimeError, match=r"fastkd: (scores|indices)"):
            ops.update(table, torch.tensor(indices), torch.tensor(fresh))
        assert all(torch.equal(a, b) for a, b in zip(table, before, strict=True))


@pytest.mark.cuda_kernels
@pytest.mark.parametrize("indices", [[9000], [-1], [3, 2**40]])
def test_a_gpu_draws_no_items_after_a_bad_index(device: torch.device, reads_values: bool, indices: list[int]) -> None:
    table = ops.build(torch.zeros(9000, device=device), lambda_of(1.0, device))
    change = torch.tensor(indices, device=device), torch.ones(len(indices), device=device)
    if reads_values:
        with pytest.raises(RuntimeError, match="fastkd: indices"):
            ops.update(table, *change)
        return
    ops.update(table, *change)
    assert (ops.sample(table, stream_of(1, 0, device), 20) == NO_ITEM).all()
    ops.update(table, torch.tensor([3], device=device), torch.ones(1, device=device))  # and for good
    assert (ops.sample(table, stream_of(1, 0, device), 20) == NO_ITEM).all()


@pytest.mark.cuda_kernels
@pytest.mark.parametrize("bad", [math.nan, INFINITY, 1e6])
def test_a_gpu_draws_no_items_after_a_bad_score(device: torch.device, reads_values: bool, bad: float) -> None:
    table = ops.build(torch.zeros(9000, device=device), lambda_of(1.0, device))
    change = torch.tensor([5, 6], device=device), torch.tensor([0.0, bad], device=device)
    if reads_values:
        with pytest.raises(RuntimeError, match="fastkd: scores"):
            ops.update(table, *change)
        return
    ops.update(table, *change)
    assert (ops.sample(table, stream_of(1, 0, device), 20) == NO_ITEM).all()


@pytest.mark.cuda_kernels
@pytest.mark.parametrize(
    ("score", "inverse_temperature"),
    [(math.nan, 1.0), (INFINITY, 1.0), (-INFINITY, 1.0), (0.0, -1.0), (0.0, math.nan), (0.0, INFINITY), (0.0, 1.7e308)],
)
def test_a_gpu_draws_no_items_from_a_table_that_the_cpu_refuses(
    device: torch.device, reads_values: bool, score: float, inverse_temperature: float
) -> None:
    for n in (1, 9000):
        scores = torch.full((n,), -INFINITY if score == -INFINITY else 0.0, device=device)
        scores[n // 2] = score
        if reads_values:
            with pytest.raises(RuntimeError, match=r"fastkd: (scores|inverse_temperature)"):
                ops.build(scores, lambda_of(inverse_temperature))
            continue
        table = ops.build(scores, lambda_of(inverse_temperature, device))
        assert table.scale.isnan().all()
        assert (ops.weights(table) == 0).all()
        assert (ops.sample(table, stream_of(1, 0, device), 20) == NO_ITEM).all()
        if not math.isfinite(score):
            assert ops.inverse_temperature(scores, 5.0).isnan()


def test_update_warns_where_too_little_weight_is_left() -> None:
    scores = torch.zeros(1000)
    scores[0] = 30.0
    with pytest.warns(UserWarning, match="weights sum to [0-9]+ for 1000 items, too few for exact probabilities"):
        AliasTable(scores, 1.0).update(torch.tensor([0]), torch.tensor([0.0]))


def test_items_can_leave_and_return() -> None:
    table = AliasTable(torch.tensor([0.0, 0.0, 1.0]), 1.0, seed=0)
    table.update(torch.tensor([2]), torch.tensor([-INFINITY]))
    assert set(table.sample(1000).tolist()) == {0, 1}
    table.update(torch.tensor([2]), torch.tensor([1.0]))
    assert (table.sample(1000) == 2).any()
