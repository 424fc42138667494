"""Side-by-side timing: fastkd and its peers on the same inputs, interleaved, so that a noisy machine hurts all alike."""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

import fastkd

Run = Callable[[], Any]


@dataclass
class Case:
    """One piece of work, done by fastkd and by peers. Each function does all of it once, allocation included."""

    name: str
    ours: Run
    peers: dict[str, Run]
    targets: dict[str, float] = field(default_factory=dict)  # peer -> ratio to hold (design targets)
    rounds: int = 15
    scale: dict[str, float] = field(default_factory=dict)  # peer -> factor, where it does only a part of the work


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


def seconds(run: Run) -> float:
    """One timed call; what it returned is freed outside the clock."""
    start = time.perf_counter()
    result = run()
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def measure(case: Case) -> list[dict[str, Any]]:
    """Rows of the table: one for each peer, with medians, quartiles and the ratio."""
    runs = {"fastkd": case.ours, **case.peers}
    for run in runs.values():
        run()  # warm-up: compilation, first touch
    gc.collect()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(case.rounds):
        for name, run in runs.items():
            times[name].append(seconds(run) * case.scale.get(name, 1.0))
    ours = statistics.median(times["fastkd"])
    rows = []
    for peer in case.peers:
        theirs = statistics.median(times[peer])
        low, _, high = statistics.quantiles(times[peer], n=4)
        rows.append(
            {
                "case": case.name,
                "peer": peer,
                "fastkd_ms": ours * 1e3,
                "peer_ms": theirs * 1e3,
                "peer_quartiles_ms": [low * 1e3, high * 1e3],
                "ratio": theirs / ours,
                "target": case.targets.get(peer),
            }
        )
    return rows
