"""The machine code of the CUDA kernels: cuobjdump's disassembly as instructions, and where control goes from each."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

Key = tuple[str, str]  # a kernel image: mangled name, architecture such as sm_90a

# Loads and stores of global memory, LDG or by generic address; LDGSTS and UBLKCP copy to and from shared memory.
KINDS = {"loads": ("LDG", "LD", "LDGSTS", "UBLKCP.S.G"), "stores": ("STG", "ST", "UBLKCP.G.S"), "local": ("LDL", "STL")}
KIND_OF = {opcode: kind for kind, opcodes in KINDS.items() for opcode in opcodes}

_FIRST_LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(@\S+\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;")
_SECOND_LINE = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/\s*$")  # the upper half of the instruction


NO_BARRIER = 7


class Schedule(NamedTuple):
    """What the compiler decided for an instruction: bits 105 to 121 of the 128, in every architecture since Volta."""

    stall: int  # cycles until the warp may issue its next instruction
    result: int  # the barrier, of six, that is down until its result is there; or NO_BARRIER
    operands: int  # the one that is down until its operands are read
    waits: tuple[int, ...]  # barriers that it waits for


class Instruction(NamedTuple):
    address: int
    guard: str  # predicate
    opcode: str
    operands: str
    schedule: Schedule = Schedule(1, NO_BARRIER, NO_BARRIER, ())

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def kind(self) -> str:
        return KIND_OF.get(self.opcode) or KIND_OF.get(self.base, "")

    @property
    def bits(self) -> int:
        """What a load or store moves: LDG.E.128, LDG.E.U16; 32 where nothing is said; a bulk copy has 128 or more."""
        widths = (re.fullmatch(r"[US]?(8|16)|(64|128|256)", part) for part in self.opcode.split("."))
        return 128 if self.opcode.startswith("U") else next((int(w[1] or w[2]) for w in widths if w), 32)


def _schedule(word: int) -> Schedule:
    bits = word >> 41
    return Schedule(max(bits & 15, 1), bits >> 5 & 7, bits >> 8 & 7, tuple(b for b in range(6) if bits >> (11 + b) & 1))


def parse_sass(text: str) -> dict[Key, list[Instruction]]:
    """The output of cuobjdump -sass."""
    result: dict[Key, list[Instruction]] = {}
    architecture = name = ""
    for line in text.splitlines():
        if match := _FIRST_LINE.match(line):
            result[name, architecture].append(Instruction(int(match[1], 16), match[2] or "", match[3], match[4]))
        elif (match := _SECOND_LINE.match(line)) and result.get((name, architecture)):
            code = result[name, architecture]
            code[-1] = code[-1]._replace(schedule=_schedule(int(match[1], 16)))
        elif match := re.match(r"\s*code for (\S+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            name = match[1]
            result[name, architecture] = []
    return result


def successors(code: list[Instruction]) -> list[set[int]]:
    """Of each instruction, by index, those that may come next. What is called is left out: its caller goes on behind it."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    result = []
    for i, instruction in enumerate(code):
        following = {i + 1}
        if instruction.base == "BRA" and (target := re.fullmatch(r"(.*?)0x([0-9a-f]+)", instruction.operands)):
            conditional = instruction.guard or target[1]  # a predicate may be an operand: BRA.U !UP0, 0x450
            following = {index.get(int(target[2], 16), len(code)), *(following if conditional else ())}
        elif instruction.base in ("EXIT", "RET") and not instruction.guard:
            following = set()
        result.append(following - {len(code)})
    return result


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Demangled, without parameters, spaces, `fastkd` and anonymous namespaces."""
    mangled = sorted(set(names))
    run = subprocess.run(["c++filt", "-p"], input="\n".join(mangled), capture_output=True, text=True, check=True)
    short = (re.sub(r"\(anonymous namespace\)::|fastkd::| ", "", line) for line in run.stdout.splitlines())
    return dict(zip(mangled, short, strict=True))


def name_matches(name: str, pattern: str) -> bool:
    """A shell pattern on a short name, whose namespaces it may leave out."""
    return any(fnmatchcase(name, prefix + pattern) for prefix in ("", "*::"))


def disassemble(library: Path) -> str:
    wheels = map(str, Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin"))
    path = os.pathsep.join([*wheels, os.environ.get("CUDA_HOME", "") + "/bin", os.environ.get("PATH", "")])
    tool = shutil.which("cuobjdump", path=path)
    if not tool or not shutil.which("nvdisasm", path=path):
        sys.exit("error: cuobjdump and nvdisasm are missing: pip install -e '.[dev]'")
    run = subprocess.run([tool, "-sass", library], env={**os.environ, "PATH": path}, capture_output=True, text=True)
    return run.stdout if run.returncode == 0 else sys.exit(f"error: {tool} -sass {library}: {run.stderr}")
