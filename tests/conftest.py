"""Fixtures: the devices and instruction sets that every op test runs on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastkd import _C, build_info

_SETS = ["baseline", "avx2", "avx512"]
_BEST = _SETS.index(build_info()["cpu_instruction_set_best"])


@pytest.fixture(
    params=[
        *(
            pytest.param(
                f"cpu-{name}", marks=[] if i <= _BEST else [pytest.mark.skip(reason=f"this machine has no {name}")]
            )
            for i, name in enumerate(_SETS)
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The devices an op test runs on: the CPU with each instruction set that this machine has."""
    _C.set_instruction_set(request.param.removeprefix("cpu-"))
    yield torch.device("cpu")
    _C.set_instruction_set(_SETS[_BEST])


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
