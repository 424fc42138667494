"""Which labels are probably wrong: each rule against its formula in numpy, confident learning against cleanlab, all inputs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refusals import DTYPES, FLOATS, INF, NAN, refuses
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from torch import Tensor

import fastkd
from fastkd import FitStatus, TwoGaussianMixture, noise
from fastkd.data.labels import symmetric_noise

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]

# of three classes; the labels 0, 0, 1, 2, 1, of which the second and the last are wrong
LABELS = torch.tensor([0, 0, 1, 2, 1])
PROBABILITIES = torch.tensor(
    [[0.90, 0.05, 0.05], [0.04, 0.86, 0.10], [0.10, 0.80, 0.10], [0.20, 0.10, 0.70], [0.02, 0.03, 0.95]]
)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor]:
    """Labels of the handwritten digits, 30 % of them wrong; which; probabilities of a classifier that did not see them."""
    images, classes = load_digits(return_X_y=True)
    labels, wrong = symmetric_noise(torch.from_numpy(classes), 0.3, 10, seed=0)
    model = LogisticRegression(C=0.01)
    found = cross_val_predict(model, images / 16, labels.numpy(), cv=3, method="predict_proba")
    return labels, wrong, torch.from_numpy(found)


def drawn(samples: int, classes: int, seed: int = 0, wrong: float = 0.3) -> tuple[Tensor, Tensor]:
    """Labels and float64 probabilities."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.randint(0, classes, (samples,), generator=generator)
    logits = torch.randn(samples, classes, generator=generator, dtype=torch.float64)
    logits[torch.arange(samples), true] += 3
    changed = torch.rand(samples, generator=generator) < wrong
    return torch.where(changed, (true + 1) % classes, true), logits.softmax(1)


@st.composite
def cases(draw: Any) -> tuple[np.ndarray, np.ndarray]:
    """Labels and float64 probabilities as numpy has them, many of them equal; of cleanlab's one class must be 0."""
    classes = draw(st.integers(2, 5))
    samples = draw(st.integers(1, 25))
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=samples, max_size=samples))
    if len(set(labels)) == 1:
        labels = [0] * samples
    coarse = st.lists(st.integers(0, 4), min_size=classes, max_size=classes).filter(any)
    fine = st.lists(st.floats(1e-9, 1), min_size=classes, max_size=classes)
    rows = np.array([draw(coarse | fine) for _ in range(samples)], dtype=np.float64)
    return np.array(labels), rows / rows.sum(1, keepdims=True)


def by_cleanlab(labels: Any, p: Any, filter_by: str = "confident_learning", ranked_by: str | None = None) -> np.ndarray:
    cleanlab = pytest.importorskip("cleanlab.filter", reason="cleanlab is not installed")
    found: np.ndarray = cleanlab.find_label_issues(
        np.asarray(labels), np.asarray(p), filter_by=filter_by, return_indices_ranked_by=ranked_by
    )
    return found


def by_the_paper(labels: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Confident learning, a sample at a time."""
    thresholds = [p[labels == k, k].mean() if (labels == k).any() else INF for k in range(p.shape[1])]
    noisy = []
    for row, label in zip(p, labels, strict=True):
        confident = [k for k in range(len(row)) if row[k] >= thresholds[k] - 1e-6]
        noisy.append(bool(confident) and max(confident, key=lambda k: row[k]) != label and row.argmax() != label)
    return np.array(noisy)


# ---- rules ---------------------------------------------------------------------------------------------


def test_what_is_found_by_each_rule() -> None:
    own = PROBABILITIES[torch.arange(5), LABELS]
    for rule in noise.RULES:
        found = noise.find(LABELS, PROBABILITIES, rule=rule)
        assert found.noisy.tolist() == [False, True, False, False, True], rule
        assert found.count == 2
        assert found.ranked().tolist() == (
            [1, 4] if rule == "mixture" else [4, 1]
        )  # the second loss is the mean of its Gaussian
        assert found.rule == rule
        assert found.suggested is not None
        assert found.suggested.tolist() == [0, 1, 1, 2, 2]
        if rule != "mixture":
            torch.testing.assert_close(found.score, own)
    thresholds = {rule: noise.find(LABELS, PROBABILITIES, rule=rule).threshold for rule in noise.RULES}
    assert thresholds == {"mixture": 0.5, "probability": 0.05, "confident": None, "disagreement": None}
    confident = noise.find(LABELS, PROBABILITIES, rule="confident").class_thresholds
    torch.testing.assert_close(confident, torch.tensor([0.47, 0.415, 0.7], dtype=torch.float64))


@given(cases())
def test_confident_is_cleanlabs(case: tuple[np.ndarray, np.ndarray]) -> None:
    labels, p = case
    found = noise.find(labels, p, rule="confident")
    assert found.noisy.tolist() == by_cleanlab(labels, p).tolist()


@given(cases())
def test_confident_in_32_bits_is_cleanlabs_of_the_same_numbers(case: tuple[np.ndarray, np.ndarray]) -> None:
    labels, p = case
    single = p.astype(np.float32)
    found = noise.find(labels, single, rule="confident")
    assert found.noisy.tolist() == by_cleanlab(labels, single.astype(np.float64)).tolist()


@given(cases())
def test_confident_is_the_papers_but_for_one_case(case: tuple[np.ndarray, np.ndarray]) -> None:
    """Where the most probable class is below its threshold, and two others are above theirs."""
    labels, p = case
    ours, paper = noise.find(labels, p, rule="confident"), by_the_paper(labels, p)
    assert ours.class_thresholds is not None
    above = p >= ours.class_thresholds.nan_to_num(INF).numpy() - 1e-6
    apart = ~above[np.arange(len(p)), p.argmax(1)] & (above.sum(1) > 1)
    # probabilities within 1e-6 of each other count as equal
    equal = p.max(1) - p[np.arange(len(p)), labels] <= 2e-6
    same = ~apart & ~equal
    assert ours.noisy.numpy()[same].tolist() == paper[same].tolist()


def test_the_one_case() -> None:
    """Of the last sample: class 0 is the most probable, but below its 0.9; 1, its label, and 2 are above theirs."""
    labels = [0, 1, 1, 2, 1]
    p = np.array([[0.9, 0.05, 0.05], [0.6, 0.2, 0.2], [0.6, 0.2, 0.2], [0.7, 0.1, 0.2], [0.42, 0.33, 0.25]])
    assert by_the_paper(np.array(labels), p).tolist()[-1] is False
    assert by_cleanlab(labels, p).tolist()[-1] is True
    assert noise.find(labels, p, rule="confident").noisy.tolist()[-1] is True


@pytest.mark.parametrize(("samples", "classes"), [(1000, 2), (3000, 100), (200_000, 10)])
def test_many_samples(samples: int, classes: int) -> None:
    labels, p = drawn(samples, classes)
    for values in (p, p.float(), p.half(), p.bfloat16()):
        found = noise.find(labels, values, rule="confident")
        assert np.array_equal(found.noisy.numpy(), by_cleanlab(labels, values.double()))
        assert 0 < found.count < samples


def test_digits(digits: tuple[Tensor, Tensor, Tensor]) -> None:
    """Agreement with cleanlab is exact, and most of the wrong labels are found."""
    labels, wrong, p = digits
    found = noise.find(labels, p, rule="confident")
    assert np.array_equal(found.noisy.numpy(), by_cleanlab(labels, p))
    assert found.ranked().tolist() == by_cleanlab(labels, p, ranked_by="self_confidence").tolist()
    for rule, least in (("confident", 0.8), ("mixture", 0.8), ("disagreement", 0.8)):
        assert noise.measure(noise.find(labels, p, rule=rule).noisy, wrong).f1 > least  # type: ignore[arg-type]
    assert noise.measure(noise.find(labels, p, rule="mixture", by_class=True).noisy, wrong).f1 > 0.8
    argmax = noise.find(labels, p, rule="disagreement").noisy
    assert argmax.tolist() == by_cleanlab(labels, p, "predicted_neq_given").tolist()


@pytest.mark.parametrize("threshold", [None, 0.0, 0.3, 1.0])
def test_a_mixture_is_that_of_select_clean(threshold: float | None, digits: tuple[Tensor, Tensor, Tensor]) -> None:
    labels, _, p = digits
    losses = -p[torch.arange(len(p)), labels].log()
    clean, posterior = fastkd.select_clean(losses, 0.5 if threshold is None else threshold)
    for found in (
        noise.find(labels, p, threshold=threshold),
        noise.find(losses=losses, threshold=threshold),
        noise.find(labels, losses=losses.numpy(), threshold=threshold),
    ):
        assert torch.equal(found.noisy, ~clean)
        torch.testing.assert_close(found.score, posterior, rtol=1e-12, atol=0)
        assert found.status is not None
        assert found.status.shape == (1,)


@pytest.mark.parametrize("kind", ["probabilities", "logits", "losses"])
def test_by_class_is_a_mixture_for_each_class(kind: str, digits: tuple[Tensor, Tensor, Tensor]) -> None:
    """Of labels in no order, and of classes without one: 3 in the midst, 10 and 11 at the end."""
    labels, _, p = digits
    labels = torch.where(labels == 3, 4, labels)
    p = torch.cat([p, torch.full((len(p), 2), 1e-9)], 1)
    losses = -p[torch.arange(len(p)), labels].log()
    values = {"probabilities": p, "logits": p.log(), "losses": losses}[kind]
    found = noise.find(labels, by_class=True, threshold=0.4, **{kind: values})  # type: ignore[arg-type]
    noisy, score = torch.ones(len(p), dtype=torch.bool), torch.full_like(losses, NAN)
    status = [int(FitStatus.TOO_FEW)] * (10 if kind == "losses" else 12)
    for k in range(10):
        rows = labels == k
        if k != 3:
            mixture = TwoGaussianMixture(normalize=True).fit(losses[rows])
            score[rows] = mixture.predict_proba(losses[rows])[:, 0]
            status[k] = int(mixture.status_)
        noisy[rows] = score[rows] <= 0.4
    torch.testing.assert_close(found.score, score, rtol=1e-9, atol=1e-12)
    assert torch.equal(found.noisy, noisy)
    assert found.status is not None
    assert found.status.tolist() == status


def test_thresholds_are_those_of_the_rule() -> None:
    own = PROBABILITIES[torch.arange(5), LABELS]
    for threshold in (0.0, 0.03, 0.8, 1.0):
        found = noise.find(LABELS, PROBABILITIES, rule="probability", threshold=threshold)
        assert found.noisy.tolist() == (own < threshold).tolist()
        assert found.threshold == threshold


def test_a_suggestion_may_be_the_label() -> None:
    """Of many classes the most probable one may be improbable."""
    found = noise.find([7], torch.full((1, 100), 0.01).index_fill(1, torch.tensor(7), 0.011), rule="probability")
    assert found.noisy.tolist() == [True]
    assert found.suggested is not None
    assert found.suggested.tolist() == [7]


def test_ranks_of_equal_scores_go_by_index() -> None:
    labels = torch.tensor([0, 1, 1, 1, 0])
    found = noise.find(labels, torch.tensor([[1.0, 0.0]]).expand(5, 2), rule="disagreement")
    assert found.ranked().tolist() == [1, 2, 3]


# ---- inputs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", noise.RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_are_as_their_softmax(rule: noise.Rule, dtype: torch.dtype) -> None:
    labels, p = drawn(500, 6)
    logits = (p.log() + torch.randn(500, 1, dtype=torch.float64)).to(dtype)
    ours, theirs = (
        noise.find(labels, logits=logits, rule=rule),
        noise.find(labels, logits.softmax(1), rule=rule),
    )
    assert torch.equal(ours.noisy, theirs.noisy)
    assert ours.suggested is not None
    assert theirs.suggested is not None
    assert torch.equal(ours.suggested, theirs.suggested)
    torch.testing.assert_close(ours.score, theirs.score, rtol=1e-3 if dtype == torch.float32 else 1e-9, atol=1e-6)
    again = noise.find(labels, logits=logits.log_softmax(1), rule=rule)  # log-probabilities are logits
    assert torch.equal(again.noisy, ours.noisy)


def test_losses_of_logits_have_no_end() -> None:
    """As probabilities, both of the first class are 0."""
    logits = torch.tensor([[0.0, 200.0], [0.0, 900.0], [5.0, 0.0], [6.0, 0.0], [5.5, 0.0], [4.5, 0.0]])
    labels = torch.zeros(6, dtype=torch.int64)
    assert noise.find(labels, logits=logits).noisy.tolist() == [False, True, False, False, False, False]
    found = noise.find(labels, logits.softmax(1))
    assert found.noisy[:2].tolist() == [True, True]
    assert found.score[:2].tolist() == [0.0, 0.0]
    assert found.status is not None
    assert found.status.tolist() == [int(FitStatus.NON_FINITE)]


@pytest.mark.parametrize("rule", noise.RULES)
def test_arrays_lists_and_dtypes(rule: noise.Rule) -> None:
    expected = noise.find(LABELS, PROBABILITIES, rule=rule)
    for labels in (LABELS.int(), LABELS.to(torch.uint8), LABELS.to(torch.int8), LABELS.numpy(), LABELS.tolist()):
        for p in (PROBABILITIES, PROBABILITIES.numpy(), PROBABILITIES.tolist(), PROBABILITIES.clone().requires_grad_()):
            found = noise.find(labels, p, rule=rule)  # type: ignore[arg-type]
            assert torch.equal(found.noisy, expected.noisy)
            assert torch.equal(found.score, expected.score)
            assert found.score.dtype == torch.float32
    for dtype in FLOATS:
        found = noise.find(LABELS, PROBABILITIES.to(dtype), rule=rule)
        assert torch.equal(found.noisy, expected.noisy)
        assert found.score.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert found.suggested is not None
        assert found.suggested.dtype == torch.int64
    strided = PROBABILITIES.t().contiguous().t()
    assert torch.equal(noise.find(LABELS, strided, rule=rule).score, expected.score)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_rows_of_16_bits_sum_to_1(dtype: torch.dtype, classes: int) -> None:
    labels, p = drawn(300, classes)
    assert 0 < noise.find(labels, p.to(dtype), rule="disagreement").count < 300


@pytest.mark.parametrize("rule", noise.RULES)
@pytest.mark.parametrize("kind", ["probabilities", "logits"])
def test_what_is_not_finite_counts_nowhere(rule: noise.Rule, kind: str) -> None:
    labels, p = drawn(200, 3)
    values = p if kind == "probabilities" else 3 * p.log()
    bad = values.clone()
    bad[5] = NAN
    bad[7, (int(labels[7]) + 1) % 3] = NAN  # of another class than the label
    bad[9, int(labels[9])] = NAN
    broken = [5, 7, 9]
    if kind == "logits":
        bad[11, int(labels[11])], bad[13, (int(labels[13]) + 1) % 3] = INF, INF
        bad[15] = -INF
        broken += [11, 13, 15]
    others = torch.ones(200, dtype=torch.bool)
    others[broken] = False
    found = noise.find(labels, rule=rule, **{kind: bad})  # type: ignore[arg-type]
    expected = noise.find(labels[others], rule=rule, **{kind: values[others]})  # type: ignore[arg-type]
    assert torch.equal(found.noisy[others], expected.noisy)
    torch.testing.assert_close(found.score[others], expected.score, rtol=1e-9, atol=1e-12)
    assert found.noisy[broken].all()
    assert (found.score[broken] == 0).all()
    assert found.suggested is not None
    assert (found.suggested[broken] == -1).all()
    assert (found.suggested[others] >= 0).all()


def test_a_class_that_is_masked() -> None:
    logits = torch.tensor([[2.0, -INF, 0.0], [0.0, -INF, 2.0], [2.5, -INF, 0.0], [0.1, -INF, 2.0]])
    for rule in noise.RULES:
        found = noise.find([0, 2, 1, 0], logits=logits, rule=rule)
        assert found.noisy[2]
        assert found.score[2] == 0
        assert found.suggested is not None
        assert found.suggested.tolist() == [0, 2, 0, 2]


def test_losses_that_are_not_finite_or_all_equal() -> None:
    losses = torch.tensor([0.1, 0.2, NAN, 0.15, 3.0, INF, -INF, 2.9, 0.12])
    found = noise.find(losses=losses)
    assert found.noisy.tolist() == [False, False, True, False, True, True, True, True, False]
    assert found.score[[2, 5, 6]].tolist() == [0.0, 0.0, 0.0]
    assert found.suggested is None
    for equal in (torch.full((5,), 0.7), torch.tensor([0.7]), torch.tensor([0.7, NAN])):
        found = noise.find(losses=equal)
        assert found.noisy.tolist() == equal.isnan().tolist()
        assert found.score.tolist() == (~equal.isnan()).float().tolist()
        assert noise.find(losses=equal, threshold=1.0).noisy.all()
    assert noise.find(losses=torch.full((5,), 0.7)).status.tolist() == [int(FitStatus.CONSTANT)]  # type: ignore[union-attr]
    by_class = noise.find([0, 0, 2, 2, 2], losses=[0.7, 0.7, 0.1, 0.1, 2.0], by_class=True)
    assert by_class.noisy.tolist() == [False, False, False, False, True]
    assert by_class.status is not None
    assert by_class.status.tolist()[:2] == [int(FitStatus.CONSTANT), int(FitStatus.TOO_FEW)]


@pytest.mark.parametrize(("rule", "by_class"), [("mixture", True), *((rule, False) for rule in noise.RULES)])
def test_no_sample_and_one(rule: noise.Rule, by_class: bool) -> None:
    none = noise.find(LABELS[:0], PROBABILITIES[:0], rule=rule, by_class=by_class)
    assert none.noisy.shape == none.score.shape == (0,)
    assert none.count == 0
    assert none.ranked().shape == (0,)
    assert noise.find(LABELS[:0], logits=PROBABILITIES[:0], rule=rule, by_class=by_class).count == 0
    right = noise.find([0], [[0.9, 0.1]], rule=rule, by_class=by_class)
    assert right.noisy.tolist() == [False]
    wrong = noise.find([1], [[0.99, 0.01]], rule=rule, by_class=by_class)
    # a single loss says nothing, nor does a threshold that only the sample itself makes
    assert wrong.noisy.tolist() == [rule in ("probability", "disagreement")]
    if rule == "mixture":
        assert noise.find(losses=torch.zeros(0)).count == 0
        assert noise.find(torch.zeros(0).long(), losses=torch.zeros(0), by_class=True).status.shape == (0,)  # type: ignore[union-attr]


@pytest.mark.parametrize("rule", noise.RULES)
def test_one_class(rule: noise.Rule) -> None:
    """Whatever the logits are."""
    for values in ({"probabilities": torch.ones(4, 1)}, {"logits": torch.randn(4, 1)}, {"logits": torch.ones(4, 1)}):
        found = noise.find([0, 0, 0, 0], rule=rule, **values)
        assert found.count == 0
        assert found.score.tolist() == [1.0] * 4


def test_a_class_without_samples_has_no_threshold() -> None:
    labels, p = drawn(100, 4)
    labels = labels % 3
    found = noise.find(labels, p, rule="confident")
    assert found.class_thresholds is not None
    assert found.class_thresholds.isnan().tolist() == [False, False, False, True]
    assert np.array_equal(found.noisy.numpy(), by_cleanlab(labels, p))


# ---- refusals ------------------------------------------------------------------------------------------

LOGITS = PROBABILITIES.log() + 5
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "0 of probabilities, logits and losses are given, must be one"),
    "two": ({"probabilities": PROBABILITIES, "losses": LOGITS[:, 0]}, "2 of probabilities, logits and losses"),
    "no labels": ({"labels": None, "probabilities": PROBABILITIES}, "labels is None, must be given with probabilities"),
    "no labels by class": (
        {"labels": None, "losses": LOGITS[:, 0], "by_class": True},
        "labels is None, must be given with by_class",
    ),
    "swapped": ({"labels": PROBABILITIES, "probabilities": LABELS}, "probabilities has dtype torch.int64"),
    "rule": (
        {"probabilities": PROBABILITIES, "rule": "confidnt"},
        "rule 'confidnt' is unknown, did you mean confident",
    ),
    "losses and rule": ({"losses": LOGITS[:, 0], "rule": "confident"}, "rule is 'confident', must be 'mixture' with"),
    "by class": ({"probabilities": PROBABILITIES, "rule": "confident", "by_class": True}, "by_class is True, must be"),
    "flag": ({"probabilities": PROBABILITIES, "by_class": 1}, "by_class is int, must be True or False"),
    "threshold of none": (
        {"probabilities": PROBABILITIES, "rule": "disagreement", "threshold": 0.5},
        "threshold is 0.5, must be None for rule 'disagreement'",
    ),
    "threshold": ({"probabilities": PROBABILITIES, "threshold": 1.5}, r"threshold is 1.5, must be in \[0, 1\]"),
    "threshold of NaN": ({"probabilities": PROBABILITIES, "threshold": NAN}, "threshold is nan"),
    "a vector": ({"probabilities": PROBABILITIES[:, 0]}, r"probabilities has shape \(5,\), must be \[N, K\]"),
    "no class": ({"logits": LOGITS[:, :0]}, r"logits has shape \(5, 0\), must be \[N, K\] with a class"),
    "losses of a table": ({"losses": LOGITS}, r"losses has shape \(5, 3\), must be \[N\]"),
    "fewer labels": (
        {"labels": LABELS[:4], "probabilities": PROBABILITIES},
        r"labels has shape \(4,\), must be \(5,\)",
    ),
    "a column": ({"labels": LABELS[:, None], "logits": LOGITS}, r"labels has shape \(5, 1\), must be \(5,\)"),
    "fewer labels with losses": ({"labels": LABELS[:4], "losses": LOGITS[:, 0]}, r"labels has shape \(4,\), must be"),
    "unlabelled": (
        {"labels": LABELS - 1, "probabilities": PROBABILITIES},
        r"labels has -1 at 0, must be in \[0, 3\); leave samples without a label out",
    ),
    "beyond": ({"labels": LABELS + 1, "logits": LOGITS}, r"labels has 3 at 3, must be in \[0, 3\)$"),
    "negative with losses": ({"labels": LABELS - 1, "losses": LOGITS[:, 0]}, "labels has -1 at 0"),
    "huge with losses": (
        {"labels": LABELS + 2**30, "losses": LOGITS[:, 0], "by_class": True},
        "labels has 1073741824 at 0, must be in",
    ),
    "words": ({"labels": ["cat"] * 5, "probabilities": PROBABILITIES}, "labels is list, must be a tensor or an array"),
    "logits as probabilities": (
        {"probabilities": LOGITS},
        r"probabilities has .* at 0, must be in \[0, 1\]: logits and",
    ),
    "logarithms as probabilities": (
        {"probabilities": PROBABILITIES.log()},
        r"probabilities has -0.105361 at 0, .* log-probabilities must be given as logits",
    ),
    "probabilities as logits": ({"logits": PROBABILITIES}, "logits has only rows in .* that sum to 1, must be logits"),
    "16-bit probabilities as logits": ({"logits": PROBABILITIES.half()}, "logits has only rows in"),
    "sums": ({"probabilities": PROBABILITIES * 0.9}, "probabilities has a row at 0 that sums to 0.9, must sum to 1"),
    "infinite": (
        {"probabilities": torch.tensor([[0.5, 0.5, 0], [INF, 0.0, 0.0], *[[1.0, 0.0, 0.0]] * 3])},
        "probabilities has inf at 1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    arguments, message = REFUSED[case]
    if case in ("unlabelled", "beyond"):
        for rule in noise.RULES:
            refuses(message, lambda rule=rule: noise.find(**{"labels": LABELS, **arguments, "rule": rule}))  # type: ignore[misc]
    refuses(message, lambda: noise.find(**{"labels": LABELS, **arguments}))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_of_values(dtype: torch.dtype) -> None:
    refuses("probabilities has dtype", lambda: noise.find(LABELS, PROBABILITIES.to(dtype)))
    refuses("losses has dtype", lambda: noise.find(losses=torch.ones(3).to(dtype)))


@pytest.mark.parametrize("dtype", [torch.bool, *FLOATS, torch.complex64])
def test_dtypes_of_labels(dtype: torch.dtype) -> None:
    refuses("labels has dtype", lambda: noise.find((LABELS % 2).to(dtype), PROBABILITIES))


def test_labels_on_another_device() -> None:
    refuses("labels is on meta, must be on cpu", lambda: noise.find(LABELS.to("meta"), PROBABILITIES))


def test_a_sample_that_is_named() -> None:
    p = PROBABILITIES.clone()
    p[3, 1] = math.nan  # which is no reason
    p[4, 2] = 0.5
    refuses("probabilities has a row at 4 that sums to 0.55", lambda: noise.find(LABELS, p))
