"""Seeds: what counts as one, streams of random numbers out of one, and torch's global CPU generator, which threads share."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastkd._checks import check_count
from fastkd._locks import Lock

__all__ = ["check_generator", "draw_seed", "drawing", "mixed_generator", "mixed_seed", "seed_of", "seeded"]


def seed_of(value: Any, name: str = "seed") -> int:
    """Any whole number modulo 2^64, as torch.Generator takes it, in int64; a TypeError for anything else."""
    return (check_count(name, value) + 2**63) % 2**64 - 2**63


def check_generator(generator: torch.Generator | None) -> None:
    """Raises a TypeError for what is neither None nor a generator of torch."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"fastkd: generator is {type(generator).__name__}, must be a torch.Generator or None")


_one_at_a_time = Lock()


def _one_of_its_own() -> None:
    """In a child that was forked inside the ``with`` block, which it may never leave: its other threads draw, too."""
    global _one_at_a_time
    _one_at_a_time = Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_one_of_its_own)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside the ``with`` block torch's global CPU generator begins at the seed; afterwards it is as before.

    The GPUs' generators stay as they are, which ``torch.manual_seed`` would reseed. One thread at a time: the generator is
    the process's. The others' draws by :func:`draw_seed` and inside :func:`drawing` wait, or they would come once more when
    its state is put back. What else draws from it in another thread is not kept out, so the block is for what is short
    and takes no other lock: the weights of a network.
    """
    with _one_at_a_time, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(seed))
        yield


def drawing(device: torch.device, generator: torch.Generator | None = None) -> AbstractContextManager[None]:
    """Inside the ``with`` block no other thread has the global CPU generator :func:`seeded`, if that is what is drawn from.

    Nothing else may be waited for there, and it must not be entered by who holds a lock. A traced program holds none.
    """
    if device.type != "cpu" or torch.compiler.is_compiling():
        return nullcontext()
    return nullcontext() if generator is not None and generator is not torch.default_generator else _one_at_a_time


def draw_seed(least: int, below: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """int64 ``[1]``, by one step of the generator, or the default one of the device: threads get seeds of their own."""
    with drawing(device, generator):
        return torch.randint(least, below, (1,), dtype=torch.int64, device=device, generator=generator)


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
