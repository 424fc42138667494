"""``python -m benchmarks [divergence crop gmm alias batch]``: ratios against peers, printed and written as JSON.

With ``--device cuda`` (divergence, crop and batch): event timings, and the share of the measured copy bandwidth.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

import torch

from benchmarks import gpu
from benchmarks.harness import machine, measure
from benchmarks.results_file import RESULTS, ResultsFile, slug

PRIMITIVES = ("divergence", "crop", "gmm", "alias", "batch")


def main() -> None:
    """Measures the cases of the named primitives."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("primitives", nargs="*", metavar="|".join(PRIMITIVES))
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:<n>")
    parser.add_argument("--seconds", type=float, default=600.0, help="on a GPU: the time for all cases")
    parser.add_argument("--output", type=Path, help="JSON file; default benchmarks/results/<processor>.json")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    known = gpu.PRIMITIVES if device.type == "cuda" else PRIMITIVES
    for name in arguments.primitives:
        if name not in known:
            parser.error(f"{name!r} has no benchmark on {device.type}, choose from {', '.join(known)}")
    primitives = arguments.primitives or known
    if device.type == "cuda":
        if not torch.cuda.is_available():
            parser.error("torch finds no GPU here")
        output = arguments.output or RESULTS / f"{slug(torch.cuda.get_device_name(device))}.json"
        complete = gpu.run(device, primitives, ResultsFile(output), arguments.seconds)
        print(f"written to {output}")
        sys.exit(not complete)
    _measure_cpu(primitives, arguments.output)


def _measure_cpu(primitives: tuple[str, ...], output: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table

    host = machine()
    console = Console()
    table = Table(title=f"{host['cpu']}, {host['threads']} threads, {host['instruction_set']}, torch {host['torch']}")
    for column in ("work", "peer", "fastkd", "peer time", "ratio", "target"):
        table.add_column(column, justify="left" if column in ("work", "peer") else "right")
    rows = []
    with console.status("measuring") as status:
        for name in primitives:
            for case in importlib.import_module(f"benchmarks.bench_{name}").cases():
                status.update(f"measuring {case.name}")
                for row in measure(case):
                    rows.append(row)
                    target = row["target"]
                    colour = "" if target is None else "[green]" if row["ratio"] >= target else "[red]"
                    times = [f"{row[key]:,.3f} ms" for key in ("fastkd_ms", "peer_ms")]
                    wanted = "" if target is None else f">= {target:g}x"
                    table.add_row(row["case"], row["peer"], *times, f"{colour}{row['ratio']:.1f}x", wanted)
    console.print(table)
    output = output or RESULTS / f"{slug(host['cpu'])}-{host['threads']}-threads.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"machine": host, "rows": rows}, indent=1) + "\n")
    console.print(f"written to {output}")


if __name__ == "__main__":
    main()
