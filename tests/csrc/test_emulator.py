"""The emulator of CUDA kernels notices what CUDA leaves undefined: each kernel of tests/emulated/self_test.cu breaks a rule."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import emulated
import pytest
import torch

FLAWS = [
    "none",
    "no_barrier",
    "no_barrier_before",
    "shared_bounds",
    "global_bounds",
    "uninitialised",
    "divergent_shuffle",
    "other_shuffle",
    "early_exit",
    "misaligned",
    "early_remote_store",
    "no_cluster_barrier",
    "atomic_then_load",
    "load_then_atomic",
    "relaxed_barrier",
    "leaves_early",
]
SCHEDULES = range(5)


def reverse(flaw: str, threads: int = 64, cluster: int = 1, blocks: int = 4, seed: int = 0) -> torch.Tensor:
    with emulated.emulated(seed):
        data = torch.arange(threads * blocks, dtype=torch.int32)
        torch.ops.fastkd_emulated.self_test_reverse(data, FLAWS.index(flaw), threads, cluster)
        return data


@pytest.mark.parametrize("seed", SCHEDULES)
@pytest.mark.parametrize("threads", [32, 64])
@pytest.mark.parametrize("cluster", [1, 2, 4])
def test_right_kernels_run(threads: int, cluster: int, seed: int) -> None:
    data = torch.arange(threads * 8, dtype=torch.int32).reshape(-1, threads * cluster)
    assert torch.equal(reverse("none", threads, cluster, 8, seed), data.flip(1).reshape(-1))


@pytest.mark.parametrize("seed", SCHEDULES)
@pytest.mark.parametrize(
    ("flaw", "cluster", "message"),
    [
        ("no_barrier", 1, "nobody has written|read without a barrier after another thread's store"),
        ("no_barrier_before", 1, "written without a barrier after another thread's load|after another thread's store"),
        ("shared_bounds", 1, "element 64 of an array of 64 in shared memory"),
        ("uninitialised", 1, "nobody has written"),
        ("divergent_shuffle", 1, "wait for others that never come: .* waits at a shuffle"),
        ("other_shuffle", 1, "diverge: .* at a shuffle .*, another one at a shuffle"),
        ("early_exit", 1, "wait for others that never come: .* waits at a block barrier"),
        ("misaligned", 1, "not a multiple of 16"),
        ("early_remote_store", 2, "before a cluster barrier: it may not have started"),
        ("atomic_then_load", 1, "a race: (shared memory is read|an atomic operation) without a barrier after another"),
        ("load_then_atomic", 1, "a race: (shared memory is read|an atomic operation) without a barrier after another"),
        ("no_cluster_barrier", 2, "nobody has written|without a barrier after another thread's store"),
        ("relaxed_barrier", 2, "read without a barrier after another thread's store"),
        ("leaves_early", 2, "whose threads have ended|no cluster barrier after another block's store"),
    ],
)
def test_broken_kernels_are_noticed(flaw: str, cluster: int, message: str, seed: int) -> None:
    with pytest.raises(RuntimeError, match=f"emulated launch of reverse: .*({message})"):
        reverse(flaw, cluster=cluster, seed=seed)
    reverse("none")  # the emulator is as good as before


@pytest.mark.skipif(not emulated.SANITIZED, reason="needs AddressSanitizer: runs in `make sanitize`")
def test_global_memory_is_watched() -> None:
    here = Path(__file__).parent
    code = f"""
import sys
sys.path[:0] = [{str(here)!r}, {str(here.parent)!r}]
import test_emulator
test_emulator.reverse('global_bounds')
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "reverse_kernel" in done.stderr


@pytest.mark.parametrize(
    ("threads", "cluster", "message"),
    [(33, 1, "whole warps"), (2048, 1, "to 1024"), (64, 3, "power of two"), (64, 32, "no clusters of this size")],
)
def test_impossible_launches_are_refused(threads: int, cluster: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"emulated launch of reverse: .*{message}"):
        reverse("none", threads, cluster, 96)


def test_schedules_differ_and_repeat() -> None:
    """A missing barrier is found at another thread in another schedule, at the same one in the same."""

    def message(seed: int) -> str:
        with pytest.raises(RuntimeError) as error:
            reverse("no_barrier", seed=seed)
        return str(error.value)

    messages = [message(seed) for seed in range(8)]
    assert len(set(messages)) > 2
    assert messages == [message(seed) for seed in range(8)]
