"""Sequences of tokens, from text that is tokenized here, or tokens that are there already."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from fastkd import _checks

__all__ = ["TokenSequences"]

Array = np.ndarray[Any, Any]

_AT_ONCE = 1 << 22  # tokens of which copies are made


class Tokens(NamedTuple):
    """One sequence."""

    input_ids: Array
    """int32 ``[S]``."""
    labels: Array | None
    """int32 ``[S]``: of each token, itself or -100, where not all are to be learned."""


class TokenSequences:
    """N sequences, one after the other in one array.

    Args:
        tokens: integers ``[T]``, which may be memory-mapped.
        offsets: int64 ``[N + 1]``: sequence i is ``tokens[offsets[i] : offsets[i + 1]]``.
        labels: integers ``[T]``, or None.
        reading: how they came to be, by name, for whoever must say whether others are the same.

    Raises:
        ValueError: there is none, or one without tokens.
    """

    def __init__(
        self, tokens: Array, offsets: Array, labels: Array | None = None, reading: Mapping[str, Any] | None = None
    ) -> None:
        for name, array in (("tokens", tokens), ("labels", labels)):
            if array is not None and (array.ndim != 1 or array.dtype.kind not in "iu"):
                raise TypeError(f"fastkd: {name} has {array.dtype} {array.shape}, must be integers of one dimension")
        if labels is not None and len(labels) != len(tokens):
            raise ValueError(f"fastkd: labels has {len(labels)} elements, must have as many as tokens, {len(tokens)}")
        self._tokens, self._labels = tokens, labels
        self.offsets: Array = np.asarray(offsets, dtype=np.int64)
        self.reading = dict(reading or {})
        if len(self) < 1:
            raise ValueError("fastkd: the data has no sequences, must have at least one")
        lengths = np.diff(self.offsets)
        if self.offsets[0] != 0 or self.offsets[-1] != len(tokens) or lengths.min() < 1:
            empty = int(lengths.argmin())
            raise ValueError(f"fastkd: sequence {empty} of the data has {lengths[empty]} tokens, must have at least 1")

    @classmethod
    def of(cls, sequences: Iterable[Any], reading: Mapping[str, Any] | None = None) -> TokenSequences:
        """Of lists, arrays or tensors of integers, or mappings with ``input_ids`` and, where wanted, ``labels``."""
        ids: list[Array] = []
        labels: list[Array] = []
        for number, sequence in enumerate(sequences):
            pair = sequence if isinstance(sequence, Mapping) else {"input_ids": sequence}
            ids.append(_integers(f"sequence {number}", pair["input_ids"]))
            if pair.get("labels") is not None:
                labels.append(_integers(f"labels of sequence {number}", pair["labels"]))
            if labels and (len(labels), len(labels[-1])) != (len(ids), len(ids[-1])):
                raise ValueError(
                    f"fastkd: labels of sequence {number} are not as long as it is, must be, for all or none"
                )
        empty = np.zeros(0, np.int32)
        offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
        return cls(
            np.concatenate([empty, *ids]), offsets, np.concatenate([empty, *labels]) if labels else None, reading
        )

    @classmethod
    def blocks(cls, tokens: Array, length: int, reading: Mapping[str, Any] | None = None) -> TokenSequences:
        """One stream, cut into blocks of so many tokens. What is left at the end is a shorter block; a single token, which
        predicts nothing, is left out."""
        length = _checks.check_count("sequence_length", length, 2)
        if len(tokens) % length == 1:
            tokens = tokens[:-1]
        return cls(tokens, np.append(np.arange(0, len(tokens), length), len(tokens)), None, reading)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Tokens:
        low, high = self.offsets[index], self.offsets[index + 1]
        labels = None if self._labels is None else self._labels[low:high].astype("<i4")
        return Tokens(self._tokens[low:high].astype("<i4"), labels)

    def __iter__(self) -> Iterator[Tokens]:
        return map(self.__getitem__, range(len(self)))

    @property
    def num_tokens(self) -> int:
        """Of all sequences together."""
        return int(self.offsets[-1])

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int(np.diff(self.offsets).max())

    @property
    def labelled(self) -> bool:
        """Whether they have labels of their own."""
        return self._labels is not None

    def digest(self) -> str:
        """sha256 over lengths, tokens and labels: hex. The same for any dtype, in memory and memory-mapped."""
        made = hashlib.sha256(f"tokens {len(self)} {self.labelled}\n".encode())
        made.update(self.offsets.astype("<i8").data)
        for array in (self._tokens, self._labels):
            if array is not None:
                for low in range(0, len(array), _AT_ONCE):
                    made.update(np.ascontiguousarray(array[low : low + _AT_ONCE], dtype="<i4").data)
        return made.hexdigest()

    def check_below(self, size: int) -> None:
        """Whether all tokens are in ``[0, size)``.

        Raises:
            ValueError: one is not; it is named with its sequence.
        """
        for low in range(0, len(self._tokens), _AT_ONCE):
            part = self._tokens[low : low + _AT_ONCE]
            wrong = (part < 0) | (part >= size)
            if wrong.any():
                place = low + int(wrong.argmax())
                sequence = int(np.searchsorted(self.offsets, place, side="right")) - 1
                raise ValueError(
                    f"fastkd: token {self._tokens[place]} of sequence {sequence} is none of the model's, must be in "
                    f"[0, {size}): look at the tokenizer"
                )


def _integers(name: str, values: Any) -> Array:
    array = values.cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if array.size == 0:
        array = array.astype(np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise TypeError(f"fastkd: {name} is {array.dtype} {array.shape}, must be integers of one dimension")
    return array.astype(np.int32)
