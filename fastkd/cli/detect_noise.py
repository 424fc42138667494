"""``fastkd detect-noise``: which labels are probably wrong."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from fastkd import noise
from fastkd.cli import _noise_report
from fastkd.cli._errors import UsageError, usage_errors
from fastkd.cli._output import check_writable
from fastkd.data.label_files import SUFFIXES, read_labels
from fastkd.methods import NoisyLabels
from fastkd.methods import registry as methods
from fastkd.studies.data import DataSettings
from fastkd.studies.detection import LABELS, PROBABILITIES, WRONG
from fastkd.studies.distillation import run
from fastkd.studies.settings import Distillation
from fastkd.training import Process, TrainingSettings, process_group

TRAINING = "training"  # what its folder begins with


@dataclass(frozen=True)
class DetectNoise:
    """Say which labels are probably wrong: by what a network has said of the samples, or of a network that is trained for it.

    With --values, the network should not know the labels by heart: take probabilities of folds that it was not trained on, or
    losses of early epochs. With --data, one is trained on the set's images by a method that withstands wrong labels; the same
    command goes on where it was interrupted. Writes labels.csv (index, label, suggested, score, noisy), noisy.npy, report.json
    and histogram.png; where the truth is known, also how many of the wrong labels were found, and sweep.png.
    """

    values: Path | None = None
    """An .npy of what the network said: floats, a row a sample, or for losses a number a sample."""
    labels: Path | None = None
    """The given labels: .npy, .pt, .json, .csv or .txt, also those of CIFAR-10N. With --data those of the set by default; where
    they are given, the set's own are taken for the truth."""
    label_key: str = ""
    """Which labels of the file, where it has several: worst, aggre, random1, noisy, or a name as it has them."""
    kind: Literal["probabilities", "logits", "losses"] = "probabilities"
    """What the values are."""
    truth: Path | None = None
    """With --values: the true labels, as --labels, or an .npy of bools, True where a label is wrong; not needed to find
    them."""
    data: str = ""
    """Instead of --values: cifar10, mnist or another data set; a network is trained on its training images."""
    data_root: Path | None = None
    """The folder of the data sets; $FASTKD_DATA or ~/.cache/fastkd/data by default. Nothing is downloaded."""
    method: str = "bldr"
    """By which it is trained: one for noisy labels, as `fastkd methods` lists them. `fastkd distill` has more options for the
    training, and leaves probabilities.npy for --values, labels.npy for --labels and, where it made labels wrong, wrong.npy for
    --truth."""
    student: str = "resnet14"
    """The network: resnet<6n+2>, wrn-<6n+4>-<width>, cifar-resnet34, or another name of fastkd.models.names()."""
    epochs: int = 100
    """Of its training; of a few, BLDR knows too little, and calls most labels wrong."""
    batch_size: int = 128
    """Images of a batch."""
    learning_rate: float = 0.1
    """The highest."""
    seed: int = 0
    """Of weights and batches."""
    rule: noise.Rule | None = None
    """mixture: of two Gaussians of the losses (DivideMix); probability: that of the label is low (BLDR); confident: another
    class is above its own mean (confident learning, cleanlab); disagreement: another class is the most probable. By default
    mixture, or that of the method."""
    threshold: float | None = None
    """Of the score, below which a label is called wrong: 0.5 for a mixture, 0.05 for a probability by default."""
    by_class: bool = False
    """A mixture for each class of labels."""
    output: Path = Path("detect-noise")
    """The folder of the results."""
    overwrite: bool = False
    """Replace the results of another run in the folder."""
    config: Path | None = None
    """A TOML or YAML file with any of these options; those of the command line come before them."""

    def __call__(self, console: Console) -> None:
        if (self.values is None) == (not self.data):
            raise UsageError("one of --values, what a network said, and --data, images to train one on, must be given")
        self._check_names()
        rule: noise.Rule = self.rule or ("mixture" if self.values is not None else self._kind().rule)
        with usage_errors():
            noise.check_options(rule, self.threshold, self.by_class, self.kind)
        _noise_report.check_folder(self.output, self.overwrite)
        check_writable("--output", self.output, *_noise_report.files(self.output))
        if self.values is not None:
            self._report(self._read(), rule, console)
            return
        with process_group("cuda" if torch.cuda.is_available() else "cpu") as process:
            given = self._train(process)
            if process.rank == 0:
                self._report(given, rule, console)

    def _check_names(self) -> None:
        """Of files, before any is looked for."""
        for option, path, allowed in (
            ("--values", self.values, (".npy",)),
            ("--labels", self.labels, SUFFIXES),
            ("--truth", self.truth, SUFFIXES),
        ):
            if path is not None and path.suffix.lower() not in allowed:
                raise UsageError(f"{option} is {path}, must end with {' or '.join(allowed)}")

    def _report(self, given: _Given, rule: noise.Rule, console: Console) -> None:
        values, labels, wrong = given
        with usage_errors():
            found = noise.find(
                labels, **{self.kind: values}, rule=rule, threshold=self.threshold, by_class=self.by_class
            )
        _noise_report.report(found, labels, wrong, self.output, console)

    def _read(self) -> _Given:
        """What is in the files."""
        assert self.values is not None
        if self.labels is None:
            raise UsageError("--labels is missing, must be the file of the labels with --values")
        for name in ("data_root", "method", "student", "epochs", "batch_size", "learning_rate", "seed"):
            if getattr(self, name) != getattr(DetectNoise, name):
                raise UsageError(f"--{name.replace('_', '-')} must not be given with --values: nothing is trained")
        values = _read_array("--values", self.values)
        with usage_errors():
            labels = read_labels(self.labels, self.label_key or None)
            truth = None if self.truth is None else _read_truth(self.truth)
        if truth is not None and truth.shape != labels.shape:
            raise UsageError(
                f"--truth {self.truth} has {len(truth):,} labels, must have as many as --labels, {len(labels):,}"
            )
        return _Given(
            values, labels, None if truth is None else truth if truth.dtype == torch.bool else truth != labels
        )

    def _train(self, process: Process) -> _Given:
        """What a network says that is trained now; the folder of the training, one for each, is in that of the results."""
        if self.truth is not None:
            raise UsageError(
                "--truth must not be given with --data, whose own labels are the truth where --labels are others"
            )
        if self.kind != "probabilities":
            raise UsageError(f"--kind is {self.kind}, must be probabilities with --data")
        if self.label_key and self.labels is None:
            raise UsageError(f"--label-key is {self.label_key}, must be given with --labels")
        with usage_errors():
            data = DataSettings(self.data, data_root=self.data_root)
            if self.labels is not None:
                data = replace(data, noise="file", label_file=self.labels, label_key=self.label_key)
            training = TrainingSettings(epochs=self.epochs, learning_rate=self.learning_rate, seed=self.seed)
            settings = Distillation(
                method=self.method, student=self.student, batch_size=self.batch_size, data=data, training=training
            )
            folder = self.output / f"{TRAINING}-{settings.digest()}"
            run(settings, folder, process)
            labels = torch.from_numpy(np.load(folder / LABELS))
            wrong = None if self.labels is None else torch.from_numpy(np.load(folder / WRONG))
        return _Given(np.load(folder / PROBABILITIES), labels, wrong)

    def _kind(self) -> type[NoisyLabels]:
        with usage_errors():
            kind = methods.find(self.method).kind
        if not issubclass(kind, NoisyLabels):
            raise UsageError(f"--method is {self.method}, must be one for noisy labels, as bldr or dividemix")
        return kind


class _Given(NamedTuple):
    values: np.ndarray
    labels: Tensor
    wrong: Tensor | None
    """Bool, where it is known."""


def _read_array(option: str, path: Path) -> np.ndarray:
    """
    Raises:
        UsageError: it is not there, or no array of numbers.
    """
    try:
        array: np.ndarray = np.load(path, allow_pickle=False)
    except OSError as error:
        raise UsageError(f"{option} {path} cannot be read: {error.strerror or error}") from None
    except (ValueError, EOFError):  # of pickles, and of files that are cut off
        raise UsageError(f"{option} {path} is no .npy of numbers") from None
    return array


def _read_truth(path: Path) -> Tensor:
    """True labels, int64 ``[N]``; or an array of bools as it is."""
    if path.suffix == ".npy":
        array = _read_array("--truth", path)
        if array.dtype == np.bool_:
            return torch.from_numpy(array)
    return read_labels(path)
