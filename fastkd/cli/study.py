"""``fastkd study NAME``: a grid of runs, its table and its figure."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from fastkd._build_info import build_info
from fastkd.cli._errors import UsageError, usage_errors
from fastkd.cli._output import check_writable
from fastkd.cli.distill import check_device
from fastkd.studies import names as study_names
from fastkd.studies.distillation import Experiment
from fastkd.studies.result import Result
from fastkd.studies.study import Run, Study, find, known, run_all

SEEDS_LOOKED_FOR = 20  # of which results of earlier calls are looked for
MOST_SEEDS, MOST_JOBS = 100, 1024  # each seed is a run of every method, each job a process
_OF_THE_MACHINE = ("config", "output", "runs", "device", "jobs", "data_root")  # which the results do not depend on

if TYPE_CHECKING:
    _Base = Study
else:  # the fields of a study come before those that all have
    _Base = object


@dataclass(frozen=True)
class StudyCommand(_Base):
    """What any study is told, beside its own options."""

    seeds: int = 3
    """Runs of each, with seeds 0, 1, ..."""
    jobs: int = 1
    """Runs side by side, each a process; on a CPU they share its threads."""
    output: Path | None = None
    """The folder of the table, the plot and the numbers; fastkd-<name> by default."""
    config: Path | None = None
    """A TOML or YAML file with any of these options, as "epochs = 30"; those of the command line come before them."""
    runs: Path | None = None
    """The folder of the runs and their checkpoints; "runs" in --output by default."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the networks train; auto takes CUDA where there is a GPU."""

    def __call__(self, console: Console) -> int:
        # first what was said, then the files that it names, then the images, then the work
        self._check()
        with usage_errors():
            runs = self.grid(self._rows, self._columns, self.seeds)
            for run in runs:
                if run.seed == 0 and (run.column == runs[0].column or run.row == runs[0].row):
                    # networks that one method does not take are among what failed; those of the first stand for all
                    Experiment(run.distillation).check(step=run is runs[0])
        check_device(self.device)
        device = torch.device("cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu")
        output = self.output or Path(f"fastkd-{self.name}")
        folder = self.runs or output / "runs"
        check_writable("--output", output, output / "table.md")
        check_writable("--runs", folder, folder / "tried")
        with usage_errors():
            for column in dict.fromkeys(run.column for run in runs):  # each may have images of its own
                Experiment(next(run for run in runs if run.column == column).distillation).check_data()
            failures = self._run(runs, folder, device, console)
            # what earlier calls have run is part of the study, too
            every = self.grid(self.row_names(), self.column_names(), max(self.seeds, SEEDS_LOOKED_FOR))
            results = list(known(every, folder))
        if results:
            self._report(results, output, console)
        for run, error in failures:
            console.print(f"failed: {run.column} {run.row} {run.seed}: {error}", soft_wrap=True, highlight=False)
        return 1 if failures else 0

    @property
    def _rows(self) -> tuple[str, ...]:
        return tuple(getattr(self, self.row_option))

    @property
    def _columns(self) -> tuple[str, ...]:
        return tuple(getattr(self, self.column_option))

    def _check(self) -> None:
        for name, most in (("seeds", MOST_SEEDS), ("jobs", MOST_JOBS)):
            if not 1 <= getattr(self, name) <= most:
                raise UsageError(f"--{name} is {getattr(self, name)}, must be 1 or more, and at most {most}")
        if self.training.seed != 0:
            raise UsageError("--seed has no effect here: --seeds says how many")
        for name, instead in self.of_the_grid.items():
            if value := getattr(self.data, name):
                raise UsageError(f"--{name.replace('_', '-')} has no effect here: {instead.format(value)}")

    def _report(self, results: list[tuple[Run, Result]], output: Path, console: Console) -> None:
        from fastkd.studies import report  # matplotlib takes a second to import

        accuracies: dict[str, dict[str, dict[int, float]]] = {}
        teachers: dict[str, dict[str, dict[int, float]]] = {}
        figures: dict[str, dict[str, dict[str, dict[int, float]]]] = {}
        measure = self.measure
        for run, result in results:
            for name, value in result.figures.items():
                figures.setdefault(name, {}).setdefault(run.column, {}).setdefault(run.row, {})[run.seed] = value
            student, teacher = result.by(measure)
            accuracies.setdefault(run.column, {}).setdefault(run.row, {})[run.seed] = student
            if teacher is not None:
                of_column = teachers.setdefault(run.column, {})
                seed = run.distillation.of_teacher().training.seed  # one that students of all seeds share is one
                of_column.setdefault(run.distillation.teacher, {})[seed] = teacher
        rows = report.in_order(self, {row for of_rows in accuracies.values() for row in of_rows})
        changes: dict[str, Any] = {self.row_option: tuple(rows), self.column_option: tuple(accuracies)}
        asked = replace(self, seeds=1 + max(run.seed for run, _ in results), **changes)
        files = report.save(output, self, accuracies, teachers, asked._about(taught=bool(teachers)), figures)
        head, *lines = report.overview(self, accuracies, teachers)
        table = Table(*head, box=None, pad_edge=False)
        for line in lines:
            table.add_row(*line)
        console.print(table)
        for file in files:
            console.print(str(file), highlight=False, soft_wrap=True)

    def _run(
        self, runs: list[Run], folder: Path, device: torch.device, console: Console
    ) -> list[tuple[Run, Exception]]:
        """What failed."""
        failures: list[tuple[Run, Exception]] = []
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("teachers", total=len(runs))
            for run, result in run_all(runs, folder, device, self.jobs):
                if isinstance(result, Exception):
                    failures.append((run, result))
                    came_to = "failed"
                else:
                    came_to = f"{100 * result.by(self.measure)[0]:.1f} %"
                progress.update(bar, advance=1, description=f"{run.column} {run.row} {run.seed}: {came_to}")
        return failures

    def _about(self, *, taught: bool) -> dict[str, object]:
        """What was run, without the folders of this machine.

        Args:
            taught: whether any run has a teacher.
        """
        networks = f"{self.student} from {self.teacher}" if taught else self.student
        said = self if self.plugin is None else replace(self, plugin=Path(self.plugin.name))
        if (file := said.data.label_file) is not None:
            said = replace(said, data=replace(said.data, label_file=Path(file.name)))
        settings = asdict(said)
        for name in _OF_THE_MACHINE:
            settings.pop(name, None)
            settings["data"].pop(name, None)
        return {
            "what": f"{networks} on {self.data.data}: {self.data.train_size or 'all'} training images",
            "command": shlex.join(["fastkd", "study", self.name, *options_of(said, type(self)())]),
            "data": self.data.data.lower(),
            "student": self.student,
            "settings": settings,
            "fastkd": build_info()["version"],
            "torch": torch.__version__,
        }


def commands() -> dict[str, Callable[..., StudyCommand]]:
    """A command for each study, with the options of all and its own."""
    return {name: _command(find(name)) for name in study_names()}


def _command(kind: type[Study]) -> type[StudyCommand]:
    made = type(kind.__name__, (StudyCommand, kind), {"__doc__": kind.__doc__, "__module__": kind.__module__})
    return dataclass(frozen=True)(made)


@dataclass(frozen=True)
class Studies:
    """The experiments of a paper: fastkd study zoo."""

    # It stands in the list of commands. What `fastkd study ...` is given goes to the parser of the studies, each a command
    # with options of its own, so this is called only by who makes one.
    def __call__(self, console: Console) -> None:
        raise UsageError(f"which one? fastkd study {' or '.join(study_names())}")


def options_of(given: object, defaults: object) -> list[str]:
    """The options that are not their defaults, as on a command line."""
    options: list[str] = []
    for f in fields(given):  # type: ignore[arg-type]
        name, value = f.name, getattr(given, f.name)
        default = getattr(defaults, name)
        flag = "--" + name.replace("_", "-")
        if name in _OF_THE_MACHINE or value == default:
            continue
        if hasattr(value, "__dataclass_fields__"):
            options += options_of(value, default)
        elif isinstance(value, bool):
            options.append(flag if value else f"--no-{flag[2:]}")
        else:
            options += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return options
