"""``make gpu-check`` without a GPU: hangs, crashes, faults, failing tests and signals are survived, named, and run again alone.

In the place of the GPU are small programs that hang or die as it would; the processes, the tests and the files are real.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))  # benchmarks/ is of the source tree, not of the package

from benchmarks import gpu_check, pytest_cache, watchdog  # noqa: E402
from benchmarks.gpu_check import Stage  # noqa: E402
from benchmarks.results_file import ResultsFile  # noqa: E402

pytestmark = pytest.mark.no_kernels

GPU = {"gpu": "Test GPU", "capability": [9, 0], "torch": "2.11"}
XDIST = ("-p", "xdist.plugin", "-n", "1")
PATIENCE = 3.0  # seconds, of which a start of Python takes a part

# Each notes its name in the file `ran`, and does it right once there is a file `mended`.
DEVICE = f"""
import os, pathlib, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
here = pathlib.Path(__file__).parent
poisoned = False

def mended(name):
    with open(here / "ran", "a") as file:
        file.write(name + "\\n")
    return (here / "mended").exists()
"""
WORKER = (
    DEVICE
    + """
from benchmarks.watchdog import serve

def right():
    if poisoned:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
def hang(): time.sleep(60)
def segfault(): os.kill(os.getpid(), signal.SIGSEGV)
def fault():
    global poisoned
    poisoned = True
    right()
def wrong(): assert 1 == 2, "loss: error 0.5"

cases = {"one": right, "hangs": hang, "two": right, "crashes": segfault, "aborts": os.abort, "faults": fault, "three": right,
         "is wrong": wrong, "four": right}
serve({name: lambda name=name, case=case: (mended(name) or case()) and None for name, case in cases.items()})
"""
)
BAD_CASES = {
    "hangs": "hung",
    "crashes": "died of SIGSEGV",
    "aborts": "died of SIGABRT",
    "faults": "fault: RuntimeError: CUDA error: an illegal memory access was encountered",
    "is wrong": "wrong: loss: error 0.5",
}
SUITE = (
    DEVICE
    + """
import pytest
def test_wrong(): assert mended("wrong")
def test_crash(): mended("crash") or os.abort()
@pytest.mark.parametrize("i", range(4))
def test_right(i): mended(f"right{i}")
"""
)
HANGING = (
    DEVICE
    + """
def test_a(): mended("a")
def test_b():
    if not mended("b"):
        time.sleep(60)
def test_c(): mended("c")
"""
)
SLOW = DEVICE + "\nmended('slow') or time.sleep(60)\n"


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str, str], str]:
    """Writes a program beside the files ``ran`` and ``mended``."""

    def write(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    write("pytest.ini", "[pytest]\n")
    return write


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, dict[str, Any], list[str]]]:
    """Runs gpu_check with these stages: exit code, results file, and what has run, in order of names."""
    monkeypatch.setattr(gpu_check, "probe", lambda _: GPU)
    monkeypatch.setattr(gpu_check, "missing", lambda *_: {})
    monkeypatch.setattr(gpu_check, "LOGS", tmp_path / "logs")
    output, ran = tmp_path / "out.json", tmp_path / "ran"

    def run(stages: Callable[[], list[Stage]], *arguments: str) -> tuple[int, dict[str, Any], list[str]]:
        monkeypatch.setattr(gpu_check, "stages_for", lambda *_: stages())
        ran.write_text("")
        code = gpu_check.main(["--output", str(output), "--seconds", "120", *arguments])
        return code, json.loads(output.read_text()), sorted(ran.read_text().split("\n")[:-1])

    return run


def python_stage(name: str, seconds: float, *command: str, **more: Any) -> Stage:
    return Stage(name, [sys.executable, *command], seconds, **more)


def suite_stage(path: str, *arguments: str, seconds: float = 40) -> Stage:
    options = ["-c", str(Path(path).parent / "pytest.ini"), *arguments, path]
    fast = ["PYTEST_DISABLE_PLUGIN_AUTOLOAD=1"]  # importing them all takes seconds
    return gpu_check.pytest_stage(sys.executable, "tests", seconds, options, fast)


def watchdog_stage(worker: str, output: Path) -> Stage:
    command = ["-m", "benchmarks.watchdog", "--seconds", "{seconds}", "--patience", str(PATIENCE)]
    command += ["--output", str(output), "--worker", f"{sys.executable} {worker}"]
    return python_stage("every operator once", 40, *command, live=True, again=["--only-failed"])


def status(results: dict[str, Any]) -> dict[str, str]:
    return {entry["stage"]: entry["status"] for entry in results["stages"]}


def test_a_whole_check(script: Callable, check: Callable, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """All that may go wrong goes wrong; then it is mended, and no more than that runs again."""
    slow, worker, suite = script("slow.py", SLOW), script("worker.py", WORKER), script("test_suite.py", SUITE)

    def stages() -> list[Stage]:
        return [
            python_stage("slow", 0.5, slow),
            python_stage("build", 10, "-c", "print('built')"),
            watchdog_stage(worker, tmp_path / "out.json"),
            suite_stage(suite, *XDIST),
            python_stage("last", 10, "-c", "print('all is well')"),
        ]

    code, results, _ = check(stages)
    assert code == 1
    assert status(results) == {
        "slow": "out of time",
        "build": "ok",
        "every operator once": "failed",
        "tests": "failed",
        "last": "ok",
    }
    good = dict.fromkeys(("one", "two", "three", "four"), "ok")
    assert results["cases"] == good | BAD_CASES
    entries = {entry["stage"]: entry for entry in results["stages"]}
    assert "hangs: hung; crashes: died of SIGSEGV" in entries["every operator once"]["detail"]
    assert {name.rpartition("::")[2] for name in entries["tests"]["not_passed"]} == {"test_wrong", "test_crash"}
    assert "test_crash" in entries["tests"]["detail"]
    assert "[2/9] hangs: hung" in capfd.readouterr().out  # as it goes

    (tmp_path / "mended").touch()
    code, results, ran = check(stages, "--only", "failed")
    assert code == 0
    assert set(status(results).values()) == {"ok"}
    assert ran == sorted(["slow", *BAD_CASES, "wrong", "crash"])
    assert results["cases"] == good | dict.fromkeys(BAD_CASES, "ok")
    assert not any(entry["not_passed"] for entry in results["stages"])
    assert results["check"]["gpu"] == "Test GPU"
    with pytest.raises(SystemExit) as ended:
        check(stages, "--only", "failed")
    assert ended.value.code == 2
    assert "has no stage that failed" in capfd.readouterr().err


def test_what_fails_again_stays_to_be_run(script: Callable, check: Callable) -> None:
    suite = script("test_suite.py", SUITE)
    for arguments in ([], ["--only", "failed"]):
        code, results, ran = check(lambda: [suite_stage(suite, *XDIST)], *arguments)
        assert code == 1
        assert len(results["stages"][0]["not_passed"]) == 2
        assert set(ran) == {"wrong", "crash"} | (set() if arguments else {f"right{i}" for i in range(4)})


@pytest.mark.parametrize("xdist", [(), XDIST], ids=["alone", "xdist"])
def test_a_stage_of_tests_that_runs_out_of_time(
    xdist: tuple[str, ...], script: Callable, check: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test that hangs is named; it and those behind it are run again, not the one before."""
    suite, waits = script("test_hanging.py", HANGING), gpu_check.wait

    def stages() -> list[Stage]:
        return [suite_stage(suite, *xdist)]

    def no_longer_than_to_the_hang(process: subprocess.Popen[bytes], seconds: float, shown: Path | None) -> int | None:
        until, cache = time.monotonic() + 60, gpu_check.LOGS / "tests.cache"
        while time.monotonic() < until:
            heard_of = any("test_b" in name for name in pytest_cache.read(cache, pytest_cache.RUNNING))
            if heard_of and "b\n" in (tmp_path / "ran").read_text():
                break
            time.sleep(0.02)
        return waits(process, 0.0, shown)

    with monkeypatch.context() as patch:
        patch.setattr(gpu_check, "wait", no_longer_than_to_the_hang)
        code, results, ran = check(stages)
    (entry,) = results["stages"]
    assert (code, entry["status"], ran) == (1, "out of time", ["a", "b"])
    assert entry["detail"].endswith("while it ran test_hanging.py::test_b")
    assert {"test_hanging.py::test_b", "test_hanging.py::test_c"} <= set(entry["not_passed"])
    (tmp_path / "mended").touch()
    code, results, ran = check(stages, "--only", "failed")
    assert (code, results["stages"][0]["status"]) == (0, "ok")
    assert {"b", "c"} <= set(ran)


def test_a_file_that_cannot_be_imported_has_not_passed(script: Callable, check: Callable) -> None:
    suite = script("test_broken.py", "import no_such_module\n")
    code, results, _ = check(lambda: [suite_stage(suite)])
    assert (code, results["stages"][0]["not_passed"]) == (1, ["test_broken.py"])


# ---- the check itself is ended -----------------------------------------------------------------------

CHECK = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which whatever runs in the background is born without
sys.path.insert(0, {root!r})
from benchmarks import gpu_check
from benchmarks.gpu_check import Stage
from pathlib import Path
folder = Path({folder!r})
gpu_check.probe = lambda _: {gpu!r}
gpu_check.missing = lambda *_: {{}}
gpu_check.LOGS = folder / "logs"
endless = "import os, time; open({pid!r}, 'w').write(str(os.getpid())); time.sleep(60)"
gpu_check.stages_for = lambda *_: [
    Stage("first", [sys.executable, "-c", "print('done')"], 10),
    Stage("second", [sys.executable, "-c", endless], 10),
    Stage("third", [sys.executable, "-c", "print('never')"], 10),
]
sys.exit(gpu_check.main(["--output", str(folder / "out.json")]))
"""


def written(path: Path) -> str:
    """Its text, once there is some."""
    until = time.monotonic() + 60
    while not (path.exists() and path.read_text()) and time.monotonic() < until:
        time.sleep(0.02)
    return path.read_text()


def is_there(pid: int) -> bool:
    """Whether the process runs; one that only waits to be asked for its status does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_a_signal_leaves_results(number: signal.Signals, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = CHECK.format(root=str(ROOT), folder=str(tmp_path), gpu=GPU, pid=str(pid))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    stage = int(written(pid))
    process.send_signal(number)
    ended = process.wait(60)
    results = ResultsFile(tmp_path / "out.json").read()
    assert status(results) == {"first": "ok", "second": "out of time", "third": "not begun"}
    if number == signal.SIGKILL:  # what it had started lives on: nobody was there to end it
        assert ended == -signal.SIGKILL
        os.kill(stage, signal.SIGKILL)
        assert "nobody saw its end" in results["stages"][1]["detail"]
    else:
        assert ended == 1
        assert not is_there(stage)
        assert f"stopped by {number.name}" in results["stages"][1]["detail"]


def test_a_screen_that_is_gone_ends_nothing(tmp_path: Path) -> None:
    code = CHECK.format(root=str(ROOT), folder=str(tmp_path), gpu=GPU, pid=str(tmp_path / "pid"))
    code = code.replace("time.sleep(60)", "print('ended')")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    process.wait(60)
    assert status(ResultsFile(tmp_path / "out.json").read()) == dict.fromkeys(("first", "second", "third"), "ok")


def test_the_hard_limit_ends_everything(tmp_path: Path) -> None:
    results = ResultsFile(tmp_path / "out.json")
    stages = [python_stage("endless", 50, "-c", "import time; time.sleep(60)"), python_stage("next", 50, "-c", "pass")]
    outcomes = gpu_check.run_stages(stages, 100, dict(os.environ), results, tmp_path / "logs", hard_limit=0.5)
    assert [outcome.status for outcome in outcomes] == ["out of time", "not begun"]
    assert "the hard limit" in outcomes[0].detail
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as before


def test_more_time_than_there_is_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for seconds in ("541", "0", "-1"):
        with pytest.raises(SystemExit):
            gpu_check.main(["--seconds", seconds])
        assert f"--seconds is {seconds}, must be above 0 and at most 540" in capsys.readouterr().err


# ---- the watchdog by itself --------------------------------------------------------------------------


def test_the_watchdog_ends_in_time(script: Callable, tmp_path: Path) -> None:
    endless = "from benchmarks.watchdog import serve\nserve({str(i): lambda: time.sleep(1) for i in range(60)})\n"
    worker, results = script("worker.py", DEVICE + endless), ResultsFile(tmp_path / "out.json")
    cases = watchdog.watch([sys.executable, worker], results, 4.0, PATIENCE)
    assert len(cases) == 60
    assert cases["59"] == watchdog.NOT_RUN
    assert results.read()["cases"] == cases


def test_a_worker_that_does_not_start(script: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    worker = script("worker.py", "import no_such_module\n")
    assert watchdog.main(["--output", str(tmp_path / "out.json"), "--worker", f"{sys.executable} {worker}"]) == 1
    assert "the worker could not be started: it ended with status 1" in capsys.readouterr().out


def test_half_a_list_of_tests_is_none(tmp_path: Path) -> None:
    """pytest writes its own in place: a kill may come in between."""
    assert pytest_cache.read(tmp_path, pytest_cache.LAST_FAILED) == []
    pytest_cache.write(tmp_path, pytest_cache.LAST_FAILED, ["a", "b"])
    assert pytest_cache.read(tmp_path, pytest_cache.LAST_FAILED) == ["a", "b"]
    path = tmp_path / "v" / pytest_cache.LAST_FAILED
    path.write_text(path.read_text()[:5])
    assert pytest_cache.read(tmp_path, pytest_cache.LAST_FAILED) == []
