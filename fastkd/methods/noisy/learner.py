"""What the methods for noisy labels have in common: labels that may be wrong, and what becomes known of each sample."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastkd import _checks, noise
from fastkd.data.batch import Batch, Batches
from fastkd.methods.features import check_module
from fastkd.methods.given import Given
from fastkd.methods.noisy import terms
from fastkd.methods.noisy.samples import Samples
from fastkd.methods.procedure import Part, Procedure, Step

__all__ = ["NoisyLabels", "chosen", "whole_epochs"]

_NO_OPTIONS = {"self", "__class__", *(f.name for f in fields(Given))}  # arguments that are given, not chosen


def chosen(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The options among the arguments (``locals()``) of a method."""
    return {name: value for name, value in arguments.items() if name not in _NO_OPTIONS}


def whole_epochs(share: float, epochs: int) -> int:
    """Epochs that a share of the training comes to, the last one whole."""
    return math.ceil(share * epochs - 1e-6)  # 10 / 300 of 300 are not to be 11


class NoisyLabels(Procedure):
    """Base of procedures that learn from labels some of which are wrong.

    Batches have images, ``target``, ``index`` and, where :attr:`views` says so, further views of the images. State of samples
    is in :class:`Samples`, which a subclass gives to ``keep``.

    Args:
        student: images to logits ``[B, K]``.
        items: samples of the training set.
        num_classes: K.
        options: of the subclass, by name: two trainings go on from each other where they are the same.
    """

    rule: ClassVar[noise.Rule] = "mixture"
    """How wrong labels are told in the end, of :meth:`probabilities`: one of :func:`fastkd.noise.find`."""

    def __init__(self, student: nn.Module, items: int, num_classes: int, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.student = check_module("student", student)
        self.items = _checks.check_count("items", items, 1)
        self.num_classes = _checks.check_count("num_classes", num_classes, 2)
        self._options = dict(options)

    def keep(self, **initial: Tensor) -> Samples:
        """State of the samples, by name the first value of every row, on the student's device."""
        device = next(self.student.parameters()).device
        return Samples(self.items, **initial).to(device)

    def parts(self) -> dict[str, Part]:
        return {"student": Part(self.student)}

    def network(self) -> nn.Module:
        return self.student

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self._options.items())

    def after_epoch(self, step: Step) -> dict[str, Tensor | float]:
        for module in self.modules():
            if isinstance(module, Samples):
                module.share()
        return {}

    def probabilities(self, network: nn.Module, images: Tensor, index: Tensor) -> Tensor:
        """Of the classes, ``[B, K]``, by which labels are judged.

        Args:
            network: :meth:`network`, or its average, in evaluation mode.
            images: of the training set, as they are.
            index: int64 ``[B]``, which of it.
        """
        return terms.probabilities(terms.class_logits(self.deployed(network), images))

    def checked(self, batch: Batches) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Labels ``[B]``, index ``[B]`` and all views of a batch.

        Raises:
            TypeError, ValueError: no labels, or no index; too few views; labels of maps. On the CPU labels and index out of
                range, too: on a GPU they are not looked at, as that would wait for it.
        """
        name = type(self).__name__
        if not isinstance(batch, Batch):
            raise TypeError(f"fastkd: batch is {type(batch).__name__}, must be a Batch for {name}")
        target, index = batch.target, batch.index
        for what, tensor in (("target", target), ("index", index)):
            if tensor is None:
                raise ValueError(f"fastkd: the batch's {what} is None, must be int64 [B] for {name}")
            if tensor.dtype != torch.int64 or tensor.dim() != 1:
                raise ValueError(
                    f"fastkd: the batch's {what} is {tensor.dtype} {tuple(tensor.shape)}, must be int64 [B] for {name}"
                )
        assert target is not None
        assert index is not None
        views = (batch.images, *batch.views)
        if len(views) < self.views:
            raise ValueError(
                f"fastkd: the batch has {len(views)} view of its images, must have {self.views} for {name}, as "
                f"ImageBatches(..., views={self.views}) gives them"
            )
        if target.device.type == "cpu":
            for what, tensor, end in (("target", target, self.num_classes), ("index", index, self.items)):
                low, high = int(tensor.min()), int(tensor.max())
                if low < 0 or high >= end:
                    raise ValueError(f"fastkd: the batch's {what} holds {low} to {high}, must be in [0, {end})")
        return target, index, views[: self.views]
