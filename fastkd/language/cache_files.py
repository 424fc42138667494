"""A teacher's predictions over a data set, on the disk: a folder with ``cache.json``, what they are of, and shards.

``cache.json`` is written when all shards are there; before, ``begun.json`` says what they are going to be of.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fastkd._files import write_whole
from fastkd.language.shard_file import Array, read_header

__all__: list[str] = []

FORMAT = 1
WHOLE, BEGUN = "cache.json", "begun.json"
OF_READING = ("sequence_length", "packed", "field")
DIGESTS = ("tokenizer", "data", "model")
# What must be the same in a cache that is gone on with, in the order in which it is said: that a tokenizer is another one
# says more than that its tokens are.
COMPARED = (
    *("format", "targets", "top_k", "sampled", "seed"),
    *("temperature", "log_prob_dtype", "model_dtype", "shard_tokens"),
    *("sequence_length", "packed"),
    *DIGESTS,
    *("vocab_size", "sequences", "tokens", "labelled"),
)
STORED = {"float16": "<f2", "float32": "<f4"}
MOST_DRAWS = 2048  # in float16: up to there log(count / draws) is off by less than half a count
AGAIN = "the command that made it makes it again"


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def shard_shapes(sequences: int, tokens: int, about: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape of each array of a shard, in their order: larger elements first."""
    k = about["top_k"] or min(about["sampled"], about["vocab_size"])
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "offsets": ("<i8", (sequences + 1,)),
        "input_ids": ("<i4", (tokens,)),
        "labels": ("<i4", (tokens,)),
        "teacher_tail_log_prob": ("<f4", (tokens,)),
        "teacher_indices": ("<i4", (tokens, k)),
        "teacher_log_probs": (STORED[about["log_prob_dtype"]], (tokens, k)),
    }
    if not about["labelled"]:
        del shapes["labels"]
    if about["sampled"]:
        del shapes["teacher_tail_log_prob"]
    return shapes


def check_shard(file: Path, shard: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Whether a file is that shard by its sizes.

    Raises:
        FileNotFoundError, ValueError: it is not.
    """
    try:
        size = file.stat().st_size
    except FileNotFoundError:
        raise FileNotFoundError(f"fastkd: there is no {file}; {AGAIN}") from None
    if size != shard["bytes"]:
        raise ValueError(f"fastkd: {file} is damaged: it has {size} bytes, must have {shard['bytes']}; {AGAIN}")
    header = read_header(file)
    if header.shapes() != shard_shapes(shard["sequences"], shard["tokens"], about) or header.sha256 != shard["sha256"]:
        raise ValueError(f"fastkd: {file} is damaged: its header is not that of {WHOLE}; delete it, and {AGAIN}")


def read_about(folder: Path) -> dict[str, Any] | None:
    """What a cache is of, whole or begun, or None where there is none.

    Raises:
        ValueError: it cannot be read.
    """
    for file in (folder / WHOLE, folder / BEGUN):
        if not file.is_file():
            continue
        try:
            about = json.loads(file.read_text())
            if not {*COMPARED, *OF_READING} <= set(about):
                raise ValueError
        except (ValueError, TypeError):
            raise ValueError(
                f"fastkd: {file} does not say what a cache is of; choose another folder, or delete it"
            ) from None
        if about["format"] != FORMAT:
            raise ValueError(f"fastkd: {file} is of format {about['format']}, must be {FORMAT}, that of this fastkd")
        return about  # type: ignore[no-any-return]
    return None


def write_about(folder: Path, name: str, about: Mapping[str, Any]) -> None:
    text = json.dumps(about, indent=1) + "\n"
    write_whole(folder / name, lambda file: file.write(text.encode()))


def check_same(folder: Path, about: Mapping[str, Any], wanted: Mapping[str, Any], advice: str = "") -> None:
    """Whether a cache is of what is wanted.

    Args:
        advice: ends the message.

    Raises:
        ValueError: it is not; the first that differs is named, as it was found and as it is given.
    """
    for name in COMPARED:
        if name not in wanted or about[name] == wanted[name]:
            continue
        found, given = about[name], wanted[name]
        if name in OF_READING and None in (found, given):
            continue  # of another kind of file: its data differ
        if name in DIGESTS:
            what = {"data": "other data"}.get(name, f"another {name}")
            said = f"of {what}: its digest is {_short(found)}, given is {_short(given)}"
        else:
            said = f"with {name} {found}, given is {given}"
        raise ValueError(f"fastkd: {folder} holds a cache {said}{advice}")


def _short(digest: str | None) -> str:
    return "none" if digest is None else f"{digest[:12]}..."


def shards_of(offsets: Array, shard_tokens: int) -> Iterator[tuple[int, int]]:
    """First sequence, and that after the last, of shards of about so many tokens."""
    starts = np.searchsorted(offsets, np.arange(0, offsets[-1], shard_tokens))
    yield from pairwise(np.unique(np.append(starts, len(offsets) - 1)).tolist())
