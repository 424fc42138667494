"""One pass of a teacher over sequences, to a cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastkd import _checks
from fastkd._build_info import build_info
from fastkd._group import Group
from fastkd._seeding import mixed_seed
from fastkd.language.cache_files import (
    BEGUN,
    COMPARED,
    FORMAT,
    MOST_DRAWS,
    OF_READING,
    STORED,
    WHOLE,
    check_same,
    read_about,
    shard_name,
    shard_shapes,
    shards_of,
    write_about,
)
from fastkd.language.digests import model_digest, tokenizer_digest
from fastkd.language.shard_file import Array, read_header, write_arrays
from fastkd.language.targets import drawn_log_probs, top_k_log_probs
from fastkd.language.teacher_cache import TeacherCache
from fastkd.language.tokens import TokenSequences
from fastkd.training.distributed import on_first_rank
from fastkd.training.folder import locked

__all__ = ["SHARD_TOKENS", "cache_teacher"]

TOP_K = 64  # where nothing is said
SHARD_TOKENS = 1 << 18  # of a shard, about: 100 MB at 64 tokens a position, which a process also holds in memory
_CHUNK_BYTES = {"cpu": 1 << 24, "cuda": 1 << 28}  # of rows in float32 at a time
_MOST_CLASSES = 2**31  # that int32 can index

Forward = Callable[[Tensor], Tensor]


def cache_teacher(
    model: Callable[[Tensor], Any],
    sequences: TokenSequences | Iterable[Any],
    folder: str | Path,
    *,
    tokenizer: Any = None,
    top_k: int | None = None,
    sampled: int | None = None,
    seed: int = 0,
    temperature: float = 1.0,
    log_prob_dtype: torch.dtype = torch.float16,
    batch_size: int = 8,
    shard_tokens: int = SHARD_TOKENS,
    device: torch.device | str | None = None,
    fingerprint: str | None = None,
    notes: Mapping[str, Any] | None = None,
    on_progress: Callable[[int, int], object] | None = None,
) -> TeacherCache:
    """Writes the k most probable tokens of a teacher at each position of each sequence, and the logarithm of what the others
    have together; or draws from its distribution, by :func:`fastkd.functional.sample_teacher`.

    A shard is written as a whole, or not at all: killed, the same call goes on with the first that is not there. Under torchrun
    the ranks take shards in turn; another number of them may go on.

    Args:
        model: a causal language model of transformers, in eval mode, or anything that makes logits ``[B, S, V]``, or an object
            that has them as ``.logits``, of int64 ``[B, S]``. Sequences are padded with token 0 on the right, which a causal
            model does not see.
        sequences: :class:`TokenSequences`, or what :meth:`TokenSequences.of` takes.
        folder: of the cache; one that is not there, is empty, or holds a part of the same.
        tokenizer: whose digest the cache is to have.
        top_k: k; 64 where ``sampled`` is not given either.
        sampled: draws at each position, in place of the k most probable tokens; for losses with ``tail="drop"``.
        seed: of the draws. Those at a position depend on it, on the number of the sequence, the place in it and the logits
            alone: not on batches, shards, ranks, the device, or whether the pass was interrupted.
        temperature: by which logits are divided.
        log_prob_dtype: torch.float16 or torch.float32, in which they are stored. float16 is exact for up to 2048 draws.
        batch_size: sequences at once. It may change when a cache is gone on with.
        shard_tokens: tokens of a shard, about.
        device: where the model takes its input; that of its parameters by default.
        fingerprint: text that says which model it is, where it is none of torch, whose weights say it.
        notes: what cache.json is to say besides.
        on_progress: on rank 0, called with the number of tokens that are done, on all ranks, and of all.

    Returns:
        The cache, also where all of it was there.

    Raises:
        ValueError: the folder holds a cache of something else; k is more than the vocabulary; a token is none of the model's;
            the logits hold NaN.
        FileExistsError: the folder holds other files.
    """
    if sampled is None:
        top_k = _checks.check_count("top_k", TOP_K if top_k is None else top_k, 1)
    elif top_k is None:
        sampled = _checks.check_count("sampled", sampled, 1)
    else:
        raise ValueError(f"fastkd: top_k is {top_k} and sampled is {sampled}, must be one of them")
    seed = _checks.check_count("seed", seed)
    temperature = _checks.check_positive("temperature", temperature)
    dtype = str(log_prob_dtype).removeprefix("torch.")
    _checks.check_choice("log_prob_dtype", dtype, STORED)
    if sampled is not None and sampled > MOST_DRAWS and dtype == "float16":
        raise ValueError(f"fastkd: sampled is {sampled}, must be at most {MOST_DRAWS} where log_prob_dtype is float16")
    batch_size = _checks.check_count("batch_size", batch_size, 1)
    shard_tokens = _checks.check_count("shard_tokens", shard_tokens, 1)
    if isinstance(model, nn.Module):
        if model.training:
            raise ValueError("fastkd: model is in training mode, must not be: model.eval()")
        device = device or next((p.device for p in model.parameters()), None)
    elif fingerprint is None:
        raise ValueError("fastkd: fingerprint is None, must say which model it is, which is no module of torch")
    if not isinstance(sequences, TokenSequences):
        sequences = TokenSequences.of(sequences)
    place = torch.device(device or "cpu")
    forward = _forward(model, place)
    classes = _classes(model, forward, sequences)
    if top_k is not None and top_k > classes:
        raise ValueError(f"fastkd: top_k is {top_k}, must be at most the {classes} tokens of the vocabulary")
    reading = {**dict.fromkeys(OF_READING), **sequences.reading}
    folder = Path(folder)
    with ExitStack() as stack:

        def begin() -> dict[str, Any]:
            stack.enter_context(locked(folder, make=True, what="making of a cache"))
            about = {
                "format": FORMAT,
                "targets": "top_k" if sampled is None else "sampled",
                "top_k": top_k,
                "sampled": sampled,
                "seed": None if sampled is None else seed,
                "temperature": temperature,
                "log_prob_dtype": dtype,
                "model_dtype": _dtype(model),
                "shard_tokens": shard_tokens,
                **reading,
                "tokenizer": None if tokenizer is None else tokenizer_digest(tokenizer),
                "data": sequences.digest(),
                "model": model_digest(model) if isinstance(model, nn.Module) else fingerprint,
                "vocab_size": classes,
                "sequences": len(sequences),
                "tokens": sequences.num_tokens,
                "labelled": sequences.labelled,
                "fastkd": build_info()["version"],
                "torch": torch.__version__,
                "notes": dict(notes or {}),
            }
            return _begin(folder, about)

        about = on_first_rank(begin)
        shards = list(shards_of(sequences.offsets, shard_tokens))
        left = on_first_rank(
            lambda: [i for i, bounds in enumerate(shards) if not _there(folder, i, bounds, sequences, about)]
        )
        pass_ = _Pass(forward, sequences, about, batch_size, place, on_progress)
        pass_.write(folder, shards, left)
        on_first_rank(lambda: _finish(folder, shards, sequences, about))
    return TeacherCache(folder)


class _Pass:
    """The shards that are left, each rank its own."""

    def __init__(
        self,
        forward: Forward,
        sequences: TokenSequences,
        about: dict[str, Any],
        batch_size: int,
        device: torch.device,
        on_progress: Callable[[int, int], object] | None,
    ) -> None:
        self.forward, self.sequences, self.about = forward, sequences, about
        self.batch_size, self.device = batch_size, device
        self.group = Group(None)
        self._on_progress = on_progress if self.group.rank == 0 else None
        self._done = 0

    def write(self, folder: Path, shards: list[tuple[int, int]], left: list[int]) -> None:
        """In rounds of one shard a rank, so that no rank waits for long where another is slower, and what is wrong on one is
        an error of all."""
        sizes = [int(self.sequences.offsets[last] - self.sequences.offsets[first]) for first, last in shards]
        self._done = sum(sizes) - sum(sizes[i] for i in left)
        self._tell(0)
        for start in range(0, len(left), self.group.size):
            numbers = left[start : start + self.group.size]
            tokens = sum(sizes[i] for i in numbers)
            mine = numbers[self.group.rank] if self.group.rank < len(numbers) else None

            def one(number: int | None = mine, tokens: int = tokens) -> None:
                if number is not None:
                    write_arrays(folder / shard_name(number), self._shard(*shards[number], tokens))

            self.group.together(one)
            self._done += tokens
            self._tell(0)

    def _shard(self, first: int, last: int, tokens_of_round: int) -> dict[str, Array]:
        """Of the sequences from ``first`` on, up to ``last``. The other ranks are taken to be as far as this one."""
        offsets = self.sequences.offsets[first : last + 1] - self.sequences.offsets[first]
        arrays = {
            name: np.empty(shape, dtype)
            for name, (dtype, shape) in shard_shapes(last - first, int(offsets[-1]), self.about).items()
        }
        arrays["offsets"][:] = offsets
        ahead = 0
        # neighbours in length make little padding; the longest first, so that it is known at once whether they fit
        order = np.argsort(-np.diff(offsets), kind="stable")
        for chosen in np.split(order, range(self.batch_size, len(order), self.batch_size)):
            found = [self.sequences[first + int(i)] for i in chosen]
            rows = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in chosen])
            arrays["input_ids"][rows] = np.concatenate([tokens.input_ids for tokens in found])
            if "labels" in arrays:
                arrays["labels"][rows] = np.concatenate([tokens.labels for tokens in found])
            made = self._targets([tokens.input_ids for tokens in found], [first + int(i) for i in chosen])
            wrong = made["teacher_log_probs"].isnan().any(-1).cpu().numpy()
            if wrong.any():
                place = int(rows[wrong.argmax()])
                sequence = int(np.searchsorted(offsets, place, side="right")) - 1
                raise ValueError(
                    f"fastkd: the teacher's logits at position {place - offsets[sequence]} of sequence {first + sequence} hold "
                    "NaN, +inf or nothing but -inf, must be numbers: look at the model and its dtype"
                )
            for name, values in made.items():
                stored = torch.from_numpy(arrays[name])
                stored[torch.from_numpy(rows)] = values.to("cpu", stored.dtype)
            ahead += len(rows)
            self._tell(tokens_of_round * ahead // int(offsets[-1]))
        return arrays

    def _targets(self, ids: list[Array], numbers: list[int]) -> dict[str, Tensor]:
        """Of a batch of sequences with these numbers: those of all positions, one after the other, on the device."""
        lengths = [len(row) for row in ids]
        batch = torch.zeros(len(ids), max(lengths), dtype=torch.int64)
        for row, tokens in zip(batch, ids, strict=True):
            row[: len(tokens)] = torch.from_numpy(tokens)
        with torch.inference_mode():
            logits = self.forward(batch)
            if self.about["sampled"]:
                return self._drawn([row[:length] for row, length in zip(logits, lengths, strict=True)], numbers)
            width = logits.shape[-1]
            flat = logits.reshape(-1, width)
            valid = torch.cat([torch.arange(n) + i * batch.shape[1] for i, n in enumerate(lengths)]).to(logits.device)
            chunk = max(1, _CHUNK_BYTES.get(logits.device.type, 1 << 24) // (4 * width))
            # no copy of all rows, which in float32 may be twice as large as the logits
            parts = [
                top_k_log_probs(flat[rows], self.about["top_k"], self.about["temperature"])
                for rows in valid.split(chunk)
            ]
        indices, log_probs, tail = (torch.cat(column) for column in zip(*parts, strict=True))
        return {"teacher_indices": indices, "teacher_log_probs": log_probs, "teacher_tail_log_prob": tail}

    def _drawn(self, logits: list[Tensor], numbers: list[int]) -> dict[str, Tensor]:
        """With a seed for each sequence, so that its draws do not depend on what is beside it in a batch."""
        draws, seed, temperature = (self.about[name] for name in ("sampled", "seed", "temperature"))
        parts = [
            drawn_log_probs(rows, draws, mixed_seed("sampled teacher", seed, number), temperature)
            for rows, number in zip(logits, numbers, strict=True)
        ]
        indices, log_probs = (torch.cat(column) for column in zip(*parts, strict=True))
        return {"teacher_indices": indices, "teacher_log_probs": log_probs}

    def _tell(self, ahead: int) -> None:
        if self._on_progress is not None:
            self._on_progress(self._done + ahead, self.sequences.num_tokens)


def _forward(model: Callable[[Tensor], Any], device: torch.device) -> Forward:
    if isinstance(model, nn.Module) and "use_cache" in inspect.signature(model.forward).parameters:
        model = partial(model, use_cache=False)  # keys and values would be kept for tokens that never come

    def forward(ids: Tensor) -> Tensor:
        made = model(ids.to(device))
        logits = getattr(made, "logits", made)
        if not isinstance(logits, Tensor) or logits.shape[:-1] != ids.shape:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"fastkd: the teacher's logits are {got}, must be {(*ids.shape, 'V')}")
        return logits

    return forward


def _classes(model: Any, forward: Forward, sequences: TokenSequences) -> int:
    """How many tokens the teacher predicts, by a look at the logits of one; all that are given must be among those it takes."""
    takes = getattr(model, "get_input_embeddings", lambda: None)()
    if takes is not None:
        sequences.check_below(takes.num_embeddings)
    with torch.inference_mode():
        classes = forward(torch.from_numpy(sequences[0].input_ids[None, :1]).long()).shape[-1]
    if takes is None:
        sequences.check_below(classes)
    return _checks.check_count("vocabulary", classes, 1, _MOST_CLASSES)


def _dtype(model: Any) -> str | None:
    """Of its weights."""
    found = {str(p.dtype).removeprefix("torch.") for p in model.parameters()} if isinstance(model, nn.Module) else set()
    return ", ".join(sorted(found)) or None


def _begin(folder: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Makes the folder's description, or takes the one that is there, where it is of the same."""
    before = read_about(folder)
    if before is not None:
        wanted = {name: about[name] for name in COMPARED}
        check_same(folder, before, wanted, "; choose another folder, or delete it")
    else:
        others = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        if others:
            raise FileExistsError(f"fastkd: the folder {folder} holds {others[0]}, but no cache; choose another")
        write_about(folder, BEGUN, about)
    for partial_file in folder.glob(".*.partial"):  # of processes that were killed
        partial_file.unlink(missing_ok=True)
    return {name: value for name, value in (before or about).items() if name != "shards"}


def _there(
    folder: Path, number: int, bounds: tuple[int, int], sequences: TokenSequences, about: Mapping[str, Any]
) -> bool:
    """Whether that shard is on the disk, by its sizes."""
    first, last = bounds
    try:
        header = read_header(folder / shard_name(number))
    except (FileNotFoundError, ValueError):
        return False
    return header.shapes() == shard_shapes(last - first, int(sequences.offsets[last] - sequences.offsets[first]), about)


def _finish(folder: Path, shards: list[tuple[int, int]], sequences: TokenSequences, about: Mapping[str, Any]) -> None:
    """All shards are there: the folder says so."""
    table = []
    for number, (first, last) in enumerate(shards):
        header = read_header(folder / shard_name(number))
        tokens = int(sequences.offsets[last] - sequences.offsets[first])
        table.append(
            {
                "file": shard_name(number),
                "sequences": last - first,
                "tokens": tokens,
                "bytes": header.size,
                "sha256": header.sha256,
            }
        )
    write_about(folder, WHOLE, {**about, "shards": table})
    (folder / BEGUN).unlink(missing_ok=True)
