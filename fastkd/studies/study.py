"""What any study is: a grid of runs, a row for each way to train, a column for each setting, and some seeds.

A study of its own is one file: a dataclass of :class:`Study` that names its rows and columns, says how the run of a cell is
made, and has the published figures. The grid, processes, resume, results, table, figure and the command are here and in
:mod:`fastkd.studies.report`; :mod:`fastkd.studies.zoo` is an example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypeVar

import torch

from fastkd._names import unknown_name
from fastkd.data import registry as data_sets
from fastkd.methods import registry as methods
from fastkd.studies.distillation import Experiment, run
from fastkd.studies.pool import Pool
from fastkd.studies.result import ACCURACY, MEAN_IOU, Measure, Result, read_result
from fastkd.studies.settings import Distillation, Networks
from fastkd.training import Process

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

__all__ = [
    "Accuracies",
    "Figure",
    "Published",
    "Run",
    "Spread",
    "Study",
    "find",
    "known",
    "names",
    "register",
    "run_all",
]

Accuracies = Mapping[str, Mapping[str, Mapping[int, float]]]
"""Column -> row, or teacher -> seed -> test accuracy, or whatever the study goes by."""

TEACHERS = "teachers"  # the folder of theirs


class Published(NamedTuple):
    """In %, test accuracy or whatever the study goes by."""

    mean: float
    std: float


class Figure(NamedTuple):
    """What a study shows of its runs beside the accuracy."""

    name: str
    """Of :attr:`fastkd.studies.result.Result.figures`."""
    heading: str
    published: Mapping[str, Mapping[str, Published]]
    """By column and row, as shown."""
    scale: float = 100.0
    """What it is shown times: a share is in %."""


class Spread(NamedTuple):
    """How a study shows what a row owes to the column: tables of each row over all columns, and a box plot."""

    over: str
    """What the columns are: "teachers"."""
    figure: str
    """Beside the accuracy, and drawn: of :attr:`fastkd.studies.result.Result.figures`, a share; less is better."""
    heading: str
    """What that is."""


@dataclass(frozen=True)
class Run:
    """One cell of the grid, with one seed."""

    row: str
    column: str
    seed: int
    distillation: Distillation

    def folder(self, root: Path) -> Path:
        """Its own, below that of the study."""
        return root / self.column / f"{self.row}-{self.seed}-{self.distillation.digest()}"


@dataclass(frozen=True)
class Study(Networks):
    """Base of studies. The fields of a dataclass of it are options of its command."""

    all_rows: ClassVar[tuple[str, ...]] = ()
    """In the order of the table; the published ones first."""
    all_columns: ClassVar[tuple[str, ...]] = ()
    name: ClassVar[str] = ""
    """Under which it is registered."""
    figures: ClassVar[tuple[Figure, ...]] = ()
    """A table each, beside that of the accuracy."""
    spread: ClassVar[Spread | None] = None
    """Where the question is what a row owes to the column."""
    baseline: ClassVar[str] = ""
    """The row that others are compared with, if any."""
    row_option: ClassVar[str] = "rows"
    """The field that says which rows are asked for."""
    column_option: ClassVar[str] = "columns"
    """And which columns."""
    row_name: ClassVar[str] = ""
    """What a row is, for the head of the table; the option without its s by default."""
    of_the_grid: ClassVar[Mapping[str, str]] = {}
    """Options that the grid sets, and what says so instead: they must not be given."""

    @property
    def measure(self) -> Measure:
        """The mean IoU of dense networks, the accuracy of others."""
        return MEAN_IOU if data_sets.outline(self.data.data).dense else ACCURACY

    def distillation(self, row: str, column: str, seed: int) -> Distillation:
        """The run of a cell."""
        raise NotImplementedError

    def published(self, column: str) -> tuple[str, Mapping[str, Published]]:
        """Of what the published figures of a column are, and those by row."""
        return "", {}

    def figures_shown(self) -> tuple[Figure, ...]:
        """Those of the class, or what they are with these options."""
        return self.figures

    def pictures(self, accuracies: Accuracies, figures: Mapping[str, Accuracies]) -> Mapping[str, Picture]:
        """Figures of its own by the name of their file, without its ending. They need matplotlib, which is to be imported in
        here.

        Args:
            figures: by name, what the runs came to beside the accuracy.
        """
        return {}

    def row_names(self) -> tuple[str, ...]:
        """Those that may be asked for."""
        return self.all_rows

    def column_names(self) -> tuple[str, ...]:
        """And of the columns."""
        return self.all_columns

    def common(self) -> dict[str, object]:
        """The fields of :class:`fastkd.studies.settings.Networks`, to make a run of."""
        return {f.name: getattr(self, f.name) for f in fields(Networks)}

    def grid(self, rows: Iterable[str], columns: Iterable[str], seeds: int) -> list[Run]:
        """All runs, those of one column and seed one after the other.

        Args:
            seeds: 0, ..., seeds - 1.

        Raises:
            ValueError: an unknown name, answered with the nearest right ones; or none.
        """
        rows, columns = list(dict.fromkeys(rows)), list(dict.fromkeys(columns))
        for option, chosen, allowed in (
            (self.row_option, rows, self.row_names()),
            (self.column_option, columns, self.column_names()),
        ):
            if not chosen:
                raise ValueError(f"fastkd: {option} is empty, must be one name or more")
            for name in chosen:
                if name not in allowed:
                    raise unknown_name(option.removesuffix("s"), name, allowed)
        return [
            Run(row, column, seed, self.distillation(row, column, seed))
            for column in columns
            for seed in range(seeds)
            for row in rows
        ]


Kind = TypeVar("Kind", bound=type[Study])
_studies: dict[str, type[Study]] = {}


def register(name: str) -> Callable[[Kind], Kind]:
    """Gives a study a name, under which ``fastkd study`` has it."""

    def decorate(kind: Kind) -> Kind:
        kind.name = name
        _studies[name] = kind
        return kind

    return decorate


def names() -> tuple[str, ...]:
    """Of all studies."""
    return tuple(_studies)


def find(name: str) -> type[Study]:
    """The study of this name.

    Raises:
        ValueError: an unknown name.
    """
    if name not in _studies:
        raise unknown_name("study", name, _studies)
    return _studies[name]


def known(runs: Iterable[Run], folder: Path) -> Iterator[tuple[Run, Result]]:
    """Those whose result is there."""
    for one in runs:
        done = read_result(one.distillation, one.folder(folder))
        if done is not None:
            yield one, done


def run_all(runs: list[Run], folder: Path, device: torch.device, jobs: int) -> Iterator[tuple[Run, Result | Exception]]:
    """Runs what has no result yet; an interruption loses nothing, as the next call goes on.

    Args:
        folder: of the study; teachers are shared by the runs in it.
        jobs: processes side by side.

    Yields:
        Each run and its result, those that were there first; or why it failed, which does not keep the others from running.
    """
    there = list(known(runs, folder))
    yield from there
    done = [one for one, _ in there]
    missing = [one for one in runs if one not in done]
    # first the teachers, so that no two processes train the same one; where one fails, so do its students
    teachers = {
        one.distillation.of_teacher().digest(): one
        for one in missing
        if methods.find(one.distillation.method).needs_teacher
    }
    # and of these each score of each collection
    scored = {
        (one.distillation.of_teacher().digest(), one.distillation.collection.collection, score): (one, score)
        for one in missing
        for score in one.distillation.collection.looked_at
    }
    with Pool(min(jobs, len(missing)), device).open() as pool:
        for _ in pool.outcomes(partial(_train_teacher, folder=folder, device=device), list(teachers.values())):
            pass
        for _ in pool.outcomes(partial(_score, folder=folder, device=device), list(scored.values())):
            pass
        yield from pool.outcomes(partial(_run, folder=folder, device=device), missing)


def _run(one: Run, folder: Path, device: torch.device) -> Result:
    process = Process(0, 1, device)
    return run(one.distillation, one.folder(folder), process, teachers=folder / TEACHERS, show="off")


def _score(one: tuple[Run, str], folder: Path, device: torch.device) -> None:
    run, score = one
    Experiment(run.distillation, Process(0, 1, device)).score(folder / TEACHERS, score)


def _train_teacher(one: Run, folder: Path, device: torch.device) -> Result:
    return Experiment(one.distillation, Process(0, 1, device)).train_teacher(folder / TEACHERS, show="off")
