"""What ``make gpu-check`` does that needs no GPU: its stages, its report, its file."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))  # benchmarks/ is of the source tree, not of the package

from benchmarks import gpu_check  # noqa: E402
from benchmarks.gpu_check import Outcome, Stage  # noqa: E402
from benchmarks.results_file import ResultsFile, slug  # noqa: E402

pytestmark = pytest.mark.no_kernels


def stage(name: str, code: str, seconds: float = 10.0, **more: Any) -> Stage:
    return Stage(name, [sys.executable, "-c", code], seconds, **more)


@pytest.fixture
def results(tmp_path: Path) -> ResultsFile:
    """An empty results file."""
    return ResultsFile(tmp_path / "results" / "gpu.json")


def run_stages(stages: list[Stage], results: ResultsFile, seconds: float = 60.0) -> list[Outcome]:
    return gpu_check.run_stages(stages, seconds, dict(os.environ), results, results.path.parent / "logs")


def test_a_failed_stage_does_not_end_the_check(results: ResultsFile) -> None:
    outcomes = run_stages(
        [
            stage("one", "print('all good')"),
            stage("two words", "import sys; sys.exit(9)", meanings={9: "found errors"}),
            Stage("three", ["/no/such/program"], 10.0),
            stage("four", "pass", unavailable="not installed"),
            stage("five", "print('=== Device not supported'); raise SystemExit(1)"),
            stage("six", "print('=== 5 skipped')", must_say="passed"),
            stage("seven", "print('=== 2 passed, 5 skipped')", must_say="passed"),
        ],
        results,
    )
    assert [o.status for o in outcomes] == ["ok", "failed", "failed", "unavailable", "unavailable", "failed", "ok"]
    assert [o.bad for o in outcomes] == [False, True, True, False, False, True, False]
    assert outcomes[0].detail == "all good"
    assert outcomes[1].detail == "found errors"
    assert [entry["stage"] for entry in results.read()["stages"]] == [o.stage for o in outcomes]
    assert gpu_check.summary(outcomes).count("\n") == 6


def test_a_stage_is_stopped_with_all_that_it_started(results: ResultsFile, tmp_path: Path) -> None:
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    begun = time.monotonic()
    outcomes = run_stages([stage("endless", code, 1.0), stage("next", "pass", 9.0)], results, seconds=10.0)
    assert [o.status for o in outcomes] == ["out of time", "ok"]
    time.sleep(max(0.0, 4 - (time.monotonic() - begun)))
    assert not (tmp_path / "late").exists()


def test_later_stages_use_what_earlier_ones_left(results: ResultsFile, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    def record(stage: Stage, seconds: float, *_: Any) -> Outcome:
        given.append(seconds)
        return Outcome(stage.name, "ok", 0.0)

    monkeypatch.setattr(gpu_check, "run_stage", record)
    ticks = itertools.count(100.0, 1.0)  # every stage takes a second
    stages = [stage("a", "", 10), stage("b", "", 20), stage("c", "", 30)]
    gpu_check.run_stages(stages, 120.0, {}, results, clock=lambda: next(ticks))
    assert given == [19.0, 58.0, 117.0]


def test_a_command_is_told_its_time(results: ResultsFile) -> None:
    told = Stage("told", [sys.executable, "-c", "import sys; print(sys.argv[1])", "{seconds}"], 10.0)
    assert run_stages([told], results, seconds=42.0)[0].detail in ("41", "42")


def test_results_are_whole_after_every_stage(results: ResultsFile) -> None:
    """A stage reads the file: those before it are there; keys of other writers stay."""
    results.update(machine={"gpu": "x"})
    read = f"import json; print([(s['stage'], s['status']) for s in json.load(open({str(results.path)!r}))['stages']])"
    outcomes = run_stages([stage("first", "pass"), stage("second", read)], results)
    assert outcomes[1].detail == "[('first', 'ok'), ('second', 'out of time')]"  # what it is if it never ends
    assert results.read()["machine"] == {"gpu": "x"}
    assert [path.name for path in results.path.parent.iterdir() if path.is_file()] == ["gpu.json"]  # no draft left
    results.clear()
    assert results.read() == {}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090"),
        ("  A100 (80GB)", "a100-80gb"),
    ],
)
def test_slug(name: str, expected: str) -> None:
    assert slug(name) == expected


@pytest.mark.parametrize(("capability", "expected"), [([9, 0], "9.0a"), ([8, 6], "8.6"), ([10, 0], "10.0")])
def test_architecture(capability: list[int], expected: str) -> None:
    assert gpu_check.architecture(capability) == expected
    environment = gpu_check.environment_for(capability, {"PATH": "", "PYTHONPATH": "/somewhere"})
    assert environment["TORCH_CUDA_ARCH_LIST"] == expected
    assert environment["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "/somewhere"]


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "NEEDS", {"torch": "all", "no_such_peer": "the benchmarks", "ninja": "the build"})
    monkeypatch.setattr(gpu_check, "TOOLS", {"no-such-tool": "the sanitizer stages"})
    monkeypatch.setattr(gpu_check, "_ninja_has_its_program", lambda *_: False)
    absent = gpu_check.missing(sys.executable, os.environ)
    assert set(absent) == {"no_such_peer", "no-such-tool", "ninja's program"}
    assert absent["no_such_peer"] == "the benchmarks"


def test_it_runs_on_the_standard_library() -> None:
    """To say what is missing."""
    code = "import sys; sys.modules.update(pytest=None, torch=None, numpy=None); from benchmarks import gpu_check, watchdog"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_library_that_was_carried_is_not_built_again(tmp_path: Path) -> None:
    (tmp_path / "fastkd").mkdir()
    assert not gpu_check.carried(tmp_path)
    (tmp_path / "fastkd/_cuda.cpython-312-x86_64-linux-gnu.so").touch()
    assert gpu_check.carried(tmp_path)
    (tmp_path / "build/objects").mkdir(parents=True)
    assert not gpu_check.carried(tmp_path)


def test_only_the_tests_of_a_gpu_are_picked() -> None:
    """By their backend: a mark that has the word in its name is on those of the emulator, too."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    found = subprocess.run(
        [*command, "tests/ops/test_relation.py", "tests/csrc/test_cuda_graphs.py"],
        cwd=ROOT,
        env={**os.environ, "FASTKD_ONLY_CUDA": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    picked = [line for line in found.stdout.splitlines() if "::" in line]
    assert any("test_relation.py" in line for line in picked)
    assert any("test_cuda_graphs.py" in line for line in picked)
    assert not any("[cpu-" in line or "[emulated-" in line for line in picked)
    assert all("[cuda" in line or "-cuda" in line or "test_cuda_" in line for line in picked)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == gpu_check.NO_GPU
    assert found.stdout.startswith("gpu-check: no GPU to check on: ")
    assert found.stdout.count("\n") == 1


def test_a_failure_is_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    gpu_found = {"gpu": "Test GPU", "capability": [9, 0], "torch": "2.11"}
    monkeypatch.setattr(gpu_check, "probe", lambda _: gpu_found)
    monkeypatch.setattr(gpu_check, "missing", lambda *_: {"kornia": "the benchmarks"})
    monkeypatch.setattr(gpu_check, "LOGS", tmp_path)
    stages = [stage("build", "raise SystemExit(3)"), stage("benchmarks", "print('measured')")]
    monkeypatch.setattr(gpu_check, "stages_for", lambda *_: stages)
    output = tmp_path / "out.json"
    assert gpu_check.main(["--output", str(output)]) == 1
    assert gpu_check.main(["--output", str(output), "--only", "benchmarks"]) == 0
    assert [entry["status"] for entry in json.loads(output.read_text())["stages"]] == ["failed", "ok"]  # that stays
    assert "missing: kornia, needed for the benchmarks" in capsys.readouterr().out
    written = json.loads(output.read_text())
    assert written["check"]["missing"] == {"kornia": "the benchmarks"}
    assert [entry["status"] for entry in written["stages"]] == ["failed", "ok"]


def test_every_stage_has_its_files() -> None:
    stages = gpu_check.stages_for("python3", Path("out.json"), dict(os.environ))
    names = ["build", "every", "cuda", "operator", "memcheck", "racecheck", "benchmarks", "tuning"]
    assert [s.name.split()[0] for s in stages] == names
    assert sum(s.seconds for s in stages) <= gpu_check.SECONDS < gpu_check.HARD_LIMIT
    named = [part for s in stages for word in s.command for part in word.split() if part.endswith(".py")]
    assert len(named) > 8
    assert all((ROOT / part).exists() for part in named)
