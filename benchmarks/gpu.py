"""The GPU side of the benchmarks: cases that are built one at a time, checked, timed, and set against the copy ceiling."""

from __future__ import annotations

import gc
import importlib
import statistics
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Case, EventClock, Run, clock_for, machine, measure
from benchmarks.results_file import ResultsFile

PRIMITIVES = ("alias", "batch", "crop", "gmm", "divergence")  # those with `gpu_cases`; the quick ones first
RESERVE = 20.0  # seconds: what a case may take, its compilation by torch included
SMALLEST = 1 << 30  # bytes of logits or images on each side: far more than any cache holds


@dataclass(frozen=True)
class Settings:
    """What the cases are made for. On the CPU, with few bytes, they test the benchmark itself."""

    device: torch.device
    nbytes: int = SMALLEST
    compile: bool = True
    most_rounds: int = 1000

    def rows(self, row_elements: int, dtype: torch.dtype) -> int:
        """So many rows that a tensor of them holds at least ``nbytes``."""
        return -(-self.nbytes // (row_elements * dtype.itemsize))


class LazyCase(NamedTuple):
    """A case whose inputs are made only when its turn comes."""

    name: str
    build: Callable[[], Case]


@dataclass
class Contenders:
    """fastkd and its peers before they are timed: each must do the work, and do it right."""

    ours: Run
    peers: dict[str, Run]
    error: Callable[[Any], float]  # relative error of what a contender returned
    tolerance: float
    peer_tolerance: float
    missing: dict[str, str] = field(default_factory=dict)

    def case(
        self,
        name: str,
        settings: Settings,
        *,
        targets: dict[str, float] | None = None,
        rounds: int = 15,
        scale: dict[str, float] | None = None,
        floor_bytes: int | None = None,
        latency: bool = False,
    ) -> Case:
        """The case of those that passed; a peer that did not is missing, with the reason. Raises if fastkd did not."""
        errors = {"fastkd": self.error(self.ours())}
        if not errors["fastkd"] <= self.tolerance:
            raise ArithmeticError(f"fastkd is wrong: relative error {errors['fastkd']:.2g}, allowed {self.tolerance:g}")
        able: dict[str, Run] = {}
        for peer, run in self.peers.items():
            try:
                errors[peer] = self.error(run())
            except Exception as problem:
                self.missing[peer] = first_line(problem)
                continue
            if errors[peer] <= self.peer_tolerance:
                able[peer] = run
            else:
                self.missing[peer] = f"its result differs: relative error {errors[peer]:.2g}"
        return Case(
            name,
            self.ours,
            able,
            targets or {},
            min(rounds, settings.most_rounds),
            scale or {},
            clock_for(settings.device, latency=latency),
            floor_bytes,
            self.missing,
            errors,
        )


def first_line(problem: Exception) -> str:
    """What went wrong, for a cell of the table."""
    if isinstance(problem, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return "out of memory"
    return f"{type(problem).__name__}: {problem}".splitlines()[0][:160]


def relative_error(value: Tensor, truth: Tensor) -> float:
    """``|value - truth| / |truth|`` in float64; NaN where the value holds one."""
    value, truth = value.detach().double(), truth.detach().double()
    return float((value - truth).norm() / truth.norm())


def short_name(dtype: torch.dtype) -> str:
    """``bf16`` and the like."""
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.uint8: "uint8"}
    return names[dtype]


def graph_replay(run: Callable[[], Tensor], replays: int) -> Callable[[], Tensor]:
    """``run`` captured as a CUDA graph; each call replays it ``replays`` times in a row and returns the last result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Tensor:
        for _ in range(replays):
            graph.replay()
        return result

    return replay


def gpu_machine(device: torch.device) -> dict[str, Any]:
    """What GPU figures were measured on."""
    properties = torch.cuda.get_device_properties(device)
    return machine() | {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "l2_mb": round(properties.L2_cache_size / 1e6, 1),
        "cuda": torch.version.cuda,
    }


def copy_ceiling(device: torch.device, nbytes: int = SMALLEST, rounds: int = 21) -> float:
    """Bytes read and written in a second by ``copy_`` between two pairs of large buffers that take turns."""
    pairs = [[torch.randint(256, (nbytes,), dtype=torch.uint8, device=device) for _ in range(2)] for _ in range(2)]
    clock = clock_for(device)
    if isinstance(clock, EventClock):  # an idle GPU has low clocks
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            clock.seconds(lambda: pairs[0][0].copy_(pairs[0][1]))
    times = [clock.seconds(lambda pair=pairs[i % 2]: pair[0].copy_(pair[1])) for i in range(rounds)]
    return 2 * nbytes / statistics.median(times)


def case_rows(case: Case, ceiling: float) -> list[dict[str, Any]]:
    """Measured rows with their share of the ceiling, then a row for each peer that is missing."""
    rows = measure(case)
    for row in rows:
        for key, contender in (("fastkd", "fastkd"), ("peer", row["peer"])):
            if contender in case.errors:
                row[f"{key}_relative_error"] = case.errors[contender]
            if case.floor_bytes is not None and f"{key}_ms" in row:
                row[f"{key}_percent_of_ceiling"] = 100 * case.floor_bytes / (row[f"{key}_ms"] * 1e-3) / ceiling
        if case.floor_bytes is not None:
            row["floor_bytes"] = case.floor_bytes
    return rows + [{"case": case.name, "peer": peer, "missing": reason} for peer, reason in case.missing.items()]


def row_line(row: dict[str, Any]) -> str:
    """One line of the table."""
    head = f"{row['case']:46} {row.get('peer') or '':28}"
    for key in ("error", "missing", "not_measured"):
        if key in row:
            return f"{head} {key.replace('_', ' ')}: {row[key]}"
    cells = [f"{row['fastkd_ms']:10.4f}", f"{row['peer_ms']:10.4f}" if "peer_ms" in row else " " * 10]
    cells.append(f"{row['ratio']:7.1f}x" if "ratio" in row else " " * 8)
    for key in ("fastkd", "peer"):
        share = row.get(f"{key}_percent_of_ceiling")
        cells.append(" " * 6 if share is None else f"{share:5.1f}%")
    target = row.get("target")
    return f"{head} {' '.join(cells)}" + (f"  target {target:g}x" if target is not None else "")


HEADER = (
    f"{'work':46} {'peer':28} {'fastkd ms':>10} {'peer ms':>10} {'ratio':>8} {'ours':>6} {'peer':>6}  (% of ceiling)"
)


def measure_all(
    settings: Settings, primitives: Iterable[str], results: ResultsFile, ceiling: float, deadline: float
) -> bool:
    """Prints and writes each row as it comes; False if a case failed. Cases after ``deadline`` (monotonic) are named only."""
    rows: list[dict[str, Any]] = []
    complete = True

    def add(*new: dict[str, Any]) -> None:
        rows.extend(new)
        results.update(rows=rows)
        for row in new:
            print(row_line(row), flush=True)

    print(HEADER)
    for primitive in primitives:
        for name, build in importlib.import_module(f"benchmarks.bench_{primitive}").gpu_cases(settings):
            if time.monotonic() > deadline:
                add({"case": name, "peer": None, "not_measured": "out of time"})
                continue
            try:
                add(*case_rows(build(), ceiling))
            except Exception as problem:
                complete = False
                add({"case": name, "peer": None, "error": first_line(problem)})
                traceback.print_exc(limit=-3)
            gc.collect()
            if settings.device.type == "cuda":
                torch.cuda.empty_cache()
    return complete


def run(device: torch.device, primitives: Iterable[str], results: ResultsFile, seconds: float) -> bool:
    """Measures the primitives on a GPU; False if anything failed."""
    deadline = time.monotonic() + seconds - RESERVE
    host = gpu_machine(device)
    ceiling = copy_ceiling(device)
    results.update(machine=host, ceiling_gb_per_s=round(ceiling / 1e9, 1), rows=[])
    print(f"{host['gpu']}, torch {host['torch']}, copy ceiling {ceiling / 1e12:.2f} TB/s (read and written)")
    return measure_all(Settings(device), primitives, results, ceiling, deadline)
