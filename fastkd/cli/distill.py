"""``fastkd distill``: one distillation, from data to test accuracy."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

from fastkd.cli._errors import UsageError, usage_errors
from fastkd.cli._output import check_writable
from fastkd.studies.distillation import Distillation, check, run
from fastkd.training import process_group

MOST_THREADS = 1024  # torch makes as many as it is told to


@dataclass(frozen=True)
class Distill(Distillation):
    """Train a student by a method of the zoo, on CIFAR-10 or another set of small images, and say how good it is.

    A teacher learns the same images first, unless its weights are given. All is in one folder, with metrics and curves; the
    same command goes on where it was interrupted. Works under torchrun, too.
    """

    output: Path = Path("fastkd-distill")
    """The folder of the results."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the networks train; auto takes CUDA where there is a GPU."""
    config: Path | None = None
    """A TOML or YAML file with any of these options, as "epochs = 30"; those of the command line come before them."""
    threads: int = 0
    """Of the CPU; 0: as many as torch takes."""

    def __call__(self, console: Console) -> None:
        settings = Distillation(**{f.name: getattr(self, f.name) for f in fields(Distillation)})
        # first what was said, then the files that it names, then the images, then the work
        with usage_errors():
            check(settings)
        check_device(self.device)
        if not 0 <= self.threads <= MOST_THREADS:
            raise UsageError(
                f"--threads is {self.threads}, must be 0 (as torch takes) or more, and at most {MOST_THREADS}"
            )
        if self.threads:
            torch.set_num_threads(self.threads)
        check_writable("--output", self.output, self.output / "result.json")
        with usage_errors(), process_group(None if self.device == "auto" else self.device) as process:
            result = run(settings, self.output, process)
            if process.rank == 0:
                console.print(_table(settings, result.accuracy, result.teacher_accuracy))
                console.print(f"\nresults  {self.output}", highlight=False, soft_wrap=True)


def check_device(device: str) -> None:
    """Whether there is one."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda cannot be used: torch finds no CUDA device; take --device cpu")


def _table(settings: Distillation, accuracy: float, teacher_accuracy: float | None) -> Table:
    table = Table("network", "learned by", "test accuracy", box=None, pad_edge=False)
    if teacher_accuracy is not None:
        table.add_row(f"teacher {settings.teacher}", "labels", f"{100 * teacher_accuracy:.2f} %")
    table.add_row(f"student {settings.student}", settings.method, f"{100 * accuracy:.2f} %")
    return table
