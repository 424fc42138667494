"""What the kernels' machine code says about their time: benchmarks/machine_code.md.

hot_paths.py names the paths. Of the ways from a kernel's entry to its exit, or around a loop, that load, store and compute
exactly what a path declares, the hot path is the one with the fewest instructions. Its time is predicted from

- the bytes that must move, at the bandwidth of a copy;
- its instructions, of which a quarter of a multiprocessor starts one a cycle, and the busiest unit (UNITS);
- how long a warp takes that is alone. Each instruction says how long the compiler lets the warp stall after it, and which
  loads, shuffles and special functions it waits for (sass.Schedule); LATENCY says how long those take.

The warps of a quarter are then customers of a closed queueing network: memory, and the issue or the busiest unit, serve one
at a time; all else is a delay. Mean value analysis gives the throughput. The latency of a cluster's barrier was fitted to
measurements on an H200; benchmarks/README.md compares other predictions with them.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from hot_paths import HotPath
from sass import NO_BARRIER, Instruction, successors

ARCHITECTURE = "sm_90a"
TOLERANCE = 0.05  # of the committed counts

# Cycles for which an instruction of a warp keeps a unit of a quarter of a multiprocessor of Hopper: 32 over the unit's lanes
# (throughput table of the CUDA programming guide, 9.0). What is not named takes the issue alone.
UNITS = {
    "fma": (1, "FADD FMUL FFMA IMAD HFMA2 HADD2 HMUL2"),
    "alu": (
        2,
        "F2FP FCHK FMNMX FSEL FSETP HMNMX2 HSET2 HSETP2 IADD IADD3 ISETP LEA LOP3 MOV P2R PLOP3 PRMT R2P SEL SHF "
        "VHMNMX VIADD VIADDMNMX VIMNMX VIMNMX3 VOTE",
    ),
    "special": (8, "MUFU BREV F2F F2I F2IP FLO FRND I2F I2FP POPC"),
    "fp64": (2, "DADD DFMA DMNMX DMUL DSETP"),
    "load/store": (4, "ATOM ATOMG ATOMS LD LDG LDGSTS LDS RED SHFL ST STG STS"),
}
UNIT_OF = {opcode: unit for unit, (_, opcodes) in UNITS.items() for opcode in opcodes.split()}
# Cycles until a result is there for which the code waits at a barrier. Loads: from device memory that is busy.
LATENCY = {"ATOM": 800, "ATOMG": 800, "BAR": 40, "LD": 800, "LDC": 40, "LDG": 800, "LDS": 30, "UCGABAR_WAIT": 600}
OTHER_LATENCY = 25
OPERANDS_READ = 20
BARRIERS = ("BAR", "UCGABAR_WAIT")
# Of a multiprocessor.
QUARTERS, REGISTERS, MOST_WARPS, MOST_BLOCKS, SHARED, SHARED_OF_SYSTEM = 4, 65536, 64, 32, 228 << 10, 1024


class Machine(NamedTuple):
    name: str
    multiprocessors: int
    gigahertz: float
    copy: float  # bytes a second: 0.865 of what its memory can do, as measured on an H200


MACHINES = (Machine("H100", 132, 1.755, 0.865 * 3.35e12), Machine("H200", 132, 1.755, 0.865 * 4.8e12))


def _is(opcode: str, wanted: str) -> bool:
    """LDG.E.128.CONSTANT is an LDG.128."""
    base, *parts = wanted.split(".")
    have = opcode.split(".")
    return have[0] == base and all(part in have for part in parts)


class Run(NamedTuple):
    """Instructions without a choice."""

    begin: int
    end: int  # the last one
    does: tuple[int, ...]
    following: set[int]
    last: bool  # the kernel may end with it


def cheapest(code: list[Instruction], wanted: Mapping[str, int], loop: bool) -> list[int] | None:
    """The way with the fewest instructions that does each wanted thing exactly so often: indices of its instructions."""
    following = successors(code)
    does = [tuple(int(_is(step.opcode, opcode)) for opcode in wanted) for step in code]
    goal = tuple(wanted.values())
    # runs of instructions without a choice are taken at once
    entries = {0, *(j for steps in following if len(steps) > 1 for j in steps)}
    entries |= {j for i, steps in enumerate(following) for j in steps if j != i + 1 or code[i].base == "EXIT"}
    starts = [i for i in range(len(code)) if any(does[i])] if loop else [0]
    entries |= set(starts)

    def run(i: int) -> Run:
        done, end = list(does[i]), i
        while len(following[end]) == 1 and (after := next(iter(following[end]))) == end + 1 and after not in entries:
            end = after
            done = [a + b for a, b in zip(done, does[end], strict=True)]
        return Run(i, end, tuple(done), following[end], code[end].base == "EXIT")

    runs = {i: run(i) for i in entries}
    best: list[int] | None = None
    for start in starts:
        way = _search(runs, start, goal, loop)
        if way is not None:
            steps = [i for entry in way for i in range(entry, runs[entry].end + 1)]
            if best is None or len(steps) < len(best):
                best = steps
    return best


def _search(runs: dict[int, Run], start: int, goal: tuple[int, ...], loop: bool) -> list[int] | None:
    """Dijkstra's algorithm over (where, what is done): the runs of the way."""
    begin = (start, (0,) * len(goal))
    cost = {begin: 0}
    before: dict[tuple[int, tuple[int, ...]], tuple[int, tuple[int, ...]]] = {}
    queue = [(0, begin)]
    while queue:
        spent, state = heapq.heappop(queue)
        if spent > cost[state]:
            continue
        run, done = runs[state[0]], state[1]
        now = tuple(a + b for a, b in zip(done, run.does, strict=True))
        if any(a > b for a, b in zip(now, goal, strict=True)):
            continue
        if now == goal and (start in run.following if loop else run.last):
            way = [state[0]]
            while state in before:
                state = before[state]
                way.append(state[0])
            return way[::-1]
        for after in run.following:
            reached, total = (after, now), spent + run.end - run.begin + 1
            if total < cost.get(reached, total + 1):
                cost[reached], before[reached] = total, state
                heapq.heappush(queue, (total, reached))
    return None


def cycles_of(step: Instruction) -> int:
    """How long an instruction keeps its unit."""
    unit = UNIT_OF.get(step.base)
    if unit is None:
        return 1
    wide = step.bits // 32 if unit == "load/store" and step.base != "SHFL" else 1
    return UNITS[unit][0] * max(wide, 1)


def walk(steps: Sequence[Instruction], rounds: int) -> tuple[float, int]:
    """Cycles of a warp alone for one round, the last of several; and the most bytes of a thread on their way from memory."""
    clock, began, most = 0.0, 0.0, 0
    result, operands = [0.0] * (NO_BARRIER + 1), [0.0] * (NO_BARRIER + 1)
    free = dict.fromkeys(UNITS, 0.0)
    coming: list[tuple[float, int]] = []
    for _ in range(rounds):
        began = clock
        for step in steps:
            schedule = step.schedule
            clock = max([clock, *(max(result[b], operands[b]) for b in schedule.waits)])
            if unit := UNIT_OF.get(step.base):
                clock = max(clock, free[unit])
                free[unit] = clock + cycles_of(step)
            result[schedule.result] = clock + LATENCY.get(step.base, OTHER_LATENCY)
            operands[schedule.operands] = clock + OPERANDS_READ
            if step.kind == "loads":
                coming = [(t, size) for t, size in coming if t > clock] + [(clock + LATENCY["LDG"], step.bits // 8)]
                most = max(most, sum(size for _, size in coming))
            clock += LATENCY[step.base] if step.base in BARRIERS else schedule.stall
    return clock - began, most


class Row(NamedTuple):
    """What is known of a hot path, and what follows."""

    path: HotPath
    steps: tuple[Instruction, ...]
    registers: int
    shared: int
    alone: float  # cycles of a warp
    in_flight_of_thread: int  # bytes

    @property
    def blocks(self) -> int:
        """On a multiprocessor at once."""
        warps = self.path.threads // 32
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * 32) // warps
        by_shared = SHARED // (self.shared + self.path.shared + SHARED_OF_SYSTEM)
        return min(by_registers, by_shared, MOST_WARPS // warps, MOST_BLOCKS)

    @property
    def warps(self) -> int:
        return self.blocks * self.path.threads // 32

    def unit(self, unit: str) -> int:
        return sum(UNIT_OF.get(step.base) == unit for step in self.steps)

    def rate(self, machine: Machine) -> float:
        """Elements a second."""
        cycles, _, _ = self.cycles(machine)
        return 32 * self.path.elements / cycles * machine.multiprocessors * QUARTERS * machine.gigahertz * 1e9

    def predicted(self, machine: Machine) -> tuple[float, str]:
        """Share of the copy bandwidth, and what keeps the multiprocessors busiest."""
        cycles, memory, busiest = self.cycles(machine)
        return memory / cycles, busiest

    def cycles(self, machine: Machine) -> tuple[float, float, str]:
        """Of a quarter for a warp's path; those of memory alone; what it is busiest with."""
        busy = Counter({"issue": len(self.steps)})
        for step in self.steps:
            if unit := UNIT_OF.get(step.base):
                busy[unit] += cycles_of(step)
        unit = max(busy, key=lambda key: busy[key])
        bandwidth = machine.copy / (
            machine.multiprocessors * QUARTERS * machine.gigahertz * 1e9
        )  # bytes a cycle and quarter
        memory = 32 * self.path.elements * self.path.bytes / bandwidth
        stations = {"memory": memory, "issue": float(len(self.steps))}
        if unit != "issue":
            stations = {"memory": memory, unit: float(busy[unit])}
        delay = max(self.alone - stations[unit], 0.0)
        queue = dict.fromkeys(stations, 0.0)
        cycles, warps = 0.0, max(self.warps // QUARTERS, 1)
        for n in range(1, warps + 1):
            response = {key: stations[key] * (1 + queue[key]) for key in stations}
            cycles = (delay + sum(response.values())) / n
            queue = {key: response[key] / cycles for key in stations}
        busiest = {**stations, "latency": self.alone / warps}
        return cycles, memory, max(busiest, key=lambda key: busiest[key])


def parse_way(way: str) -> tuple[int, bool, dict[str, int]]:
    """How many times it is gone, whether it is a loop, and how often it does what."""
    kind, *words = way.split()
    times, _, kind = kind.rpartition("*")
    return int(times or 1), kind == "loop", {key: int(n) for key, n in (word.split("=") for word in words)}


def analyse(path: HotPath, code: list[Instruction], registers: int, shared: int) -> Row | None:
    """None where no way does what the path declares."""
    steps: list[Instruction] = []
    alone, most = 0.0, 0
    for way in path.ways:
        times, loop, does = parse_way(way)
        indices = cheapest(code, does, loop)
        if indices is None:
            return None
        part = [code[i] for i in indices]
        cycles, in_flight = walk(part, 4 if loop else 1)
        steps += part * times
        alone += cycles * times
        most = max(most, in_flight)
    return Row(path, tuple(steps), registers, shared, alone, most)


HEAD = (
    "hot path", "instructions", "an element", "fma", "alu", "special", "conversions", "fp64", "loads, stores",
    "registers", "shared", "blocks", "kB in flight", *(machine.name for machine in MACHINES), "bound by",
)  # fmt: skip

INTRODUCTION = """# What the machine code promises

Made by `make machine-code` from what nvcc {release} builds for {architecture}. `make inspect` fails where a count of
instructions or registers has changed by more than {tolerance:.0%}. What is counted: `.ci/hot_paths.py`; how time is predicted:
`.ci/machine_code.py`.

- **instructions**: of a warp, along the path; **an element**: of a thread, as are those of each unit; **special** functions
  (exponentials, logarithms, reciprocals, roots) and **conversions** share one.
- **loads, stores**: of global memory, their number and width in bits.
- **shared**: bytes of a block; **blocks**: threads of a block x blocks on a multiprocessor; **kB in flight**: most that a
  multiprocessor has asked of memory at once.
- **H100**, **H200**: predicted share of the bandwidth of a copy (86.5 % of 3.35 and 4.8 TB/s); for paths that move
  nothing, elements a second.
- **bound by**: what an H200's multiprocessor is busiest with: memory, its issue slots, a unit, or waiting (latency).

"""


def widths(steps: Iterable[Instruction]) -> str:
    """32x128 + 8x128: loads and stores."""
    sides = []
    for kind in ("loads", "stores"):
        found = Counter(step.bits for step in steps if step.kind == kind)
        sides.append(" ".join(f"{n}x{bits}" for bits, n in sorted(found.items(), reverse=True)) or "0")
    return " + ".join(sides)


def cells(row: Row) -> list[str]:
    """A line of the table."""
    path, count = row.path, len(row.steps)
    special = sum(step.base == "MUFU" for step in row.steps)
    counts = (count, row.unit("fma"), row.unit("alu"), special, row.unit("special") - special, row.unit("fp64"))
    each = [f"{n / path.elements:.1f}" for n in counts]
    shares = [
        f"{100 * row.predicted(machine)[0]:.0f} %" if path.bytes else f"{row.rate(machine):.2e}" for machine in MACHINES
    ]
    return [
        path.title, str(count), *each, widths(row.steps), str(row.registers), str(row.shared + path.shared),
        f"{path.threads}x{row.blocks}", str(row.warps * 32 * row.in_flight_of_thread >> 10), *shares,
        row.predicted(MACHINES[-1])[1],
    ]  # fmt: skip


def table(rows: Sequence[Row], release: str) -> str:
    """benchmarks/machine_code.md."""
    text = INTRODUCTION.format(release=release, architecture=ARCHITECTURE, tolerance=TOLERANCE)
    lines = [list(HEAD), ["---"] * len(HEAD), *map(cells, rows)]
    return text + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def changes(committed: str, rows: Sequence[Row], release: str) -> list[str]:
    """What is not as the committed table says."""
    if f"nvcc {release} " not in committed:
        return []  # another compiler makes other code: nothing to compare
    lines = [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in committed.splitlines()
        if line.startswith("| ")
    ]
    known = {line[0]: line for line in lines[2:]}
    errors = [
        f"{title}: in the table, but not in hot_paths.py" for title in known.keys() - {row.path.title for row in rows}
    ]
    for row in rows:
        if row.path.title not in known:
            errors.append(f"{row.path.title}: not in the table")
            continue
        for what, now in (("instructions", len(row.steps)), ("registers", row.registers)):
            before = int(known[row.path.title][HEAD.index(what)])
            if abs(now - before) > TOLERANCE * before:
                errors.append(f"{row.path.title}: {now} {what}, {before} in the table")
    return [f"machine_code.md: {error}; make machine-code writes it anew" for error in sorted(errors)]
