"""``make compat`` without its gigabytes: which releases it takes, what it writes, when it fails, what it does not do twice.

pip and pytest are scripts here: the environments, the processes and the files are real.
"""

from __future__ import annotations

import importlib.util
import json
import os
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.no_kernels

INDEX = """\
torch (2.15.0)
Available versions: 2.15.0, 2.14.1, 2.14.0, 2.13.0+cpu, 2.13.0, 2.12.1, 2.12.0, 2.11.0, 2.10.0, 2.9.1, 2.9.0, 1.13.1
  INSTALLED: 2.13.0+cpu
"""
# In the place of Python: makes environments of itself, has pip, fastkd and pytest as the variables of the test say.
PYTHON = """\
#!/bin/bash
here="$(dirname "$0")"
echo "$* emulated:$FASTKD_EMULATED path:$PYTHONPATH" >> "$LOG"
case "$*" in
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; cp "$0" "$3/bin/pytest";;
  *"index versions torch") printf '%s' "$INDEX";;
  *"--dry-run"*) for no in $REFUSED; do [[ "$*" == *"torch==$no"* ]] && { echo "ERROR: $no is excluded"; exit 1; }; done;;
  *" install "*)
    for no in $BROKEN; do [[ "$*" == *"torch==$no"* ]] && { echo "ERROR: no space left"; exit 1; }; done
    [[ "$*" =~ torch==([^\\ ]+) ]] && echo "${BASH_REMATCH[1]}" > "$here/torch";;
  "-c import sys"*) echo cp399;;
  "-c "*)
    file="${FILE:-$(dirname "$here")/fastkd/__init__.py}"
    [ -f "$here/torch" ] && torch="$(cat "$here/torch")"
    printf '{"file": "%s", "fastkd": "0.1.0", "python": "3.99.0", "torch": "%s", "cuda": %s, "operators": 18, ' \\
      "$file" "${TORCH:-$torch}" "${CUDA:-null}"
    printf '"cuda_operators": %s, "architectures": "8.0", "why_not": "it did not load", ' "${CUDA_OPERATORS:-18}"
    printf '"refusal": "%s"}\\n' "${REFUSAL-the kernels were built for 8.0, which a GPU does not run}";;
  *--junitxml=*)
    [[ "$*" =~ --junitxml=([^\\ ]+) ]] && report="${BASH_REMATCH[1]}"
    failing=0; for no in $FAILING; do [[ "$(cat "$here/torch")" == "$no"* ]] && failing=3; done
    suite="<testsuite tests='10' failures='$failing' errors='0' skipped='2'/>"
    [ -n "$SILENT" ] || echo "<testsuites>$suite</testsuites>" > "$report"
    echo ".... [100%]"
    [ $failing = 0 ] || { echo "FAILED tests/ops/test_alias.py::test_it - AssertionError"; exit 1; };;
esac
exit 0
"""


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """.ci/compat.py."""
    spec = importlib.util.spec_from_file_location("compat", ROOT / ".ci" / "compat.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["compat"] = module  # where dataclasses and named tuples look for their module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("versions", "chosen"),
    [
        ("2.9.1 2.10.0 2.11.0 2.12.0 2.12.1 2.13.0 2.14.0 2.14.1", ["2.10.0", "2.12.1", "2.14.1"]),
        ("2.14.1 2.12.1 2.10.0 2.13.0 2.11.0", ["2.10.0", "2.12.1", "2.14.1"]),
        ("2.10.0 2.10.1 2.10.2", ["2.10.2"]),
        ("2.10.0 2.11.0", ["2.10.0", "2.11.0"]),
        ("2.10.9 2.10.10 2.11.0 2.12.0", ["2.10.10", "2.11.0", "2.12.0"]),
        ("2.10.0 2.99.0 3.0.0", ["2.10.0", "2.99.0", "3.0.0"]),
        ("2.10.0 2.11.0 2.12.0 2.13.0", ["2.10.0", "2.12.0", "2.13.0"]),
        ("2.12.0", ["2.12.0"]),
        ("1.13.1 2.9.1", []),
        ("", []),
    ],
)
def test_oldest_middle_newest(tool: ModuleType, versions: str, chosen: list[str]) -> None:
    assert tool.choose(versions.split()) == chosen


@pytest.mark.parametrize(
    ("text", "versions"),
    [
        (INDEX, "1.13.1 2.9.0 2.9.1 2.10.0 2.11.0 2.12.0 2.12.1 2.13.0 2.14.0 2.14.1 2.15.0"),
        ("torch (2.10.0)\nAvailable versions: 2.10.0\n", "2.10.0"),
        ("Available versions: 2.11.0rc1, 2.11.0.dev20260101, 2.10.0+cu130, 2.10.0+cpu, 2.10.0.post1", "2.10.0"),
        ("WARNING: pip index is experimental\nERROR: No matching distribution found for torch\n", ""),
        ("", ""),
    ],
)
def test_what_the_index_lists(tool: ModuleType, text: str, versions: str) -> None:
    assert tool.parse_index(text) == versions.split()


Compat = Callable[..., tuple[int, str]]


@pytest.fixture
def compat(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Compat:
    """Runs the tool with that Python; status, output."""
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "dist").mkdir()
    make_wheel(tmp_path, "one")
    monkeypatch.setattr(tool, "FOLDER", tmp_path / "environments")
    monkeypatch.setattr(tool, "RESULTS", tmp_path / "results")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setenv("INDEX", INDEX)
    monkeypatch.setenv("REFUSED", "2.15.0")

    def run(*arguments: str, **variables: str) -> tuple[int, str]:
        (tmp_path / "log").write_text("")
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            wheel = ["--wheel", str(tmp_path / "dist" / WHEEL)]
            status = tool.main(["--python", str(python), *wheel, *arguments])
        return status, capsys.readouterr().out

    return run


WHEEL = "fastkd-0.1.0-cp399-cp399-linux_x86_64.whl"


def make_wheel(folder: Path, content: str) -> None:
    with zipfile.ZipFile(folder / "dist" / WHEEL, "w") as archive:
        archive.writestr("fastkd/__init__.py", content)


def rows(folder: Path) -> dict[str, dict[str, object]]:
    document = json.loads((folder / "results" / "results.json").read_text())
    return {row["release"]: row for row in document["releases"]}


def called(folder: Path, word: str) -> int:
    return sum(word in line for line in (folder / "log").read_text().splitlines())


def test_all_is_well(compat: Compat, tmp_path: Path) -> None:
    status, shown = compat()
    assert status == 0
    assert "torch 2.15.0 is listed, but pip does not take it here: ERROR: 2.15.0 is excluded" in shown
    assert "== torch 2.12.1, 2 of 3" in shown
    assert list(rows(tmp_path)) == ["2.10.0", "2.12.1", "2.14.1"]
    assert {(row["result"], row["passed"], row["skipped"]) for row in rows(tmp_path).values()} == {("passed", 8, 2)}
    table = (tmp_path / "results" / "table.md").read_text()
    assert "On a GPU of compute capability 7.5, which the wheel has no code for, a tensor is told so" in table
    assert "fastkd works with torch 2.10.0, 2.12.1 and 2.14.1." in table
    assert "| 2.14.1 | 3.99.0 | none | 18 | 18 | 8 | 0 | 2 | passed |" in table
    assert str(tmp_path) not in table + (tmp_path / "results" / "results.json").read_text()
    assert not [path for path in (tmp_path / "environments").iterdir() if path.is_dir()]  # gigabytes


def test_the_wheel_and_not_the_source_tree(compat: Compat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert compat("--versions", "2.10.0")[0] == 0
    (install,) = (line for line in (tmp_path / "log").read_text().splitlines() if " install " in line)
    assert f"torch==2.10.0 fastkd[test] @ {(tmp_path / 'dist' / WHEEL).as_uri()} " in install
    (tests,) = (line for line in (tmp_path / "log").read_text().splitlines() if "--junitxml" in line)
    assert "-m not no_kernels -k not emulated" in tests
    assert tests.endswith(f" {ROOT / 'tests'} emulated:0 path:")
    status, shown = compat("--versions", "2.10.0", "--again", FILE=str(ROOT / "fastkd" / "__init__.py"))
    assert status == 1
    assert "fastkd was not loaded from the wheel" in shown


@pytest.mark.parametrize(
    ("variables", "why"),
    [
        ({"BROKEN": "2.12.1"}, "ERROR: no space left"),
        ({"FAILING": "2.12.1"}, "3 tests have failed"),
    ],
)
def test_one_that_fails_fails_the_check_and_keeps_no_other_from_running(
    variables: dict[str, str], why: str, compat: Compat, tmp_path: Path
) -> None:
    status, shown = compat(**variables)
    assert status == 1
    assert [row["result"] for row in rows(tmp_path).values()] == ["passed", "failed", "passed"]
    assert why in shown
    table = (tmp_path / "results" / "table.md").read_text()
    assert f"| failed: {why} |" in table
    assert "fastkd works with torch 2.10.0 and 2.14.1." in table
    # only what failed is run again
    status, shown = compat()
    assert status == 0
    assert shown.count("passed before, 8 tests: not run again") == 2
    assert called(tmp_path, "-m venv") == ("BROKEN" in variables)  # its environment was kept, to be looked at
    assert called(tmp_path, "--junitxml") == 1
    assert {row["result"] for row in rows(tmp_path).values()} == {"passed"}


@pytest.mark.parametrize(
    ("variables", "why"),
    [
        ({"SILENT": "1"}, "no test has run"),
        ({"CUDA": '"13.0"', "CUDA_OPERATORS": "17"}, "17 of 18 CUDA operators: it did not load"),
        ({"TORCH": "2.13.0"}, "torch is 2.13.0, must be torch==2.10.0"),
        ({"REFUSAL": ""}, "a GPU of compute capability 7.5 is told: nothing"),
        ({"REFUSAL": "were built for 9.0"}, "a GPU of compute capability 7.5 is told: were built for 9.0"),
    ],
)
def test_what_counts_as_a_failure(variables: dict[str, str], why: str, compat: Compat, tmp_path: Path) -> None:
    status, shown = compat("--versions", "2.10.0", **variables)
    assert status == 1
    assert why in shown
    assert rows(tmp_path)["2.10.0"]["result"] == "failed"
    assert "works with no torch that was tried" in shown


def test_a_cpu_build_needs_no_cuda_operators(compat: Compat) -> None:
    assert compat("--versions", "2.10.0", CUDA_OPERATORS="0")[0] == 0


def test_a_step_that_does_not_end_is_stopped(tool: ModuleType, tmp_path: Path) -> None:
    child = [
        sys.executable,
        "-c",
        "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(99)'])",
    ]
    with pytest.raises(tool.StepError, match=r"stopped after 0\.0001 hours"):
        tool.run(child, tmp_path / "log", hours=0.0001)


def test_an_interrupted_check_goes_on(
    compat: Compat, tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = tool.check

    def interrupted(plan: object, folder: Path) -> object:
        if "2.12.1" in folder.name:
            raise KeyboardInterrupt
        return check(plan, folder)

    with monkeypatch.context() as patch:
        patch.setattr(tool, "check", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compat()
    assert list(rows(tmp_path)) == ["2.10.0"]
    assert compat()[0] == 0
    assert called(tmp_path, "--junitxml") == 2
    assert list(rows(tmp_path)) == ["2.10.0", "2.12.1", "2.14.1"]
    assert compat()[0] == 0
    assert called(tmp_path, "--junitxml") == 0
    assert compat("--again")[0] == 0
    assert called(tmp_path, "--junitxml") == 3


def test_another_wheel_begins_a_table_of_its_own(compat: Compat, tmp_path: Path) -> None:
    compat("--versions", "2.10.0")
    make_wheel(tmp_path, "one")  # the same, built again
    compat("--versions", "2.11.0")
    assert list(rows(tmp_path)) == ["2.10.0", "2.11.0"]
    make_wheel(tmp_path, "two")
    status, shown = compat("--versions", "2.12.0")
    assert status == 0
    assert list(rows(tmp_path)) == ["2.12.0"]
    assert "torch 2.12.0." in shown


def test_a_selection_of_tests_is_no_result(compat: Compat, tmp_path: Path) -> None:
    assert compat("--versions", "2.10.0", "--tests", "test_alias.py", "test_crop.py::test_it", "--keep")[0] == 0
    assert not (tmp_path / "results").exists()
    assert (tmp_path / "environments" / "results" / "table.md").exists()
    assert (tmp_path / "environments" / "torch-2.10.0" / "ready").exists()
    (tests,) = (line for line in (tmp_path / "log").read_text().splitlines() if "--junitxml" in line)
    assert f"{ROOT / 'tests' / 'test_alias.py'} {ROOT / 'tests' / 'test_crop.py'}::test_it " in tests


def test_a_build_of_torch_by_its_suffix(compat: Compat, tmp_path: Path) -> None:
    assert compat("--versions", "2.10.0", "--torch-suffix=+cpu")[0] == 0
    assert called(tmp_path, "torch==2.10.0+cpu") == 1
    assert rows(tmp_path)["2.10.0"]["torch"] == "2.10.0+cpu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--versions", "2.9.1"], "--versions has '2.9.1', must be releases of 2.10 or newer"),
        (["--versions", "2.10"], "--versions has '2.10', must be"),
        (["--versions", "newest"], "--versions has 'newest', must be"),
        (["--versions", "2.10.0", "--wheel", "nowhere.whl"], "--wheel is nowhere.whl, must be a file"),
    ],
)
def test_what_is_refused(
    arguments: list[str], message: str, compat: Compat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        compat(*arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"INDEX": "ERROR: no such package"}, "compat: pip lists no torch"),
        ({"REFUSED": "2.1"}, "compat: pip takes no torch of 2.10 or newer"),
        ({"INDEX": "Available versions: 2.9.1, 2.8.0"}, "compat: pip takes no torch of 2.10 or newer"),
    ],
)
def test_an_index_without_torch(variables: dict[str, str], message: str, compat: Compat) -> None:
    with pytest.raises(SystemExit) as ended:
        compat(**variables)
    assert str(ended.value.code).startswith(message)


def test_the_wheel_of_another_python(tool: ModuleType, compat: Compat, tmp_path: Path) -> None:
    python = str(tmp_path / "python")
    assert tool.find_wheel(python, tmp_path / "dist").name == WHEEL
    (tmp_path / "dist" / WHEEL).rename(tmp_path / "dist" / WHEEL.replace("cp399", "cp310"))
    with pytest.raises(SystemExit) as ended:
        tool.find_wheel(python, tmp_path / "dist")
    assert "has no wheel for cp399: run `make wheel`" in str(ended.value.code)


def test_help_and_list(compat: Compat, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / ".ci" / "compat.py"), "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "120"},
    )
    for option in ("--versions", "--torch-suffix", "--python", "--wheel", "--again", "--keep", "--list"):
        assert option in done.stdout
    status, shown = compat("--list")
    assert status == 0
    assert shown.splitlines()[-1] == "torch 2.10.0, 2.12.1, 2.14.1"
    assert called(tmp_path, "venv") == 0


def test_the_readme_says_what_the_table_says(tool: ModuleType) -> None:
    """Where it does not: the sentence is in results/compat/table.md."""
    releases = json.loads((ROOT / "results" / "compat" / "results.json").read_text())["releases"]
    assert tool.markdown(releases) == (ROOT / "results" / "compat" / "table.md").read_text()
    assert tool.sentence(releases) in " ".join((ROOT / "README.md").read_text().split())
