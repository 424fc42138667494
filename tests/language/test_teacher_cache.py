"""Cached teachers: what is kept of a row, files, killed and gone on with, any number of ranks, batches, what is refused.

The teacher is a table; tests/language/test_pretrained_cache.py has models of transformers.
"""

from __future__ import annotations

import json
import math
import pickle
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from language_cases import (
    INF,
    SEQUENCES,
    SHARD,
    VOCABULARY,
    Bigram,
    K,
    content,
    make,
    make_alone,
    make_in_ranks,
    sequences,
    truth,
)
from language_cases import refuse_in_ranks as refuse_in
from torch.utils.data import DataLoader, DistributedSampler
from training_processes import PATIENCE, start, start_ranks

from fastkd import AliasTable, CollectionBatchSampler, CollectionSampler
from fastkd.language import CacheCollator, TeacherCache, top_k_log_probs

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, to be read only."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    make(folder)
    return folder


# ---- what is kept of a row -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 4.0])
def test_top_k_and_tail(dtype: torch.dtype, temperature: float, generator: torch.Generator) -> None:
    logits = (8 * torch.randn(2, 31, 1000, generator=generator)).to(dtype)
    before = logits.clone()
    found = top_k_log_probs(logits, 16, temperature)
    expected = (logits.double() / temperature).log_softmax(-1)
    values, indices = expected.topk(16)
    assert torch.equal(logits, before)
    assert found.log_probs.dtype == found.tail_log_prob.dtype == torch.float32
    if dtype not in (torch.bfloat16, torch.float16):  # where there are ties
        assert torch.equal(found.indices, indices)
    torch.testing.assert_close(found.log_probs.double(), values, rtol=1e-5, atol=1e-5)
    rest = expected.scatter(-1, found.indices, -INF).logsumexp(-1)
    torch.testing.assert_close(found.tail_log_prob.double(), rest, rtol=1e-5, atol=1e-5)


def test_a_tail_that_a_difference_would_lose() -> None:
    """1 less the sum of the k would be 0, or noise."""
    logits = torch.tensor([[50.0, 0.0, -1.0, -2.0]])
    found = top_k_log_probs(logits, 1)
    assert found.log_probs.item() == pytest.approx(-math.exp(found.tail_log_prob.item()), rel=1e-5)
    assert found.tail_log_prob.item() == pytest.approx(math.log(1 + math.exp(-1) + math.exp(-2)) - 50, rel=1e-6)
    assert top_k_log_probs(logits, 4).tail_log_prob.item() == -INF


def test_masked_classes_and_rows_that_are_none() -> None:
    masked = top_k_log_probs(torch.tensor([0.0, -INF, 0.0, -INF]), 3)
    assert masked.log_probs.tolist() == pytest.approx([-math.log(2), -math.log(2), -INF])
    assert masked.tail_log_prob.item() == -INF
    for wrong in ([math.nan, 0.0, 1.0], [INF, 0.0, 1.0], [-INF] * 3):
        assert top_k_log_probs(torch.tensor(wrong), 2).log_probs.isnan().any(), wrong


# ---- the files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_is_read_is_what_the_teacher_said(tmp_path: Path, dtype: torch.dtype, temperature: float) -> None:
    told: list[tuple[int, int]] = []
    data = sequences()
    cache = make(
        tmp_path / "deep" / "cache",
        log_prob_dtype=dtype,
        temperature=temperature,
        on_progress=lambda *numbers: told.append(numbers),
    )
    assert len(cache) == SEQUENCES
    assert (cache.top_k, cache.temperature, cache.vocab_size) == (K, temperature, VOCABULARY)
    assert cache.num_tokens == data.num_tokens == told[-1][0] == told[-1][1]
    assert told == sorted(told)
    assert told[0][0] == 0
    error = 1e-5 if dtype == torch.float32 else 2e-2
    for index, tokens in enumerate(data):
        item = cache[index]
        assert item["input_ids"].tolist() == item["labels"].tolist() == tokens.input_ids.tolist()
        expected = truth(torch.from_numpy(tokens.input_ids), temperature=temperature)
        values, indices = expected.topk(K)
        assert torch.equal(item["teacher_indices"].long(), indices)
        assert item["teacher_log_probs"].dtype == item["teacher_tail_log_prob"].dtype == torch.float32
        torch.testing.assert_close(item["teacher_log_probs"].double(), values, rtol=0, atol=error)
        rest = expected.scatter(-1, indices, -INF).logsumexp(-1)
        torch.testing.assert_close(item["teacher_tail_log_prob"].double(), rest, rtol=0, atol=error)
        # as read, it is a distribution: a KL of the teacher to itself is 0, and never below
        assert (item["teacher_log_probs"] <= 0).all()
        mass = item["teacher_log_probs"].exp().sum(-1) + item["teacher_tail_log_prob"].exp()
        torch.testing.assert_close(mass, torch.ones(len(mass)), rtol=0, atol=1e-6)


def test_float16_costs_less_than_logits_in_bfloat16(tmp_path: Path) -> None:
    """Which is why it is the default: the teacher's own rounding is a multiple of it."""
    stored, rounded = [], []
    cache = make(tmp_path / "cache")
    for index, tokens in enumerate(sequences()):
        ids = torch.from_numpy(tokens.input_ids)
        expected = truth(ids)
        item = cache[index]
        there = item["teacher_indices"].long()
        right = expected.gather(-1, there).exp()
        stored.append((item["teacher_log_probs"].exp() - right).abs().sum(-1))
        coarse = truth(ids, Bigram(dtype=torch.bfloat16))
        rounded.append((coarse.gather(-1, there).exp() - right).abs().sum(-1))
    assert torch.cat(stored).mean() * 5 < torch.cat(rounded).mean()


def test_the_folder_says_what_it_is_of(whole: Path) -> None:
    cache = TeacherCache(whole)
    about = json.loads((whole / "cache.json").read_text())
    assert about == cache.about
    shards = about["shards"]
    assert [path.name for path in sorted(whole.iterdir())] == ["cache.json", *(shard["file"] for shard in shards)]
    assert len(shards) > 3
    assert sum(shard["sequences"] for shard in shards) == about["sequences"] == SEQUENCES
    assert sum(shard["tokens"] for shard in shards) == about["tokens"]
    assert cache.nbytes == sum((whole / shard["file"]).stat().st_size for shard in shards)
    assert max(shard["tokens"] for shard in shards) < SHARD + 17
    assert 0.0 < cache.tail_mass() < 1.0
    cache.verify()
    cache.check(data=sequences(), model=Bigram())
    # 6 bytes a token and its log-probability, 4 for the tail, 4 for the token itself
    for shard in shards:
        body = shard["tokens"] * (6 * K + 8) + 8 * (shard["sequences"] + 1)
        assert 0 < shard["bytes"] - body < 700


def test_labels_of_the_data_are_kept(tmp_path: Path) -> None:
    data = sequences(labelled=True)
    cache = make(tmp_path / "cache", data=data)
    for index, tokens in enumerate(data):
        assert tokens.labels is not None
        assert cache[index]["labels"].tolist() == tokens.labels.tolist()
        assert cache[index]["input_ids"].tolist() == tokens.input_ids.tolist()
    with pytest.raises(ValueError, match="of other data"):
        cache.check(data=sequences())


def test_any_callable_is_a_teacher(tmp_path: Path, whole: Path) -> None:
    class Result:
        def __init__(self, logits: torch.Tensor) -> None:
            self.logits = logits

    model = Bigram()
    rows = [tokens.input_ids.tolist() for tokens in sequences()]
    cache = make(tmp_path / "cache", lambda ids: Result(model(ids)), rows, fingerprint="a table")
    assert cache.about["model"] == "a table"
    assert content(cache.path) == content(whole)


def test_no_copy_of_all_rows_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    seen: list[int] = []

    def watched(logits: torch.Tensor, k: int, temperature: float) -> Any:
        seen.append(len(logits))
        return top_k_log_probs(logits, k, temperature)

    monkeypatch.setattr("fastkd.language.cache_pass.top_k_log_probs", watched)
    monkeypatch.setitem(cache_pass_bytes(), "cpu", 4 * VOCABULARY * 7)
    make(tmp_path / "cache")
    assert max(seen) == 7
    assert content(tmp_path / "cache") == content(whole)


def cache_pass_bytes() -> dict[str, int]:
    from fastkd.language import cache_pass

    return cache_pass._CHUNK_BYTES


# ---- killed, gone on with, in ranks -----------------------------------------------------------------------


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    first = make(tmp_path / "cache")
    calls: list[int] = []
    model = Bigram()
    model.register_forward_hook(lambda *_: calls.append(1))
    again = make(tmp_path / "cache", model)
    assert again.about == first.about
    assert len(calls) == 1  # how many tokens there are


@pytest.mark.forks
def test_killed_and_gone_on_with_equals_not_killed(tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "cache"
    done = 0
    for lives in (1, 6, 4):
        process = start(make_alone, folder, lives)
        process.join(PATIENCE)
        assert process.exitcode == -signal.SIGKILL
        shards = list(folder.glob("shard-*"))
        assert len(shards) >= done
        done = len(shards)
        with pytest.raises(FileNotFoundError, match=r"there is no .*cache.json: making it was interrupted, the same"):
            TeacherCache(folder)
    assert 0 < done < len(TeacherCache(whole).about["shards"])
    (folder / ".shard-00009.safetensors.1.ab.partial").write_bytes(b"of a process that was killed")
    times = {path: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
    told: list[int] = []
    make(folder, batch_size=3, on_progress=lambda done, _: told.append(done))
    assert told[0] > 0
    assert {path: path.stat().st_mtime_ns for path in times} == times  # none is made twice
    assert content(folder) == content(whole)
    assert TeacherCache(folder).about == TeacherCache(whole).about


@pytest.mark.forks
@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_makes_the_same(tmp_path: Path, whole: Path, ranks: int) -> None:
    """One process begins, is killed, and others go on."""
    folder = tmp_path / "cache"
    process = start(make_alone, folder, 4)
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL
    start_ranks(make_in_ranks, folder, ranks=ranks)
    assert content(folder) == content(whole)
    assert TeacherCache(folder).about == TeacherCache(whole).about


@pytest.mark.forks
def test_what_is_wrong_on_one_rank_is_an_error_of_all(tmp_path: Path) -> None:
    start_ranks(refuse_in, tmp_path)
    said = {(tmp_path / f"said{rank}").read_text().split(" (on rank")[0] for rank in range(2)}
    assert len(said) == 1
    assert "hold NaN" in said.pop()


def test_a_shard_that_is_damaged_is_made_again(tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "cache"
    make(folder)
    shards = sorted(folder.glob("shard-*"))
    shards[1].write_bytes(shards[1].read_bytes()[:-5])
    shards[2].unlink()
    make(folder)
    assert content(folder) == content(whole)


# ---- reading -------------------------------------------------------------------------------------------


def test_items_are_memory_mapped_and_travel(whole: Path) -> None:
    cache = TeacherCache(whole)
    assert all(torch.equal(a, b) for a, b in zip(cache[-1].values(), cache[SEQUENCES - 1].values(), strict=True))
    assert cache._maps
    assert all(isinstance(array, np.memmap) for arrays in cache._maps.values() for array in arrays.values())
    copy = pickle.loads(pickle.dumps(cache))
    assert len(pickle.dumps(cache)) < 20_000
    assert copy._maps == {}
    assert torch.equal(copy[3]["teacher_log_probs"], cache[3]["teacher_log_probs"])
    for wrong in (SEQUENCES, -SEQUENCES - 1):
        with pytest.raises(IndexError, match=f"index is {wrong}, must be in"):
            cache[wrong]
    item = cache[0]
    item["teacher_log_probs"].zero_()  # a copy: the file is not written
    assert not torch.equal(cache[0]["teacher_log_probs"], item["teacher_log_probs"])


def test_batches_lie_as_logits_do(whole: Path) -> None:
    cache = TeacherCache(whole)
    items = [cache[i] for i in (4, 0, 7)]
    lengths = [len(item["input_ids"]) for item in items]
    longest = max(lengths)
    batch = CacheCollator(2)(items)
    assert batch["input_ids"].shape == batch["target"].shape == (3, longest)
    assert batch["teacher_log_probs"].shape == batch["teacher_indices"].shape == (3, longest, K)
    assert {name: value.dtype for name, value in batch.items()} == {
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
        "labels": torch.int64,
        "target": torch.int64,
        "teacher_indices": torch.int64,
        "teacher_log_probs": torch.float32,
        "teacher_tail_log_prob": torch.float32,
    }
    for row, (item, length) in enumerate(zip(items, lengths, strict=True)):
        ids = item["input_ids"].tolist()
        padding = longest - length
        assert batch["input_ids"][row].tolist() == ids + [2] * padding
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * padding
        assert batch["labels"][row].tolist() == ids + [-100] * padding
        assert batch["target"][row].tolist() == [*ids[1:], -100] + [-100] * padding
        assert torch.equal(batch["teacher_log_probs"][row, :length], item["teacher_log_probs"])
        assert (batch["teacher_log_probs"][row, length:] == -INF).all()
        assert (batch["teacher_indices"][row, length:] == 0).all()
        # all of a row of padding is in its tail: a distribution, too
        assert (batch["teacher_tail_log_prob"][row, length:] == 0).all()
    assert CacheCollator(0, pad_to_multiple_of=8)(items)["labels"].shape[1] % 8 == 0
    for wrong in (-1, 2**31, None):
        with pytest.raises((ValueError, TypeError), match="pad_token_id is"):
            CacheCollator(wrong)  # type: ignore[arg-type]


@pytest.mark.forks
def test_loaders_with_workers_give_the_same_batches(whole: Path) -> None:
    cache = TeacherCache(whole)
    cache[0]
    options: dict[str, Any] = {"batch_size": 4, "collate_fn": CacheCollator(0)}
    alone = list(DataLoader(cache, **options))
    workers = list(DataLoader(cache, num_workers=2, multiprocessing_context="fork", **options))
    assert len(alone) == len(workers) == -(-SEQUENCES // 4)
    for one, other in zip(alone, workers, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_samplers_of_torch_and_of_fastkd(whole: Path) -> None:
    cache = TeacherCache(whole)
    collate = CacheCollator(0)
    halves = [DistributedSampler(cache, 2, rank, shuffle=False) for rank in range(2)]
    tokens = [
        sum(int(b["attention_mask"].sum()) for b in DataLoader(cache, 4, sampler=h, collate_fn=collate)) for h in halves
    ]
    assert sum(tokens) == cache.num_tokens + len(cache[0]["input_ids"])  # rounded up by one sequence
    table = AliasTable(torch.zeros(SEQUENCES), 1.0, seed=0)
    assert len(list(DataLoader(cache, 4, sampler=CollectionSampler(table, 12), collate_fn=collate))) == 3
    batches = CollectionBatchSampler(table, 4, 2)
    assert [len(b["labels"]) for b in DataLoader(cache, batch_sampler=batches, collate_fn=collate)] == [4, 4]


def test_a_student_trains_against_it(whole: Path) -> None:
    """KL of the teacher to the student over the k and the tail, in plain torch: what sparse_kl_div does."""
    student = Bigram(1)
    optimizer = torch.optim.Adam(student.parameters(), 0.2)
    cache = TeacherCache(whole)
    loader = DataLoader(cache, 8, collate_fn=CacheCollator(0))

    def loss_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        ours = student(batch["input_ids"]).log_softmax(-1)
        top = ours.gather(-1, batch["teacher_indices"])
        rest = ours.scatter(-1, batch["teacher_indices"], -INF).logsumexp(-1)
        theirs, tail = batch["teacher_log_probs"], batch["teacher_tail_log_prob"]
        terms = torch.where(theirs > -INF, theirs.exp() * (theirs - top), 0.0).sum(-1) + tail.exp() * (tail - rest)
        return terms[batch["target"] != -100].mean()

    losses = []
    for _ in range(30):
        for batch in loader:
            loss = loss_of(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert losses[-1] > 0.0
