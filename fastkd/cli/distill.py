"""``fastkd distill``: one distillation, from data to test accuracy."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import torch
import tyro
from rich.console import Console
from rich.table import Table

from fastkd.cli._errors import UsageError, usage_errors
from fastkd.cli._output import check_writable
from fastkd.methods import registry as methods
from fastkd.studies.distillation import Experiment, run
from fastkd.studies.result import ACCURACY, MEAN_IOU, Result
from fastkd.studies.settings import Distillation
from fastkd.training import process_group

MOST_THREADS = 1024  # torch makes as many as it is told to


@dataclass(frozen=True)
class Distill(Distillation):
    """Train a student by a method, on CIFAR-10 or another set of small images, and say how good it is.

    A teacher learns the same images first, where the method has one, unless its weights are given. All is in one folder, with
    metrics and curves; the same command goes on where it was interrupted. Works under torchrun, too. The options of the
    method come last: `fastkd distill --method at --help` shows those of AT, `fastkd methods` all methods.
    """

    options: Annotated[dict[str, Any], tyro.conf.Suppress] = field(default_factory=dict)

    output: Path = Path("fastkd-distill")
    """The folder of the results."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the networks train; auto takes CUDA where there is a GPU."""
    config: Path | None = None
    """A TOML or YAML file with any of these options, as "epochs = 30"; those of the command line come before them."""
    threads: int = 0
    """Of the CPU; 0: as many as torch takes."""
    pictures_every: int = 0
    """Epochs of the student after which figures of what the method makes, generated images for instance, are drawn; after
    the last one, too. They lie in "pictures" in --output. Not all methods have some. 0: none are drawn."""

    def __call__(self, console: Console) -> None:
        settings = self._settings()
        # first what was said, then the files that it names, then the images, then the work
        with usage_errors():
            Experiment(settings, pictures_every=self.pictures_every).check()
        check_device(self.device)
        if not 0 <= self.threads <= MOST_THREADS:
            raise UsageError(
                f"--threads is {self.threads}, must be 0 (as torch takes) or more, and at most {MOST_THREADS}"
            )
        if self.threads:
            torch.set_num_threads(self.threads)
        check_writable("--output", self.output, self.output / "result.json")
        with usage_errors(), process_group(None if self.device == "auto" else self.device) as process:
            result = run(settings, self.output, process, pictures_every=self.pictures_every)
            if process.rank == 0:
                console.print(_table(settings, result))
                console.print(f"\nresults  {self.output}", highlight=False, soft_wrap=True)

    def _settings(self) -> Distillation:
        common = {f.name: getattr(self, f.name) for f in fields(Distillation)}
        said = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _OWN}
        return Distillation(**{**common, "options": {name: value for name, value in said.items() if value is not None}})


def _names(kind: type) -> set[str]:
    """Of the options of a dataclass, and of those in it."""
    hints = get_type_hints(kind)
    found = {f.name for f in fields(kind)}
    return found.union(*(_names(hints[name]) for name in found if is_dataclass(hints[name])))


_OWN = {f.name for f in fields(Distill)}


def command_for(arguments: list[str]) -> type[Distill]:
    """The command, with the options of the method that the arguments name.

    Raises:
        UsageError: an unknown method.
    """
    with usage_errors():
        options = methods.find(_value_of("--method", arguments) or Distillation.method).options()
    own = [(o.name, Annotated[o.kind | None, _as_argument(o)], None) for o in options.values()]
    taken = _names(Distill)
    clashes = [name for name, *_ in own if name in taken]
    if clashes:
        raise UsageError(f"options of the method have names of the command's own: {', '.join(clashes)}")
    return make_dataclass("Distill", own, bases=(Distill,), frozen=True, namespace={"__doc__": Distill.__doc__})


def load_plugin_of(arguments: list[str]) -> None:
    """Loads the plugin that the arguments name, if any.

    Raises:
        UsageError: it cannot be had.
    """
    with usage_errors():
        if plugin := _value_of("--plugin", arguments):
            methods.load_plugin(plugin)


def _as_argument(option: methods.Option) -> Any:
    """With its published default, though None is what stands for it: what is not said may follow from the networks."""
    default = "" if option.default is None else f"(default: {_as_said(option.default)})"
    said = option.help.replace("``", "") or "of the method."
    return tyro.conf.arg(help=said[:1].upper() + said[1:], help_behavior_hint=default)


def _as_said(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def _value_of(option: str, arguments: list[str]) -> str | None:
    """What the arguments say of an option, the last time that they do."""
    found = None
    for i, argument in enumerate(arguments):
        if argument == option and i + 1 < len(arguments):
            found = arguments[i + 1]
        elif argument.startswith(f"{option}="):
            found = argument.partition("=")[2]
    return found


def check_device(device: str) -> None:
    """Whether there is one."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda cannot be used: torch finds no CUDA device; take --device cpu")


def _table(settings: Distillation, result: Result) -> Table:
    """Accuracies in %, of dense networks those of pixels, and their mean IoU."""
    measures = {"test accuracy": ACCURACY}
    if MEAN_IOU.student in result.figures:
        measures = {"pixel accuracy": ACCURACY, "mean IoU": MEAN_IOU}
    student, teacher = zip(*(result.by(measure) for measure in measures.values()), strict=True)
    table = Table("network", "learned by", *measures, box=None, pad_edge=False)
    for network, way, shares in (
        (f"teacher {settings.teacher}", "labels", teacher),
        (f"student {settings.student}", settings.method, student),
    ):
        shown = [f"{100 * share:.2f} %" for share in shares if share is not None]
        if shown:
            table.add_row(network, way, *shown)
    return table
