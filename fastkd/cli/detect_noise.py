"""``fastkd detect-noise``: which labels of a file are probably wrong."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from fastkd import noise
from fastkd.cli import _noise_report
from fastkd.cli._errors import UsageError, usage_errors
from fastkd.cli._output import check_writable

TEXT = (".csv", ".txt")


@dataclass(frozen=True)
class DetectNoise:
    """Say which labels are probably wrong, by what a network said of the samples.

    The network should not know the labels by heart: take probabilities of folds that it was not trained on, or losses of early
    epochs. Writes labels.csv (index, label, suggested, score, noisy), noisy.npy, report.json and histogram.png; where the truth
    is given, also how many of the wrong labels were found, and sweep.png.
    """

    values: Path
    """An .npy of what the network said: floats, a row a sample, or for losses a number a sample."""
    labels: Path
    """The given labels: an .npy of integers, a .csv or .txt of one a line, or a .json list."""
    kind: Literal["probabilities", "logits", "losses"] = "probabilities"
    """What the values are."""
    truth: Path | None = None
    """The true labels, as --labels, or an .npy of bools, True where a label is wrong; not needed to find them."""
    rule: noise.Rule = "mixture"
    """mixture: of two Gaussians of the losses (DivideMix); probability: that of the label is low (BLDR); confident: another
    class is above its own mean (confident learning, cleanlab); disagreement: another class is the most probable."""
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
        with usage_errors():
            noise.check_options(self.rule, self.threshold, self.by_class, self.kind)
        if self.values.suffix != ".npy":
            raise UsageError(f"--values is {self.values}, must end with .npy")
        for option, path in (("--labels", self.labels), ("--truth", self.truth)):
            if path is not None and path.suffix not in (".npy", ".json", *TEXT):
                raise UsageError(f"{option} is {path}, must end with .npy, .csv, .txt or .json")
        _noise_report.check_folder(self.output, self.overwrite)
        check_writable("--output", self.output, *_noise_report.files(self.output))
        values = _read_array("--values", self.values)
        labels = _read_labels("--labels", self.labels)
        truth = None if self.truth is None else _read_labels("--truth", self.truth, bools=True)
        if truth is not None and truth.shape != labels.shape:
            raise UsageError(
                f"--truth {self.truth} has {len(truth):,} labels, must have as many as --labels, {len(labels):,}"
            )
        if truth is not None and truth.dtype != torch.bool and bool((truth < 0).any()):
            raise UsageError(
                f"--truth {self.truth} has {int(truth.min())}, must be 0 or more: leave out what is not known"
            )
        with usage_errors():
            found = noise.find(
                labels,
                **{self.kind: values},
                rule=self.rule,
                threshold=self.threshold,
                by_class=self.by_class,
            )
        wrong = None if truth is None else truth if truth.dtype == torch.bool else truth != labels
        _noise_report.report(found, labels, wrong, self.output, console)


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


def _read_labels(option: str, path: Path, *, bools: bool = False) -> Tensor:
    """Labels of a file, int64 ``[N]``; an array of bools as it is, where they may be.

    Raises:
        UsageError: it cannot be read, or holds something else.
    """
    if path.suffix == ".npy":
        array = _read_array(option, path)
        if array.dtype.kind not in ("iub" if bools else "iu"):
            raise UsageError(f"{option} {path} holds {array.dtype}, must be integers")
        if array.ndim != 1:
            raise UsageError(f"{option} {path} has shape {array.shape}, must have one dimension, a label a sample")
        if array.dtype.kind == "b":
            return torch.from_numpy(array)
        if array.size and array.max() > np.iinfo(np.int64).max:
            raise UsageError(f"{option} {path} holds {array.max()}, must be labels")
        return torch.from_numpy(array.astype(np.int64))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UsageError(f"{option} {path} cannot be read: {why}") from None
    items: list[object]
    if path.suffix == ".json":
        where, first = "item", 0
        items = _json_list(option, path, text)
    else:
        where, first = "line", 1
        items = [*text.rstrip().split("\n")] if text.strip() else []
    labels = []
    for number, item in enumerate(items, first):
        label = _integer(item)
        if label is None:
            raise UsageError(f"{option} {path} has {str(item)[:40]!r} in {where} {number}, must be an integer")
        labels.append(label)
    return torch.tensor(labels, dtype=torch.int64)


def _json_list(option: str, path: Path, text: str) -> list[object]:
    try:
        items = json.loads(text)
    except (ValueError, RecursionError):
        raise UsageError(f"{option} {path} is no JSON") from None
    if not isinstance(items, list):
        raise UsageError(f"{option} {path} holds {type(items).__name__}, must be a list of integers")
    return items


def _integer(item: object) -> int | None:
    """Of a line or of JSON; None for anything else, and for what 64 bits do not hold."""
    try:
        number = int(item.strip()) if isinstance(item, str) else item
    except ValueError:
        return None
    good = isinstance(number, int) and not isinstance(number, bool) and -(2**63) <= number < 2**63
    return number if good else None  # type: ignore[return-value]
