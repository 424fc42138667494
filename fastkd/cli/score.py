"""``fastkd score``: one pass of a teacher over a collection."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fastkd.cli._errors import UsageError, usage_errors
from fastkd.cli._output import check_writable
from fastkd.cli._progress import passing
from fastkd.cli.distill import check_device
from fastkd.data import registry as data_sets
from fastkd.data.collection import Collection
from fastkd.data.opening import open_collection
from fastkd.scores import ScoreName, make_scorer
from fastkd.scoring import ScoreFile, score_collection
from fastkd.studies.networks import check_network, make_network, read_state, take_weights
from fastkd.training import process_group

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Score:
    """Say of each image of an unlabeled collection how much it looks like a teacher's task: by how much it is to be drawn.

    No labels and no images of the task are needed. Killed, the same command goes on where it was; under torchrun the processes
    share the images out. `fastkd distill --collection --scores` draws by the scores.
    """

    collection: str
    """A folder of images, an .npy of uint8, the name of a data set, or several, as name=place,name=place; place:N
    takes N images of it."""
    teacher: str = "resnet26"
    """resnet<6n+2>, wrn-<6n+4>-<width>, or another name of fastkd.models.names(), or of torchvision."""
    weights: Path | None = None
    """The teacher's state dict: needed, as only its weights know the task."""
    output: Path = Path("scores.npy")
    """Where the scores go, float64, one an image. Beside it a .json says what they are of."""
    score: ScoreName = "1c-sum"
    """1C-Sum, of fifteen indicators, or one of the logits alone; higher is always more alike."""
    data: str = "cifar10"
    """The task's data set: shape, classes and normalisation of its images are the teacher's."""
    shape: tuple[int, int, int] | None = None
    """C H W of the teacher's images, where it is not that of --data. Images of other sizes are resized."""
    classes: int | None = None
    """Of the teacher, where not those of --data."""
    mean: tuple[float, ...] | None = None
    """Of each channel, in units of x / 255, where not that of --data's training images, whose files are then not needed."""
    std: tuple[float, ...] | None = None
    """As mean."""
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    """Of the .npy."""
    unreadable: Literal["error", "skip"] = "error"
    """Images that cannot be read: an error that names the first, or left out, with a score of -inf, and listed."""
    batch_size: int = 256
    """Images at once."""
    workers: int = 2
    """Processes that decode the files of a folder."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """Of the teacher, under torch.autocast."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the teacher runs; auto takes CUDA where there is a GPU."""
    data_root: Path | None = field(default=None)
    """The folder of the data sets; $FASTKD_DATA or ~/.cache/fastkd/data by default. Nothing is downloaded."""
    config: Path | None = None
    """A TOML or YAML file with any of these options; those of the command line come before them."""

    def __call__(self, console: Console) -> None:
        if self.batch_size < 1:
            raise UsageError(f"--batch-size is {self.batch_size}, must be 1 or more")
        if self.workers < 0:
            raise UsageError(f"--workers is {self.workers}, must be 0 or more")
        if (self.mean is None) != (self.std is None):
            raise UsageError("--mean and --std must be given together")
        if self.weights is None:
            raise UsageError("--weights is missing, must be a state dict of the teacher")
        if self.output.suffix != ".npy":
            raise UsageError(f"--output is {self.output}, must end with .npy")
        with usage_errors():
            shape, classes = self._task()
            teacher = make_network(self.teacher, "teacher", channels=shape[0], classes=classes, seed=0)
            check_network(teacher, self.teacher, "teacher", torch.zeros(2, *shape), classes)
            check_device(self.device)
            take_weights(teacher, read_state(self.weights), self.weights)
            mean, std = self._normalisation()
            collection = open_collection(
                self.collection,
                shape,
                root=self.data_root,
                layout=self.layout,
                workers=self.workers,
                unreadable=self.unreadable,
            )
        check_writable("--output", self.output, self.output)
        with usage_errors(), process_group(None if self.device == "auto" else self.device) as process:
            scorer = make_scorer(self.score, teacher.to(process.device).eval(), amp=AMP[self.amp])
            with passing("scoring", "images", console, shown=process.rank == 0) as tell:
                tell(0, len(collection))
                found = score_collection(
                    scorer,
                    collection,
                    self.output,
                    name=self.score,
                    mean=mean,
                    std=std,
                    batch_size=self.batch_size,
                    on_progress=tell,
                )
                tell(len(collection), len(collection))
            if process.rank == 0:
                _report(found, collection, console)

    def _task(self) -> tuple[tuple[int, int, int], int]:
        """Shape of the teacher's images, and classes."""
        if self.shape is not None and self.classes is not None:
            return self.shape, self.classes
        outline = data_sets.outline(self.data)
        classes = self.classes or outline.num_classes
        if classes is None:
            raise ValueError(f"fastkd: classes is None, must be given for {self.data}")
        return self.shape or outline.shape, classes

    def _normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        if self.mean is not None and self.std is not None:
            return self.mean, self.std
        train, _ = data_sets.load(self.data, self.data_root)
        return train.mean, train.std


def _report(found: ScoreFile, collection: Collection, console: Console) -> None:
    """What the scores of each source are like."""
    scores = found.array()
    table = Table("source", "images", "first quartile", "median", "third quartile", box=None, pad_edge=False)
    parts = [(source.name, scores[source.start : source.stop]) for source in collection.sources]
    for name, part in [*parts, *([("all", scores)] if len(parts) > 1 else [])]:
        readable = part[np.isfinite(part)]
        quartiles = np.quantile(readable, [0.25, 0.5, 0.75]) if len(readable) else [float("nan")] * 3
        table.add_row(name, f"{len(part):,}", *(f"{value:.6g}" for value in quartiles))
    console.print(table)
    for item in found.unreadable[:10]:
        console.print(f"left out: image {item.index}, {item.name}: {item.why}", highlight=False, soft_wrap=True)
    if len(found.unreadable) > 10:
        console.print(f"left out: {len(found.unreadable)} images in all, listed in {found.path}.json", highlight=False)
    console.print(f"\nscores  {found.path}", highlight=False, soft_wrap=True)
