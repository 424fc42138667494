"""A teacher's predictions over a data set, read from the disk."""

from __future__ import annotations

import os
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastkd import _checks
from fastkd.functional.sparse import Tail
from fastkd.language.cache_files import AGAIN, OF_READING, WHOLE, check_same, check_shard, read_about
from fastkd.language.digests import model_digest, tokenizer_digest
from fastkd.language.shard_file import Array, map_arrays, payload_digest
from fastkd.language.token_files import open_tokens
from fastkd.language.tokens import TokenSequences

__all__ = ["TeacherCache"]


class TeacherCache(Dataset[dict[str, Tensor]]):
    """What :func:`fastkd.language.cache_teacher` wrote, as a map-style Dataset of sequences; memory-mapped, nothing is loaded.

    An item has, for a sequence of S tokens:

    - ``input_ids`` and ``labels``, int64 ``[S]``: the labels of the data, or the tokens; ``labels[i]`` belongs to token i;
    - ``teacher_indices`` int32 ``[S, k]``, ``teacher_log_probs`` float32 ``[S, k]`` and ``teacher_tail_log_prob`` float32
      ``[S]``: the k most probable tokens, their log-probabilities in ``softmax(logits / temperature)`` over the whole
      vocabulary, in descending order, and the logarithm of what all others have together.

    In a cache of draws (``cache_teacher(..., sampled=N)``) a row has each token that was drawn once, in increasing order, with
    log(count / N); what is left of the row is padding, token 0 with -inf. There is no ``teacher_tail_log_prob``: give the loss
    ``tail=cache.tail``, which is "drop".

    Row i of the teacher is its prediction at position i, of token i + 1, as logits lie; the last row is of a token that the
    sequence does not have. :class:`fastkd.language.CacheCollator` makes batches of items.

    Log-probabilities that are stored in float16 are normalised as they are read, so that they and the tail add up to one; of
    draws, whose counts are whole numbers, they are exact.

    Args:
        path: the folder.
        tokenizer, data, model: as in :meth:`check`.

    Raises:
        FileNotFoundError: there is no cache, or not all of it yet.
        ValueError: it is damaged, or of other data, another tokenizer or another model.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, tokenizer: Any = None, data: Any = None, model: Any = None
    ) -> None:
        self.path = Path(path)
        about = read_about(self.path)
        if about is None or "shards" not in about:
            begun = ": making it was interrupted, the same command goes on" if about else ""
            raise FileNotFoundError(f"fastkd: there is no {self.path / WHOLE}{begun}")
        self.about = about
        """What it is of: the numbers and digests of cache.json."""
        self._files = [self.path / shard["file"] for shard in about["shards"]]
        for file, shard in zip(self._files, about["shards"], strict=True):
            check_shard(file, shard, about)
        self._starts: list[int] = [0, *accumulate(shard["sequences"] for shard in about["shards"])]
        self._maps: dict[int, dict[str, Array]] = {}
        self.check(tokenizer=tokenizer, data=data, model=model)

    @property
    def top_k(self) -> int | None:
        """Most probable tokens that each position has; None in a cache of draws."""
        return self.about["top_k"]  # type: ignore[no-any-return]

    @property
    def sampled(self) -> int | None:
        """Draws at each position; None in a cache of the most probable tokens."""
        return self.about["sampled"]  # type: ignore[no-any-return]

    @property
    def tail(self) -> Tail:
        """The ``tail`` of the losses in :mod:`fastkd.functional.sparse`: "bucket", or "drop" for draws."""
        return "drop" if self.sampled else "bucket"

    @property
    def temperature(self) -> float:
        """By which the teacher's logits were divided: the student's are to be, too."""
        return float(self.about["temperature"])

    @property
    def vocab_size(self) -> int:
        """Classes of the teacher."""
        return int(self.about["vocab_size"])

    @property
    def num_tokens(self) -> int:
        """Of all sequences together."""
        return int(self.about["tokens"])

    @property
    def nbytes(self) -> int:
        """Of all shards."""
        return sum(int(shard["bytes"]) for shard in self.about["shards"])

    def __len__(self) -> int:
        return self._starts[-1]

    def __repr__(self) -> str:
        of = f"{self.sampled} draws" if self.sampled else f"top {self.top_k}"
        return f"TeacherCache({self.path}: {len(self)} sequences, {self.num_tokens} tokens, {of})"

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        index = _checks.check_count("index", index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"fastkd: index is {index}, must be in [{-len(self)}, {len(self)})")
        index %= len(self)
        shard = bisect_right(self._starts, index) - 1
        arrays = self._shard(shard)
        low, high = arrays["offsets"][index - self._starts[shard] :][:2].tolist()
        ids = _copy(arrays["input_ids"], low, high).long()
        log_probs = _copy(arrays["teacher_log_probs"], low, high)
        item = {
            "input_ids": ids,
            "labels": _copy(arrays["labels"], low, high).long() if "labels" in arrays else ids.clone(),
            "teacher_indices": _copy(arrays["teacher_indices"], low, high),
            "teacher_log_probs": log_probs.float(),
        }
        if self.sampled:
            if log_probs.dtype == torch.float16:
                counts = (item["teacher_log_probs"].exp() * self.sampled).round()
                item["teacher_log_probs"] = (counts / self.sampled).log()
            return item
        item["teacher_tail_log_prob"] = _copy(arrays["teacher_tail_log_prob"], low, high)
        if log_probs.dtype == torch.float16:
            whole = torch.logaddexp(item["teacher_log_probs"].logsumexp(-1), item["teacher_tail_log_prob"])
            item["teacher_log_probs"] -= whole.unsqueeze(-1)
            item["teacher_tail_log_prob"] -= whole
        return item

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_maps": {}}  # a worker maps the files itself

    def check(self, *, tokenizer: Any = None, data: Any = None, model: Any = None) -> None:
        """Whether the cache is of these.

        Args:
            tokenizer: of ``transformers`` or ``tokenizers``.
            data: :class:`TokenSequences`, or the path of a file, which is read, and tokenized, as it was for the cache.
            model: the teacher, as it was loaded: its dtype counts.

        Raises:
            ValueError: it is of others; the digests of both are named.
        """
        given: dict[str, Any] = {}
        if tokenizer is not None:
            given["tokenizer"] = tokenizer_digest(tokenizer)
            check_same(self.path, self.about, given)  # before texts are tokenized by it
        if data is not None:
            if not isinstance(data, TokenSequences):
                data = open_tokens(
                    data, tokenizer, **{name: self.about[name] for name in OF_READING if self.about[name] is not None}
                )
            given["data"] = data.digest()
        if model is not None:
            given["model"] = model_digest(model)
        check_same(self.path, self.about, given)

    def verify(self) -> None:
        """Reads all of it and compares each shard with its digest.

        Raises:
            ValueError: a shard is damaged.
        """
        for file, shard in zip(self._files, self.about["shards"], strict=True):
            if payload_digest(file) != shard["sha256"]:
                raise ValueError(
                    f"fastkd: {file} is damaged: its digest is not that of {WHOLE}; delete it, and {AGAIN}"
                )

    def tail_mass(self) -> float:
        """The probability that the teacher gives to tokens outside the k, on average.

        Raises:
            ValueError: the cache is of draws.
        """
        if self.sampled:
            raise ValueError(f"fastkd: {self.path} is a cache of {self.sampled} draws, which have no tail")
        total = sum(
            float(np.exp(self._shard(i)["teacher_tail_log_prob"]).sum(dtype=np.float64))
            for i in range(len(self._files))
        )
        return total / self.num_tokens

    def tokens_per_position(self) -> float:
        """Tokens that a position has, padding left out: the average over the first shard, which is read."""
        log_probs = self._shard(0)["teacher_log_probs"]
        return float((log_probs > -np.inf).sum()) / len(log_probs)

    def _shard(self, number: int) -> dict[str, Array]:
        if number not in self._maps:
            self._maps[number] = map_arrays(self._files[number])
        return self._maps[number]


def _copy(array: Array, low: int, high: int) -> Tensor:
    return torch.from_numpy(np.array(array[low:high]))
