"""``fastkd demo``: its options, what it refuses, and the order of what it shows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fastkd._build_info import build_info
from fastkd._library import CUDA_OPERATORS
from fastkd.cli._errors import UsageError
from fastkd.cli._output import check_writable
from fastkd.studies.demo import experiment

FILE_NAME = "fastkd-demo.png"
QUICK = {"steps": 200, "teacher_steps": 100, "collection_size": 2000, "repeats": 1}
OPERATORS_CALLED = (
    "alias_build",
    "alias_inverse_temperature",
    "alias_sample",
    "alias_weights",
    "divergence",
    "divergence_backward_",
    "logit_stats",
)


@dataclass(frozen=True)
class Demo(experiment.Settings):
    """Distill on an unlabeled collection, with nothing to fetch: about a minute on a CPU.

    A teacher learns scikit-learn's handwritten digits. A student 30 times smaller learns from the teacher's logits on
    a collection without labels, most of it patches of photographs: by biased draws, softmax(lambda * T1000 score), by
    uniform draws, and, for reference, on the labelled digits. Writes a figure, and the numbers as JSON next to it.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the networks train. fastkd's operators run there too, or on the CPU where they have no CUDA kernel yet; auto
    takes CUDA where all of them have."""
    output: Path = Path(FILE_NAME)
    """The figure (a name that ends in .png) or a folder for it."""
    quick: bool = False
    """Small sizes (1 student of each kind, 200 steps): to see that it works, not what it shows."""

    def __call__(self, console: Console) -> None:
        self._check()
        devices = _choose_devices(self.device)
        figure_path = _prepare_output(self.output)
        json_path = figure_path.with_suffix(".json")
        from fastkd.studies.demo import figure, report, timing  # matplotlib takes a second to import

        settings = experiment.Settings(**{f.name: getattr(self, f.name) for f in fields(experiment.Settings)})
        if self.quick:
            settings = replace(settings, **{name: min(getattr(settings, name), tiny) for name, tiny in QUICK.items()})
        console.print(report.introduction(settings, devices.networks))
        figure_path.parent.mkdir(parents=True, exist_ok=True)
        if devices.networks != devices.operators:
            console.print(f"fastkd's operators run on the {devices.operators.type.upper()}: {_why_no_kernels()}.\n")
        with _progress(console) as progress:
            results = experiment.run(settings, devices, progress)
            with progress("timing of the loss", 1) as advance:
                loss_time = timing.time_loss(settings.batch_size, 10, settings.temperature, devices.operators)
                advance()
            with progress("figure", 1) as advance:
                figure.save(results, figure_path)
                advance()
        summary = report.summary(results)
        document = {
            "fastkd": build_info()["version"],
            "device": devices.networks.type,
            **summary,
            "timing": loss_time._asdict(),
        }
        json_path.write_text(json.dumps(document, indent=2) + "\n")
        console.print()
        console.print(report.table(summary))
        console.print(report.conclusion(summary, loss_time))
        console.print(f"\nfigure   {figure_path}\nnumbers  {json_path}", highlight=False, soft_wrap=True)

    def _check(self) -> None:
        for option, good, allowed in (
            ("seed", 0 <= self.seed < 2**63, "0 or more"),
            ("iqpr", math.isfinite(self.iqpr) and self.iqpr >= 1, "1 (uniform draws) or more"),
            ("steps", self.steps >= 1, "1 or more"),
            ("batch_size", self.batch_size >= 2, "2 or more"),
            ("collection_size", self.collection_size >= 100, "100 or more"),
            ("relevant_share", 0.01 <= self.relevant_share <= 0.99, "between 0.01 and 0.99"),
            ("temperature", math.isfinite(self.temperature) and self.temperature > 0, "above 0"),
            ("repeats", self.repeats >= 1, "1 or more"),
            ("teacher_steps", self.teacher_steps >= 1, "1 or more"),
        ):
            if not good:
                raise UsageError(f"--{option.replace('_', '-')} is {getattr(self, option)}, must be {allowed}")


def _why_no_kernels() -> str | None:
    missing = [name for name in OPERATORS_CALLED if name not in CUDA_OPERATORS]
    because = f"this version has no CUDA kernel for {', '.join(missing)}" if missing else None
    return build_info().get("cuda_why_not", because)


def _choose_devices(choice: str) -> experiment.Devices:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    if choice == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda cannot be used: torch finds no CUDA device; take --device cpu")
    complete = torch.cuda.is_available() and _why_no_kernels() is None
    if choice == "cpu" or (choice == "auto" and not complete):
        return experiment.Devices(cpu, cpu)
    return experiment.Devices(cuda, cuda if complete else cpu)


def _prepare_output(output: Path) -> Path:
    """The figure's path; that it can be written is known before the training."""
    if output.suffix.lower() in (".jpg", ".jpeg", ".pdf", ".svg", ".json"):
        raise UsageError(f"--output is {output}, must be a name that ends in .png, or a folder")
    path = output if output.suffix.lower() == ".png" else output / FILE_NAME
    check_writable("--output", output, path, path.with_suffix(".json"))
    return path


@contextmanager
def _progress(console: Console) -> Iterator[experiment.Progress]:
    """One bar for each phase."""
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bars:

        @contextmanager
        def phase(name: str, steps: int) -> Iterator[Callable[[], None]]:
            task = bars.add_task(name, total=steps)
            yield lambda: bars.advance(task)

        yield phase
