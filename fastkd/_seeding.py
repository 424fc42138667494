"""Seeds: what counts as one, streams of random numbers out of one, and torch's global CPU generator at one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastkd._checks import check_count
from fastkd._locks import Lock

__all__ = ["check_generator", "mixed_generator", "mixed_seed", "seed_of", "seeded"]


def seed_of(value: Any, name: str = "seed") -> int:
    """Any whole number modulo 2^64, as torch.Generator takes it, in int64; a TypeError for anything else."""
    return (check_count(name, value) + 2**63) % 2**64 - 2**63


def check_generator(generator: torch.Generator | None) -> None:
    """Raises a TypeError for what is neither None nor a generator of torch."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"fastkd: generator is {type(generator).__name__}, must be a torch.Generator or None")


_one_at_a_time = Lock()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside the ``with`` block torch's global CPU generator begins at the seed; afterwards it is as before.

    The GPUs' generators stay as they are, which ``torch.manual_seed`` would reseed. One thread at a time: the generator is
    the process's.
    """
    with _one_at_a_time, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(seed))
        yield


def mixed_seed(purpose: str, *numbers: int) -> int:
    """A seed in [0, 2^63) for this purpose and these numbers: a seed, then epoch, rank, ...

    A hash: sums would give (seed 0, epoch 1) and (seed 1, epoch 0) the same numbers, and without the purpose labels would
    be changed by the numbers that order the batches.
    """
    words = [
        purpose,
        *(str(check_count("number of a stream" if i else "seed", number)) for i, number in enumerate(numbers)),
    ]
    return int.from_bytes(hashlib.blake2b("/".join(words).encode(), digest_size=8).digest(), "little") >> 1


def mixed_generator(purpose: str, *numbers: int) -> torch.Generator:
    """A generator on the CPU, where every device gets the same numbers from, of :func:`mixed_seed`."""
    return torch.Generator("cpu").manual_seed(mixed_seed(purpose, *numbers))
