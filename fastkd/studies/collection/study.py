"""Collections x how they are drawn from and learnt on: biased sampling, fixed-linear and vanilla distillation, both scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

from fastkd.scores import ScoreName
from fastkd.studies.collected import LONG_RUN, CollectionSettings
from fastkd.studies.collection import published
from fastkd.studies.data import DataSettings
from fastkd.studies.settings import Distillation
from fastkd.studies.study import Figure, Published, Study, register
from fastkd.training import TrainingSettings

__all__ = ["COLLECTIONS", "ROWS", "CollectionStudy", "Row"]


class Row(NamedTuple):
    """How a student learns, and what it sees."""

    method: str
    score: ScoreName
    iqpr: float
    options: dict[str, Any]


def _rows() -> dict[str, Row]:
    ways: dict[str, tuple[str, ScoreName, dict[str, Any]]] = {
        "fixed-linear": ("fixed-linear", "1c-sum", {"project": True}),
        "no-projection": ("fixed-linear", "1c-sum", {}),
        "vanilla": ("vanilla", "1c-sum", {}),
        "t1000": ("fixed-linear", "t1000", {"project": True}),
    }
    return {
        f"{name}-{iqpr}": Row(method, score, float(iqpr), options)
        for name, (method, score, options) in ways.items()
        for iqpr in (1, 5, 25)
        if (name, iqpr) != ("t1000", 1)  # where all are drawn equally often, the score does not matter
    }


ROWS = _rows()
COLLECTIONS = ("rel+irrel", "ori+irrel", "ori")
_LONG_RUN = f"of {LONG_RUN} draws for each image"


@register("collection")
@dataclass(frozen=True)
class CollectionStudy(Study):
    """Distillation from unlabeled collections by biased sampling: "Distillation from heterogeneous unlabeled collections"
    (Begon & Geurts, 2021).

    ori: the teacher's training images. rel: images of its data set that it has not seen. irrel: MNIST, Fashion-MNIST and
    Quick, Draw!. A row is a method and an IQPR. Writes tables of the accuracy at 100 % and 10 % of the training, of what was
    drawn, beside the paper's, and the course of the accuracy. The same command goes on where it was interrupted.
    """

    all_rows: ClassVar[tuple[str, ...]] = tuple(ROWS)
    all_columns: ClassVar[tuple[str, ...]] = COLLECTIONS
    baseline: ClassVar[str] = "fixed-linear-1"
    row_option: ClassVar[str] = "ways"
    column_option: ClassVar[str] = "collections"
    of_the_grid: ClassVar[Mapping[str, str]] = {"label_noise": "{} has no labels to be wrong"}
    figures: ClassVar[tuple[Figure, ...]] = (
        Figure("test_accuracy_at_10", "test accuracy at 10 % of the training, %", published.EARLY),
        Figure("long_run_skip_ratio", f"skip ratio, %, {_LONG_RUN}", published.SKIP_RATIO),
        Figure("long_run_uniformity", f"uniformity, %, {_LONG_RUN}", published.UNIFORMITY),
        Figure(
            "long_run_irrelevant_proportion", f"irrelevant proportion, %, {_LONG_RUN}", published.IRRELEVANT_PROPORTION
        ),
        Figure("skip_ratio", "skip ratio of the training, %", {}),
        Figure("relevant_draws", "share of relevant images among the draws of the training, %", {}),
    )

    ways: tuple[str, ...] = tuple(ROWS)
    """fixed-linear (with a projection), no-projection, vanilla or t1000 (fixed-linear by that score), each with an IQPR."""
    collections: tuple[str, ...] = COLLECTIONS[:2]
    """rel+irrel, ori+irrel or ori."""
    irrelevant: int = 9000
    """Images of each of MNIST, Fashion-MNIST and Quick, Draw!; 0: all."""
    relevant: int = 20000
    """Images of rel; 0: all."""
    data: DataSettings = field(default_factory=lambda: DataSettings(train_size=25000))
    """The images; those that the teacher does not learn on are rel."""
    collection: CollectionSettings = field(default_factory=lambda: CollectionSettings(held_out=0.1))
    """How many are drawn, and held out."""
    training: TrainingSettings = field(
        default_factory=lambda: TrainingSettings(
            epochs=20, learning_rate=0.01, schedule="plateau", decay=0.4, evaluate_every=2, nesterov=False
        )
    )
    """The training of the student; an epoch is of --draws images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.collection.collection:
            raise ValueError(
                f"fastkd: collection is {self.collection.collection!r}, must not be given: collections says which"
            )

    def distillation(self, row: str, column: str, seed: int) -> Distillation:
        way = ROWS[row]
        common: dict[str, Any] = self.common()
        common["collection"] = replace(self.collection, collection=self._text(column), score=way.score, iqpr=way.iqpr)
        common["training"] = replace(self.training, seed=seed)
        return Distillation(**common, method=way.method, options=way.options)

    def published(self, column: str) -> tuple[str, Mapping[str, Published]]:
        return "CIFAR-10, ResNet-50 to MobileNetV2", published.ACCURACY.get(column, {})

    def _text(self, column: str) -> str:
        """Of the collection, as the settings have it."""
        of = {
            "ori": ["ori=task"],
            "rel": ["rel=rest" + self._count(self.relevant)],
            "irrel": [f"{name}{self._count(self.irrelevant)}" for name in ("mnist", "fashion-mnist", "quickdraw")],
        }
        return ",".join(text for part in column.split("+") for text in of[part])

    @staticmethod
    def _count(images: int) -> str:
        return f":{images}" if images else ""
