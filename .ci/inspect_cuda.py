#!/usr/bin/env python3
"""Reads what nvcc made of the CUDA kernels, and fails where it is not what we promise.

Registers, shared memory, stack frames and spills come from ptxas's reports (build/objects/**/*.ptxas), loads and stores
from the disassembly of fastkd/_cuda*.so. For each kernel on each architecture it fails on

- a stack frame, a spill, an access to local memory;
- a load that need not see what the kernel itself stores (ld.global.nc): some kernels work in place;
- no machine code for an architecture of --architectures;
- a broken promise. A promise is a comment beside the kernel, in csrc/<primitive>/*.cu or *.cuh:

      // inspect: streaming scale_kernel<float,*> loads=128 stores=128

  Kernels of this primitive whose name matches load from and store to global memory at least 128 bits at once, inside a
  loop; `anywhere` asks for no loop. The pattern is a shell pattern on the name in the table, without the namespace.
  Promises add up; one that matches no kernel is an error; kernels without one are listed as not inspected.
- hot paths (hot_paths.py) whose instructions or registers are not those of benchmarks/machine_code.md, within 5 %;
  --write-table writes it anew (make machine-code).

cuobjdump and nvdisasm are looked for beside Python (extra `dev`), in $CUDA_HOME/bin and on PATH.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from hot_paths import HOT_PATHS
from machine_code import ARCHITECTURE, analyse, changes, table
from sass import Instruction, Key, disassemble, name_matches, parse_sass, short_names, successors

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path("benchmarks/machine_code.md")


class Resources(NamedTuple):
    folder: str  # the primitive
    registers: int
    shared: int  # bytes, as the rest
    stack: int
    spills: int


class Rule(NamedTuple):
    where: str
    folder: str
    place: str  # "streaming" or "anywhere"
    pattern: str
    kind: str  # "loads" or "stores"
    bits: int

    def matches(self, name: str, folder: str) -> bool:
        return self.folder in (folder, "common") and name_matches(name, self.pattern)


def parse_report(text: str, folder: str) -> dict[Key, Resources]:
    """A .ptxas file. Functions that were not inlined are reported after their kernel, and counted as its own."""
    result = {}
    for part in text.split("Compiling entry function ")[1:]:
        name, architecture = re.findall(r"'(\S+)'", part.splitlines()[0])
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        if not frames or not registers:
            sys.exit(f"error: ptxas says nothing that we understand about {name} on {architecture}:\n{part}")
        stack, stored, loaded = (sum(map(int, column)) for column in zip(*frames, strict=True))
        shared = sum(map(int, re.findall(r"(\d+) bytes smem", part)))
        result[name, architecture] = Resources(folder, int(registers[1]), shared, stack, stored + loaded)
    return result


def parse_rules(path: Path) -> Iterator[Rule]:
    folder = path.parent.name
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if comment := re.search(r"//\s*inspect:(.*)", line):
            match = re.fullmatch(r"\s*(streaming|anywhere) (\S+)((?: (?:loads|stores)=\d+)+)\s*", comment[1])
            if not match:
                sys.exit(f"error: {path}:{number}: must be '// inspect: streaming|anywhere PATTERN loads=N stores=N'")
            for kind, bits in re.findall(r"(\w+)=(\d+)", match[3]):
                yield Rule(f"{folder}/{path.name}:{number}", folder, match[1], match[2], kind, int(bits))


def in_loop(code: list[Instruction], start: int) -> bool:
    """Whether the control flow leads from code[start] back to it. What a loop calls counts as outside it."""
    following = successors(code)
    seen: set[int] = set()
    todo = [start]
    while todo:
        after = following[todo.pop()] - seen
        seen |= after
        todo += after
    return start in seen


def broken(code: list[Instruction], report: Resources | None, rules: list[Rule]) -> Iterator[str]:
    """What is wrong with one kernel image."""
    if not report:
        yield "has no report of ptxas: the library is of another build than build/"
    elif report.stack or report.spills:
        yield f"has a stack frame of {report.stack} bytes and spills {report.spills} bytes"
    elif local := sum(instruction.kind == "local" for instruction in code):
        yield f"accesses local memory {local} times"
    if blind := sum("CONSTANT" in instruction.opcode.split(".") for instruction in code if instruction.kind == "loads"):
        yield f"has {blind} loads that need not see its own stores"
    for rule in rules:
        wide = [i for i, step in enumerate(code) if step.kind == rule.kind and step.bits >= rule.bits]
        if not any(rule.place == "anywhere" or in_loop(code, i) for i in wide):
            place = "at all" if rule.place == "anywhere" else f"in a loop, {len(wide)} outside"
            yield f"breaks the promise at {rule.where}: no {rule.kind} of {rule.bits} bits {place}"


def inspect(
    resources: dict[Key, Resources], sass: dict[Key, list[Instruction]], rules: list[Rule], architectures: list[str]
) -> list[str]:
    """Prints the table, returns what is wrong."""
    errors, used, uninspected = [], set(), set()
    table: dict[tuple[str, ...], list[str]] = {}  # architectures of which there is the same to say share a line
    folders = {mangled: report.folder for (mangled, _), report in resources.items()}
    for mangled, name in sorted(short_names(m for m, _ in [*resources, *sass]).items(), key=lambda item: item[1]):
        images = {architecture: code for (other, architecture), code in sass.items() if other == mangled}
        errors += [f"{name} has no machine code for {a}" for a in architectures if a not in images]
        promises = [rule for rule in rules if rule.matches(name, folders.get(mangled, ""))]
        used |= {rule.where for rule in promises}
        uninspected |= set() if promises else {name}
        for architecture, code in images.items():
            report = resources.get((mangled, architecture))
            errors += [f"{name} on {architecture} {text}" for text in broken(code, report, promises)]
            row = [name, *([str(report.registers), str(report.shared)] if report else "??")]
            for kind in ("loads", "stores"):
                widths = Counter(instruction.bits for instruction in code if instruction.kind == kind)
                row.append(" ".join(f"{n}x{bits}" for bits, n in sorted(widths.items(), reverse=True)))
            opcodes = Counter(instruction.opcode.split(".")[0] for instruction in code)
            row += [str(n) for n in (opcodes["LDL"] + opcodes["STL"], opcodes["LDGSTS"], opcodes["MUFU"])]
            table.setdefault(tuple(row), []).append(architecture.removeprefix("sm_"))
    head = ("kernel", "registers", "shared", "loads", "stores", "local", "async", "mufu", "architectures")
    lines = [head, *((*row, " ".join(where)) for row, where in table.items())]
    widest = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widest, strict=True)).rstrip())
    print("not inspected for loads and stores:", ", ".join(sorted(uninspected)) or "none")
    unused = {rule.where: rule.pattern for rule in rules if rule.where not in used}
    return errors + [f"{where}: no kernel matches {pattern}" for where, pattern in unused.items()]


def hot_paths(
    resources: dict[Key, Resources], sass: dict[Key, list[Instruction]], release: str, write: bool
) -> list[str]:
    """Compares the hot paths with the committed table, or writes it."""
    mangled = {key[0] for key in sass if key[1] == ARCHITECTURE}
    names = {(key, ARCHITECTURE): name for key, name in short_names(mangled).items()}
    if not names:
        print(f"hot paths: not counted, nothing was built for {ARCHITECTURE}")
        return []
    rows, errors = [], []
    for path in HOT_PATHS:
        found = next((key for key, name in names.items() if path.matches(name) and key in resources), None)
        row = analyse(path, sass[found], resources[found].registers, resources[found].shared) if found else None
        if row:
            rows.append(row)
        else:
            missing = "way like this in" if found else "kernel matches"
            errors.append(f"hot_paths.py: {path.title}: no {missing} {path.kernel}")
    if errors:
        return errors
    if write:
        (ROOT / TABLE).write_text(table(rows, release))
        print(f"written: {TABLE}")
    return changes((ROOT / TABLE).read_text(), rows, release)


def nvcc_release(nvcc: str) -> str:
    """13.0, say."""
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\S+),", answer)
    return release[1] if release else "?"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    built_for = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace("+PTX", "").replace(";", " ").split()
    parser.add_argument(
        "--architectures",
        nargs="+",
        default=built_for or ["8.0", "9.0a", "10.0"],
        help="default: those of TORCH_CUDA_ARCH_LIST, or %(default)s",
    )
    parser.add_argument("--write-table", action="store_true", help=f"write {TABLE}")
    options = parser.parse_args(arguments)
    nvcc = shutil.which("nvcc", path=os.environ.get("CUDA_HOME", "") + "/bin") or shutil.which("nvcc")
    if not nvcc or os.environ.get("FASTKD_CUDA") == "0":  # as setup.py decides
        print("skipped:", "FASTKD_CUDA=0" if nvcc else "no nvcc on PATH or in $CUDA_HOME/bin")
        return 0
    resources: dict[Key, Resources] = {}
    for report in ROOT.glob("build/objects/**/*.ptxas"):
        resources.update(parse_report(report.read_text(), report.parent.name))
    libraries = list(ROOT.glob("fastkd/_cuda*.so"))
    if not resources or not libraries:
        sys.exit(
            "error: nvcc is here, but no report of ptxas in build/, or no fastkd/_cuda*.so: run make build, with FASTKD_CUDA=1 "
            "or the GPUs to build for in TORCH_CUDA_ARCH_LIST where there is no GPU"
        )
    sass = parse_sass("".join(map(disassemble, libraries)))
    rules = [rule for path in sorted(ROOT.glob("csrc/*/*.cu*")) for rule in parse_rules(path)]
    errors = inspect(resources, sass, rules, [f"sm_{version.replace('.', '')}" for version in options.architectures])
    errors += hot_paths(resources, sass, nvcc_release(nvcc), options.write_table)
    for error in errors:
        print("error:", error)
    print(f"{len(sass)} kernel images, {len({rule.where for rule in rules})} promises, {len(errors)} errors")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
