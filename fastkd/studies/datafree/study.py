"""Methods x teachers: distillation without data, from teachers that differ by nothing but their seed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

from fastkd.methods import registry as methods
from fastkd.studies.datafree import published
from fastkd.studies.method_options import check_known, check_options, iterations_of, options_of
from fastkd.studies.settings import Distillation, Networks
from fastkd.studies.study import Figure, Run, Spread, Study, register
from fastkd.training import TrainingSettings

__all__ = ["ROWS", "TEACHERS", "DataFree", "Row"]


class Row(NamedTuple):
    """A method, and what it is told."""

    method: str
    options: dict[str, Any]


_METHODS = ("dafl", "dfad", "zskt", "dfq", "deep-inversion", "cmi", "pre-dfkd", "nayer")
ROWS: dict[str, Row] = {
    **{name: Row(name, {}) for name in _METHODS},
    # Table 4: all three terms of the generator's loss; without class prior; without it and with selected samples
    "baseline": Row("ta-dfkd", {"class_prior": 1.0, "select": False}),
    "no-prior": Row("ta-dfkd", {"class_prior": 0.0, "select": False}),
    "ta-dfkd": Row("ta-dfkd", {}),
}
TEACHERS = {name: seed for seed, name in enumerate(published.NAMES)}


@register("datafree")
@dataclass(frozen=True)
class DataFree(Study):
    """Distillation without data, from one teacher after the other: "Teacher as a Lenient Expert: Teacher-Agnostic Data-Free
    Knowledge Distillation" (AAAI 2024). A good method does not depend on which teacher it is given.

    Teachers are of one architecture and differ by the seed of their training; students of all seeds share them. A row is a
    method, or ta-dfkd without its parts: baseline has a class prior and selects nothing, no-prior has and does neither.
    Writes tables of the peak and converging accuracy, the gap to the teacher and the instability beside the paper's, of the
    spread over the teachers, and a box plot of it. The same command goes on where it was interrupted.
    """

    all_rows: ClassVar[tuple[str, ...]] = tuple(ROWS)
    all_columns: ClassVar[tuple[str, ...]] = tuple(TEACHERS)
    baseline: ClassVar[str] = "baseline"
    row_option: ClassVar[str] = "methods"
    column_option: ClassVar[str] = "teachers"
    spread: ClassVar[Spread | None] = Spread("teachers", "teacher_gap", "gap of the peak accuracy to the teacher")

    methods: tuple[str, ...] = tuple(ROWS)
    """Those of the paper, with baseline and no-prior, or any that `fastkd methods` lists and that needs nothing but a
    teacher."""
    teachers: tuple[str, ...] = tuple(TEACHERS)
    """T1 ... T5: teachers of seeds 0 ... 4."""
    teacher: str = "cifar-resnet34"
    """resnet<6n+2>, wrn-<6n+4>-<width>, or another name of fastkd.models.names(), or of torchvision. It learns the images
    and labels first."""
    student: str = "cifar-resnet18"
    """As teacher."""
    teacher_epochs: int = 200
    """Of the teacher's training; 0: as many as the student's."""
    teacher_learning_rate: float = 0.1
    """Of the teacher's training; 0: that of the student's."""
    teacher_batch_size: int = 128
    """Images of a batch of the teacher's training, in each process; 0: as many as of the student's."""
    batch_size: int = 1024
    """Images that a method makes at a time."""
    iterations: int = 36
    """Of an epoch; 0: as many as the training images have batches."""
    student_updates: int = 0
    """Of an epoch: as many iterations as make so many updates of the student, by any method; 0: --iterations of each."""
    method_options: tuple[str, ...] = ()
    """Options of all methods that have them, as width=16, or of one row, as cmi.generator_steps=50."""
    training: TrainingSettings = field(default_factory=lambda: TrainingSettings(learning_rate=0.01, nesterov=False))
    """The training of the student, and, but for what teacher_... says, of the teacher."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_seed != Networks.teacher_seed:
            raise ValueError(f"fastkd: teacher_seed is {self.teacher_seed}, must not be given: teachers says which")
        if self.student_updates < 0:
            raise ValueError(f"fastkd: student_updates is {self.student_updates}, must be 0 (off) or more")
        check_options(self.method_options)

    def row_names(self) -> tuple[str, ...]:
        there = methods.names()
        ours = [name for name, row in ROWS.items() if row.method in there]
        return (*ours, *(name for name in there if methods.find(name).needs == ("teacher",) and name not in ours))

    def grid(self, rows: Iterable[str], columns: Iterable[str], seeds: int) -> list[Run]:
        """As of all studies; what is said of a row must be of one that there is."""
        ways = {name: ROWS.get(name, Row(name, {})) for name in self.row_names()}
        check_known(self.method_options, {name: (way.method, way.options) for name, way in ways.items()})
        return super().grid(rows, columns, seeds)

    def distillation(self, row: str, column: str, seed: int) -> Distillation:
        way = ROWS.get(row, Row(row, {}))
        common: dict[str, Any] = {**self.common(), "teacher_seed": TEACHERS[column]}
        common["training"] = replace(self.training, seed=seed)
        options = options_of(self.method_options, row, way.method, way.options)
        if self.student_updates and "student_steps" in methods.find(way.method).options():
            common["iterations"] = iterations_of(way.method, options, self.student_updates)
        return Distillation(**common, method=way.method, options=options)

    def figures_shown(self) -> tuple[Figure, ...]:
        """With the published ones of this data set, if any."""
        name = self.data.data.lower()
        accuracies = published.TEACHERS.get(name, {}).values()
        of = f"; published: {name}, ResNet-34 to ResNet-18, {{}}" if accuracies else ""
        best, teachers = of.format("the best of 4 runs"), ", ".join(f"{accuracy:.2f}" for accuracy in accuracies)
        mean = ", of baseline and no-prior their mean" if best else ""
        return (
            Figure("peak_accuracy", f"peak accuracy, %{best}{mean}", published.PEAK.get(name, {})),
            Figure(
                "converging_accuracy",
                f"converging accuracy, %, mean of the last 10 epochs evaluated{of.format('4 runs')}",
                published.CONVERGING.get(name, {}),
            ),
            Figure(
                "teacher_gap",
                f"gap of the peak accuracy to the teacher, %{of.format(f'teachers of {teachers} %')}",
                published.GAP.get(name, {}),
            ),
            Figure(
                "instability",
                f"instability: peak less converging accuracy, %{of.format('4 runs')}",
                published.INSTABILITY.get(name, {}),
            ),
            Figure(
                "frechet_distance",
                "Frechet distance of the images made to the test images, in the inputs of the teacher's last layer",
                {},
                scale=1.0,
            ),
        )
