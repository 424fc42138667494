"""Files of text or of tokens, to sequences."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from fastkd import _checks
from fastkd.data.array_collection import open_array
from fastkd.language.tokens import TokenSequences

__all__ = ["open_tokens"]

TEXT, IDS = "text", "input_ids"
_PIECE = 1 << 16  # characters of a text that are tokenized at once, up to the end of a line
_EXAMPLES = 1000  # that are tokenized at once

Row = dict[str, Any]


def open_tokens(
    path: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    sequence_length: int = 1024,
    packed: bool = True,
    field: str | None = None,
) -> TokenSequences:
    """The sequences of a file.

    - ``.txt``: text. Packed, the whole file is one stream of tokens, without special ones; else each line is an example.
    - ``.jsonl``: a JSON object a line, one of whose fields is text, or a list of tokens.
    - a folder that ``datasets.Dataset.save_to_disk`` wrote: the same of its columns.
    - ``.npy`` of integers: ``[T]``, a stream of tokens, or ``[N, S]``, a sequence a row. It is memory-mapped.

    Texts are tokenized with the special tokens that the tokenizer adds. Packed, they follow one another, each ended by the
    end-of-sequence token where the tokenizer has one, and are cut into blocks of ``sequence_length``; the last one may be
    shorter. Not packed, each is a sequence, cut off at ``sequence_length``. Empty ones are left out. What is tokenized
    already is taken as it lies, with the field ``labels`` where it is there, too.

    Args:
        tokenizer: of transformers; needed for text alone.
        sequence_length: at least 2.
        field: with the text or the tokens; by default ``input_ids`` where there is one, else ``text``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read as that, has nothing in it, or sequences of more than ``sequence_length`` tokens.
    """
    path = Path(path)
    length = _checks.check_count("sequence_length", sequence_length, 2)
    packed = _checks.check_flag("packed", packed)
    if not path.exists():
        raise FileNotFoundError(f"fastkd: there is no {path}")
    reading = {"sequence_length": length, "packed": packed, "field": field}
    if path.suffix == ".npy":
        return _of_array(path, length, {**reading, "packed": None, "field": None})
    if path.suffix == ".txt":
        if not packed:
            return _examples(_lines(path), _needed(tokenizer, path), {**reading, "field": None})
        stream = _stream(_pieces(path), _needed(tokenizer, path), special=False)
        return TokenSequences.blocks(stream, length, {**reading, "field": None})
    rows, fields = _rows(path)
    field = _field(path, field, fields)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"fastkd: {path} is empty, must have at least one example")
    rows = chain([first], rows)
    reading["field"] = field
    if not isinstance(_value(path, first, field), str):
        found = TokenSequences.of(_tokenized(path, rows, field), {**reading, "packed": None})
        _check_length(path, found, length)
        return found
    texts = (_text(path, row, field) for row in rows)
    if not packed:
        return _examples(texts, _needed(tokenizer, path), reading)
    return TokenSequences.blocks(_stream(texts, _needed(tokenizer, path), special=True), length, reading)


def check_kind(path: Path) -> None:
    """Whether it is there and a kind of file that :func:`open_tokens` knows.

    Raises:
        FileNotFoundError, ValueError: it is not.
    """
    if not path.exists():
        raise FileNotFoundError(f"fastkd: there is no {path}")
    if not path.is_dir() and path.suffix not in (".txt", ".jsonl", ".npy"):
        raise ValueError(
            f"fastkd: {path} is unknown, must be .txt, .jsonl, .npy or a folder that datasets.save_to_disk wrote"
        )


def _of_array(path: Path, length: int, reading: dict[str, Any]) -> TokenSequences:
    array = open_array(path)
    if array.ndim not in (1, 2) or array.dtype.kind not in "iu":
        raise ValueError(f"fastkd: {path} has {array.dtype} {array.shape}, must be integers [T] or [N, S]")
    if array.ndim == 1:
        return TokenSequences.blocks(array, length, reading)
    rows, width = array.shape
    found = TokenSequences(array.reshape(-1), np.arange(rows + 1) * width, None, reading)
    _check_length(path, found, length)
    return found


def _rows(path: Path) -> tuple[Iterator[Row], list[str]]:
    """Rows of a file with fields, and these."""
    check_kind(path)
    if path.is_dir():
        try:
            datasets = importlib.import_module("datasets")
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                f'fastkd: {path} is a folder, to read it needs datasets: pip install "fastkd[language]"'
            ) from None
        try:
            found = datasets.load_from_disk(str(path))
        except (OSError, ValueError) as error:
            raise ValueError(f"fastkd: {path} is no folder that datasets.save_to_disk wrote: {error}") from None
        if isinstance(found, dict):
            raise ValueError(
                f"fastkd: {path} holds {', '.join(found)}, must be one of them, {path}/{next(iter(found))}"
            )
        return _columns(found), list(found.column_names)
    rows = _objects(path)
    first = next(rows, None)
    return (iter(()), []) if first is None else (chain([first], rows), list(first))


def _columns(table: Any) -> Iterator[Row]:
    for batch in table.iter(_EXAMPLES):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def _objects(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(path, keep_blank=True), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise ValueError(f"fastkd: line {number} of {path} is no JSON object")
            yield row


def _lines(path: Path, *, keep_blank: bool = False) -> Iterator[str]:
    for piece in _pieces(path):
        yield from (line for line in piece.splitlines() if keep_blank or line.strip())


def _pieces(path: Path) -> Iterator[str]:
    """The text, in pieces that end with a line."""
    try:
        with path.open(encoding="utf-8") as file:
            while lines := file.readlines(_PIECE):
                yield "".join(lines)
    except UnicodeDecodeError as error:
        raise ValueError(f"fastkd: {path} is no UTF-8 text: {error.reason} at byte {error.start}") from None


def _field(path: Path, field: str | None, fields: list[str]) -> str:
    wanted = (IDS, TEXT) if field is None else (field,)
    for name in wanted:
        if name in fields or not fields:
            return name
    raise ValueError(f"fastkd: {path} has {', '.join(fields)}, must have {' or '.join(wanted)}: --field names another")


def _value(path: Path, row: Row, field: str) -> Any:
    if row.get(field) is None:
        raise ValueError(f"fastkd: an example of {path} has no {field}, must have one")
    return row[field]


def _text(path: Path, row: Row, field: str) -> str:
    value = _value(path, row, field)
    if not isinstance(value, str):
        raise ValueError(f"fastkd: {field} of an example of {path} is {type(value).__name__}, must be text as before")
    return value


def _tokenized(path: Path, rows: Iterable[Row], field: str) -> Iterator[Row]:
    for row in rows:
        yield {"input_ids": _value(path, row, field), "labels": row.get("labels") if field == IDS else None}


def _needed(tokenizer: Any, path: Path) -> Callable[..., Any]:
    if not callable(tokenizer):
        raise ValueError(f"fastkd: {path} is text and tokenizer is {tokenizer}, must be one of transformers")
    return tokenizer  # type: ignore[no-any-return]


def _tokenize(texts: Iterable[str], tokenizer: Callable[..., Any], special: bool) -> Iterator[list[int]]:
    texts = iter(texts)
    while some := list(islice(texts, _EXAMPLES)):
        yield from tokenizer(some, add_special_tokens=special, verbose=False)["input_ids"]


def _stream(texts: Iterable[str], tokenizer: Any, *, special: bool) -> np.ndarray[Any, np.dtype[np.int32]]:
    """All of them, one after the other."""
    end = getattr(tokenizer, "eos_token_id", None) if special else None
    parts = [np.zeros(0, np.int32)]
    for ids in _tokenize(texts, tokenizer, special):
        if ids and end is not None and ids[-1] != end:
            ids = [*ids, end]
        parts.append(np.asarray(ids, np.int32))
    return np.concatenate(parts)


def _examples(texts: Iterable[str], tokenizer: Any, reading: dict[str, Any]) -> TokenSequences:
    length = reading["sequence_length"]
    found = (ids[:length] for ids in _tokenize(texts, tokenizer, True))
    return TokenSequences.of((ids for ids in found if ids), reading)


def _check_length(path: Path, found: TokenSequences, length: int) -> None:
    if found.longest > length:
        raise ValueError(
            f"fastkd: {path} has a sequence of {found.longest} tokens, must be at most the sequence_length of {length}: "
            "what is tokenized already is not cut"
        )
