"""Cached teachers: a cache of something else, damaged files, wrong arguments."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from language_cases import (
    INF,
    VOCABULARY,
    Bigram,
    content,
    make,
    sequences,
)

from fastkd.language import TeacherCache, TokenSequences

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]


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
