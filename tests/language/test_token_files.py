"""Files of text and of tokens, as sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from language_cases import (
    make,
)

from fastkd.language import TeacherCache, TokenSequences, open_tokens

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]


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
