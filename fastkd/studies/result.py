"""What a distillation came to, and its file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from fastkd._build_info import build_info
from fastkd._files import write_whole
from fastkd.studies.settings import Distillation

__all__ = ["ACCURACY", "MEAN_IOU", "RESULT", "Measure", "Result", "read_result", "write_result"]

RESULT = "result.json"


class Measure(NamedTuple):
    """How good a network is: a share of the test images, or of their pixels; more is better."""

    student: str
    """The name of its figure."""
    teacher: str
    """And of the teacher's."""
    heading: str


ACCURACY = Measure("test_accuracy", "teacher_accuracy", "accuracy")
MEAN_IOU = Measure("test_mean_iou", "teacher_mean_iou", "mean IoU")
"""Of dense networks."""


@dataclass(frozen=True)
class Result:
    """Shares of the test images that are right, of dense networks of their pixels, after the last epoch."""

    accuracy: float
    teacher_accuracy: float | None
    """None where the method has no teacher."""
    figures: dict[str, float] = field(default_factory=dict)
    """All numbers of the last epoch, by name, as the trainer and the procedure have them."""

    def by(self, measure: Measure) -> tuple[float, float | None]:
        """Of the student, and of the teacher if there is one."""
        if measure == ACCURACY:
            return self.accuracy, self.teacher_accuracy
        return self.figures[measure.student], self.figures.get(measure.teacher)


def read_result(settings: Distillation, folder: Path) -> Result | None:
    """The result in the folder, or None where there is none.

    Raises:
        ValueError: it is the result of other settings.
    """
    path = folder / RESULT
    if not path.exists():
        return None
    try:
        document = json.loads(path.read_text())
        digest, figures = document["digest"], document.get("figures", {})
        result = Result(document["test_accuracy"], document["teacher_accuracy"], figures)
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"fastkd: {path} is no result of a distillation; delete it to run it again") from None
    if digest != settings.digest():
        plugin = "" if settings.plugin is None else f", or {settings.plugin.name} has changed"
        raise ValueError(f"fastkd: {path} is of other settings{plugin}; choose another folder, or delete it")
    return result


def write_result(settings: Distillation, folder: Path, result: Result) -> None:
    """Whole or not at all."""
    document = {
        "test_accuracy": result.accuracy,
        "teacher_accuracy": result.teacher_accuracy,
        "figures": result.figures,
        "digest": settings.digest(),
        "settings": asdict(settings),
        "fastkd": build_info()["version"],
        "torch": torch.__version__,
    }
    text = json.dumps(document, indent=2, default=str) + "\n"
    write_whole(folder / RESULT, lambda file: file.write(text.encode()))
