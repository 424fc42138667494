"""What the tests of cached teachers share, and what they run in processes of their own."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastkd.language import TeacherCache, TokenSequences, cache_teacher
from fastkd.training import process_group

VOCABULARY, SEQUENCES, SHARD = 37, 23, 40
K = 5
INF = float("inf")


class Bigram(nn.Module):
    """Stands for a language model: the logits at a position follow from the token there and from that before."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(3 * torch.randn(VOCABULARY, VOCABULARY, generator=generator).to(dtype))
        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        before = nn.functional.pad(ids, (1, 0))[:, :-1]
        return self.table[ids] + 0.5 * self.table[before]


def sequences(*, labelled: bool = False) -> TokenSequences:
    """Ragged ones, the shortest of one token."""
    random = np.random.default_rng(0)
    lengths = [1, *random.integers(2, 17, SEQUENCES - 1).tolist()]
    rows = [random.integers(0, VOCABULARY, length) for length in lengths]
    if labelled:
        return TokenSequences.of({"input_ids": row, "labels": np.where(row % 3 == 0, -100, row)} for row in rows)
    return TokenSequences.of(rows)


def make(folder: Path, model: Any = None, data: Any = None, **options: Any) -> TeacherCache:
    targets = {} if "sampled" in options else {"top_k": K}
    options = {**targets, "shard_tokens": SHARD, "batch_size": 3, **options}
    return cache_teacher(Bigram() if model is None else model, sequences() if data is None else data, folder, **options)


def content(folder: Path) -> dict[str, bytes]:
    """Of all but the description."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "cache.json"}


def truth(ids: Tensor, model: nn.Module | None = None, temperature: float = 1.0) -> Tensor:
    """float64 log-probabilities ``[S, V]`` of one sequence."""
    with torch.no_grad():
        logits: Tensor = (model or Bigram())(ids[None].long())[0]
    return (logits.double() / temperature).log_softmax(-1)


def make_alone(folder: Path, lives: int, options: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Until it has seen so many batches; it is killed in the next."""
    model, seen = Bigram(), 0

    def mortal(ids: Tensor) -> Tensor:
        nonlocal seen
        seen += 1
        if seen > lives:
            os.kill(os.getpid(), signal.SIGKILL)
        return model(ids)

    mortal_model = Mortal(mortal)
    make(folder, mortal_model, **options)


class Mortal(Bigram):
    def __init__(self, forward: Any) -> None:
        super().__init__()
        self._forward = forward

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self._forward(ids)
        return result


def make_in_ranks(rank: int, folder: Path, options: Mapping[str, Any] = MappingProxyType({})) -> None:
    told: list[tuple[int, int]] = []
    with process_group("cpu"):
        cache = make(folder, on_progress=lambda *numbers: told.append(numbers), **options)
        assert len(cache) == SEQUENCES
        assert bool(told) == (rank == 0)
        assert told == sorted(told)


def refuse_in_ranks(rank: int, folder: Path) -> None:
    """The second shard is none, which only rank 1 sees."""
    table = Bigram()
    data = sequences()
    with torch.no_grad():
        table.table[int(data[5].input_ids[0])] = torch.nan  # wherever it is
    with process_group("cpu"):
        try:
            make(folder, table)
        except ValueError as error:
            (folder / f"said{rank}").write_text(str(error))


def wait_for(path: Path, patience: float = 120.0) -> bool:
    end = time.monotonic() + patience
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.01)
    return path.exists()
