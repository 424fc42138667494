"""WeightedRandomSampler beside torch's: the same checks, draws that follow the weights, in loaders, and beyond 2^24 items."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data import WeightedRandomSampler as Theirs

from fastkd import WeightedRandomSampler

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]

WEIGHTS = [0.1, 0.9, 0.4, 0.0, 3.0, 0.6]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("scale", [1.0, 1e-310, 1e307])
def test_draws_follow_the_weights(scale: float) -> None:
    weights = torch.tensor([*WEIGHTS, 5.0, *[0.05] * 20], dtype=torch.float64) * scale
    drawn = torch.tensor(list(WeightedRandomSampler(weights, 200_000, generator=seeded())))
    counts = torch.bincount(drawn, minlength=len(weights))
    assert counts[3] == 0
    shares = weights / scale
    expected = shares / shares.sum() * 200_000
    likely = torch.arange(len(weights)) != 3
    assert stats.chisquare(counts[likely].numpy(), expected[likely].numpy()).pvalue > 1e-4


def test_draws_without_replacement_follow_the_weights() -> None:
    """Of pairs in their order: P(i, j) = w_i / W * w_j / (W - w_i)."""
    weights = torch.tensor([1.0, 2.0, 3.0, 0.0, 4.0], dtype=torch.float64)
    sampler = WeightedRandomSampler(weights, 2, replacement=False, generator=seeded())
    pairs = [tuple(sampler) for _ in range(20_000)]
    expected, counts = [], []
    for i in range(5):
        for j in range(5):
            if i != j and weights[i] * weights[j] > 0:
                expected.append(20_000 * float(weights[i] / 10 * weights[j] / (10 - weights[i])))
                counts.append(pairs.count((i, j)))
    assert sum(counts) == 20_000
    assert stats.chisquare(counts, expected).pvalue > 1e-4


@pytest.mark.parametrize("scale", [1.0, 1e-310, 1e300])
def test_draws_without_replacement_are_those_of_torch(scale: float) -> None:
    weights = torch.rand(3000, generator=seeded(), dtype=torch.float64)
    ours = WeightedRandomSampler(weights * scale, 1000, False, seeded(1))
    theirs = Theirs(weights, 1000, False, seeded(1))
    first = list(ours)
    assert first == list(theirs)
    second = list(ours)
    assert second == list(theirs) != first
    assert len(set(first)) == 1000
    wide = torch.tensor([1e300, 1e-300, 5e-324, 0.0], dtype=torch.float64)
    assert list(WeightedRandomSampler(wide, 3, False)) == [0, 1, 2]


def test_more_than_2_to_24_items() -> None:
    """The mass at the end, where a sum in fp32 would lose it."""
    items = 2**24 + 5
    weights = torch.full((items,), 1e-8, dtype=torch.float64)
    weights[-4:] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    sampler = WeightedRandomSampler(weights, 20_000, generator=seeded())
    drawn = torch.tensor(list(sampler))
    last = drawn[drawn >= items - 4] - (items - 4)
    rest = 1e-8 * (items - 4)
    assert abs(len(last) / 20_000 - 10 / (10 + rest)) < 5 * math.sqrt(0.02 / 20_000)
    assert (
        stats.chisquare(torch.bincount(last).numpy(), [len(last) * share / 10 for share in (1, 2, 3, 4)]).pvalue > 1e-4
    )
    assert len(drawn[drawn < items - 4].unique()) > 100
    few = list(WeightedRandomSampler(weights, 4, False, seeded()))
    assert len(set(few)) == 4
    assert sum(index >= items - 4 for index in few) >= 3
    with pytest.raises(RuntimeError, match="24"):
        list(Theirs(weights, 10))


def test_iterations_are_fresh_draws_of_the_generator() -> None:
    sampler = WeightedRandomSampler(WEIGHTS, 70_000, generator=seeded(3))
    first, second = list(sampler), list(sampler)
    assert first != second
    again = WeightedRandomSampler(WEIGHTS, 70_000, generator=seeded(3))
    assert [list(again), list(again)] == [first, second]
    assert all(type(index) is int for index in first[:10])
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(5)
        defaults = list(WeightedRandomSampler(WEIGHTS, 100))
        torch.manual_seed(5)
        assert list(WeightedRandomSampler(WEIGHTS, 100)) == defaults
        assert list(WeightedRandomSampler(WEIGHTS, 100)) != defaults
    finally:
        torch.random.set_rng_state(state)


@pytest.mark.parametrize("replacement", [True, False])
def test_changes_of_the_weights(replacement: bool) -> None:
    """Assigned, in place, and in numpy's array, as in torch's, from the next iteration on."""
    array = np.array([1.0, 1.0, 0.0, 0.0])
    samplers: list[Any] = [kind(array, 2, replacement) for kind in (WeightedRandomSampler, Theirs)]
    for sampler in samplers:
        assert set(sampler) <= {0, 1}
    array[:] = [0, 0, 1, 1]
    for sampler in samplers:
        assert set(sampler) <= {2, 3}
        sampler.weights[2] = 0
        sampler.weights[0] = 1
        running = iter(sampler)
        assert next(running) in (0, 3)
        sampler.weights = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
        assert next(running) in (0, 3)
        assert set(sampler) <= {1, 2}
        array[:] = [0, 0, 1, 1]
        sampler.num_samples = 1
        assert len(list(sampler)) == len(sampler) == 1


def test_attributes_and_kind() -> None:
    for weights in (WEIGHTS, tuple(WEIGHTS), np.array(WEIGHTS, np.float32), torch.tensor(WEIGHTS), [1, 2, 3]):
        ours, theirs = WeightedRandomSampler(weights, 10), Theirs(weights, 10)  # type: ignore[arg-type]
        assert isinstance(ours, Theirs)
        assert ours.weights.dtype == torch.float64
        assert torch.equal(ours.weights, theirs.weights)
        assert (ours.num_samples, ours.replacement, ours.generator, len(ours)) == (10, True, None, 10)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.forks)])
def test_in_a_loader(workers: int) -> None:
    data = TensorDataset(torch.arange(6))
    sampler = WeightedRandomSampler(WEIGHTS, 64, generator=seeded())
    loader = DataLoader(data, 16, sampler=sampler, num_workers=workers)
    expected = list(WeightedRandomSampler(WEIGHTS, 64, generator=seeded()))
    assert torch.cat([x for (x,) in loader]).tolist() == expected
    assert torch.cat([x for (x,) in loader]).tolist() != expected


def test_copies() -> None:
    sampler = WeightedRandomSampler(WEIGHTS, 50)
    list(sampler)  # which has a table now
    for made in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler)), copy.copy(sampler)):
        state = torch.random.get_rng_state()
        drawn = list(made)
        torch.random.set_rng_state(state)
        assert list(sampler) == drawn


@pytest.mark.parametrize(
    "arguments",
    [
        (WEIGHTS, 0),
        (WEIGHTS, -1),
        (WEIGHTS, 2.0),
        (WEIGHTS, True),
        (WEIGHTS, 5, 1),
        ([WEIGHTS], 5),
        (3.0, 5),
        ("ab", 5),
    ],
)
def test_refused_at_construction_as_by_torch(arguments: tuple[Any, ...]) -> None:
    errors = []
    for kind in (WeightedRandomSampler, Theirs):
        with pytest.raises((TypeError, ValueError)) as caught:
            kind(*arguments)
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize(
    ("weights", "samples", "replacement", "message"),
    [
        ([1.0, math.nan], 2, True, "weights holds nan to nan, must be finite and at least 0"),
        ([1.0, -1.0], 2, True, "weights holds -1.0 to 1.0, must be finite and at least 0"),
        ([1.0, math.inf], 2, True, "weights holds 1.0 to inf, must be finite and at least 0"),
        ([0.0, 0.0], 2, True, "weights has none above 0, must have one at least"),
        ([], 2, True, "weights is empty, must have one item at least"),
        ([1.0, math.nan], 2, False, "weights holds nan to nan"),
        ([0.0, 0.0], 1, False, "weights has none above 0"),
        ([1.0, 2.0], 3, False, "num_samples is 3, must be at most the 2 items of weight above 0 without replacement"),
    ],
)
def test_refused_when_iterated_as_by_torch(weights: Any, samples: int, replacement: bool, message: str) -> None:
    with pytest.raises(RuntimeError):
        list(Theirs(weights, samples, replacement))
    with pytest.raises(RuntimeError, match="fastkd: " + message):
        list(WeightedRandomSampler(weights, samples, replacement))


def test_more_than_can_be_drawn() -> None:
    """torch's gives items of weight 0 here."""
    with pytest.raises(RuntimeError, match="num_samples is 2, must be at most the 1 items of weight above 0"):
        list(WeightedRandomSampler([1.0, 0.0], 2, False))
    with pytest.raises(TypeError, match="generator is int"):
        list(WeightedRandomSampler([1.0], 2, generator=3))
    sampler = WeightedRandomSampler([1.0, 2.0], 2)
    list(sampler)
    sampler.weights[0] = math.nan
    with pytest.raises(RuntimeError, match="weights holds nan"):
        list(sampler)
    sampler.weights = torch.ones(2, 2)
    with pytest.raises(RuntimeError, match=r"weights has shape \(2, 2\), must be \[N\]"):
        list(sampler)
