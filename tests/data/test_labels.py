"""Label noise and class imbalance: exact counts, where the labels go, independence, errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastkd._seeding import mixed_seed
from fastkd.data.labels import (
    CIFAR10_CONFUSIONS,
    asymmetric_noise,
    imbalanced,
    instance_noise,
    power_law_counts,
    symmetric_noise,
)

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def labels(count: int = 10_000, num_classes: int = 10) -> Tensor:
    return torch.arange(count) % num_classes


@pytest.mark.parametrize(("rate", "expected"), [(0.0, 0), (0.2, 2001), (0.25, 2501), (0.6, 6002), (1.0, 10_003)])
def test_symmetric_noise_changes_the_share_exactly(rate: float, expected: int) -> None:
    target = labels(10_003)
    noisy, changed = symmetric_noise(target, rate, 10, seed=0)
    assert int(changed.sum()) == expected
    assert torch.equal(noisy != target, changed)
    assert noisy.dtype == torch.int64
    assert (int(noisy.min()), int(noisy.max())) == (0, 9)


def test_symmetric_noise_is_uniform_over_the_others() -> None:
    """Each of 9 x 10 changes 600 times in expectation: five standard deviations are 120."""
    target = labels(90_000)
    noisy, changed = symmetric_noise(target, 0.6, 10, seed=1)
    table = torch.bincount(target[changed] * 10 + noisy[changed], minlength=100).reshape(10, 10)
    assert bool((table.diagonal() == 0).all())
    others = table[~torch.eye(10, dtype=torch.bool)]
    assert bool(((others - 600).abs() < 120).all())
    assert float(others.double().std()) == pytest.approx(600**0.5, rel=0.35)


def test_symmetric_noise_of_two_classes() -> None:
    target = labels(100, 2)
    assert torch.equal(symmetric_noise(target, 1.0, 2, seed=0)[0], 1 - target)


def test_asymmetric_noise_of_cifar10() -> None:
    names = {CIFAR10[a]: CIFAR10[b] for a, b in CIFAR10_CONFUSIONS.items()}
    assert names == {"truck": "automobile", "bird": "airplane", "deer": "horse", "cat": "dog", "dog": "cat"}
    target = labels(1005)  # 101 of the classes 0 to 4, 100 of the others
    noisy, changed = asymmetric_noise(target, 0.4, 10, seed=0, mapping=CIFAR10_CONFUSIONS)
    assert torch.equal(noisy != target, changed)
    assert target[changed].bincount(minlength=10).tolist() == [0, 0, 40, 40, 40, 40, 0, 0, 0, 40]
    assert all(
        CIFAR10_CONFUSIONS[a] == b for a, b in zip(target[changed].tolist(), noisy[changed].tolist(), strict=True)
    )


def test_asymmetric_noise_takes_the_next_class() -> None:
    target = labels(1000, 100)
    noisy, changed = asymmetric_noise(target, 0.3, 100, seed=0)
    assert torch.equal(noisy, torch.where(changed, (target + 1) % 100, target))
    assert target[changed].bincount(minlength=100).tolist() == [3] * 100


def uniform(target: Tensor, rate: float, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Instance noise by a classifier that knows nothing."""
    probabilities = torch.full((len(target), num_classes), 1 / num_classes, dtype=torch.float64)
    return instance_noise(target, probabilities, rate, seed)


@pytest.mark.parametrize("noise", [symmetric_noise, asymmetric_noise, uniform])
def test_noise_depends_on_the_seed_alone(noise: Callable[..., tuple[Tensor, Tensor]]) -> None:
    target = labels()
    before, state = target.clone(), torch.random.get_rng_state()
    a, again, b = (noise(target, 0.3, 10, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(a[0], again[0])
    assert torch.equal(a[1], again[1])
    assert float((a[1] & b[1]).double().mean()) == pytest.approx(0.09, abs=0.015)  # independent
    assert torch.equal(target, before)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_no_labels() -> None:
    for noise in (symmetric_noise, asymmetric_noise, uniform):
        noisy, changed = noise(torch.empty(0, dtype=torch.int64), 0.5, 10, seed=0)
        assert noisy.shape == changed.shape == (0,)


@pytest.mark.parametrize(
    ("target", "rate", "num_classes", "message"),
    [
        (labels(), -0.1, 10, r"rate is -0.1, must be in \[0, 1\]"),
        (labels(), 1.1, 10, r"rate is 1.1, must be in \[0, 1\]"),
        (labels(), float("nan"), 10, r"rate is nan, must be in \[0, 1\]"),
        (labels(), 0.1, 1, "num_classes is 1, must be at least 2"),
        (labels(), 0.1, 8, r"target\[8\] is 8, must be in \[0, 8\): there are 8 classes"),
        (torch.tensor([0, 1, -1, 9]), 0.1, 8, r"target\[2\] is -1, must be in \[0, 8\)"),
        (labels().float(), 0.1, 10, "target has dtype torch.float32, must be torch.int64"),
        ([0, 1], 0.1, 10, "target is list, must be a tensor"),
        (labels(), "0.5", 10, "rate is str, must be a number"),
        (labels(), None, 10, "rate is NoneType, must be a number"),
        (labels(), True, 10, "rate is bool, must be a number"),
        (labels(), 0.5, 10.5, "num_classes is float, must be an int"),
        (labels(), 0.5, "10", "num_classes is str, must be an int"),
        (labels(), 0.5, 2**70, "num_classes is .*, must be less than"),
        (labels()[None], 0.1, 10, r"target has shape \(1, 10000\), must be \[N\]"),
    ],
)
@pytest.mark.parametrize("noise", [symmetric_noise, asymmetric_noise])
def test_noise_errors(noise: Callable[..., object], target: Any, rate: Any, num_classes: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match="fastkd: " + message):
        noise(target, rate, num_classes, seed=0)


def some_probabilities(count: int = 1003, num_classes: int = 5) -> Tensor:
    logits = torch.randn(count, num_classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (2 * logits).softmax(1)


@pytest.mark.parametrize(("rate", "expected"), [(0.0, 0), (0.2, 201), (0.6, 602), (1.0, 1003)])
def test_instance_noise_changes_the_share_exactly(rate: float, expected: int) -> None:
    target = labels(1003, 5)
    noisy, changed = instance_noise(target, some_probabilities().float(), rate, seed=0)
    assert int(changed.sum()) == expected
    assert torch.equal(noisy != target, changed)
    assert (noisy.dtype, int(noisy.min()), int(noisy.max())) == (torch.int64, 0, 4)


def test_instance_noise_draws_by_the_odds() -> None:
    """Of four images two are changed: that a pair is, one after the other, follows from the odds; so do the new labels."""
    probabilities = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.1, 0.8], [0.5, 0.25, 0.25]])
    target = torch.tensor([0, 0, 2, 1])
    odds = [0.3 / 0.6, 0.7 / 0.2, 0.1 / 0.8, 0.5 / 0.25]
    whole, draws = sum(odds), 4000
    expected = {
        (i, j): odds[i] / whole * odds[j] / (whole - odds[i]) + odds[j] / whole * odds[i] / (whole - odds[j])
        for i in range(4)
        for j in range(i)
    }
    seen = dict.fromkeys(expected, 0)
    ones, changes = 0, 0
    for seed in range(draws):
        noisy, changed = instance_noise(target, probabilities, 0.5, seed)
        low, high = changed.nonzero().flatten().tolist()
        seen[high, low] += 1
        changes += int(changed[1])
        ones += int(noisy[1] == 1)
    for pair, share in expected.items():
        assert seen[pair] / draws == pytest.approx(share, abs=5 * (share * (1 - share) / draws) ** 0.5)
    share = 0.7 / 0.8
    assert ones / changes == pytest.approx(share, abs=5 * (share * (1 - share) / changes) ** 0.5)


def test_instance_noise_of_a_classifier_that_is_sure() -> None:
    """Its errors come first, and what it is right about last: to any other class then, each as likely."""
    target = torch.zeros(3000, dtype=torch.int64)
    probabilities = torch.nn.functional.one_hot(torch.arange(3000) % 3, 3).double()
    noisy, changed = instance_noise(target, probabilities, 2 / 3, seed=0)
    assert torch.equal(changed, torch.arange(3000) % 3 != 0)
    assert torch.equal(noisy, torch.arange(3000) % 3)
    noisy, changed = instance_noise(target, probabilities, 1.0, seed=0)
    assert bool(changed.all())
    assert int((noisy[::3] == 1).sum()) == pytest.approx(500, abs=5 * 250**0.5)


@pytest.mark.parametrize(
    ("target", "probabilities", "rate", "message"),
    [
        (labels(4, 3), [[0.5, 0.5]], 0.1, "probabilities is list, must be a tensor"),
        (
            labels(4, 3),
            torch.full((4, 3), 1 / 3).half(),
            0.1,
            "probabilities has dtype torch.float16, must be float32 or",
        ),
        (
            labels(4, 3),
            torch.full((4, 1), 1.0),
            0.1,
            r"probabilities has shape \(4, 1\), must be \[N, K\] of two classes",
        ),
        (labels(4, 3), torch.full((12,), 1.0), 0.1, r"probabilities has shape \(12,\), must be \[N, K\]"),
        (
            labels(4, 3),
            torch.full((5, 3), 1 / 3),
            0.1,
            r"probabilities has shape \(5, 3\), must be \(4, 3\), a row a label",
        ),
        (labels(4, 4), torch.full((4, 3), 1 / 3), 0.1, r"target\[3\] is 3, must be in \[0, 3\): there are 3 classes"),
        (labels(4, 3), torch.full((4, 3), 1 / 3), 1.5, r"rate is 1.5, must be in \[0, 1\]"),
        (
            labels(2, 2),
            torch.tensor([[0.5, 0.5], [0.5, 0.6]]),
            0.1,
            r"probabilities\[1\] sums to 1.1 and has 0.5 as its",
        ),
        (
            labels(2, 2),
            torch.tensor([[1.5, -0.5], [0.5, 0.5]]),
            0.1,
            r"probabilities\[0\] sums to 1 and has -0.5 as its",
        ),
        (labels(2, 2), torch.tensor([[0.5, 0.5], [torch.nan, 0.5]]), 0.1, r"probabilities\[1\] sums to nan and"),
    ],
)
def test_instance_noise_errors(target: Tensor, probabilities: Any, rate: float, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match="fastkd: " + message):
        instance_noise(target, probabilities, rate, seed=0)


@pytest.mark.parametrize("mapping", [{1: 1}, {10: 1}, {1: 10}, {-1: 1}, {0: 1, 2: -1}, {0: 1.5}, {"0": 1}])
def test_mapping_errors(mapping: Mapping[int, int]) -> None:
    source, other = list(mapping.items())[-1]
    message = rf"mapping has {source}: {other}, must have two different classes in \[0, 10\)"
    with pytest.raises(ValueError, match=message):
        asymmetric_noise(labels(), 0.1, 10, seed=0, mapping=mapping)


def test_mapping_of_other_kinds() -> None:
    assert asymmetric_noise(labels(), 1.0, 10, seed=0, mapping={np.int64(0): torch.tensor(1)})[1].sum() == 1000
    with pytest.raises(TypeError, match="fastkd: mapping is list, must be a mapping of classes to classes"):
        asymmetric_noise(labels(), 0.1, 10, seed=0, mapping=[1, 2])  # type: ignore[arg-type]


def test_power_law_by_hand() -> None:
    """gamma 1, 4 classes from 10 to 100: b = (10 - 25) / 90 = -1/6, a = 25/3, n_2 = a / (1/2 - 1/6) = 25, n_3 = 50."""
    assert power_law_counts(4, 1.0, 100, 10) == [10, 25, 50, 100]


@pytest.mark.parametrize(("gamma", "total"), [(0.2, 15_207), (0.6, 18_033), (1.0, 21_455), (2.0, 30_700)])
def test_power_law_of_the_study(gamma: float, total: int) -> None:
    counts = power_law_counts(10, gamma, 5000, 250)
    assert (counts[0], counts[-1], len(counts)) == (250, 5000, 10)
    assert counts == sorted(counts)
    assert sum(counts) == total
    # the law: 1 / n_c is an affine function of c^-gamma
    slope = (1 / counts[0] - 1 / counts[-1]) / (1 - 10**-gamma)
    for c, count in enumerate(counts, start=1):
        assert count == pytest.approx(1 / (1 / counts[-1] + slope * (c**-gamma - 10**-gamma)), abs=0.5 + 1e-9)


def test_power_law_grows_with_gamma() -> None:
    """The smaller gamma, the more imbalanced; large ones leave the first class alone behind."""
    tables = [power_law_counts(100, gamma, 500, 25) for gamma in (0.01, 0.2, 0.6, 1.0, 2.0, 30.0)]
    for smaller, larger in pairwise(tables):
        assert all(a <= b for a, b in zip(smaller, larger, strict=True))
        assert sum(smaller) < sum(larger)
    assert tables[-1] == [25] + [500] * 99
    assert all(table == sorted(table) for table in tables)


@pytest.mark.parametrize(
    ("num_classes", "largest", "smallest", "expected"),
    [(3, 7, 7, [7, 7, 7]), (1, 7, 7, [7]), (2, 9, 1, [1, 9])],
)
def test_power_law_of_few(num_classes: int, largest: int, smallest: int, expected: list[int]) -> None:
    assert power_law_counts(num_classes, 0.5, largest, smallest) == expected


@pytest.mark.parametrize(
    ("num_classes", "gamma", "largest", "smallest", "message"),
    [
        (10, 0.0, 10, 1, "gamma is 0.0, must be 1e-6 or more, and finite"),
        (10, -1.0, 10, 1, "gamma is -1.0, must be 1e-6 or more, and finite"),
        (10, float("nan"), 10, 1, "gamma is nan, must be 1e-6 or more, and finite"),
        (10, float("inf"), 10, 1, "gamma is inf, must be 1e-6 or more, and finite"),
        (10, 1.0, 10, 11, r"smallest is 11, must be in \[1, 10\], at most largest"),
        (10, 1.0, 10, 0, r"smallest is 0, must be in \[1, 10\], at most largest"),
        (1, 1.0, 10, 5, "num_classes is 1, must be at least 2 for sizes from 5 to 10"),
        (0, 1.0, 5, 5, "num_classes is 0, must be at least 1 for sizes from 5 to 5"),
        (5.0, 1.0, 10, 1, "num_classes is float, must be an int"),
        (True, 1.0, 5, 5, "num_classes is bool, must be an int"),
        (2**70, 1.0, 5, 5, "num_classes is 1180591620717411303424, must be less than 16777216"),
        (5, "1", 10, 1, "gamma is str, must be a number"),
        (5, 10**400, 10, 1, "gamma is 1000.*, must be a number that a float holds"),
        (5, 1.0, 10.7, 1, "largest is float, must be an int"),
        (5, 1.0, 10**400, 1, "largest is 1000.*, must be less than"),
        (5, 1.0, 10, float("nan"), "smallest is float, must be an int"),
    ],
)
def test_power_law_errors(num_classes: Any, gamma: Any, largest: Any, smallest: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match="fastkd: " + message):
        power_law_counts(num_classes, gamma, largest, smallest)


def test_imbalanced_keeps_the_counts() -> None:
    target = labels().flip(0)
    counts = power_law_counts(10, 0.6, 1000, 50)
    kept = imbalanced(target, counts, seed=0)
    assert target[kept].bincount(minlength=10).tolist() == counts
    assert kept.dtype == torch.int64
    assert torch.equal(kept, kept.unique())  # ascending, none twice
    assert torch.equal(kept, imbalanced(target, counts, seed=0))
    assert not torch.equal(kept, imbalanced(target, counts, seed=1))


def test_imbalanced_with_empty_classes() -> None:
    target = labels(30, 3)
    assert target[imbalanced(target, [0, 10, 1], seed=0)].bincount(minlength=3).tolist() == [0, 10, 1]
    assert torch.equal(imbalanced(target, [10, 10, 10], seed=0), torch.arange(30))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([10, 11, 10], r"counts\[1\] is 11, must be in \[0, 10\]: the samples of class 1"),
        ([10, 10, -1], r"counts\[2\] is -1, must be in \[0, 10\]"),
        ([10, 10], r"target\[2\] is 2, must be in \[0, 2\): there are 2 classes"),
        ([1.5, 1, 1], r"counts\[0\] is float, must be an int"),
        ([1, float("nan"), 1], r"counts\[1\] is float, must be an int"),
        (None, "counts is NoneType, must be a sequence of ints"),
        ([10, 10, 10, 1], r"counts\[3\] is 1, must be in \[0, 0\]: the samples of class 3"),
    ],
)
def test_imbalanced_errors(counts: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match="fastkd: " + message):
        imbalanced(labels(30, 3), counts, seed=0)


def test_seeds_are_mixed() -> None:
    """Neither sums, nor concatenated digits, nor trailing zeros, nor purposes give the same seed."""
    different = [(0, 1), (1, 0), (1, 1), (11,), (1,), (0,), (1, 0, 0), (2**32, 0), (0, 2**32), (-1, 0), (0, -1), ()]
    seeds = {mixed_seed(purpose, *numbers) for numbers in different for purpose in ("order", "crops")}
    assert len(seeds) == 2 * len(different)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert mixed_seed("order", 1, 2) == mixed_seed("order", 1, 2)
    bits = torch.tensor([[mixed_seed("order", i) >> bit & 1 for bit in range(63)] for i in range(2000)]).double()
    assert bool(((bits.mean(0) - 0.5).abs() < 0.06).all())  # five standard deviations
