"""The table of what the machine code promises: which way through a kernel is counted, and what time follows from it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / ".ci"))  # of the source tree, not of the package

import machine_code
from hot_paths import HOT_PATHS, HotPath
from sass import NO_BARRIER, Instruction, Schedule, parse_sass

pytestmark = pytest.mark.no_kernels

# A load that the code waits for at barrier 2, from what cuobjdump 13 prints for sm_90a.
_SASS = """
	code for sm_90a
		Function : kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ;              /* 0x00000a00ff017b82 */
                                                                       /* 0x000fe20000000800 */
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;    /* 0x0000000402048981 */
                                                                       /* 0x000ea8000c1e1d00 */
        /*0020*/                   FADD R4, R4, R5 ;                   /* 0x0000000504047221 */
                                                                       /* 0x004fca0000000000 */
        /*0030*/                   EXIT ;                              /* 0x000000000000794d */
                                                                       /* 0x000fea0003800000 */
"""


def program(*lines: str) -> list[Instruction]:
    """Instructions from "guard? opcode operands"; an address is the line's number."""
    code = []
    for number, line in enumerate(lines):
        words = line.split()
        guard = words.pop(0) if words[0].startswith("@") else ""
        code.append(Instruction(number, guard, words[0], " ".join(words[1:])))
    return code


def opcodes(code: list[Instruction], ways: list[int] | None) -> str:
    assert ways is not None
    return " ".join(code[i].base for i in ways)


def test_the_schedule_is_read() -> None:
    ldc, ldg, fadd, _ = parse_sass(_SASS)["kernel", "sm_90a"]
    assert ldc.schedule == Schedule(1, NO_BARRIER, NO_BARRIER, ())
    assert ldg.guard == "@!P0 "
    assert ldg.schedule == Schedule(4, 2, NO_BARRIER, ())
    assert fadd.schedule == Schedule(5, NO_BARRIER, NO_BARRIER, (2,))


def test_of_the_ways_that_do_the_work_the_shortest_is_counted() -> None:
    code = program(
        "ISETP", "@P0 BRA 0x5", "LDG.E.128 fast", "STG.E.128", "BRA 0x9",  # 0 to 4
        "LDG.E.U16 slow", "LDG.E.U16", "STG.E.128", "FADD", "@P1 EXIT", "FMUL", "EXIT",  # 5 to 11
    )  # fmt: skip
    assert (
        opcodes(code, machine_code.cheapest(code, {"LDG.128": 1, "STG.128": 1}, False)) == "ISETP BRA LDG STG BRA EXIT"
    )
    assert opcodes(code, machine_code.cheapest(code, {"LDG.U16": 2}, False)) == "ISETP BRA LDG LDG STG FADD EXIT"
    assert machine_code.cheapest(code, {"LDG.128": 2}, False) is None
    with_more = {"LDG.128": 1, "FMUL": 1}
    assert opcodes(code, machine_code.cheapest(code, with_more, False)) == "ISETP BRA LDG STG BRA EXIT FMUL EXIT"


def test_a_loop_is_counted_once_around_even_from_its_middle() -> None:
    code = program("MOV", "LDG.E.128", "@P0 BRA 0x5", "FADD", "FADD", "MUFU.EX2", "@P1 BRA 0x1", "EXIT")
    assert opcodes(code, machine_code.cheapest(code, {"LDG.128": 1, "MUFU.EX2": 1}, True)) == "LDG BRA MUFU BRA"
    assert opcodes(code, machine_code.cheapest(code, {"LDG.128": 1, "FADD": 2}, True)) == "LDG BRA FADD FADD MUFU BRA"
    assert machine_code.cheapest(code, {"MOV": 1}, True) is None


def test_a_warp_waits_as_the_compiler_scheduled_it() -> None:
    load = Instruction(0, "", "LDG.E.128", "", Schedule(2, 0, NO_BARRIER, ()))
    add = Instruction(1, "", "FADD", "", Schedule(5, NO_BARRIER, NO_BARRIER, (0,)))
    cycles, in_flight = machine_code.walk([load, load._replace(schedule=Schedule(2, 1, NO_BARRIER, ())), add], 1)
    assert cycles == machine_code.LATENCY["LDG"] + 5
    assert in_flight == 32
    special = Instruction(2, "", "MUFU.EX2", "", Schedule(1, NO_BARRIER, NO_BARRIER, ()))
    assert machine_code.walk([special] * 3, 1)[0] == 2 * 8 + 1  # the unit is busy for 8 cycles each


def row(*steps: Instruction, warps: int = 16, elements: int = 8, floor: float = 6.0) -> machine_code.Row:
    """A path of so many warps on a multiprocessor."""
    path = HotPath("some path", "kernel", 32, elements, floor, ())
    registers = machine_code.REGISTERS // (32 * warps)
    return machine_code.Row(path, steps, registers, 0, machine_code.walk(steps, 1)[0], 0)


def test_what_is_needed_most_bounds_the_time() -> None:
    h100, h200 = machine_code.MACHINES
    add = Instruction(0, "", "FADD", "", Schedule(1, NO_BARRIER, NO_BARRIER, ()))
    load = Instruction(0, "", "LDG.E.128", "", Schedule(800, NO_BARRIER, NO_BARRIER, ()))
    special = Instruction(0, "", "MUFU.LG2", "", Schedule(1, NO_BARRIER, NO_BARRIER, ()))
    assert row(*[add] * 10).predicted(h200) == (pytest.approx(1, abs=0.02), "memory")
    assert row(*[add] * 10, floor=1e-3).predicted(h200)[1] == "issue"
    assert row(*[special] * 100).predicted(h200)[1] == "special"
    assert row(load, *[add] * 10, warps=4).predicted(h200)[1] == "latency"
    busy = row(*[add] * 300)
    assert 0 < busy.predicted(h200)[0] < busy.predicted(h100)[0] < 1  # the faster memory waits longer
    assert busy.rate(h100) > row(*[add] * 400).rate(h100)


def test_blocks_fit_registers_and_shared_memory() -> None:
    one = row(Instruction(0, "", "EXIT", ""))
    assert (one.blocks, one.warps) == (16, 16)
    assert one._replace(registers=129).blocks == 65536 // (136 * 32)
    assert one._replace(shared=100 << 10).blocks == 2
    assert one._replace(registers=16).blocks == machine_code.MOST_BLOCKS


def test_a_change_of_the_counts_is_an_error() -> None:
    add = Instruction(0, "", "FADD", "", Schedule(1, NO_BARRIER, NO_BARRIER, ()))
    committed = machine_code.table([row(*[add] * 100)], "13.0")
    assert "| some path | 100 | 12.5 |" in committed
    assert machine_code.changes(committed, [row(*[add] * 105)], "13.0") == []
    for count in (106, 94):
        (error,) = machine_code.changes(committed, [row(*[add] * count)], "13.0")
        assert f"some path: {count} instructions, 100 in the table" in error
    (error,) = machine_code.changes(committed, [row(*[add] * 100)._replace(registers=150)], "13.0")
    assert "150 registers, 128 in the table" in error
    assert machine_code.changes(committed, [row(*[add] * 200)], "13.1") == []  # another compiler
    other = row(add)
    errors = machine_code.changes(committed, [other._replace(path=other.path._replace(title="new"))], "13.0")
    assert [error.split("; ")[0] for error in errors] == [
        "machine_code.md: new: not in the table",
        "machine_code.md: some path: in the table, but not in hot_paths.py",
    ]


def rows_of(text: str, columns: int) -> dict[str, list[str]]:
    """The rows of the tables of so many columns, by their first cell."""
    lines = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    )
    return {line[0]: line for line in lines if len(line) == columns}


def test_the_documents_say_what_the_table_says() -> None:
    benchmarks = Path(__file__).parents[2] / "benchmarks"
    table = rows_of((benchmarks / "machine_code.md").read_text(), len(machine_code.HEAD))
    assert table.keys() - {"hot path", "---"} == {path.title for path in HOT_PATHS}
    section = (benchmarks / "README.md").read_text().split("## Machine code\n")[1].split("\n## ")[0]
    compared = rows_of(section, 4)
    assert len(compared) > 10
    now = machine_code.HEAD.index("H200")
    for title in compared.keys() - {"hot path"}:
        assert compared[title][3] == table[title][now], title


def test_ways_may_be_gone_several_times() -> None:
    assert machine_code.parse_way("4*loop LDG=12 STG=0") == (4, True, {"LDG": 12, "STG": 0})
    assert machine_code.parse_way("path LDG.128=8") == (1, False, {"LDG.128": 8})


def test_paths_are_well_formed() -> None:
    assert len({path.title for path in HOT_PATHS}) == len(HOT_PATHS)
    for path in HOT_PATHS:
        assert path.ways, path.title
        for way in path.ways:
            assert way.split()[0].rpartition("*")[2] in ("path", "loop"), path.title
            assert machine_code.parse_way(way)[2], path.title
