"""Draws from torch's global CPU generator that are of a seed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["seeded"]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside the ``with`` block torch's global CPU generator begins at the seed; afterwards it is as before.

    The GPUs' generators stay as they are, which ``torch.manual_seed`` would reseed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
