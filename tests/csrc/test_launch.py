"""csrc/common/launch.cuh, compiled by g++ against tests/fake_cuda: what it asks of GPUs that are not here."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAKE = ROOT / "tests/fake_cuda"

pytestmark = [
    pytest.mark.no_kernels,
    pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="there is no C++ compiler"),
]

LARGEST_SHARED, NON_PORTABLE_CLUSTER = 8, 13  # cudaFuncAttribute


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Runs launch_test and returns the lines that it prints."""
    program = tmp_path_factory.mktemp("launch") / "launch_test"
    flags = f"-std=c++20 -Wall -Wextra -Werror -pthread -I{FAKE} -I{ROOT / 'csrc'}".split()
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, *flags, str(FAKE / "launch_test.cpp"), "-o", str(program)], check=True)

    def run(*arguments: object) -> list[str]:
        done = subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


@pytest.mark.parametrize(
    ("major", "block_kib", "ptx", "largest_cluster", "expected"),
    [
        (8, 163, 80, 1, 1),
        (8, 99, 86, 1, 1),
        (9, 227, 90, 16, 16),
        (9, 227, 90, 8, 8),  # a part of a GPU
        (9, 227, 90, 1, 1),
        (9, 227, 80, 16, 1),  # code of an older architecture, translated at run time
        (10, 227, 100, 16, 16),
        (12, 99, 100, 8, 8),
    ],
)
def test_limits_of_each_architecture(
    ask: Callable[..., list[str]], major: int, block_kib: int, ptx: int, largest_cluster: int, expected: int
) -> None:
    """The last number is the error that a later call would find: none."""
    assert ask("limits", major, 132, block_kib, ptx, largest_cluster) == [f"{expected} 132 {block_kib} 0"]


def test_limits_are_kept_for_each_device(ask: Callable[..., list[str]]) -> None:
    assert ask("many") == ["75", "11", "75", "11", "74", "10"]


def test_a_kernel_is_allowed_more_once_for_each_device(ask: Callable[..., list[str]]) -> None:
    assert ask("launches") == [
        "launched, asked",  # little shared memory, no cluster
        f"launched, asked 0:{NON_PORTABLE_CLUSTER} 0:{LARGEST_SHARED}",
        "launched, asked",  # the same again
        "launched, asked",  # less
        f"launched, asked 0:{LARGEST_SHARED}",  # another kernel
        f"launched, asked 1:{LARGEST_SHARED}",  # another device
        "launched, asked",
        f"fastkd: launch of name failed: error 1, asked 1:{NON_PORTABLE_CLUSTER}",  # more than that device has
        "launched, asked",  # which leaves no error behind
        "fastkd: launch of name failed: error 9, asked",  # no blocks
        "launched, asked",
    ]


def test_threads_share_what_is_allowed(ask: Callable[..., list[str]]) -> None:
    assert ask("threads") == ["8 2"]  # launches, and what was asked for them


@pytest.mark.parametrize(("major", "minor", "device"), [(8, 6, 0), (9, 0, 1), (12, 0, 63)])
def test_a_gpu_is_asked_once_whether_there_is_code_for_it(
    ask: Callable[..., list[str]], major: int, minor: int, device: int
) -> None:
    assert ask("code", major, minor, 1, device) == ["launched, questions 2"] * 2


@pytest.mark.parametrize(("capability", "device"), [("7.5", 0), ("7.0", 64), ("6.1", 100)])
def test_no_launch_where_there_is_no_code(ask: Callable[..., list[str]], capability: str, device: int) -> None:
    for line in ask("code", *capability.split("."), 1, device):
        assert line.startswith("fastkd: the CUDA kernels of this fastkd were built for 8.0 9.0a 10.0+PTX, ")
        assert f"which GPU {device}, of compute capability {capability}, does not run" in line
        assert f"TORCH_CUDA_ARCH_LIST={capability} pip install" in line
        assert line.endswith(", launches 0")


def test_code_that_fits_by_its_number_only(ask: Callable[..., list[str]]) -> None:
    """As of a Jetson, which does not run that of other GPUs: the runtime says so at the launch."""
    for line in ask("code", 8, 7, 0, 5):
        assert "which GPU 5, of compute capability 8.7, does not run" in line
