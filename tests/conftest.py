"""Fixtures: the devices and instruction sets that every op test runs on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from fastkd import _C, build_info

_SETS = ["baseline", "avx2", "avx512"]
_BEST = _SETS.index(build_info()["cpu_instruction_set_best"])
_CPU = [
    pytest.param(f"cpu-{name}", marks=[] if i <= _BEST else [pytest.mark.skip(reason=f"this machine has no {name}")])
    for i, name in enumerate(_SETS)
]


@contextmanager
def _kernels_of(backend: str) -> Iterator[torch.device]:
    """Has ``backend``, ``kind`` or ``kind-variant``, answer the operators on tensors of the device that it yields."""
    _, _, variant = backend.partition("-")
    _C.set_instruction_set(variant)
    try:
        yield torch.device("cpu")
    finally:
        _C.set_instruction_set(_SETS[_BEST])


@pytest.fixture(params=_CPU)
def backend(request: pytest.FixtureRequest) -> str:
    """Whose kernels an op test runs: ``cpu-<instruction set>``. Tests ask for ``device``, which puts them in place."""
    return str(request.param)


@pytest.fixture
def device(backend: str) -> Iterator[torch.device]:
    """The devices an op test runs on: the CPU with each instruction set that this machine has.

    Inputs are made on the CPU, by ``generator``, and moved; results are compared to the truth there.
    """
    with _kernels_of(backend) as device:
        yield device


@pytest.fixture
def reads_values(backend: str) -> bool:
    """Whether ``device``'s kernels check the numbers in tensors, too, and raise.

    Elsewhere that would wait for the device: a wrong number makes its row NaN there.
    """
    return backend.startswith("cpu-")


@pytest.fixture(params=_CPU)
def cpu(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The CPU alone, with each instruction set: for tests of its threads."""
    with _kernels_of(request.param) as device:
        yield device


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small tensors in plain torch are ten times faster so where other processes share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded generator for the inputs of a test."""
    return torch.Generator().manual_seed(0)
