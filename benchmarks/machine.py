"""The machine that figures are of: its name, its copy bandwidth, its memory."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

import fastkd
from benchmarks.case import Run
from benchmarks.clock import EventClock, clock_for

PEER_PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "torchvision", "kornia", "liger-kernel", "triton")
COPIED = 1 << 28  # bytes of each of four buffers: more than a cache holds
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # mallopt(3)
_RESET_PEAK = "5"  # proc(5): clear_refs


def cpu_name() -> str:
    """The processor as the system names it."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on, and with which versions."""
    build = fastkd.build_info()
    found: dict[str, Any] = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "instruction_set": build["cpu_instruction_set"],
        "python": platform.python_version(),
        "fastkd": build["version"],
        "date": time.strftime("%Y-%m-%d"),
    }
    for package in PEER_PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "l2_mb": round(properties.L2_cache_size / 1e6, 1),
            "cuda": torch.version.cuda,
        }
    return found


def copy_ceiling(device: torch.device, nbytes: int = COPIED, rounds: int = 9) -> float:
    """Bytes read and written in a second by ``copy_`` between two pairs of large buffers that take turns."""
    pairs = [[torch.ones(nbytes, dtype=torch.uint8, device=device) for _ in range(2)] for _ in range(2)]
    copies: list[Run] = [partial(target.copy_, source) for target, source in pairs]
    clock = clock_for(device)
    if isinstance(clock, EventClock):  # an idle GPU has low clocks
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            clock.seconds(copies[0])
    times = [clock.seconds(copies[i % 2]) for i in range(rounds)]
    return 2 * nbytes / statistics.median(times)


def free_memory(device: torch.device) -> float:
    """Bytes that can be taken without driving anything out."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":") for line in file)
        return 1024.0 * int(fields["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return float("inf")


def peak_memory(run: Run, device: torch.device) -> int | None:
    """Bytes that one run takes at its peak beyond what was there before, its result included.

    On a GPU by torch's allocator. On a CPU by the pages of the whole process, so that the memory of every library
    counts: exact to some hundred kilobytes. None where the system does not tell.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        # heap that was freed but not given back would hide what is taken again
        ctypes.CDLL(None).malloc_trim(0)
        before = _resident_bytes("VmRSS")
        with open("/proc/self/clear_refs", "w") as file:
            file.write(_RESET_PEAK)
    except (OSError, AttributeError):  # not Linux, not glibc, not allowed
        return None
    run()
    return max(_resident_bytes("VmHWM") - before, 0)


@contextmanager
def pages_kept() -> Iterator[None]:
    """Inside the ``with`` block what is freed stays in the process, however large, and is what the next allocation gets.

    Usually glibc gives blocks of 32 MiB and more back at once, and makes each of new pages. Its thresholds, which it moves by
    itself, are afterwards where they end up in a process that frees large blocks.

    Raises:
        RuntimeError: the allocator is not glibc's.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        raise RuntimeError("memory cannot be kept: the allocator is not that of glibc")
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_MAX, 1 << 16)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 64 << 20)
        libc.malloc_trim(0)


def _resident_bytes(field: str) -> int:
    with open(f"/proc/{os.getpid()}/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{field}:"))
