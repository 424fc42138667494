"""Independent streams of random numbers out of one seed."""

from __future__ import annotations

import hashlib

import torch

__all__ = ["mixed_generator", "mixed_seed"]


def mixed_seed(purpose: str, *numbers: int) -> int:
    """A seed in [0, 2^63) for this purpose and these numbers (seed, epoch, rank, ...).

    A hash: sums would give (seed 0, epoch 1) and (seed 1, epoch 0) the same numbers, and without the purpose labels would
    be changed by the numbers that order the batches.
    """
    words = "/".join([purpose, *(str(int(number)) for number in numbers)])
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "little") >> 1


def mixed_generator(purpose: str, *numbers: int) -> torch.Generator:
    """A generator on the CPU, where every device gets the same numbers from, of :func:`mixed_seed`."""
    return torch.Generator().manual_seed(mixed_seed(purpose, *numbers))
