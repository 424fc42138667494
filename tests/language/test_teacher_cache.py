"""Cached teachers: what is kept of a row, files, killed and gone on with, any number of ranks, batches, what is refused.

The teacher is a table; tests/language/test_pretrained_cache.py has models of transformers.
"""

from __future__ import annotations

import json
import math
import pickle
import signal
import struct
from collections.abc import Callable
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
from fastkd.language import CacheCollator, TeacherCache, TokenSequences, open_tokens, top_k_log_probs

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, to be read only."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    make(folder)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "cache.json"}


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


# ---- bad input ---------------------------------------------------------------------------------------


@pytest.fixture
def done(tmp_path: Path) -> Path:
    make(tmp_path / "cache", tokenizer=Vocabulary("abc"))
    return tmp_path / "cache"


class Vocabulary:
    """A tokenizer without a serialized form."""

    special_tokens_map: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, letters: str) -> None:
        self.letters = letters

    def get_vocab(self) -> dict[str, int]:
        return {letter: i for i, letter in enumerate(self.letters)}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"top_k": 4}, "with top_k 5, given is 4"),
        ({"temperature": 2}, "with temperature 1.0, given is 2.0"),
        ({"log_prob_dtype": torch.float32}, "with log_prob_dtype float16, given is float32"),
        ({"shard_tokens": 50}, "with shard_tokens 40, given is 50"),
        (
            {"tokenizer": Vocabulary("abd")},
            r"of another tokenizer: its digest is [0-9a-f]{12}\.\.\., given is [0-9a-f]{12}\.\.\.",
        ),
        ({"data": TokenSequences.of([[1, 2, 3]])}, r"of other data: its digest is [0-9a-f]{12}\.\.\., given is"),
        ({"model": Bigram(1)}, r"of another model: its digest is [0-9a-f]{12}\.\.\., given is"),
        ({"model": Bigram().to(torch.bfloat16)}, "with model_dtype float32, given is bfloat16"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_cache_of_something_else_is_left_alone(done: Path, options: dict[str, Any], said: str) -> None:
    before = content(done)
    with pytest.raises(ValueError, match=rf"cache holds a cache {said}.*; choose another folder, or delete it$"):
        make(done, **{"tokenizer": Vocabulary("abc"), **options})
    # and one that is begun
    (done / "cache.json").rename(done / "begun.json")
    with pytest.raises(ValueError, match=said):
        make(done, **{"tokenizer": Vocabulary("abc"), **options})
    assert content(done) == {**before, "begun.json": (done / "begun.json").read_bytes()}


def test_reading_refuses_a_cache_of_something_else(done: Path) -> None:
    TeacherCache(done, tokenizer=Vocabulary("abc"), data=sequences(), model=Bigram())
    with pytest.raises(
        ValueError, match=r"holds a cache of another tokenizer: its digest is .*, given is [0-9a-f]{12}\.\.\.$"
    ):
        TeacherCache(done, tokenizer=Vocabulary("abd"))
    with pytest.raises(ValueError, match="holds a cache of other data"):
        TeacherCache(done, data=sequences(labelled=True))
    with pytest.raises(ValueError, match="holds a cache of another model"):
        TeacherCache(done, model=Bigram(1))
    with pytest.raises(TypeError, match="tokenizer is int, must be one of transformers or tokenizers"):
        TeacherCache(done, tokenizer=3)


def rewrite(path: Path, old: bytes, new: bytes) -> None:
    text = path.read_bytes()
    assert old in text
    path.write_bytes(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda shard: shard.write_bytes(shard.read_bytes()[:-1]),
            r"has \d+ bytes, must have \d+; the command that made it",
        ),
        (lambda shard: shard.write_bytes(b""), r"has 0 bytes, must have \d+"),
        (lambda shard: shard.write_bytes(shard.read_bytes() + b"more"), r"has \d+ bytes, must have \d+"),
        (lambda shard: shard.unlink(), "there is no .*shard-00001.safetensors; the command that made it"),
        (lambda shard: rewrite(shard, b"offsets", b"offsetz"), "its header is not that of cache.json"),
        (lambda shard: rewrite(shard, b"data_offsets", b"data_offsetz"), "it has no header"),
        (lambda shard: rewrite(shard, b'"shape"', b'"shap}"'), "damaged"),
        (lambda shard: shard.write_bytes(struct.pack("<Q", 2**40) + shard.read_bytes()[8:]), "it has no header"),
    ],
    ids=["truncated", "empty", "longer", "missing", "names", "keys", "json", "length"],
)
def test_damaged_shards_are_named_on_opening(done: Path, spoil: Callable[[Path], object], said: str) -> None:
    spoil(done / "shard-00001.safetensors")
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        TeacherCache(done)


def test_one_bit_is_found_by_verify(done: Path) -> None:
    shard = done / "shard-00002.safetensors"
    text = bytearray(shard.read_bytes())
    text[-7] ^= 1
    shard.write_bytes(text)
    cache = TeacherCache(done)
    with pytest.raises(
        ValueError, match=r"shard-00002.safetensors is damaged: its digest is not that of cache.json; delete it"
    ):
        cache.verify()


@pytest.mark.parametrize("text", ["{}", "nothing", "[]", '{"format": 1}'])
def test_other_descriptions(done: Path, text: str) -> None:
    (done / "cache.json").write_text(text)
    with pytest.raises(ValueError, match=r"cache.json does not say what a cache is of"):
        TeacherCache(done)


def test_other_formats_and_other_folders(done: Path, tmp_path: Path) -> None:
    rewrite(done / "cache.json", b'"format": 1', b'"format": 7')
    with pytest.raises(ValueError, match=r"cache.json is of format 7, must be 1"):
        TeacherCache(done)
    with pytest.raises(FileNotFoundError, match=r"there is no .*nowhere/cache.json$"):
        TeacherCache(tmp_path / "nowhere")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match=r"other holds thesis.tex, but no cache; choose another"):
        make(other)
    with pytest.raises(NotADirectoryError, match=r"thesis.tex, which is a file"):
        make(other / "thesis.tex")
    assert [path.name for path in other.iterdir()] == ["thesis.tex"]


def spoilt(token: int, *values: float) -> Bigram:
    model = Bigram()
    with torch.no_grad():
        model.table[token, : len(values)] = torch.tensor(values)
    return model


def test_logits_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the teacher's logits at position 2 of sequence 1 hold NaN, \+inf"):
        make(tmp_path / "a", spoilt(30, math.nan), [[3, 4, 5], [6, 7, 30]])
    with pytest.raises(ValueError, match="at position 0 of sequence 1 hold NaN"):
        make(tmp_path / "b", spoilt(30, INF), [[3, 4, 5], [30]])
    with pytest.raises(ValueError, match="hold NaN"):
        make(tmp_path / "c", spoilt(30, *[-INF] * VOCABULARY), [[3, 4, 5], [30]])
    make(tmp_path / "d", spoilt(30, -INF, -INF), [[3, 4, 5], [30]])  # masked classes are none of these


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"top_k": VOCABULARY + 1}, "top_k is 38, must be at most the 37 tokens of the vocabulary"),
        ({"top_k": 0}, "top_k is 0"),
        ({"temperature": 0}, "temperature is 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"log_prob_dtype": torch.bfloat16}, "log_prob_dtype is 'bfloat16', must be one of float16, float32"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"shard_tokens": 0}, "shard_tokens is 0"),
        ({"data": []}, "the data has no sequences"),
        ({"data": [[1, 2], []]}, "sequence 1 of the data has 0 tokens"),
        ({"data": [[1, 2], [3, VOCABULARY]]}, r"token 37 of sequence 1 is none of the model's, must be in \[0, 37\)"),
        ({"data": [[1, -1]]}, "token -1 of sequence 0 is none"),
        ({"data": [[1.5, 2]]}, "sequence 0 is float64"),
        ({"data": [{"input_ids": [1, 2], "labels": [1]}]}, "labels of sequence 0 are not as long as it is"),
        ({"data": [{"input_ids": [1], "labels": [1]}, [2]]}, "labels of sequence 1"),
        ({"model": Bigram().train()}, "model is in training mode"),
        ({"model": lambda ids: ids}, "fingerprint is None"),
        ({"model": lambda ids: ids, "fingerprint": "x"}, r"logits are \(1, 1\), must be \(1, 1, 'V'\)"),
        ({"model": lambda ids: None, "fingerprint": "x"}, "logits are NoneType"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_arguments(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        make(tmp_path / "cache", **options)
    assert not (tmp_path / "cache").exists()


def test_k_may_be_all_of_the_vocabulary(tmp_path: Path) -> None:
    item = make(tmp_path / "cache", top_k=VOCABULARY)[3]
    assert (item["teacher_tail_log_prob"] == -INF).all()
    torch.testing.assert_close(item["teacher_log_probs"].exp().sum(-1), torch.ones(len(item["input_ids"])))


# ---- files of tokens -----------------------------------------------------------------------------------


def letters(texts: list[str], add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[list[int]]]:
    """A tokenizer: a token a letter; 0 begins a text."""
    return {"input_ids": [[0] * add_special_tokens + [ord(c) - 96 for c in text if c.isalpha()] for text in texts]}


letters.eos_token_id = 30  # type: ignore[attr-defined]


def rows_of(data: TokenSequences) -> list[list[int]]:
    return [tokens.input_ids.tolist() for tokens in data]


def test_text_packed_and_by_example(tmp_path: Path) -> None:
    text = tmp_path / "x.txt"
    text.write_text("ab\n\ncd\nefg\n")
    assert rows_of(open_tokens(text, letters, sequence_length=3)) == [
        [1, 2, 3],
        [4, 5, 6],
    ]  # a single g predicts nothing
    assert rows_of(open_tokens(text, letters, sequence_length=4)) == [[1, 2, 3, 4], [5, 6, 7]]
    lines = open_tokens(text, letters, sequence_length=3, packed=False)
    assert rows_of(lines) == [[0, 1, 2], [0, 3, 4], [0, 5, 6]]
    assert lines.reading == {"sequence_length": 3, "packed": False, "field": None}


def test_json_lines_of_text_and_of_tokens(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "ab", "id": 1}\n\n{"text": "c", "id": 2}\n')
    assert rows_of(open_tokens(file, letters, sequence_length=4)) == [[0, 1, 2, 30], [0, 3, 30]]
    assert rows_of(open_tokens(file, letters, packed=False)) == [[0, 1, 2], [0, 3]]
    file.write_text('{"words": "ab", "input_ids": [4, 5], "labels": [-100, 5]}\n{"input_ids": [6], "labels": [6]}')
    found = open_tokens(file)
    assert found.reading == {"sequence_length": 1024, "packed": None, "field": "input_ids"}
    assert rows_of(found) == [[4, 5], [6]]
    assert [tokens.labels.tolist() for tokens in found] == [[-100, 5], [6]]  # type: ignore[union-attr]
    assert (
        found.digest()
        == TokenSequences.of([{"input_ids": [4, 5], "labels": [-100, 5]}, {"input_ids": [6], "labels": [6]}]).digest()
    )
    assert found.digest() != TokenSequences.of([[4, 5], [6]]).digest()
    assert (
        found.digest()
        != TokenSequences.of([{"input_ids": [4], "labels": [-100]}, {"input_ids": [5, 6], "labels": [5, 6]}]).digest()
    )


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint16])
def test_arrays_of_tokens(tmp_path: Path, dtype: type) -> None:
    file = tmp_path / "x.npy"
    np.save(file, np.arange(10, dtype=dtype))
    stream = open_tokens(file, sequence_length=4)
    assert isinstance(stream._tokens, np.memmap)
    assert rows_of(stream) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert stream.digest() == TokenSequences.of([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]).digest()
    np.save(file, np.arange(6, dtype=dtype).reshape(2, 3))
    assert rows_of(open_tokens(file)) == [[0, 1, 2], [3, 4, 5]]


def test_a_cache_is_checked_against_a_file(tmp_path: Path) -> None:
    file = tmp_path / "x.npy"
    np.save(file, np.arange(30) % 7)
    make(tmp_path / "cache", data=open_tokens(file, sequence_length=8))
    TeacherCache(tmp_path / "cache", data=file)
    np.save(file, np.arange(30) % 6)
    with pytest.raises(ValueError, match="of other data"):
        TeacherCache(tmp_path / "cache", data=file)
    with pytest.raises(ValueError, match="with sequence_length 8, given is 10"):
        make(tmp_path / "cache", data=open_tokens(file, sequence_length=10))


@pytest.mark.parametrize(
    ("name", "text", "options", "said"),
    [
        ("x.csv", "a", {}, "x.csv is unknown, must be .txt, .jsonl, .npy or a folder"),
        ("x.txt", "", {}, "the data has no sequences"),
        ("x.txt", "\n\n", {"packed": False}, "the data has no sequences"),
        ("x.jsonl", "", {}, "x.jsonl is empty"),
        ("x.jsonl", "{}", {}, "an example of .*x.jsonl has no input_ids"),
        ("x.jsonl", '{"a": "b", "c": 1}', {}, "x.jsonl has a, c, must have input_ids or text: --field names another"),
        ("x.jsonl", '{"a": "b"}', {"field": "c"}, "x.jsonl has a, must have c"),
        ("x.jsonl", '{"text": "b"}\n{"text": 3}', {}, "text of an example of .* is int, must be text"),
        ("x.jsonl", '{"text": "b"}\n{"a": 3}', {}, "an example of .* has no text"),
        ("x.jsonl", '{"text": "b"}\n[1]', {}, "line 2 of .*x.jsonl is no JSON object"),
        ("x.jsonl", '{"text": "b"', {}, "line 1 of .*x.jsonl is no JSON object"),
        ("x.jsonl", '{"input_ids": [1, 2, 3]}', {"sequence_length": 2}, "has a sequence of 3 tokens, must be at most the seq"),
        ("x.txt", b"\xff\xfe", {}, "x.txt is no UTF-8 text: invalid start byte at byte 0"),
        ("x.txt", "a", {"tokenizer": None}, "x.txt is text and tokenizer is None"),
        ("x.txt", "a", {"sequence_length": 1}, "sequence_length is 1"),
        ("x.npy", b"nothing", {}, "x.npy is broken: no whole .npy file"),
        ("x.npy", np.zeros(3), {}, r"x.npy has float64 \(3,\), must be integers"),
        ("x.npy", np.zeros((2, 2, 2), int), {}, r"must be integers \[T\] or \[N, S\]"),
        ("x.npy", np.zeros((2, 9), int), {"sequence_length": 8}, "has a sequence of 9 tokens"),
        ("x.npy", np.zeros(0, int), {}, "no sequences|cannot mmap an empty"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read(tmp_path: Path, name: str, text: Any, options: dict[str, Any], said: str) -> None:
    file = tmp_path / name
    if isinstance(text, np.ndarray):
        np.save(file, text)
    else:
        file.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ValueError, match=said):
        open_tokens(file, **{"tokenizer": letters, **options})
    with pytest.raises(FileNotFoundError, match="there is no"):
        open_tokens(tmp_path / "nowhere.txt", letters)
