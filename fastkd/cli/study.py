"""``fastkd study zoo``: the experiments of a paper."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from fastkd._library import build_info
from fastkd.cli._errors import UsageError, usage_errors
from fastkd.cli._output import check_writable
from fastkd.cli.distill import check_device
from fastkd.methods.registry import NAMES
from fastkd.studies import zoo
from fastkd.studies.distillation import Networks, Result, check, check_data

SEEDS_LOOKED_FOR = 20  # of which results of earlier calls are looked for
MOST_SEEDS, MOST_JOBS = 100, 1024  # each seed is a run of every method, each job a process
_OF_THE_MACHINE = ("config", "output", "runs", "device", "jobs", "data_root")  # which the results do not depend on


@dataclass(frozen=True)
class Zoo(Networks):
    """All methods of the zoo under clean data, label noise and unequal classes: "Knowledge Distillation Beyond Model
    Compression" (Sarfraz et al., ICPR 2020).

    Writes a table with mean and standard deviation beside the paper's figures, and a plot. The same command goes on where
    it was interrupted, and adds what more is asked for.
    """

    methods: tuple[str, ...] = NAMES
    """Names of methods."""
    settings: tuple[str, ...] = tuple(zoo.SETTINGS)
    """clean, noise-<share of wrong labels> or imbalance-<gamma>, as in the paper."""
    seeds: int = 3
    """Runs of each, with seeds 0, 1, ...; 5 in the paper."""
    jobs: int = 1
    """Runs side by side, each a process; on a CPU they share its threads."""
    output: Path = Path("fastkd-zoo")
    """The folder of the table, the plot and the numbers."""
    config: Path | None = None
    """A TOML or YAML file with any of these options, as "epochs = 30"; those of the command line come before them."""
    runs: Path | None = None
    """The folder of the runs and their checkpoints; "runs" in --output by default."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the networks train; auto takes CUDA where there is a GPU."""

    def __call__(self, console: Console) -> int:
        # first what was said, then the files that it names, then the images, then the work
        for name, most in (("seeds", MOST_SEEDS), ("jobs", MOST_JOBS)):
            if not 1 <= getattr(self, name) <= most:
                raise UsageError(f"--{name} is {getattr(self, name)}, must be 1 or more, and at most {most}")
        for option, without_effect, instead in (
            ("seed", self.training.seed != 0, "--seeds says how many"),
            ("label-noise", self.data.label_noise != 0.0, f"--settings noise-{self.data.label_noise:g}"),
            ("imbalance", self.data.imbalance != 0.0, f"--settings imbalance-{self.data.imbalance:g}"),
        ):
            if without_effect:
                raise UsageError(f"--{option} has no effect here: {instead}")
        with usage_errors():
            runs = zoo.grid(self, self.methods, self.settings, self.seeds)
            for run in runs:
                if run.seed == 0 and (run.setting == runs[0].setting or run.method == runs[0].method):
                    # networks that one method does not take are among what failed; those of the first stand for all
                    check(run.distillation, step=run is runs[0])
        check_device(self.device)
        device = torch.device("cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu")
        folder = self.runs or self.output / "runs"
        check_writable("--output", self.output, self.output / "table.md")
        check_writable("--runs", folder, folder / "tried")
        with usage_errors():
            check_data(runs[0].distillation)
            failures = self._run(runs, folder, device, console)
            # what earlier calls have run is part of the study, too
            every = zoo.grid(self, NAMES, zoo.SETTINGS, max(self.seeds, SEEDS_LOOKED_FOR))
            results = list(zoo.known(every, folder))
        if results:
            self._report(results, console)
        for run, error in failures:
            console.print(f"failed: {run.setting} {run.method} {run.seed}: {error}", soft_wrap=True, highlight=False)
        return 1 if failures else 0

    def _report(self, results: list[tuple[zoo.Run, Result]], console: Console) -> None:
        from fastkd.studies import report  # matplotlib takes a second to import

        accuracies: zoo.Accuracies = {}
        teachers: zoo.Accuracies = {}
        for run, result in results:
            accuracies.setdefault(run.setting, {}).setdefault(run.method, {})[run.seed] = result.accuracy
            if result.teacher_accuracy is not None:
                teachers.setdefault(run.setting, {}).setdefault(self.teacher, {})[run.seed] = result.teacher_accuracy
        asked = replace(
            self,
            methods=tuple(name for name in NAMES if any(name in methods for methods in accuracies.values())),
            settings=tuple(accuracies),
            seeds=1 + max(run.seed for run, _ in results),
        )
        files = report.save(self.output, accuracies, teachers, asked._about())
        head, *rows = report.overview(accuracies, teachers)
        table = Table(*head, box=None, pad_edge=False)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        for file in files:
            console.print(str(file), highlight=False, soft_wrap=True)

    def _run(
        self, runs: list[zoo.Run], folder: Path, device: torch.device, console: Console
    ) -> list[tuple[zoo.Run, Exception]]:
        """What failed."""
        failures: list[tuple[zoo.Run, Exception]] = []
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("teachers", total=len(runs))
            for run, result in zoo.run_all(runs, folder, device, self.jobs):
                if isinstance(result, Exception):
                    failures.append((run, result))
                    came_to = "failed"
                else:
                    came_to = f"{100 * result.accuracy:.1f} %"
                progress.update(bar, advance=1, description=f"{run.setting} {run.method} {run.seed}: {came_to}")
        return failures

    def _about(self) -> dict[str, object]:
        """What was run, without the folders of this machine."""
        settings = asdict(self)
        for name in _OF_THE_MACHINE:
            settings.pop(name, None)
            settings["data"].pop(name, None)
        return {
            "what": f"{self.student} from {self.teacher} on {self.data.data}: {self.data.train_size or 'all'} training images",
            "command": shlex.join(["fastkd", "study", "zoo", *_options(self, Zoo())]),
            "data": self.data.data.lower(),
            "student": self.student,
            "settings": settings,
            "fastkd": build_info()["version"],
            "torch": torch.__version__,
        }


@dataclass(frozen=True)
class Study:
    """The experiments of a paper: fastkd study zoo."""

    # It stands in the list of commands. What `fastkd study ...` is given goes to the parser of the studies, each a command
    # with options of its own, so this is called only by who makes one.
    def __call__(self, console: Console) -> None:
        raise UsageError("which one? fastkd study zoo")


def _options(given: object, defaults: object) -> list[str]:
    """The options that are not their defaults, as on a command line."""
    options: list[str] = []
    for name, value in vars(given).items():
        default = getattr(defaults, name)
        flag = "--" + name.replace("_", "-")
        if name in _OF_THE_MACHINE or value == default:
            continue
        if hasattr(value, "__dataclass_fields__"):
            options += _options(value, default)
        elif isinstance(value, bool):
            options.append(flag if value else f"--no-{flag[2:]}")
        else:
            options += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return options
