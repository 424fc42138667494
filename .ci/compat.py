#!/usr/bin/env python3
"""Installs one wheel of fastkd beside several releases of torch, and runs the operators' tests in each: make compat.

The releases are the oldest that fastkd takes, the newest that pip takes here, and one half-way, each with its last patch. Every
one gets an environment of its own in build/compat/, which is removed when its tests have passed. What has passed with the
same wheel and the same tests is not run again, so an interrupted check goes on where it was. Results are written after
each release, to results/compat/: results.json and table.md. The status is 1 where something failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.results_file import ResultsFile  # noqa: E402

OLDEST = (2, 10)
RESULTS = ROOT / "results" / "compat"
FOLDER = ROOT / "build" / "compat"
# Those of the operators, but for the emulated launches (FASTKD_EMULATED=0), which are compiled here and not in the wheel.
SELECTION = ("-m", "not no_kernels", "-k", "not emulated")
HOURS = 2.0  # after which a step is stopped

PROBE = """
import json, sys, torch, fastkd
from fastkd import _library
info = fastkd.build_info()
print(json.dumps({
    "file": fastkd.__file__, "fastkd": info["version"], "python": sys.version.split()[0], "torch": torch.__version__,
    "cuda": torch.version.cuda, "operators": len(_library.OPERATORS), "cuda_operators": len(info["cuda_operators"]),
    "architectures": info["cuda_architectures"], "why_not": info.get("cuda_why_not"),
    "refusal": fastkd._C.cuda_refusal("a GPU", 7, 5) if info["cuda_architectures"] else "",
}))
"""

Row = dict[str, Any]


class StepError(Exception):
    """A step of a release has failed; the message is one line."""


class Plan(NamedTuple):
    """What is done for a release."""

    python: str
    wheel: Path
    spec: str  # torch==2.10.0, as pip takes it
    tests: tuple[str, ...]
    keep: bool


def parse_index(text: str) -> list[str]:
    """The releases in the output of `pip index versions torch`, oldest first; without pre-releases and local builds (+cpu)."""
    line = re.search(r"^Available versions: (.*)$", text, re.MULTILINE)
    named = {name.strip().partition("+")[0] for name in line[1].split(",")} if line else set()
    return sorted((name for name in named if re.fullmatch(r"\d+\.\d+\.\d+", name)), key=numbers)


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])))


def choose(versions: Iterable[str]) -> list[str]:
    """The last patch of the oldest release that fastkd takes, of one half-way, and of the newest."""
    last: dict[tuple[int, ...], str] = {}
    for version in sorted(versions, key=numbers):
        if numbers(version) >= OLDEST:
            last[numbers(version)[:2]] = version
    releases = list(last.values())
    return list(dict.fromkeys(releases[place] for place in (0, len(releases) // 2, -1))) if releases else []


def pip(python: str, *arguments: str) -> list[str]:
    return [python, "-m", "pip", "--disable-pip-version-check", *arguments]


def taken(python: str, spec: str) -> str:
    """Why pip does not take it here, as where a constraint excludes it; nothing where it does."""
    command = pip(python, "install", "--quiet", "--dry-run", "--no-deps", "--ignore-installed", spec)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else last_error(done.stdout + done.stderr)


def last_error(text: str) -> str:
    """The line that says most."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"error\b", line, re.IGNORECASE)]
    return (errors or lines or ["it said nothing"])[0][:200]


def releases_here(python: str, suffix: str) -> list[str]:
    """Those to check, of what the index lists and pip takes."""
    listed = subprocess.run(pip(python, "index", "versions", "torch"), capture_output=True, text=True, check=False)
    versions = parse_index(listed.stdout)
    if not versions:
        sys.exit(f"compat: pip lists no torch: {last_error(listed.stderr)}")
    while versions and (why := taken(python, f"torch=={versions[-1]}{suffix}")):
        print(f"torch {versions.pop()} is listed, but pip does not take it here: {why}")
    chosen = choose(versions)
    if not chosen:
        sys.exit(f"compat: pip takes no torch of {'.'.join(map(str, OLDEST))} or newer for {python}")
    return chosen


def find_wheel(python: str, folder: Path) -> Path:
    """The newest wheel for this Python."""
    tag = subprocess.run(
        [python, "-c", "import sys; print('cp%d%d' % sys.version_info[:2])"], capture_output=True, text=True, check=True
    ).stdout.strip()
    wheels = sorted(folder.glob(f"fastkd-*-{tag}-*.whl"), key=lambda path: path.stat().st_mtime)
    if not wheels:
        sys.exit(f"compat: {folder} has no wheel for {tag}: run `make wheel`, with PYTHON=... for another Python")
    return wheels[-1]


def run(command: Sequence[str], log: Path, *, hours: float = HOURS, cwd: Path | None = None) -> str:
    """What the command prints, which is shown and logged as it comes.

    Raises:
        StepError: another status than 0, or no end in time.
    """
    # of the user's settings nothing that would put another fastkd in the place of the wheel
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"PYTHONUNBUFFERED": "1", "FASTKD_EMULATED": "0"}
    said: list[str] = []
    with log.open("a") as file:
        file.write(f"$ {shlex.join(command)}\n")
        # a session of its own, so that what the command started can be ended with it
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            cwd=cwd,
            start_new_session=True,
        ) as process:
            late = threading.Timer(hours * 3600, os.killpg, (process.pid, signal.SIGKILL))
            late.start()
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    said.append(line)
                    file.write(line)
                    print(f"  {line.rstrip()[:160]}", flush=True)
                status = process.wait()
            finally:
                in_time = late.is_alive()
                late.cancel()
                if process.poll() is None:  # Ctrl-C
                    os.killpg(process.pid, signal.SIGKILL)
    if status != 0:
        text = "".join(said)
        raise StepError(last_error(text) if in_time else f"stopped after {hours:g} hours")
    return "".join(said)


def environment(plan: Plan, folder: Path, log: Path) -> str:
    """Its Python; torch and the wheel are installed there."""
    ready, python = folder / "ready", str(folder / "bin" / "python")
    what = f"{plan.spec} {contents(plan.wheel)}"
    if ready.exists() and ready.read_text() == what:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    run([plan.python, "-m", "venv", str(folder)], log)
    run(pip(python, "install", "--progress-bar", "off", plan.spec, f"fastkd[test] @ {plan.wheel.as_uri()}"), log)
    ready.write_text(what)
    return python


def check(plan: Plan, folder: Path) -> Row:
    """One release: its environment, what fastkd finds there, the tests."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    log, report = folder.with_name(f"{folder.name}.log"), folder.with_name(f"{folder.name}.xml")
    log.unlink(missing_ok=True)
    report.unlink(missing_ok=True)
    print(f"-- installing {plan.spec} and {plan.wheel.name}: minutes, and gigabytes to download", flush=True)
    python = environment(plan, folder, log)
    found: Row = json.loads(run([python, "-c", PROBE], log, cwd=folder).splitlines()[-1])
    if not Path(found.pop("file")).is_relative_to(folder):
        raise StepError("fastkd was not loaded from the wheel")
    if numbers(found["torch"]) != numbers(plan.spec):
        raise StepError(f"torch is {found['torch']}, must be {plan.spec}")
    if found["cuda"] and found["architectures"] and found["cuda_operators"] < found["operators"]:
        raise StepError(f"{found['cuda_operators']} of {found['operators']} CUDA operators: {found['why_not']}")
    # no GPU here, so no tensor there: what a tensor on one that is older than the wheel's is told, by the function that says it
    if found["architectures"] and f"were built for {found['architectures']}" not in found["refusal"]:
        raise StepError(f"a GPU of compute capability 7.5 is told: {found['refusal'] or 'nothing'}")
    print("-- the operators' tests: two to six minutes on two cores", flush=True)
    pytest = [str(folder / "bin" / "pytest"), "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
    pytest += ["-p", "no:cacheprovider", "-q", "--tb=short", "-n", "auto", "--dist", "worksteal"]
    begun, why = time.monotonic(), ""
    try:
        run([*pytest, f"--junitxml={report}", *plan.tests], log, cwd=folder)
    except StepError as failure:
        why = str(failure)
    counts = read_report(report)
    found |= {**counts, "seconds": round(time.monotonic() - begun)}
    if counts["failed"]:
        why = f"{counts['failed']} tests have failed"
    elif not counts["passed"]:
        why = why or "no test has run"
    if why:
        return {**found, "result": "failed", "why": why}
    if not plan.keep:
        shutil.rmtree(folder)
    return {**found, "result": "passed"}


def read_report(path: Path) -> dict[str, int]:
    """Numbers of tests in pytest's JUnit file, all 0 where there is none."""
    if not path.exists():
        return {"passed": 0, "failed": 0, "skipped": 0}
    suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    total, failures, errors, skipped = (
        sum(int(suite.get(name, "0")) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    )
    return {"passed": total - failures - errors - skipped, "failed": failures + errors, "skipped": skipped}


def contents(wheel: Path) -> str:
    """A hash of what is in the package: of the wheel as a file it would be another with each build."""
    with zipfile.ZipFile(wheel) as archive:
        files = sorted((file.filename, file.CRC) for file in archive.infolist() if file.filename.startswith("fastkd/"))
    return hashlib.sha256(repr(files).encode()).hexdigest()[:16]


def digest(plan: Plan) -> str:
    """Other where the wheel, the build of torch or the tests are others; the same for all releases."""
    said = hashlib.sha256(" ".join((contents(plan.wheel), plan.wheel.name, plan.spec.partition("+")[2])).encode())
    said.update(" ".join(plan.tests).replace(str(ROOT), "").encode())
    for path in sorted((ROOT / "tests").rglob("*.py")):
        said.update(path.read_bytes())
    return said.hexdigest()[:16]


def sentence(rows: Iterable[Row]) -> str:
    """For the README: with which torch it works."""
    good = sorted({row["release"] for row in rows if row["result"] == "passed"}, key=numbers)
    if not good:
        return "works with no torch that was tried"
    *others, newest = good
    return f"works with torch {', '.join(others)}{' and ' if others else ''}{newest}"


def markdown(rows: Sequence[Row]) -> str:
    """The table, and how it came about."""
    lines = ["# One wheel beside several releases of torch", "", f"fastkd {sentence(rows)}. By `make compat`:", ""]
    lines += ["| torch | Python | its CUDA | operators | on CUDA | passed | failed | skipped | |", "|---" * 9 + "|"]
    for row in rows:
        result = row["result"] if row["result"] == "passed" else f"{row['result']}: {row['why']}"
        cells = [row.get("torch", row["release"]), row.get("python", ""), row.get("cuda") or "none"]
        cells += [row.get(name, "") for name in ("operators", "cuda_operators", "passed", "failed", "skipped")]
        lines.append(f"| {' | '.join(str(cell).replace('|', '/') for cell in (*cells, result))} |")
    lines += ["", "`on CUDA`: operators with a CUDA kernel that torch has loaded; no GPU is needed for that."]
    if any(row.get("architectures") and row.get("refusal") for row in rows):
        lines += [
            "On a GPU of compute capability 7.5, which the wheel has no code for, a tensor is told so, and how to rebuild."
        ]
    lines += ["The tests are those of the operators, without the emulated launches.", ""]
    return "\n".join(lines)


def write(output: Path, rows: Iterable[Row]) -> None:
    rows = sorted(rows, key=lambda row: numbers(row["release"]))
    ResultsFile(output / "results.json").update(releases=rows)
    (output / "table.md").write_text(markdown(rows))


def main(arguments: Sequence[str] | None = None) -> int:
    """Status 0 where all releases have passed, now or before."""
    parser = argparse.ArgumentParser(
        prog="compat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--versions", nargs="+", metavar="V", help="releases of torch, as 2.10.0, instead of the three")
    parser.add_argument(
        "--torch-suffix", default="", metavar="S", help="after the version, as +cpu for a build of pytorch.org"
    )
    parser.add_argument("--python", default=sys.executable, help="whose environments are made; default: this one")
    parser.add_argument("--wheel", type=Path, help="default: the newest of dist/ for that Python")
    parser.add_argument("--output", type=Path, help="default: results/compat/, with --tests build/compat/results/")
    parser.add_argument(
        "--tests", nargs="+", metavar="T", help="a selection, as ops/test_alias.py or ops/test_crop.py::test_fuzz"
    )
    parser.add_argument("--again", action="store_true", help="run what has passed, too")
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    parser.add_argument("--list", action="store_true", help="only say which releases it would be")
    options = parser.parse_args(arguments)
    for version in options.versions or ():
        if not re.fullmatch(r"\d+\.\d+\.\d+", version) or numbers(version) < OLDEST:
            parser.error(f"--versions has {version!r}, must be releases of 2.10 or newer, as 2.10.0")
    releases = list(dict.fromkeys(options.versions or releases_here(options.python, options.torch_suffix)))
    print(f"torch {', '.join(releases)}", flush=True)
    if options.list:
        return 0
    wheel = (options.wheel or find_wheel(options.python, ROOT / "dist")).resolve()
    if not wheel.is_file():
        parser.error(f"--wheel is {options.wheel}, must be a file")
    output = options.output or (FOLDER / "results" if options.tests else RESULTS)
    tests = [f"{ROOT / 'tests' / name}" for name in options.tests or ("",)]
    plans = {
        release: Plan(
            options.python, wheel, f"torch=={release}{options.torch_suffix}", (*SELECTION, *tests), options.keep
        )
        for release in releases
    }
    mark = digest(next(iter(plans.values())))
    # of the same wheel and tests: those of other releases stay in the table
    rows = {
        row["release"]: row
        for row in ResultsFile(output / "results.json").read().get("releases", [])
        if row["digest"] == mark
    }
    for place, (release, plan) in enumerate(plans.items(), 1):
        print(f"\n== torch {release}, {place} of {len(plans)}", flush=True)
        row = rows.get(release, {"result": "failed"})
        if row["result"] == "passed" and not options.again:
            print(f"passed before, {row['passed']} tests: not run again (--again does)")
            continue
        try:
            row = check(plan, FOLDER / f"torch-{release}")
        except StepError as failure:
            row = {"result": "failed", "why": str(failure)}
        rows[release] = {"release": release, **row, "digest": mark, "date": time.strftime("%Y-%m-%d")}
        print(
            f"{row['result']}: {row.get('passed', 0)} tests passed, {row.get('failed', 0)} failed {row.get('why', '')}"
        )
        write(output, rows.values())
    done = [rows[release] for release in releases]
    print(f"\n{markdown(done)}\nwritten to {output}")
    return int(any(row["result"] != "passed" for row in done))


if __name__ == "__main__":
    sys.exit(main())
