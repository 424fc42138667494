"""Caches of draws: what they hold, that their mean is the teacher, the same however they came to be, what is refused."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from language_cases import (
    INF,
    SEQUENCES,
    VOCABULARY,
    Bigram,
    content,
    make,
    make_alone,
    make_in_ranks,
    sequences,
    truth,
)
from torch.utils.data import DataLoader
from training_processes import PATIENCE, start, start_ranks

from fastkd.functional import kl_div, sparse_kd_loss, sparse_kl_div
from fastkd.language import CacheCollator, TeacherCache
from fastkd.language.cache_files import MOST_DRAWS

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]

DRAWS = 12
SAMPLED = {"sampled": DRAWS, "seed": 7}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, to be read only."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    make(folder, **SAMPLED)
    return folder


def shares(item: dict[str, torch.Tensor]) -> torch.Tensor:
    """count / N of every token, ``[S, V]``."""
    indices, log_probs = item["teacher_indices"].long(), item["teacher_log_probs"]
    return torch.zeros(len(indices), VOCABULARY).scatter_add(-1, indices, log_probs.exp())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("draws", [1, DRAWS, 1000])
def test_rows_are_counts(tmp_path: Path, draws: int, dtype: torch.dtype) -> None:
    cache = make(tmp_path / "cache", sampled=draws, log_prob_dtype=dtype)
    assert (cache.top_k, cache.sampled, cache.tail) == (None, draws, "drop")
    assert f"{draws} draws" in repr(cache)
    kept = 0
    for item in cache:
        assert set(item) == {"input_ids", "labels", "teacher_indices", "teacher_log_probs"}
        indices, log_probs = item["teacher_indices"], item["teacher_log_probs"]
        assert indices.shape == log_probs.shape == (len(item["input_ids"]), min(draws, VOCABULARY))
        assert log_probs.dtype == torch.float32
        there = log_probs > -INF
        kept += int(there.sum())
        assert ((indices[:, 1:] > indices[:, :-1]) | ~there[:, 1:]).all()
        assert not indices[~there].any()
        counts = log_probs.double().exp() * draws
        torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-4)
        assert (counts.round().sum(-1) == draws).all()
    of_first = cache.about["shards"][0]
    assert 1.0 <= cache.tokens_per_position() <= min(draws, VOCABULARY)
    if len(cache.about["shards"]) == 1:
        assert cache.tokens_per_position() == kept / of_first["tokens"]
    cache.verify()


def test_float16_keeps_counts_exactly() -> None:
    for draws in (1, 2, 50, 777, MOST_DRAWS):
        counts = torch.arange(draws + 1)
        stored = (counts / draws).log().half()
        assert torch.equal((stored.float().exp() * draws).round().long(), counts)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_mean_of_many_is_the_teacher(tmp_path: Path, temperature: float) -> None:
    """Over positions in the same state; the top k of as many tokens are far off."""
    rows, length = 40, 50
    ids = [[3] * length] * rows
    cache = make(tmp_path / "cache", None, ids, temperature=temperature, sampled=20)
    expected = truth(torch.tensor(ids[0]), temperature=temperature)[1].exp()
    found = torch.stack([shares(item)[1:] for item in cache]).double()
    n = 20 * rows * (length - 1)
    chi = ((found.mean((0, 1)) - expected).square() / expected).sum() * n
    assert 8.0 < chi < 75.0  # 36 degrees of freedom: outside once in 10^4
    assert len({sequence.numpy().tobytes() for sequence in found}) == rows
    variance = (found.flatten(0, 1).var(0) * 20 / (expected * (1 - expected)))[expected > 0.01]
    assert (variance - 1).abs().max() < 0.2


def test_of_a_position_alone(tmp_path: Path, whole: Path) -> None:
    """Batches and shards do not matter, nor what comes after; the seed and the number of a sequence do."""
    for options in ({"batch_size": 1}, {"batch_size": 23}, {"shard_tokens": 10_000}):
        other = make(tmp_path / next(iter(options)) / str(options), **SAMPLED, **options)
        for one, again in zip(TeacherCache(whole), other, strict=True):
            assert all(torch.equal(one[name], again[name]) for name in one)
    rows = [tokens.input_ids.tolist() for tokens in sequences()]
    few = make(tmp_path / "few", None, [row[: max(1, len(row) // 2)] for row in rows[:9]], **SAMPLED)
    for one, again in zip(few, TeacherCache(whole), strict=False):
        assert torch.equal(one["teacher_indices"], again["teacher_indices"][: len(one["input_ids"])])
    seeded = make(tmp_path / "seeded", sampled=DRAWS, seed=8)
    shifted = make(tmp_path / "shifted", None, [rows[0], *rows], **SAMPLED)
    for number in (3, 4, 5):
        first = TeacherCache(whole)[number]["teacher_indices"]
        assert not torch.equal(first, seeded[number]["teacher_indices"])
        assert not torch.equal(first, shifted[number + 1]["teacher_indices"])


@pytest.mark.forks
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_and_gone_on_with_equals_not_killed(tmp_path: Path, whole: Path, ranks: int) -> None:
    folder = tmp_path / "cache"
    process = start(make_alone, folder, 4, SAMPLED)
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL
    assert 0 < len(list(folder.glob("shard-*"))) < len(TeacherCache(whole).about["shards"])
    start_ranks(make_in_ranks, folder, SAMPLED, ranks=ranks)
    assert content(folder) == content(whole)
    assert TeacherCache(folder).about == TeacherCache(whole).about


def test_the_folder_says_which_kind_it_is(whole: Path, tmp_path: Path) -> None:
    about = json.loads((whole / "cache.json").read_text())
    assert {name: about[name] for name in ("targets", "top_k", "sampled", "seed")} == {
        "targets": "sampled",
        "top_k": None,
        **SAMPLED,
    }
    other = make(tmp_path / "cache")
    assert {name: other.about[name] for name in ("targets", "sampled", "seed")} == {
        "targets": "top_k",
        "sampled": None,
        "seed": None,
    }
    assert (other.sampled, other.tail) == (None, "bucket")
    for shard in about["shards"]:
        body = shard["tokens"] * (6 * DRAWS + 4) + 8 * (shard["sequences"] + 1)
        assert 0 < shard["bytes"] - body < 700
    with pytest.raises(ValueError, match=r"is a cache of 12 draws, which have no tail"):
        TeacherCache(whole).tail_mass()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"top_k": 5}, "with targets sampled, given is top_k"),
        ({"sampled": DRAWS}, "with seed 7, given is 0"),
        ({"sampled": 13, "seed": 7}, "with sampled 12, given is 13"),
    ],
    ids=["top_k", "seed", "draws"],
)
def test_a_cache_of_something_else_is_left_alone(whole: Path, options: dict[str, Any], said: str) -> None:
    before = content(whole)
    with pytest.raises(ValueError, match=rf"holds a cache {said}; choose another folder, or delete it$"):
        make(whole, **options)
    assert content(whole) == before


def test_a_cache_of_the_top_k_is_left_alone(tmp_path: Path) -> None:
    make(tmp_path / "cache")
    with pytest.raises(ValueError, match="with targets top_k, given is sampled"):
        make(tmp_path / "cache", **SAMPLED)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sampled": 5, "top_k": 4}, "fastkd: top_k is 4 and sampled is 5, must be one of them"),
        ({"sampled": 0}, "fastkd: sampled is 0"),
        ({"sampled": 1.5}, "fastkd: sampled is float"),
        ({"sampled": 3, "seed": "x"}, "fastkd: seed is str"),
        ({"sampled": 2049}, "fastkd: sampled is 2049, must be at most 2048 where log_prob_dtype is float16"),
    ],
    ids=["both", "none", "fraction", "seed", "float16"],
)
def test_arguments(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        make(tmp_path / "cache", **options)
    assert not (tmp_path / "cache").exists()


def test_logits_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    for name, values in {"nan": [math.nan], "inf": [INF], "none": [-INF] * VOCABULARY}.items():
        model = Bigram()
        with torch.no_grad():
            model.table[30, : len(values)] = torch.tensor(values)
        with pytest.raises(ValueError, match=r"the teacher's logits at position 2 of sequence 1 hold NaN, \+inf"):
            make(tmp_path / name, model, [[3, 4, 5], [6, 7, 30]], **SAMPLED)
    with torch.no_grad():
        model.table[30, :] = torch.arange(VOCABULARY)
        model.table[30, :30] = -INF  # masked classes are none of these
    item = make(tmp_path / "masked", model, [[3, 4, 5], [30]], **SAMPLED)[1]
    assert (item["teacher_indices"][item["teacher_log_probs"] > -INF] >= 30).all()


def test_batches_and_losses(whole: Path, tmp_path: Path) -> None:
    """What the collator makes is what the losses take, of both kinds of caches alike."""
    student = Bigram(1)
    items = [TeacherCache(whole)[i] for i in (4, 0, 7)]
    batch = CacheCollator(2)(items)
    assert "teacher_tail_log_prob" not in batch
    for row, item in enumerate(items):
        length = len(item["input_ids"])
        assert torch.equal(batch["teacher_log_probs"][row, :length], item["teacher_log_probs"])
        assert (batch["teacher_log_probs"][row, length:] == -INF).all()
    logits = student(batch["input_ids"]).detach().requires_grad_()
    entries = batch["teacher_indices"], batch["teacher_log_probs"]
    loss = sparse_kl_div(logits, *entries, tail="drop", target=batch["target"], reduction="sum")
    loss.backward()
    count = torch.stack(
        [torch.nn.functional.pad(shares(i), (0, 0, 0, len(logits[0]) - len(i["labels"]))) for i in items]
    )
    expected = torch.where(batch["target"][..., None] != -100, logits.detach().softmax(-1) - count, 0.0)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, expected)
    assert sparse_kd_loss(logits, *entries, batch["target"], tail="drop").isfinite()
    with pytest.raises(ValueError, match="teacher_tail_log_prob is given, must be None"):
        sparse_kl_div(
            logits, *entries, tail=TeacherCache(whole).tail, teacher_tail_log_prob=torch.zeros(logits.shape[:2])
        )
    top = make(tmp_path / "top")
    assert top.tail == "bucket"
    assert "teacher_tail_log_prob" in CacheCollator(2)([top[0]])


def test_a_student_trains_against_it(tmp_path: Path) -> None:
    """Towards the teacher itself, over all classes, of which few are ever seen at a time."""
    cache = make(tmp_path / "cache", sampled=20)
    student, teacher = Bigram(1), Bigram()
    optimizer = torch.optim.Adam(student.parameters(), 0.1)

    def whole_loss() -> float:
        ids = torch.from_numpy(np.concatenate([tokens.input_ids for tokens in sequences()])).long()[None]
        with torch.no_grad():
            return kl_div(student(ids)[0], teacher(ids)[0]).item()

    before = whole_loss()
    for _ in range(20):
        for batch in DataLoader(cache, 8, collate_fn=CacheCollator(0)):
            logits = student(batch["input_ids"])
            loss = sparse_kl_div(
                logits,
                batch["teacher_indices"],
                batch["teacher_log_probs"],
                cache.temperature,
                tail=cache.tail,
                teacher_tail_log_prob=batch.get("teacher_tail_log_prob"),
                target=batch["target"],
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert whole_loss() < 0.3 * before
    assert len(cache) == SEQUENCES
