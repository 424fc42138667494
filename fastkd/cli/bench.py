"""``fastkd bench``: its options, what it refuses, what it shows. The suite itself is ``benchmarks/`` of the source tree."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console

import fastkd
from fastkd.cli._errors import UsageError
from fastkd.cli._output import check_writable

ROOT = Path(fastkd.__file__).resolve().parents[1]


@dataclass(frozen=True)
class Bench:
    """Measure fastkd against what you would use instead, on this machine.

    All contenders of a case get the same inputs, are checked, and take turns. Prints one table; writes all numbers
    as JSON and figures beside it. Ends with status 1 where a case failed or, with --compare, something became slower.
    """

    primitives: tyro.conf.Positional[tuple[str, ...]] = ()
    """What to measure, as divergence or crop; all by default."""
    full: bool = False
    """Sweeps of sizes and threads (half an hour on 2 cores) instead of the quick selection (below 5 minutes)."""
    device: str = "cpu"
    """cpu, cuda or cuda:<n>."""
    match: Annotated[str, tyro.conf.arg(aliases=["-k"])] = ""
    """Only cases whose name matches, as pytest's -k: "KL and not 128x10"."""
    seconds: float = 0.0
    """For everything: a case that does not begin 20 s, or a tenth of the time, before the end is only named. 0: no limit."""
    case_seconds: float = 0.0
    """For the rounds of one contender. 0: 1 on a CPU, 0.2 on a GPU."""
    output: Path | None = None
    """The results file, *.json; figures stand beside it. By default benchmarks/results/<machine>.json, and build/bench/
    for a selection of primitives or cases."""
    compare: Path | None = None
    """An older results file: say what became slower since."""
    tolerance: float = 0.25
    """With --compare: so much slower, after the drift of the machine, is called slower."""
    show: Path | None = None
    """A results file to show, to draw and to compare, instead of measuring."""

    markdown: bool = False
    """Print the table as markdown, as in the README, and draw nothing."""

    def __call__(self, console: Console) -> int:
        self._check()
        if not (ROOT / "benchmarks" / "conftest.py").is_file():
            raise UsageError(
                "the suite is in the source tree, not in the package: clone the repository, then `make bench`"
            )
        try:
            suite, compare = (_of_the_suite(name) for name in ("suite", "compare"))
        except ModuleNotFoundError as error:
            raise UsageError(f'the suite needs {error.name}: pip install "fastkd[bench]"') from None
        for name in self.primitives:
            if name not in suite.primitives():
                raise UsageError(f"nothing is measured for {name!r}; choose from {', '.join(suite.primitives())}")
        try:
            suite.check_match(self.match)
        except ValueError as error:
            raise UsageError(
                f"--match is {self.match!r}, must be an expression as pytest's -k takes: {error}"
            ) from None
        screen = Console(stderr=True) if self.markdown else console  # what is not the markdown
        old = None if self.compare is None else _read(suite, self.compare, "--compare")
        path, complete = (self.show, True) if self.show is not None else self._measure(suite, screen)
        document = _read(suite, path, "--show")
        if not self.markdown:
            check_writable("figures beside", path, path)
        suite.show(document, path, console, as_markdown=self.markdown)
        slower = old is not None and compare.report(old, document, self.tolerance, screen)
        return int(slower or not complete)

    def _measure(self, suite: ModuleType, screen: Console) -> tuple[Path, bool]:
        everything = not (self.primitives or self.match)
        path = self.output or suite.output_for(self.device, full=self.full, complete=everything)
        if self.compare is not None and path.resolve() == self.compare.resolve():
            raise UsageError(f"--compare is {self.compare}, which this run would replace: choose another --output")
        check_writable("--output", path, path)
        try:
            finished: tuple[Path, bool] = suite.run(self._arguments(), path.resolve(), screen)
        except ValueError as error:
            raise UsageError(str(error)) from None
        return finished

    def _check(self) -> None:
        for option, good, allowed in (
            ("seconds", self.seconds >= 0, "0 or more"),
            ("case_seconds", self.case_seconds >= 0, "0 or more"),
            ("tolerance", self.tolerance > 0, "above 0"),
        ):
            if not good:
                raise UsageError(f"--{option.replace('_', '-')} is {getattr(self, option)}, must be {allowed}")
        if self.output is not None and self.output.suffix != ".json":
            raise UsageError(f"--output is {self.output}, must be a name that ends in .json")
        try:
            device = torch.device(self.device)
        except RuntimeError:
            device = None
        if device is None or device.type not in ("cpu", "cuda"):
            raise UsageError(f"--device is {self.device!r}, must be cpu, cuda or cuda:<n>")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise UsageError(
                f"--device {self.device} cannot be used: torch finds {torch.cuda.device_count()} CUDA devices"
            )
        if device.type == "cuda" and self.full:
            raise UsageError("--full is of CPUs: the cases of a GPU are one list")
        if self.show is not None and (self.primitives or self.match or self.output):
            raise UsageError("--show shows all of a file: leave out the primitives, --match and --output")

    def _arguments(self) -> list[str]:
        """Of pytest."""
        files = [f"bench_{name}.py" for name in self.primitives]
        arguments = [str(ROOT / "benchmarks" / file) for file in files] or [str(ROOT / "benchmarks")]
        arguments += ["--device", self.device]
        arguments += ["--sizes", "full"] if self.full else []
        arguments += ["-k", self.match] if self.match else []
        arguments += ["--seconds", str(self.seconds)] if self.seconds else []
        arguments += ["--case-seconds", str(self.case_seconds)] if self.case_seconds else []
        return arguments


def _of_the_suite(name: str) -> ModuleType:
    """A module of the source tree's ``benchmarks``, which is imported from there, wherever Python looks for others."""
    if "benchmarks" not in sys.modules:
        spec = importlib.util.spec_from_file_location("benchmarks", ROOT / "benchmarks" / "__init__.py")
        assert spec is not None
        assert spec.loader is not None
        package = sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(package)
    return importlib.import_module(f"benchmarks.{name}")


def _read(suite: ModuleType, path: Path, option: str) -> dict[str, Any]:
    try:
        document: dict[str, Any] = suite.read(path)
        return document
    except (OSError, ValueError) as error:
        raise UsageError(f"{option} {path} cannot be used: {error}") from None
