"""CI's inspection of the CUDA kernels fails when it must: on excerpts of what ptxas and cuobjdump 13 print."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

pytestmark = pytest.mark.no_kernels

sys.path.append(str(Path(__file__).parents[2] / ".ci"))  # of the source tree, not of the package

import inspect_cuda as tool  # noqa: E402
from hot_paths import HotPath  # noqa: E402

_NAME = "_ZN6fastkd5probe36_GLOBAL__N__80df6588_4_c_cu_bb118e9711copy_kernelI6float4EEvPKT_PS4_j"
_REPORT = f"""\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{_NAME}' for 'sm_80'
ptxas info    : Function properties for {_NAME}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers, 4096 bytes smem, 372 bytes cmem[0]
ptxas info    : Compile time = 1.151 ms
"""
_CALLED = """\
ptxas info    : Function properties for __internal_trig_reduction_slowpathd
    40 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""
_SASS = f"""
Fatbin elf code:
================
arch = sm_80

	code for sm_80
	.target	sm_80

		Function : {_NAME}
	.headerflags	@"EF_CUDA_SM80 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM80)"
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;                /* 0x00000a0000017a02 */
                                                                                          /* 0x000fc40000000f00 */
        /*0010*/                   S2R R0, SR_TID.X ;                                     /* 0x0000000000007919 */
        /*0020*/                   ISETP.GE.U32.AND P0, PT, R0, c[0x0][0x170], PT ;       /* 0x00005c0000007a0c */
        /*0030*/               @P0 EXIT ;                                                 /* 0x000000000000094d */
        /*0040*/                   HFMA2.MMA R3, -RZ, RZ, 0, 9.5367431640625e-07 ;        /* 0x00000010ff037435 */
        /*0060*/                   IMAD.WIDE.U32 R4, R0, R3, c[0x0][0x160] ;              /* 0x0000580000047625 */
        /*0070*/                   LDG.E.128 R4, [R4.64] ;                                /* 0x0000000404047981 */
        /*0090*/                   IADD3 R0, R0, 0x100, RZ ;                              /* 0x0000010000007810 */
        /*00a0*/                   ISETP.GE.U32.AND P0, PT, R0, c[0x0][0x170], PT ;       /* 0x00005c0000007a0c */
        /*00b0*/                   STG.E.128 [R2.64], R4 ;                                /* 0x0000000402007986 */
        /*00c0*/              @!P0 BRA 0x40 ;                                             /* 0xffffff7000008947 */
        /*00d0*/                   EXIT ;                                                 /* 0x000000000000794d */
        /*00e0*/                   BRA 0xe0;                                              /* 0xfffffff000007947 */
        /*00f0*/                   NOP;                                                   /* 0x0000000000007918 */
		..........

Fatbin ptx code:
================
arch = sm_100
"""
Check = Callable[..., tuple[object, str]]  # exit status, output
_RULE = "// inspect: streaming copy_kernel<float4> loads=128 stores=128"


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Check:
    """Runs the tool on a source, a report and a disassembly, as if nvcc had built them for one architecture."""

    def run(
        rules: str = _RULE, report: str = _REPORT, sass: str = _SASS, *arguments: str, paths: Sequence[HotPath] = ()
    ) -> tuple[object, str]:
        contents = {"csrc/probe/cuda.cu": rules, "build/objects/csrc/probe/cuda.cu.o.ptxas": report}
        for path, text in {**contents, "fastkd/_cuda.so": "", "cuda/bin/nvcc": ""}.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        (tmp_path / "cuda/bin/nvcc").chmod(0o755)
        (tmp_path / "benchmarks").mkdir(exist_ok=True)
        (tmp_path / tool.TABLE).touch()
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
        monkeypatch.delenv("FASTKD_CUDA", raising=False)
        monkeypatch.setattr(tool, "ROOT", tmp_path)
        monkeypatch.setattr(tool, "HOT_PATHS", paths)
        monkeypatch.setattr(tool, "nvcc_release", lambda _: "13.0")
        monkeypatch.setattr(tool, "disassemble", lambda _: sass)
        try:
            status = tool.main(["--architectures", *(arguments or ["8.0"])])
        except SystemExit as error:  # what it cannot read
            status = error.code
        return status, capsys.readouterr().out

    return run


def test_a_good_kernel_passes(check: Check) -> None:
    status, out = check()
    assert status == 0, out
    row = next(line for line in out.splitlines() if line.startswith("probe::copy_kernel<float4>"))
    assert row.split()[1:] == ["10", "4096", "1x128", "1x128", "0", "0", "0", "80"]
    assert "not inspected for loads and stores: none\n" in out
    assert "1 kernel images, 1 promises, 0 errors" in out


@pytest.mark.parametrize(
    ("changed", "old", "new", "message"),
    [
        ("report", " 0 bytes spill stores", " 8 bytes spill stores", "has a stack frame of 0 bytes and spills 8 bytes"),
        ("report", " 0 bytes stack frame", " 16 bytes stack frame", "has a stack frame of 16 bytes and spills 0 bytes"),
        ("report", "ptxas info    : Compile", _CALLED, "has a stack frame of 40 bytes and spills 0 bytes"),
        ("report", "for 'sm_80'", "for 'sm_86'", "has no report of ptxas"),
        ("sass", "HFMA2.MMA R3", "LDL.LU R3", "accesses local memory 1 times"),
        ("sass", "STG.E.128", "STG.E", "no stores of 128 bits in a loop, 0 outside"),
        ("sass", "LDG.E.128", "LDG.E.64.CONSTANT", "no loads of 128 bits in a loop, 0 outside"),
        ("sass", "LDG.E.128", "LDG.E.128.CONSTANT", "has 1 loads that need not see its own stores"),
        ("sass", "LDG.E.128", "LDG.E.LTC128B", "no loads of 128 bits in a loop, 0 outside"),
        ("sass", "LDG.E.128", "LDS.128", "no loads of 128 bits in a loop, 0 outside"),
        ("sass", "BRA 0x40", "BRA 0x90", "no loads of 128 bits in a loop, 1 outside"),
        ("sass", "BRA 0x40", "BRA 0xd0", "no stores of 128 bits in a loop, 1 outside"),
        ("sass", "code for sm_80", "code for sm_86", "probe::copy_kernel<float4> has no machine code for sm_80"),
        ("rules", "copy_kernel<float4>", "copy_kernel<float>", "probe/cuda.cu:1: no kernel matches copy_kernel<float>"),
    ],
)
def test_a_bad_one_does_not(check: Check, changed: str, old: str, new: str, message: str) -> None:
    text = {"report": _REPORT, "sass": _SASS, "rules": _RULE}[changed]
    assert old in text
    status, out = check(**{changed: text.replace(old, new)})
    assert status == 1
    assert any(line.startswith("error: ") and message in line for line in out.splitlines()), out


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("LDG.E.128", "LDG.E.ENL2.256"),
        ("LDG.E.128", "LDG.E.LTC128B.128"),
        ("LDG.E.128 R4, [R4.64]", "LDG.E.128 R4, desc[UR6][R4.64+0x10]"),
        ("LDG.E.128", "LD.E.128"),
        ("LDG.E.128", "LDGSTS.E.BYPASS.128"),
        ("LDG.E.128 R4, [R4.64]", "UBLKCP.S.G [UR4], [UR6], UR10"),
        ("@!P0 BRA 0x40", "BRA.U !UP0, 0x40"),
        ("@!P0 BRA 0x40", "BRA 0x40"),
    ],
)
def test_other_ways_to_stream(check: Check, old: str, new: str) -> None:
    assert old in _SASS
    status, out = check(sass=_SASS.replace(old, new))
    assert status == 0, out


def test_rules_select_kernels(check: Check) -> None:
    straight = _SASS.replace("BRA 0x40", "BRA 0xd0")
    assert check("// inspect: anywhere *_kernel<*> loads=128", sass=straight)[0] == 0
    assert check("// inspect: anywhere probe::copy_kernel<*> stores=64", sass=straight)[0] == 0
    status, out = check("// inspection is somewhere else")
    assert status == 0
    assert "not inspected for loads and stores: probe::copy_kernel<float4>\n" in out


def test_every_architecture_is_wanted(check: Check) -> None:
    sass = _SASS + _SASS.replace("sm_80", "sm_90a").replace("STG.E.128", "STG.E.64")
    report = _REPORT + _REPORT.replace("sm_80", "sm_90a")
    status, out = check(_RULE, report, sass, "8.0", "9.0a", "10.0")
    errors = [line for line in out.splitlines() if line.startswith("error: ")]
    assert status == 1
    assert len(errors) == 2
    assert "has no machine code for sm_100" in errors[0]  # it has PTX, which is not that
    assert "on sm_90a breaks the promise at probe/cuda.cu:1: no stores of 128 bits" in errors[1]


def test_hot_paths_are_those_of_the_committed_table(check: Check, tmp_path: Path) -> None:
    """On the architecture that they are counted on; written, then compared."""
    sass, report = _SASS.replace("sm_80", "sm_90a"), _REPORT.replace("sm_80", "sm_90a")
    path = HotPath("copy", "copy_kernel<float4>", 256, 4, 8, ("loop LDG.128=1 STG.128=1",))
    assert "nothing was built for sm_90a" in check(paths=[path])[1]
    assert check(_RULE, report, sass, "9.0a", "--write-table", paths=[path])[0] == 0
    assert "| copy | 7 | 1.8 |" in (tmp_path / tool.TABLE).read_text()
    assert "nvcc 13.0 builds for sm_90a" in (tmp_path / tool.TABLE).read_text()
    longer = sass.replace("BRA 0x40", "BRA 0x20")
    for kernel, code, message in (
        ("copy_kernel<*>", longer, "copy: 9 instructions, 7 in the table"),
        ("copy_kernel<int>", sass, "copy: no kernel matches copy_kernel<int>"),
        ("copy_kernel<*>", sass.replace("STG.E.128", "STG.E.64"), "copy: no way like this in copy_kernel<*>"),
    ):
        status, out = check("", report, code, "9.0a", paths=[path._replace(kernel=kernel)])
        assert status == 1
        assert message in out


def test_what_cannot_be_read_is_an_error(check: Check) -> None:
    assert "must be '// inspect:" in str(check("// inspect: streaming copy_kernel<float4> load=128")[0])
    assert "nothing that we understand" in str(check(report=_REPORT.replace("Used 10", "Uses ten"))[0])
    assert "run make build" in str(check(report="")[0])


def test_without_nvcc_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert tool.main([]) == 0
    assert capsys.readouterr().out == "skipped: no nvcc on PATH or in $CUDA_HOME/bin\n"
