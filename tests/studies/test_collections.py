"""Sampling statistics against loops, and distillation on draws from a collection."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from refusals import refuses

from fastkd import AliasTable, KDLoss, KLDivLoss, statistics
from fastkd._threads import one_thread
from fastkd.models.convnet import ConvNet
from fastkd.studies.demo.loop import distill
from fastkd.training.inference import predict

N = 40


@pytest.fixture(params=[0, 1, 2, 3])
def draws(request: pytest.FixtureRequest) -> list[int]:
    """Indices with repetitions; some items never come."""
    generator = torch.Generator().manual_seed(request.param)
    weights = torch.rand(N, generator=generator) ** 4
    return torch.multinomial(weights, 60, replacement=True, generator=generator).tolist()


@pytest.fixture
def relevant() -> torch.Tensor:
    return torch.arange(N) % 3 == 0


def count(draws: list[int]) -> torch.Tensor:
    return torch.bincount(torch.tensor(draws, dtype=torch.int64), minlength=N)


def test_statistics_against_loops(draws: list[int], relevant: torch.Tensor) -> None:
    counts, seen = count(draws), Counter(draws)
    assert 1 < len(seen) < N
    assert statistics.skip_ratio(counts).item() == pytest.approx(sum(i not in seen for i in range(N)) / N)
    shares = [times / len(draws) for times in seen.values()]
    entropy = -sum(share * math.log(share) for share in shares)
    assert statistics.uniformity(counts).item() == pytest.approx(entropy / math.log(len(seen)))
    irrelevant = sum(not relevant[i] for i in seen)
    assert statistics.irrelevant_proportion(counts, relevant).item() == pytest.approx(irrelevant / len(seen))
    assert statistics.relevant_draws(counts, relevant).item() == pytest.approx(
        sum(bool(relevant[i]) for i in draws) / 60
    )


def test_statistics_at_their_ends(relevant: torch.Tensor) -> None:
    nothing, equal, single = count([]), torch.full((N,), 7), count([3] * 9)
    assert statistics.skip_ratio(nothing).item() == 1.0
    assert statistics.skip_ratio(equal).item() == 0.0
    assert statistics.skip_ratio(single).item() == pytest.approx(1 - 1 / N)
    assert statistics.uniformity(equal).item() == pytest.approx(1.0)
    assert statistics.uniformity(single).item() == 1.0
    assert statistics.irrelevant_proportion(single, relevant).item() == 0.0
    for undefined in (
        statistics.uniformity(nothing).item(),
        statistics.irrelevant_proportion(nothing, relevant).item(),
        statistics.relevant_draws(nothing, relevant).item(),
    ):
        assert math.isnan(undefined)


@pytest.mark.parametrize("n", [0, 1, 5, 400])
def test_expected_skip_ratio_against_powers(n: int, generator: torch.Generator) -> None:
    q = torch.softmax(3 * torch.randn(N, generator=generator, dtype=torch.float64), 0)
    expected = sum((1 - share) ** n for share in q.tolist()) / N
    assert statistics.expected_skip_ratio(q, n).item() == pytest.approx(expected, rel=1e-12)
    certain = torch.tensor([1.0, 0.0])
    assert statistics.expected_skip_ratio(certain, n).item() == (1.0 if n == 0 else 0.5)


def test_expected_skip_ratio_is_the_mean_of_skip_ratios(generator: torch.Generator) -> None:
    q = torch.softmax(torch.randn(N, generator=generator), 0)
    runs = torch.multinomial(q, 2000 * 50, replacement=True, generator=generator).reshape(2000, 50)
    mean = sum(statistics.skip_ratio(count(run.tolist())).item() for run in runs) / len(runs)
    # one run deviates by less than 0.08, so their mean by less than 0.002; six times that is out of reach of chance
    assert mean == pytest.approx(statistics.expected_skip_ratio(q, 50).item(), abs=0.012)


@pytest.mark.parametrize("with_labels", [False, True])
def test_distill_follows_the_teacher_and_counts_its_draws(with_labels: bool, generator: torch.Generator) -> None:
    images = torch.rand(200, 1, 8, 8, generator=generator)
    logits = 4 * torch.randn(10, 64, generator=generator).mm(images.reshape(200, 64).T - 0.5).T
    student = ConvNet((8, 8), seed=1)
    table = AliasTable(torch.zeros(200), inverse_temperature=0.0, seed=5)
    criterion = KDLoss(2.0, 0.9) if with_labels else KLDivLoss(2.0)
    steps = []
    with one_thread():
        counts = distill(
            student,
            images,
            logits,
            table,
            criterion,
            steps=150,
            batch_size=32,
            learning_rate=1e-2,
            target=logits.argmax(1) if with_labels else None,
            on_step=steps.append,
        )
    assert steps == list(range(1, 151))
    assert int(counts.sum()) == 150 * 32
    assert bool((counts > 0).all())
    again = AliasTable(torch.zeros(200), inverse_temperature=0.0, seed=5)
    assert torch.equal(counts, sum(torch.bincount(again.sample(32), minlength=200) for _ in range(150)))
    assert not student.training
    agreement = (student(images).argmax(1) == logits.argmax(1)).double().mean()
    assert agreement > 0.6  # 0.1 by chance


REFUSED: list[tuple[str, dict[str, Any]]] = [
    *[("images has shape", {"images": torch.rand(n, 1, 8, 8)}) for n in (0, 19, 21)],
    *[("teacher_logits has shape", {"teacher_logits": torch.rand(n, 10)}) for n in (0, 19, 21)],
    *[("target has shape", {"target": torch.zeros(n, dtype=torch.int64)}) for n in (0, 19, 21)],
    ("images is list", {"images": [1.0] * 20}),
    ("teacher_logits is ndarray", {"teacher_logits": np.zeros((20, 10))}),
    ("target is list", {"target": [0] * 20}),
    ("table is Tensor", {"table": torch.ones(20)}),
    ("student is function", {"student": lambda images: images}),
    ("on_step is int", {"on_step": 3}),
    *[(f"{name} is", {name: value}) for name in ("steps", "batch_size") for value in (0, -1, 1.5, True, "2", None)],
    *[("learning_rate is", {"learning_rate": value}) for value in (-1e-3, math.nan, math.inf, "1", True, 10**400)],
]


@pytest.mark.parametrize(("message", "changes"), REFUSED)
def test_distill_refuses_before_it_works(message: str, changes: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {
        "student": ConvNet((4, 4)),
        "images": torch.rand(20, 1, 8, 8),
        "teacher_logits": torch.rand(20, 10),
        "table": AliasTable(torch.zeros(20), seed=5),
        "criterion": KDLoss(2.0, 0.9),
        "steps": 2,
        "batch_size": 3,
        "target": torch.zeros(20, dtype=torch.int64),
    }
    before = arguments["table"].state_dict()
    refuses(message, lambda: distill(**{**arguments, **changes}))
    assert arguments["table"].state_dict() == before
    assert arguments["student"].training  # as it was made


def test_predict_refuses() -> None:
    network, images = ConvNet((4, 4)), torch.rand(5, 1, 8, 8)
    for size in (0, -1, 1.5, True, None):
        refuses("batch_size is", lambda s=size: predict(network, images, batch_size=s))
    refuses("images is list", lambda: predict(network, [1.0]))
    refuses("model is int", lambda: predict(3, images))
    assert predict(network, images[:0]).shape == (0, 10)


def test_network_starts_from_its_seed_alone() -> None:
    before = torch.get_rng_state()
    a, b, other = ConvNet((4, 8), seed=3), ConvNet((4, 8), seed=3), ConvNet((4, 8), seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.classifier.weight, other.classifier.weight)
    with pytest.raises(ValueError, match="multiple of 4"):
        ConvNet((4, 8), image_size=10)
