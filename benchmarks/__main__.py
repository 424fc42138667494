"""``python -m benchmarks [divergence crop gmm alias]``: ratios against peers, printed and written as JSON."""

from __future__ import annotations

import argparse
import importlib
import json
import re
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.harness import machine, measure

PRIMITIVES = ("divergence", "crop", "gmm", "alias")


def main() -> None:
    """Measures the cases of the named primitives."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("primitives", nargs="*", default=PRIMITIVES, metavar="|".join(PRIMITIVES))
    parser.add_argument("--output", type=Path, help="JSON file; default benchmarks/results/<cpu>-<n>-threads.json")
    arguments = parser.parse_args()
    for name in arguments.primitives:
        if name not in PRIMITIVES:
            parser.error(f"{name!r} is not a primitive, choose from {', '.join(PRIMITIVES)}")

    host = machine()
    console = Console()
    table = Table(title=f"{host['cpu']}, {host['threads']} threads, {host['instruction_set']}, torch {host['torch']}")
    for column in ("work", "peer", "fastkd", "peer time", "ratio", "target"):
        table.add_column(column, justify="left" if column in ("work", "peer") else "right")
    rows = []
    with console.status("measuring") as status:
        for name in arguments.primitives:
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
    slug = re.sub(r"[^a-z0-9]+", "-", host["cpu"].lower()).strip("-")
    output = arguments.output or Path(__file__).parent / "results" / f"{slug}-{host['threads']}-threads.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"machine": host, "rows": rows}, indent=1) + "\n")
    console.print(f"written to {output}")


if __name__ == "__main__":
    main()
