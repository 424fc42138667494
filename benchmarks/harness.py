"""Side-by-side timing: fastkd and its peers on the same inputs, interleaved, so that a noisy machine hurts all alike."""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

import fastkd

Run = Callable[[], Any]
SHORT = 1.0  # seconds
AHEAD = 2_000_000  # cycles, about a millisecond: the GPU waits so long while Python queues what is timed


class Clock(Protocol):
    """How long one run takes."""

    def seconds(self, run: Run) -> float:
        """One timed call; what it returned is freed outside the clock."""
        ...


class WallClock:
    """The host's clock. Work shorter than ``SHORT`` is timed at its second run in a row, whose caches are its own."""

    def seconds(self, run: Run) -> float:
        """One timed call, or the second of two."""
        elapsed = self._once(run)
        return elapsed if elapsed >= SHORT else self._once(run)

    @staticmethod
    def _once(run: Run) -> float:
        start = time.perf_counter()
        result = run()
        elapsed = time.perf_counter() - start
        del result
        return elapsed


class EventClock:
    """CUDA events around the call, after the L2 cache has been overwritten.

    ``latency=False``: the GPU is kept waiting while Python queues the call, so that what is timed is the GPU's work and
    not the gaps between launches. ``latency=True``: it idles, and the time is that of a call in an eager loop.
    """

    def __init__(self, device: torch.device, *, latency: bool = False) -> None:
        self.device, self.latency = device, latency
        cache: int = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(2 * cache, dtype=torch.uint8, device=device)

    def seconds(self, run: Run) -> float:
        """One timed call."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(self.device):
            self._flush.zero_()
            if self.latency:
                torch.cuda.synchronize()
            else:
                torch.cuda._sleep(AHEAD)
            start.record()
            result = run()
            end.record()
            end.synchronize()
        del result
        return start.elapsed_time(end) * 1e-3


def clock_for(device: torch.device, *, latency: bool = False) -> Clock:
    """The clock of a device."""
    return EventClock(device, latency=latency) if device.type == "cuda" else WallClock()


@dataclass
class Case:
    """One piece of work, done by fastkd and by peers. Each function does all of it once, allocation included."""

    name: str
    ours: Run
    peers: dict[str, Run]
    targets: dict[str, float] = field(default_factory=dict)  # peer -> ratio to hold (design targets)
    rounds: int = 15
    scale: dict[str, float] = field(default_factory=dict)  # peer -> factor, where it does only a part of the work
    clock: Clock = field(default_factory=WallClock)
    floor_bytes: int | None = None  # the fewest bytes that the work must move (benchmarks/floors.py)
    missing: dict[str, str] = field(default_factory=dict)  # peer -> why it is not measured
    errors: dict[str, float] = field(default_factory=dict)  # contender -> relative error of its result


def cpu_name() -> str:
    """The processor as the system names it."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "fastkd": fastkd.build_info()["version"],
        "instruction_set": fastkd.build_info()["cpu_instruction_set"],
        "date": time.strftime("%Y-%m-%d"),
    }


def measure(case: Case) -> list[dict[str, Any]]:
    """Rows of the table: one for each peer, with medians, quartiles and the ratio.

    fastkd takes turns with one peer at a time: what a peer leaves behind (a heap given back to the system, cold caches)
    is charged to nobody else. With no peer there is one row, of fastkd alone.
    """
    rows = []
    for peer, run in case.peers.items() or [(None, None)]:
        contenders = {"fastkd": case.ours} | ({} if peer is None or run is None else {peer: run})
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for contender in contenders.values():
            contender()  # warm-up: compilation, first touch
        gc.collect()
        for _ in range(case.rounds):
            for name, contender in contenders.items():
                times[name].append(case.clock.seconds(contender) * case.scale.get(name, 1.0))
        ours = statistics.median(times["fastkd"])
        row: dict[str, Any] = {
            "case": case.name,
            "peer": peer,
            "fastkd_ms": ours * 1e3,
            "fastkd_quartiles_ms": _quartiles_ms(times["fastkd"]),
        }
        if peer is not None:
            theirs = statistics.median(times[peer])
            row |= {
                "peer_ms": theirs * 1e3,
                "peer_quartiles_ms": _quartiles_ms(times[peer]),
                "ratio": theirs / ours,
                "target": case.targets.get(peer),
            }
        rows.append(row)
    return rows


def _quartiles_ms(times: list[float]) -> list[float]:
    low, _, high = statistics.quantiles(times, n=4)
    return [low * 1e3, high * 1e3]
