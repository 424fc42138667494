"""Which labels of a training set are wrong, by what a training has made of them; and how well it says so."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastkd import noise
from fastkd._files import write_whole
from fastkd.data import ImageSet
from fastkd.methods import NoisyLabels, Procedure
from fastkd.methods.noisy import terms
from fastkd.models.modes import evaluating
from fastkd.studies.data import DataSettings, clean, wrong_labels
from fastkd.training import Trainer
from fastkd.training.distributed import on_first_rank

__all__ = ["LABELS", "PROBABILITIES", "WRONG", "detection", "find_wrong", "judged", "probabilities_of"]

PROBABILITIES, LABELS, WRONG = "probabilities.npy", "labels.npy", "wrong.npy"
AT_ONCE = 1024  # images


def judged(trainer: Trainer, train: ImageSet, settings: DataSettings, seed: int, folder: Path) -> dict[str, float]:
    """How well the labels of a training that are known to be wrong are told. What a method for noisy labels says of the labels,
    the labels, and where it is known which are wrong, are in the folder then.

    Args:
        settings, seed: that the training set was made by.
    """
    keeps = isinstance(trainer.procedure, NoisyLabels)
    if clean(settings) and not keeps:
        return {}
    probabilities = probabilities_of(trainer.procedure, trainer.network, train)
    wrong = None if clean(settings) else wrong_labels(settings, seed).to(train.device)
    if keeps:
        for name, rows in ((PROBABILITIES, probabilities.float()), (LABELS, train.target), (WRONG, wrong)):
            if rows is not None:
                array = rows.cpu().numpy()
                on_first_rank(lambda: write_whole(folder / name, lambda file: np.save(file, array)))  # noqa: B023
    return {} if wrong is None else detection(trainer.procedure, probabilities, train.target, wrong)


@torch.no_grad()
def probabilities_of(procedure: Procedure, network: nn.Module, train: ImageSet) -> Tensor:
    """Of all classes for each training image as it is, ``[N, K]``, by which its label is judged.

    Args:
        network: what the training is for, ``trainer.network``.
    """

    def judge(images: Tensor, index: Tensor) -> Tensor:
        if isinstance(procedure, NoisyLabels):
            return procedure.probabilities(network, images, index)
        return terms.probabilities(terms.class_logits(deployed, images))

    deployed = procedure.deployed(network)
    with evaluating(procedure), evaluating(network):
        parts = torch.arange(len(train), device=train.device).split(AT_ONCE)
        return torch.cat([judge(train.normalised(part), part) for part in parts])


def find_wrong(procedure: Procedure, probabilities: Tensor, target: Tensor) -> noise.Findings:
    """By the procedure's own rule; of one that has none, by a mixture of the losses."""
    rule = procedure.rule if isinstance(procedure, NoisyLabels) else NoisyLabels.rule
    return noise.find(target, probabilities, rule=rule)


def detection(procedure: Procedure, probabilities: Tensor, target: Tensor, wrong: Tensor) -> dict[str, float]:
    """Precision, recall and F1 of the wrong labels by the procedure's own rule, the area under the ROC curve of the score, and
    the F1 of each rule, ``mixture_f1`` and so on.

    Of a method for noisy labels, where cleanlab is installed, the F1 of its ``find_label_issues``, too.

    Args:
        wrong: bool ``[N]``.
    """
    found = find_wrong(procedure, probabilities, target)
    measured = noise.measure(found.noisy, wrong)
    figures = {f"noise_{name}": float(getattr(measured, name)) for name in ("precision", "recall", "f1")}
    figures["noise_auc"] = float(noise.sweep(found.score, wrong).roc_auc)
    for rule in noise.RULES:
        by_rule = noise.find(target, probabilities, rule=rule)
        figures[f"{rule}_f1"] = float(noise.measure(by_rule.noisy, wrong).f1)
    if isinstance(procedure, NoisyLabels) and importlib.util.find_spec("cleanlab") is not None:
        from cleanlab.filter import find_label_issues

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of classes with few samples
            theirs = find_label_issues(target.cpu().numpy(), probabilities.double().cpu().numpy(), n_jobs=1)
        figures["cleanlab_f1"] = float(noise.measure(torch.from_numpy(theirs).to(wrong.device), wrong).f1)
    return {name: value for name, value in figures.items() if value == value}  # not those that are undefined
