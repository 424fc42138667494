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
SHORT = 1.0  # seconds


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
    """Rows of the table: one for each peer, with medians, quartiles and the ratio.

    fastkd takes turns with one peer at a time: what a peer leaves behind (a heap given back to the system, cold caches)
    is charged to nobody else. Work shorter than ``SHORT`` is timed at its second run in a row, for the same reason.
    """
    rows = []
    for peer, run in case.peers.items():
        times: dict[str, list[float]] = {"fastkd": [], peer: []}
        for contender in (case.ours, run):
            contender()  # warm-up: compilation, first touch
        gc.collect()
        for _ in range(case.rounds):
            for name, contender in (("fastkd", case.ours), (peer, run)):
                elapsed = seconds(contender)
                if elapsed < SHORT:
                    elapsed = seconds(contender)
                times[name].append(elapsed * case.scale.get(name, 1.0))
        ours, theirs = (statistics.median(times[name]) for name in ("fastkd", peer))
        rows.append(
            {
                "case": case.name,
                "peer": peer,
                "fastkd_ms": ours * 1e3,
                "fastkd_quartiles_ms": _quartiles_ms(times["fastkd"]),
                "peer_ms": theirs * 1e3,
                "peer_quartiles_ms": _quartiles_ms(times[peer]),
                "ratio": theirs / ours,
                "target": case.targets.get(peer),
            }
        )
    return rows


def _quartiles_ms(times: list[float]) -> list[float]:
    low, _, high = statistics.quantiles(times, n=4)
    return [low * 1e3, high * 1e3]
