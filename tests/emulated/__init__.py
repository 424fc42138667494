"""CUDA kernels on the host: builds and loads them, and puts them in the place of the CPU kernels."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CSRC = Path(os.environ.get("FASTKD_EMULATED_CSRC", ROOT / "csrc"))  # without_barriers.py changes a copy
SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")
_definitions = torch.library.Library("fastkd_emulated", "FRAGMENT")
_running: list[int] = []  # seeds
SANITIZER = "-fsanitize=address,undefined -fno-sanitize-recover=undefined" if SANITIZED else ""


def build() -> Path:
    """Compiles ``csrc/*/cuda*.cu`` with g++ against the emulator, what changed only, and returns the library's path."""
    folder = ROOT / "build" / ("emulated-sanitized" if SANITIZED else "emulated")
    if ROOT / "csrc" != CSRC:
        folder = CSRC / "build"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # of several test processes, one compiles
        fcntl.flock(lock, fcntl.LOCK_EX)
        _compile(folder, folder / "_emulated.so")
    return folder / "_emulated.so"


def _compile(folder: Path, library: Path) -> None:
    import ninja as ninja_package
    from ninja.ninja_syntax import Writer

    torch_folder = Path(torch.__file__).parent
    compiler = os.environ.get("CXX", "g++")
    # the emulator's common/device.cuh and common/launch.cuh come before those of csrc; rounding as on a GPU: no contraction
    flags = (
        f"-std=c++20 -O1 -g1 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra -Wno-unknown-pragmas -I{HERE} "
        f"-I{CSRC} -isystem {torch_folder}/include -DTORCH_TARGET_VERSION=0x020a000000000000 {SANITIZER}"
    )
    sources = [*sorted(CSRC.glob("*/cuda*.cu")), *sorted(HERE.glob("*.cpp")), *sorted(HERE.glob("*.cu"))]
    with open(folder / "build.ninja", "w") as file:
        ninja = Writer(file, width=1000)
        ninja.rule("cxx", f"{compiler} -MMD -MF $out.d {flags} -x c++ -c $in -o $out", depfile="$out.d", deps="gcc")
        ninja.rule("link", f"{compiler} {SANITIZER} -shared -o $out $in -L{torch_folder}/lib -ltorch -ltorch_cpu")
        objects = [ninja.build(f"{source.parent.name}-{source.name}.o", "cxx", str(source))[0] for source in sources]
        ninja.build(str(library), "link", objects)
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    beside = f"{ninja_package.BIN_DIR}:{Path(ninja_package.__file__).parents[1]}/bin"
    program = shutil.which("ninja", path=beside) or "ninja"
    done = subprocess.run([program, "-C", str(folder)], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the emulated kernels do not compile:\n{done.stdout[-8000:]}{done.stderr[-2000:]}")


@cache
def load() -> list[str]:
    """Registers ``torch.ops.fastkd_emulated`` and returns the names of the operators that it has.

    Skips the test with FASTKD_EMULATED=0: they are compiled from the sources, not in a wheel.
    """
    if os.environ.get("FASTKD_EMULATED") == "0":
        pytest.skip("FASTKD_EMULATED=0 leaves out the emulated launches", allow_module_level=True)
    torch.ops.load_library(str(build()))
    prefix = "fastkd_emulated::"
    kernels = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    names = sorted(name.removeprefix(prefix) for name in kernels if name.startswith(prefix))
    names = [name for name in names if hasattr(torch.ops.fastkd, name)]
    for name in names:
        _definitions.define(str(getattr(torch.ops.fastkd, name).default._schema).removeprefix("fastkd::"))
    return names


@contextmanager
def tuned(settings: str) -> Iterator[None]:
    """Emulated launches with other numbers than the usual ones, as FASTKD_TUNING has them."""
    load()
    torch.ops.fastkd_emulated.tune(settings)
    try:
        yield
    finally:
        torch.ops.fastkd_emulated.tune("")


@contextmanager
def emulated(seed: int, max_cluster: int = 16) -> Iterator[None]:
    """CPU tensors go to the emulated CUDA kernels, run in the schedule of that seed."""
    names = load()
    torch.ops.fastkd_emulated.configure(seed, max_cluster)
    override = torch.library.Library("fastkd", "IMPL", "CPU")
    _running.append(seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an overridden kernel: that is the point
            for name in names:
                override.impl(name, getattr(torch.ops.fastkd_emulated, name).default, allow_override=True)
        yield
    finally:
        _running.pop()
        override._destroy()


def running() -> bool:
    """Whether CPU tensors go to the emulated kernels."""
    return bool(_running)
