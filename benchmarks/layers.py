"""Where the microseconds of a small call go: ``python -m benchmarks.layers``, KL of 128 x 10 on one thread of a CPU.

Each call does what the one above it does and a layer more, so that the difference of their medians is that layer's. Written
to ``results/<machine>-layers.json``.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastkd
from benchmarks.bench_divergence import eager_kl, gradient_step
from benchmarks.case import Run
from benchmarks.clock import WallClock
from benchmarks.machine import machine
from benchmarks.measure import Budget, take_turns
from benchmarks.results_file import RESULTS, ResultsFile, name_of
from fastkd.ops import divergence as ops

ROWS, CLASSES, TEMPERATURE = 128, 10, 4.0


class Nothing(torch.autograd.Function):
    """What any function with a formula in Python costs."""

    @staticmethod
    def forward(ctx: Any, student: Tensor) -> Tensor:
        return student.new_empty(())

    @staticmethod
    def backward(ctx: Any, _gradient: Tensor) -> None:
        return None


def calls() -> dict[str, tuple[Run, str]]:
    """Each call, and the layer that it adds to the one before; two more to compare with."""
    student, teacher = torch.randn(ROWS, CLASSES, requires_grad=True), torch.randn(ROWS, CLASSES)
    operator = torch.ops.fastkd.divergence.default
    kind, reduction = ops.KINDS["forward"], ops.REDUCTIONS["batchmean"]
    rest = (None, None, None, TEMPERATURE, kind, 0.5, 1.0, 0.0, -100, reduction, True, False)
    criterion = fastkd.KLDivLoss(TEMPERATURE)

    def below_autograd(s: Tensor, t: Tensor) -> Callable[[], Any]:
        def call() -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return operator(s, t, *rest)

        return call

    def nothing() -> None:
        Nothing.apply(student).backward()

    return {
        "the operator, no rows": (below_autograd(student[:0], teacher[:0]), "dispatcher, boxing, checks, outputs"),
        "the operator": (below_autograd(student, teacher), "kernel"),
        "the operator with autograd": (lambda: operator(student, teacher, *rest), "autograd's node"),
        "fastkd.functional.kl_div": (
            lambda: fastkd.functional.kl_div(student, teacher, TEMPERATURE),
            "checks that name arguments",
        ),
        "fastkd.KLDivLoss": (lambda: criterion(student, teacher), "nn.Module"),
        "…and backward": (lambda: gradient_step(criterion, student, teacher), "autograd's engine, backward formula"),
        "an empty autograd.Function and backward": (nothing, ""),
        "torch eager and backward": (
            lambda: gradient_step(lambda s, t: eager_kl(s, t, TEMPERATURE), student, teacher),
            "",
        ),
    }


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(prog="benchmarks.layers", description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each call (default %(default)g)")
    parser.add_argument("--output", type=Path, help="JSON file; default benchmarks/results/<machine>-layers.json")
    options = parser.parse_args()
    found = machine(torch.device("cpu"))
    torch.set_num_threads(1)
    every = calls()
    times: dict[str, list[float]] = {name: [] for name in every}
    runs = {name: run for name, (run, _) in every.items()}
    take_turns(runs, WallClock(), Budget(options.seconds, most=4001), lambda name, t: times[name].append(t))
    before, rows = 0.0, []
    print(f"{found['cpu']}, torch {found['torch']}: KL {ROWS}x{CLASSES}, medians in us\n")
    for name, (_, layer) in every.items():
        median = statistics.median(times[name]) * 1e6
        rows.append({"call": name, "us": round(median, 1), "layer": layer, "layer_us": round(median - before, 1)})
        print(f"{name:42} {median:7.1f}" + (f"  {median - before:+7.1f}  {layer}" if layer else ""))
        before = median
    output = ResultsFile(options.output or RESULTS / f"{name_of(found)}-layers.json")
    output.clear()
    output.update(machine=found, rows=rows)
    print(f"\nwritten to {output.path}")


if __name__ == "__main__":
    main()
