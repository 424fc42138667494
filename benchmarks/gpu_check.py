"""``python -m benchmarks.gpu_check``: builds, tests, sanitizes, measures and tunes on the GPU at hand, in eight minutes.

Needs no network and installs nothing: this file runs on the standard library, names what is missing first, and goes on
through failures. Each stage has a share of the time; what a stage leaves unspent, later ones may use. Everything goes
to ``benchmarks/results/<gpu>.json`` as it happens, and the stages' output to ``build/gpu-check/``. ``--only failed`` runs
again what failed by that file, and what had no time; what passed stays there.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from benchmarks import pytest_cache
from benchmarks.results_file import RESULTS, ResultsFile, slug

ROOT = Path(__file__).parents[1]
LOGS = ROOT / "build/gpu-check"
SECONDS = 480.0
HARD_LIMIT = 540.0  # seconds after which all is over, whatever it is at
ASKING = 60.0  # seconds that torch has to say which GPU there is
KILLING = 5.0  # seconds that a killed process has to be gone: one inside the driver may never be
FAILED = "failed"  # of --only
NO_GPU = 2  # exit code
SANITIZER_FOUND_ERRORS = 9

NEEDS = {
    "setuptools": "the build",
    "pybind11": "the build",
    "ninja": "the build",
    "numpy": "fastkd",
    "pytest": "all tests",
    "xdist": "all tests, side by side (pytest-xdist)",
    "pytest_timeout": "all tests: one that hangs is named (pytest-timeout)",
    "pytest_benchmark": "the benchmarks (pytest-benchmark)",
    "hypothesis": "the operators' tests",
    "scipy": "the operators' tests",
    "sklearn": "the mixture's tests (scikit-learn)",
    "threadpoolctl": "the mixture's tests",
    "triton": "the benchmarks: peers torch.compile and Liger-Kernel",
    "liger_kernel": "the benchmarks: peer Liger-Kernel (liger-kernel)",
    "kornia": "the benchmarks: peer kornia RandomCrop",
}
TOOLS = {"nvcc": "the build", "g++": "the build", "compute-sanitizer": "the sanitizer stages"}

_PROBE = """
import json, torch
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    print(json.dumps({"gpu": p.name, "capability": [p.major, p.minor], "torch": torch.__version__}))
else:
    built = torch.version.cuda is not None
    print(json.dumps({"why": "torch sees no GPU" if built else f"torch {torch.__version__} is a build without CUDA"}))
"""


@dataclass(frozen=True)
class Stage:
    """A command and its share of the time; ``{seconds}`` in it becomes the time that it has. ``meanings`` of exit codes."""

    name: str
    command: Sequence[str]
    seconds: float
    show: int = 3  # last lines of a good run to print; a bad one shows more
    live: bool = False  # what it says is printed as it comes
    meanings: Mapping[int, str] | None = None
    must_say: str = ""  # in the last line of a good run: where every test is skipped, pytest too says that all is well
    unavailable: str | None = None  # why it cannot run here
    again: Sequence[str] = ()  # added to the command, so that it runs only what failed before
    cache: Path | None = None  # of pytest, with benchmarks.not_passed: which tests have not passed


@dataclass(frozen=True)
class Outcome:
    """What became of a stage: ``ok``, ``failed``, ``out of time``, ``not begun`` or ``unavailable``."""

    stage: str
    status: str
    seconds: float
    detail: str = ""
    not_passed: Sequence[str] = ()  # tests

    @property
    def bad(self) -> bool:
        """Whether the check as a whole fails by it, and ``--only failed`` runs it again."""
        return is_bad(self.status)


def is_bad(status: str) -> bool:
    """Of a stage."""
    return status in ("failed", "out of time", "not begun")


class Ending:
    """While it is entered, SIGTERM, SIGINT, SIGHUP and the hard limit end the stage that runs, and no other begins."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM)

    def __init__(self, limit: float) -> None:
        self.reason = ""
        self._limit = limit
        self._process: subprocess.Popen[bytes] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Ending:
        heard = [number for number in self.SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # but nohup's SIGHUP
        self._before = {number: signal.signal(number, self._end) for number in heard}
        signal.setitimer(signal.ITIMER_REAL, self._limit)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def watch(self, process: subprocess.Popen[bytes]) -> None:
        """This one is to be ended."""
        self._process = process
        if self.reason:  # which came while it was started
            kill(process)

    def _end(self, number: int, _frame: FrameType | None) -> None:
        self.reason = "the hard limit" if number == signal.SIGALRM else signal.Signals(number).name
        if self._process is not None:
            kill(self._process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """With all that it started: it leads a process group of its own."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def say(text: str, end: str = "\n") -> None:
    """To the screen, if it is still there: without one the check goes on."""
    with suppress(OSError):
        print(text, end=end, flush=True)


def run_stage(
    stage: Stage,
    seconds: float,
    environment: Mapping[str, str],
    logs: Path,
    ending: Ending,
    before: Sequence[str] | None = None,
) -> Outcome:
    """Runs a stage for at most ``seconds``; its output goes to a log, the end of it to the screen.

    before: only what failed is to be run again, these tests, or whatever the command itself knows of.
    """
    if stage.unavailable is not None:
        return Outcome(stage.name, "unavailable", 0.0, stage.unavailable)
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{slug(stage.name)}.log"
    command = [part.replace("{seconds}", f"{max(seconds, 0.0):.0f}") for part in stage.command]
    if stage.cache is not None:
        shutil.rmtree(stage.cache, ignore_errors=True)
    if before is not None and (before or stage.cache is None):
        command += stage.again
        if stage.cache is not None:
            pytest_cache.write(stage.cache, pytest_cache.LAST_FAILED, before)
    start = time.monotonic()
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=dict(environment), stdout=output, stderr=output, start_new_session=True
        )
        ending.watch(process)
        try:
            code = wait(process, seconds, log if stage.live else None)
        finally:
            kill(process)
    elapsed = time.monotonic() - start
    text = log.read_text(errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    left: list[str] = []
    if ending.reason:
        status, detail = "out of time", f"stopped by {ending.reason} after {elapsed:.0f} s"
    elif code == 0 and stage.must_say not in last:
        status, detail = "failed", f"nothing {stage.must_say}: {last}"
    elif code == 0:
        status, detail = "ok", last
    elif code is None:
        status, detail = "out of time", f"stopped after {elapsed:.0f} s"
    elif "Device not supported" in text:
        status, detail = "unavailable", "the tool does not support this device"
    else:
        meaning = (stage.meanings or {}).get(code, f"exit code {code}")
        status, detail = "failed", f"{meaning}: {last}" if last else meaning
    if stage.cache is not None and is_bad(status):
        left = pytest_cache.read(stage.cache, pytest_cache.LAST_FAILED)
        running = pytest_cache.read(stage.cache, pytest_cache.RUNNING)
        if running:
            detail += f", while it ran {', '.join(running)}"
        elif left:
            detail += f", not passed: {', '.join(left)}"
    if not stage.live:
        for line in lines[-(stage.show if status == "ok" else max(stage.show, 40)) :]:
            say(f"  {line[:200]}")
    return Outcome(stage.name, status, round(elapsed, 1), detail[:400], left)


def wait(process: subprocess.Popen[bytes], seconds: float, shown: Path | None) -> int | None:
    """The exit code, or None after so many seconds, when it is killed. What it writes to ``shown`` is printed meanwhile."""
    until, place = time.monotonic() + max(seconds, 0.0), 0
    while True:
        code = process.poll()
        if shown is not None:
            with open(shown, "rb") as file:
                file.seek(place)
                new = file.read()
            place += len(new)
            say(new.decode(errors="replace"), end="")
        if code is not None:
            return code
        if time.monotonic() >= until:
            kill(process)
            try:
                process.wait(KILLING)
            except subprocess.TimeoutExpired:
                say(f"process {process.pid} does not end; it is left behind")
            return None
        time.sleep(0.05)


def run_stages(
    stages: Sequence[Stage],
    seconds: float,
    environment: Mapping[str, str],
    results: ResultsFile,
    logs: Path = LOGS,
    clock: Callable[[], float] = time.monotonic,
    *,
    only_failed: bool = False,
    hard_limit: float = HARD_LIMIT,
) -> list[Outcome]:
    """All stages in turn, whatever becomes of them. The results file has each of them at any time, and those of before."""
    start, total, due = clock(), sum(stage.seconds for stage in stages), 0.0
    before = {entry["stage"]: entry for entry in results.read().get("stages", [])}
    outcomes = {stage.name: Outcome(stage.name, "not begun", 0.0) for stage in stages}

    def keep(outcome: Outcome) -> None:
        outcomes[outcome.stage] = outcome
        entries = before | {name: {**asdict(o), "not_passed": list(o.not_passed)} for name, o in outcomes.items()}
        results.update(stages=list(entries.values()))

    with Ending(hard_limit) as ending:
        for stage in stages:
            due += stage.seconds / total * seconds
            if ending.reason:
                break
            say(f"\n== {stage.name}")
            failed = before.get(stage.name, {}).get("not_passed", []) if only_failed else None
            # what the file says if this process is killed meanwhile; the tests are then known to have failed before
            keep(Outcome(stage.name, "out of time", 0.0, "begun, and nobody saw its end", failed or ()))
            try:
                keep(run_stage(stage, start + due - clock(), environment, logs, ending, failed))
            except OSError as error:  # the command cannot be started
                keep(Outcome(stage.name, "failed", 0.0, str(error)))
        if ending.reason:
            say(f"\nstopped by {ending.reason}")
    return list(outcomes.values())


def missing(python: str, environment: Mapping[str, str]) -> dict[str, str]:
    """What is not installed, and what it is needed for."""
    code = "import importlib.util, sys; print(*(n for n in sys.argv[1:] if importlib.util.find_spec(n) is None))"
    found = subprocess.run(
        [python, "-c", code, *NEEDS], env=dict(environment), capture_output=True, text=True, check=False
    )
    absent = {name: NEEDS[name] for name in found.stdout.split()}
    absent |= {tool: purpose for tool, purpose in TOOLS.items() if find_tool(tool, environment) is None}
    if "ninja" not in absent and not _ninja_has_its_program(python, environment):
        absent["ninja's program"] = f"{NEEDS['ninja']}: the package is here, but not its executable beside this Python"
    return absent


def _ninja_has_its_program(python: str, environment: Mapping[str, str]) -> bool:
    code = "import ninja, os, sys; sys.exit(not os.path.isfile(os.path.join(ninja.BIN_DIR, 'ninja')))"
    return subprocess.run([python, "-c", code], env=dict(environment), capture_output=True, check=False).returncode == 0


def find_tool(name: str, environment: Mapping[str, str]) -> str | None:
    """A tool of the system or of the CUDA toolkit, which is often not on PATH."""
    homes = [Path(environment.get("CUDA_HOME") or "/usr/local/cuda")]
    nvcc = shutil.which("nvcc", path=environment.get("PATH"))
    homes += [Path(nvcc).resolve().parents[1]] if nvcc else []
    folders = [str(home / part) for home in homes for part in ("bin", "compute-sanitizer")]
    return shutil.which(name, path=os.pathsep.join([environment.get("PATH", ""), *folders]))


def architecture(capability: Sequence[int]) -> str:
    """The one architecture to build for: that of the GPU, with its own features where the kernels use them (9.0a)."""
    major, minor = capability
    return f"{major}.{minor}" + ("a" if (major, minor) == (9, 0) else "")


def environment_for(capability: Sequence[int], base: Mapping[str, str]) -> dict[str, str]:
    """The environment of all stages."""
    path = os.pathsep.join(part for part in (str(ROOT), base.get("PYTHONPATH", "")) if part)
    result = {**base, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "FASTKD_CUDA": "1"}
    result.setdefault("TORCH_CUDA_ARCH_LIST", architecture(capability))
    nvcc = find_tool("nvcc", base)
    if nvcc is not None and shutil.which("nvcc", path=base.get("PATH")) is None:
        result["CUDA_HOME"] = str(Path(nvcc).parents[1])
    return result


def carried(root: Path = ROOT) -> bool:
    """Whether the CUDA library was built elsewhere: it is there, without the object files of a build in place."""
    return any(root.glob("fastkd/_cuda*.so")) and not (root / "build/objects").exists()


def pytest_stage(
    python: str, name: str, seconds: float, arguments: Sequence[str], environment: Sequence[str] = (), **more: Any
) -> Stage:
    """A stage of pytest that knows which tests have not passed, however it ends."""
    cache = LOGS / f"{slug(name)}.cache"
    command = [
        "env",
        *environment,
        python,
        "-m",
        "pytest",
        "-v",
        "-p",
        "benchmarks.not_passed",
        "-o",
        f"cache_dir={cache}",
    ]
    nothing_ran = {1: "tests failed", 5: "no test ran: the device fixture has no cuda here, or none was collected"}
    return Stage(
        name,
        [*command, "--tb=short", *arguments],
        seconds,
        **{"must_say": "passed", "meanings": nothing_ran, "again": ["--last-failed"], "cache": cache, **more},
    )


def stages_for(python: str, output: Path, environment: Mapping[str, str]) -> list[Stage]:
    """Build, every operator once, tests, sanitizers, benchmarks, a sweep."""
    own = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_cuda_*.py"))
    # those that take the device fixture: other test files need packages that have nothing to do with a GPU
    shared = sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if "device: torch.device" in path.read_text() and not path.name.startswith("test_cuda_")
    )
    # side by side, as a test mostly waits for the CPU, whose results are the truth; and what hangs is ended, and named: by a
    # thread, as a call that waits for a GPU hears no signal
    side_by_side = ["--continue-on-collection-errors", "--durations=3", "-n", "12", "--dist", "worksteal"]
    side_by_side += ["--timeout", "60", "--timeout-method", "thread"]
    only_cuda = ["FASTKD_ONLY_CUDA=1", "OMP_NUM_THREADS=1"]  # twelve processes have as many threads of the CPU
    tool = find_tool("compute-sanitizer", environment)
    absent = None if tool else "compute-sanitizer is not installed"
    # torch's kernels are not looked at; with its cache of memory off, an access past a tensor is one past an allocation
    sanitizer = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", tool or "compute-sanitizer"]
    sanitizer += ["--kernel-name", "kns=fastkd", f"--error-exitcode={SANITIZER_FOUND_ERRORS}", "--tool"]
    cases = [python, "tests/cuda_cases.py"]
    errors = {SANITIZER_FOUND_ERRORS: "the sanitizer found errors"}
    # one launch at a time, so that a fault is that of the case at hand
    watched = ["env", "CUDA_LAUNCH_BLOCKING=1", python, "-m", "benchmarks.watchdog", "--seconds", "{seconds}"]
    watched += ["--output", str(output), "--worker", shlex.join([python, "tests/cuda_truth.py"])]
    # ends by itself: begins no case that it cannot finish in the time it has; the headlines first
    headlines = ("divergence", "alias", "gmm", "batch", "relation", "moments", "crop", "training", "collections")
    suites = [f"benchmarks/bench_{name}.py" for name in (*headlines, "mosaic", "datafree")]
    measured = [
        "-q",
        "--benchmark-quiet",
        *suites,
        "--device",
        "cuda",
        "--output",
        str(output),
        "--seconds",
        "{seconds}",
    ]
    sweep = [python, "-m", "benchmarks.tuning", "--device", "cuda", "--output", str(output), "--seconds", "{seconds}"]
    return [
        Stage(
            "build",
            [python, "setup.py", "--quiet", "build_ext", "--inplace"],
            60,
            unavailable="the CUDA library that is here was built elsewhere" if carried() else None,
        ),
        Stage("every operator once", watched, 50, live=True, again=["--only-failed"]),
        pytest_stage(python, "cuda tests", 50, [*side_by_side, *own], only_cuda),
        pytest_stage(python, "operator tests on cuda", 60, [*side_by_side, "-m", "not compiles", *shared], only_cuda),
        Stage("memcheck", [*sanitizer, "memcheck", *cases], 50, meanings=errors, unavailable=absent),
        Stage("racecheck", [*sanitizer, "racecheck", *cases], 50, meanings=errors, unavailable=absent),
        pytest_stage(
            python,
            "benchmarks",
            120,
            measured,
            live=True,
            meanings={1: "a case failed"},
            again=["--last-failed", "--keep-rows"],
        ),
        Stage("tuning", sweep, 40, live=True),
    ]


def probe(python: str) -> dict[str, Any]:
    """The GPU as torch sees it, asked in another process so that this one holds nothing of it; or ``why`` there is none."""
    try:
        found = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, check=False, timeout=ASKING)
    except subprocess.TimeoutExpired:
        return {"why": f"torch does not say within {ASKING:.0f} s which GPU there is"}
    if found.returncode:
        return {"why": f"torch does not work here: {(found.stderr.strip().splitlines() or ['?'])[-1]}"}
    answer: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return answer


def summary(outcomes: Sequence[Outcome]) -> str:
    """One line a stage."""
    return "\n".join(f"{o.stage:24} {o.status:12} {o.seconds:6.1f} s  {o.detail[:100]}" for o in outcomes)


def main(arguments: Sequence[str] | None = None) -> int:
    """The whole check; 0 if all went well, 1 if a stage failed, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything (default %(default)g)")
    parser.add_argument("--output", type=Path, help="JSON file; default benchmarks/results/<gpu>.json")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="STAGE",
        help="stages by the first word of their names, as build; or failed: what failed by that file, or had no time",
    )
    options = parser.parse_args(arguments)
    if not 0 < options.seconds <= HARD_LIMIT:
        parser.error(f"--seconds is {options.seconds:g}, must be above 0 and at most {HARD_LIMIT:g}")
    begun = time.monotonic()
    gpu = probe(sys.executable)
    if "why" in gpu:
        say(f"gpu-check: no GPU to check on: {gpu['why']}")
        return NO_GPU
    environment = environment_for(gpu["capability"], os.environ)
    say(f"{gpu['gpu']}, torch {gpu['torch']}, building for {environment['TORCH_CUDA_ARCH_LIST']}")
    absent = missing(sys.executable, environment)
    for name, purpose in absent.items():
        say(f"missing: {name}, needed for {purpose}")
    results = ResultsFile((options.output or RESULTS / f"{slug(gpu['gpu'])}.json").resolve())
    stages = stages_for(sys.executable, results.path, environment)
    only_failed = options.only == [FAILED]
    if only_failed:
        bad = {entry["stage"] for entry in results.read().get("stages", []) if is_bad(entry["status"])}
        if not bad:
            parser.error(f"{results.path} has no stage that failed")
        # what is mended must be built
        stages = [stage for stage in stages if stage.name in bad or stage.name == "build"]
    elif options.only:
        stages = [stage for stage in stages if stage.name.split()[0] in options.only]
        if not stages:
            parser.error(f"no stage begins with {' or '.join(options.only)}")
    else:
        results.clear()
    results.update(check={**gpu, "missing": absent, "date": time.strftime("%Y-%m-%d")})
    spent = time.monotonic() - begun
    outcomes = run_stages(
        stages,
        options.seconds - spent,
        environment,
        results,
        LOGS,
        only_failed=only_failed,
        hard_limit=HARD_LIMIT - spent,
    )
    say(f"\n{summary(outcomes)}\nwritten to {results.path}")
    return int(any(outcome.bad for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
