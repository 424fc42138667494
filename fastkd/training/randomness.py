"""The states of all global random number generators, as plain types."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fastkd._seeding import mixed_seed

__all__ = ["capture", "everything_seeded", "restore"]


def capture() -> dict[str, Any]:
    """The states of torch (CPU and all CUDA devices), numpy and Python: tensors, numbers and strings only."""
    name, keys, *position = np.random.get_state(legacy=True)  # noqa: NPY002  users' transforms draw from it
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": [str(name), [int(key) for key in keys], *position],
        "python": random.getstate(),
    }


def restore(state: dict[str, Any]) -> None:
    """Puts back what :func:`capture` returned; of the CUDA devices, those that are there."""
    torch.set_rng_state(state["torch"])
    for i, one in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(one, i)
    name, keys, *position = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *position))  # noqa: NPY002
    random.setstate(state["python"])


@contextmanager
def everything_seeded(seed: int, rank: int) -> Iterator[None]:
    """Seeds them all inside the ``with`` block; afterwards they are as they were."""
    before = capture()
    seed = mixed_seed("training", seed, rank)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)
    try:
        yield
    finally:
        restore(before)
