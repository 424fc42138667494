"""``python -m benchmarks.gpu_check``: builds, tests, sanitizes and measures on the GPU at hand, in eight minutes.

Needs no network and installs nothing: this file runs on the standard library, names what is missing first, and goes on
through failures. Each stage has a share of the time; what a stage leaves unspent, later ones may use. Everything goes
to ``benchmarks/results/<gpu>.json`` as it happens, and the stages' output to ``build/gpu-check/``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.results_file import RESULTS, ResultsFile, slug

ROOT = Path(__file__).parents[1]
LOGS = ROOT / "build/gpu-check"
SECONDS = 480.0
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
    meanings: Mapping[int, str] | None = None
    must_say: str = ""  # in the last line of a good run: where every test is skipped, pytest too says that all is well
    unavailable: str | None = None  # why it cannot run here


@dataclass(frozen=True)
class Outcome:
    """What became of a stage: ``ok``, ``failed``, ``out of time`` or ``unavailable``."""

    stage: str
    status: str
    seconds: float
    detail: str = ""

    @property
    def bad(self) -> bool:
        """Whether the check as a whole fails by it."""
        return self.status in ("failed", "out of time")


def run_stage(stage: Stage, seconds: float, environment: Mapping[str, str], logs: Path = LOGS) -> Outcome:
    """Runs a stage for at most ``seconds``; its output goes to a log, the end of it to the screen."""
    if stage.unavailable is not None:
        return Outcome(stage.name, "unavailable", 0.0, stage.unavailable)
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{slug(stage.name)}.log"
    command = [part.replace("{seconds}", f"{max(seconds, 0.0):.0f}") for part in stage.command]
    start = time.monotonic()
    with open(log, "wb") as output:
        # a session of its own, so that what the command started can be ended with it
        process = subprocess.Popen(
            command, cwd=ROOT, env=dict(environment), stdout=output, stderr=output, start_new_session=True
        )
        try:
            code: int | None = process.wait(max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    elapsed = time.monotonic() - start
    text = log.read_text(errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if code == 0 and stage.must_say not in last:
        status, detail = "failed", f"nothing {stage.must_say}: {last}"
    elif code == 0:
        status, detail = "ok", last
    elif code is None:
        status, detail = "out of time", f"stopped after {elapsed:.0f} s"
    elif "Device not supported" in text:
        status, detail = "unavailable", "the tool does not support this device"
    else:
        status, detail = "failed", (stage.meanings or {}).get(code, f"exit code {code}")
    for line in lines[-(stage.show if status == "ok" else max(stage.show, 40)) :]:
        print(f"  {line[:200]}")
    return Outcome(stage.name, status, round(elapsed, 1), detail[:200])


def run_stages(
    stages: Sequence[Stage],
    seconds: float,
    environment: Mapping[str, str],
    results: ResultsFile,
    logs: Path = LOGS,
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """All stages in turn, whatever becomes of them; the results file holds each as soon as it is over."""
    start, total, due = clock(), sum(stage.seconds for stage in stages), 0.0
    outcomes: list[Outcome] = []
    for stage in stages:
        due += stage.seconds / total * seconds
        print(f"\n== {stage.name}", flush=True)
        try:
            outcomes.append(run_stage(stage, start + due - clock(), environment, logs))
        except OSError as error:  # the command cannot be started
            outcomes.append(Outcome(stage.name, "failed", 0.0, str(error)))
        results.update(stages=[asdict(outcome) for outcome in outcomes])
    return outcomes


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


def stages_for(python: str, output: Path, environment: Mapping[str, str]) -> list[Stage]:
    """Build, every operator once, tests, sanitizers, benchmarks."""
    own = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_cuda_*.py"))
    # those that take the device fixture: other test files need packages that have nothing to do with a GPU
    shared = sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").glob("test_*.py")
        if "device: torch.device" in path.read_text() and not path.name.startswith("test_cuda_")
    )
    # side by side, as a test mostly waits for the CPU, whose results are the truth; and what hangs is ended, and named
    pytest = ["env", "FASTKD_ONLY_CUDA=1", python, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=short"]
    pytest += [
        "--continue-on-collection-errors",
        "--durations=3",
        "-n",
        "12",
        "--dist",
        "worksteal",
        "--timeout",
        "100",
    ]
    tool = find_tool("compute-sanitizer", environment)
    absent = None if tool else "compute-sanitizer is not installed"
    # torch's kernels are not looked at; with its cache of memory off, an access past a tensor is one past an allocation
    sanitizer = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", tool or "compute-sanitizer"]
    sanitizer += ["--kernel-name", "kns=fastkd", f"--error-exitcode={SANITIZER_FOUND_ERRORS}", "--tool"]
    cases = [python, "tests/cuda_cases.py"]
    nothing_ran = {5: "no test ran: the device fixture has no cuda here, or none was collected"}
    errors = {SANITIZER_FOUND_ERRORS: "the sanitizer found errors"}
    # ends by itself: begins no case that it cannot finish in the time it has; the headlines first
    suites = [
        f"benchmarks/bench_{name}.py"
        for name in ("divergence", "alias", "gmm", "batch", "relation", "crop", "training")
    ]
    measured = [python, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--benchmark-quiet", "--tb=short", *suites]
    measured += ["--device", "cuda", "--output", str(output), "--seconds", "{seconds}"]
    return [
        Stage(
            "build",
            [python, "setup.py", "--quiet", "build_ext", "--inplace"],
            60,
            unavailable="the CUDA library that is here was built elsewhere" if carried() else None,
        ),
        # one launch at a time: where one hangs or faults, the log ends with the case before it
        Stage("every operator once", ["env", "CUDA_LAUNCH_BLOCKING=1", *cases], 20),
        Stage("cuda tests", [*pytest, *own], 60, must_say="passed", meanings=nothing_ran),
        Stage(
            "operator tests on cuda",
            [*pytest, "-m", "not compiles", *shared],
            60,
            must_say="passed",
            meanings=nothing_ran,
        ),
        Stage("memcheck", [*sanitizer, "memcheck", *cases], 40, meanings=errors, unavailable=absent),
        Stage("racecheck", [*sanitizer, "racecheck", *cases], 60, meanings=errors, unavailable=absent),
        Stage("benchmarks", measured, 180, show=500, must_say="passed", meanings={1: "a case failed"}),
    ]


def probe(python: str) -> dict[str, Any]:
    """The GPU as torch sees it, asked in another process so that this one holds nothing of it; or ``why`` there is none."""
    found = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, check=False)
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
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="stages by the first word of their names, as build")
    options = parser.parse_args(arguments)
    gpu = probe(sys.executable)
    if "why" in gpu:
        print(f"gpu-check: no GPU to check on: {gpu['why']}")
        return NO_GPU
    environment = environment_for(gpu["capability"], os.environ)
    print(f"{gpu['gpu']}, torch {gpu['torch']}, building for {environment['TORCH_CUDA_ARCH_LIST']}")
    absent = missing(sys.executable, environment)
    for name, purpose in absent.items():
        print(f"missing: {name}, needed for {purpose}")
    output = (options.output or RESULTS / f"{slug(gpu['gpu'])}.json").resolve()
    stages = stages_for(sys.executable, output, environment)
    if options.only:
        stages = [stage for stage in stages if stage.name.split()[0] in options.only]
        if not stages:
            parser.error(f"no stage begins with {' or '.join(options.only)}")
    results = ResultsFile(output)
    results.clear()
    results.update(check={**gpu, "missing": absent, "date": time.strftime("%Y-%m-%d")})
    outcomes = run_stages(stages, options.seconds, environment, results)
    print(f"\n{summary(outcomes)}\nwritten to {output}")
    return int(any(outcome.bad for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
