"""What a distillation, or a study of many, can vary."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fastkd.methods import registry as methods
from fastkd.patches import padding_of
from fastkd.studies.collected import CollectionSettings, described
from fastkd.studies.data import DataSettings
from fastkd.training import TrainingSettings
from fastkd.training.settings import MOST_EPOCHS

__all__ = ["Distillation", "Networks"]


@dataclass(frozen=True)
class Networks:
    """What is distilled into what, on which images."""

    teacher: str = "resnet26"
    """resnet<6n+2>, wrn-<6n+4>-<width>, or another name of fastkd.models.names(), or of torchvision. It learns the same
    images and labels first."""
    student: str = "resnet8"
    """As teacher."""
    teacher_epochs: int = 0
    """Of the teacher's training; 0: as many as the student's. Where the student's schedule is "plateau", the teacher's is the
    usual one."""
    teacher_learning_rate: float = 0.0
    """Of the teacher's training; 0: that of the student's."""
    teacher_batch_size: int = 0
    """Images of a batch of the teacher's training, in each process; 0: as many as of the student's."""
    teacher_seed: int = -1
    """Seed of the teacher's training; -1: that of the student's. Otherwise students of any seed learn from one teacher, whose
    weights, order, choice and wrong labels of images follow from this one."""
    batch_size: int = 128
    """Images of a batch, in each process."""
    padding: int | None = None
    """Pixels of zeros that random crops may reach into; by default those of the set, 4 for sides of 32 and 28, none where each
    pixel has a class. 0: no crops."""
    flip: bool = True
    """Mirror half of the images, where a mirrored one is still one of its class."""
    iterations: int = 0
    """Of an epoch, for methods without images; 0: as many as the training images have batches."""
    plugin: Path | None = None
    """A Python file that registers methods of your own."""
    data: DataSettings = field(default_factory=DataSettings)
    """The images."""
    collection: CollectionSettings = field(default_factory=CollectionSettings)
    """Others to learn on."""
    training: TrainingSettings = field(default_factory=TrainingSettings)
    """The training of the student, and, but for what teacher_... says, of the teacher. The seed is also that of the networks'
    weights, of the order of the images, and of their choice and their wrong labels."""

    def __post_init__(self) -> None:
        if self.batch_size < 2:
            raise ValueError(f"fastkd: batch_size is {self.batch_size}, must be 2 or more, as batch norm needs")
        if self.padding is not None:
            padding_of(self.padding)
        if self.iterations < 0:
            raise ValueError(f"fastkd: iterations is {self.iterations}, must be 0 (as the images have batches) or more")
        if not 0 <= self.teacher_epochs <= MOST_EPOCHS:
            raise ValueError(
                f"fastkd: teacher_epochs is {self.teacher_epochs}, must be 0 (as the student) or more, "
                f"and at most {MOST_EPOCHS}"
            )
        if not 0 <= self.teacher_learning_rate < math.inf:
            raise ValueError(
                f"fastkd: teacher_learning_rate is {self.teacher_learning_rate}, must be 0 (that of the student) or more"
            )
        if self.teacher_batch_size != 0 and self.teacher_batch_size < 2:
            raise ValueError(
                f"fastkd: teacher_batch_size is {self.teacher_batch_size}, must be 0 (as the student) or 2 or more, "
                "as batch norm needs"
            )
        if not -1 <= self.teacher_seed < 2**63:
            raise ValueError(
                f"fastkd: teacher_seed is {self.teacher_seed}, must be -1 (that of the student) or more, "
                "and at most 2^63 - 1"
            )


_SAID_OF_THE_TEACHER = {
    name: getattr(Networks, name) for name in ("teacher_learning_rate", "teacher_batch_size", "teacher_seed")
}


@dataclass(frozen=True)
class Distillation(Networks):
    """How, too."""

    method: str = "hinton"
    """One of those that `fastkd methods` lists."""
    teacher_weights: Path | None = None
    """A state dict of the teacher, instead of training it."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the method, where they are not to be the published ones."""

    def of_teacher(self) -> Distillation:
        """The training of the teacher, as a distillation without one."""
        epochs = self.teacher_epochs or self.training.epochs
        training = replace(self.training, epochs=epochs, warmup_epochs=min(self.training.warmup_epochs, epochs / 2))
        if training.schedule == "plateau":  # nothing is held out of its images
            usual = {name: getattr(TrainingSettings, name) for name in ("schedule", "learning_rate", "nesterov")}
            training = replace(training, evaluate_every=epochs, **usual)
        if self.teacher_learning_rate:
            training = replace(training, learning_rate=self.teacher_learning_rate)
        if self.teacher_seed >= 0:
            training = replace(training, seed=self.teacher_seed)
        return Distillation(
            method="baseline",
            teacher="",
            student=self.teacher,
            batch_size=self.teacher_batch_size or self.batch_size,
            padding=self.padding,
            flip=self.flip,
            data=self.data,
            training=training,
        )

    def description(self) -> dict[str, Any]:
        """All that the result depends on."""
        everything = asdict(self)
        everything["teacher_learning_rate"] = float(self.teacher_learning_rate)
        entry = methods.find(self.method)
        if not entry.needs_teacher:
            for name in ("teacher", "teacher_epochs", "teacher_weights", *_SAID_OF_THE_TEACHER):
                del everything[name]
        elif self.teacher_weights is not None and self.teacher_weights.is_file():
            everything["teacher_weights"] = _digest_of(self.teacher_weights)
        for name, default in _SAID_OF_THE_TEACHER.items():
            if everything.get(name) == default:  # descriptions are those of the time before there was this option
                del everything[name]
        if entry.needs_images:
            del everything["iterations"]
        del everything["collection"]
        if self.collection.collection and entry.needs_images:
            everything["collection"] = described(self.collection)
        if self.plugin is not None and self.plugin.is_file():
            everything["plugin"] = _digest_of(self.plugin)
        for name in (
            "classes",
            "label_file",
            "label_key",
        ):  # descriptions are those of the time before there was this option
            if not getattr(self.data, name):
                del everything["data"][name]
        if self.data.label_file is not None and self.data.label_file.is_file():
            everything["data"]["label_file"] = _digest_of(self.data.label_file)
        del everything["data"]["data_root"]  # the images are the same wherever they lie
        everything["training"]["checkpoint_every"] = 0
        everything["training"]["warmup_epochs"] = float(self.training.warmup_epochs)
        return everything

    def digest(self) -> str:
        """Ten letters that differ where the description does."""
        return hashlib.sha256(json.dumps(self.description(), default=str, sort_keys=True).encode()).hexdigest()[:10]


def _digest_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
