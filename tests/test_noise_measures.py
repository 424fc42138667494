"""How well wrong labels were found: against counts in plain Python, and scikit-learn's curves."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refusals import DTYPES, FLOATS, NAN, refuses
from sklearn import metrics
from torch import Tensor

from fastkd import noise

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]

SCORE = torch.tensor([0.1, 0.2, 0.2, 0.6, 0.9])
WRONG = torch.tensor([True, True, False, True, False])


def share(a: int, b: int) -> float:
    return a / b if b else NAN


def plain(noisy: list[bool], wrong: list[bool]) -> list[float]:
    """Precision, recall, F1, counts."""
    pairs = list(zip(noisy, wrong, strict=True))
    tp, fp, fn, tn = (pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False)))
    return [share(tp, tp + fp), share(tp, tp + fn), share(2 * tp, 2 * tp + fp + fn), tp, fp, fn, tn]


def same(ours: Any, theirs: Any) -> bool:
    return np.allclose([float(x) for x in ours], theirs, rtol=1e-12, atol=1e-15, equal_nan=True)


PAIRS = st.lists(st.tuples(st.integers(0, 6), st.booleans()), max_size=30)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=12))
def test_counts(pairs: list[tuple[bool, bool]]) -> None:
    noisy, wrong = ([pair[i] for pair in pairs] for i in (0, 1))
    found = noise.measure(torch.tensor(noisy, dtype=torch.bool), np.array(wrong, dtype=bool))
    assert same(found, plain(noisy, wrong))


@pytest.mark.parametrize(
    ("noisy", "wrong", "shares"),
    [
        ([False, False], [True, False], [NAN, 0.0, 0.0]),  # nothing is found
        ([True, False], [False, False], [0.0, NAN, 0.0]),  # nothing is wrong
        ([False, False], [False, False], [NAN, NAN, NAN]),
        ([], [], [NAN, NAN, NAN]),
        ([True, True], [True, True], [1.0, 1.0, 1.0]),
    ],
)
def test_nothing_found_or_nothing_wrong(noisy: list[bool], wrong: list[bool], shares: list[float]) -> None:
    found = noise.measure(*(torch.tensor(x, dtype=torch.bool) for x in (noisy, wrong)))
    assert same(found[:3], shares)
    assert {number.dtype for number in found[3:]} == {torch.int64}
    assert {number.dtype for number in found[:3]} == {torch.float64}


@given(PAIRS)
def test_a_sweep_is_a_measure_at_each_threshold(pairs: list[tuple[int, bool]]) -> None:
    score = torch.tensor([pair[0] / 6 for pair in pairs])
    wrong = torch.tensor([pair[1] for pair in pairs], dtype=torch.bool)
    asked = torch.tensor([0.5, -1.0, 2.0, 1 / 6, 0.0, 1.0], dtype=torch.float64)
    for found, thresholds in (
        (noise.sweep(score, wrong), score.double().sort().values),
        (noise.sweep(score, wrong, asked), asked),
    ):
        assert torch.equal(found.thresholds, thresholds)
        for i, threshold in enumerate(thresholds):
            one = plain((score.double() <= threshold).tolist(), wrong.tolist())
            assert same((found.precision[i], found.recall[i], found.f1[i]), one[:3])
        best = found.f1.nan_to_num(-1.0).max().item() if len(thresholds) else -1.0
        if best <= 0:
            assert found.best_threshold.isnan()
        else:
            one = plain((score.double() <= found.best_threshold).tolist(), wrong.tolist())
            assert one[2] == pytest.approx(best)


@given(PAIRS)
def test_areas_are_scikit_learns(pairs: list[tuple[int, bool]]) -> None:
    """Of which many scores are equal."""
    score = np.array([pair[0] / 6 for pair in pairs])
    wrong = np.array([pair[1] for pair in pairs], dtype=bool)
    found = noise.sweep(score, wrong)
    if wrong.any() and not wrong.all():
        assert float(found.roc_auc) == pytest.approx(metrics.roc_auc_score(wrong, -score), abs=1e-12)
        # scikit-learn's labels are the other way round: high is positive
        assert float(found.average_precision) == pytest.approx(
            metrics.average_precision_score(wrong, -score), abs=1e-12
        )
    else:
        assert found.roc_auc.isnan()
        assert float(found.average_precision) == 1.0 if wrong.any() else found.average_precision.isnan()


def test_many_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    wrong = torch.rand(300_000, generator=generator) < 0.2
    score = (torch.rand(300_000, generator=generator) - 0.3 * wrong).clamp(0, 1)
    for values in (score, score.double(), score.half()):
        found = noise.sweep(values, wrong)
        assert found.thresholds.dtype == torch.float64
        reference = -values.double().numpy()
        assert float(found.roc_auc) == pytest.approx(metrics.roc_auc_score(wrong, reference), abs=1e-9)
        assert float(found.average_precision) == pytest.approx(
            metrics.average_precision_score(wrong, reference), abs=1e-9
        )


def test_the_best_threshold_serves_both_comparisons() -> None:
    found = noise.sweep(SCORE, WRONG)
    assert float(found.best_threshold) == pytest.approx(0.75)
    score, best = SCORE, float(found.best_threshold)
    assert torch.equal(score < best, score <= best)
    every = noise.sweep(SCORE, torch.ones(5, dtype=torch.bool))
    assert float(every.best_threshold) == pytest.approx(0.9)  # above which no score is
    given_ = noise.sweep(SCORE, WRONG, [0.0, 0.65, 0.7, 1.0])
    assert float(given_.best_threshold) == 0.65


def test_of_what_was_found() -> None:
    labels, true = torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0])
    found = noise.find(labels, [[0.9, 0.1], [0.2, 0.8], [0.9, 0.1]], rule="disagreement")
    assert noise.measure(found.noisy, labels != true).f1 == 1
    assert noise.sweep(found.score, labels != true).roc_auc == 1


@pytest.mark.parametrize("wrong", [torch.ones(5), torch.ones(5).long(), [0, 1, 0, 1, 1], np.ones(5)])
def test_truth_is_bool(wrong: Any) -> None:
    refuses("truth has dtype", lambda: noise.measure(WRONG, wrong))
    refuses("truth has dtype", lambda: noise.sweep(SCORE, wrong))
    refuses("noisy has dtype", lambda: noise.measure(wrong, WRONG))


@pytest.mark.parametrize("other", [WRONG[:4], WRONG[:, None]])
def test_shapes(other: Tensor) -> None:
    refuses("truth has shape", lambda: noise.measure(WRONG, other))
    refuses("truth has shape", lambda: noise.sweep(SCORE, other))
    refuses("noisy has shape", lambda: noise.measure(WRONG[:, None], WRONG))
    refuses("score has shape", lambda: noise.sweep(SCORE[:, None], WRONG))
    refuses("thresholds has shape", lambda: noise.sweep(SCORE, WRONG, 0.5))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_of_scores(dtype: torch.dtype) -> None:
    refuses("score has dtype", lambda: noise.sweep(SCORE.to(dtype), WRONG))
    refuses("thresholds has dtype", lambda: noise.sweep(SCORE, WRONG, SCORE.to(dtype)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_is_no_score(dtype: torch.dtype) -> None:
    score = SCORE.to(dtype, copy=True)
    score[3] = math.nan
    refuses("score has NaN at 3", lambda: noise.sweep(score, WRONG))
    assert noise.sweep(torch.tensor([-math.inf, math.inf]), torch.tensor([True, False])).roc_auc == 1


def test_devices() -> None:
    refuses("truth is on meta, must be on cpu", lambda: noise.measure(WRONG, WRONG.to("meta")))
    refuses("thresholds is on meta, must be on cpu", lambda: noise.sweep(SCORE, WRONG, SCORE.to("meta")))
