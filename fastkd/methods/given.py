"""What a method is made for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.methods.features import FeatureTap
from fastkd.models.modes import evaluating

__all__ = ["Given", "feature_of"]


@dataclass(frozen=True)
class Given:
    """Networks and data that a method is made for; each may be missing.

    A method takes what it wants by an argument of the name.
    """

    student: nn.Module | None = None
    teacher: nn.Module | None = None
    images: Tensor | None = None
    """A few images, ``[B, C, H, W]``, normalised, where the networks are."""
    batch_size: int | None = None
    items: int | None = None
    """Images of the training set."""
    num_classes: int | None = None
    make_student: Callable[[int], nn.Module] | None = None
    """Makes networks like the student, by seed; that of 0 is the student."""

    def network_of_seed(self, seed: int) -> nn.Module:
        """The student for 0, else one like it.

        Raises:
            ValueError: it is not given.
        """
        if seed == 0 and self.student is not None:
            return self.student
        if self.make_student is None:
            raise ValueError("fastkd: make_student is None, must be a function that makes networks like the student")
        return self.make_student(seed)

    def wanted(self, kind: type) -> dict[str, Any]:
        """Of this, what the class takes.

        Raises:
            ValueError: some of it is not given.
        """
        parameters = inspect.signature(kind).parameters
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name in parameters}
        for name, value in found.items():
            if value is None and parameters[name].default is inspect.Parameter.empty:
                raise ValueError(f"fastkd: {name} is None, must be given for {kind.__name__}")
        return {name: value for name, value in found.items() if value is not None}


@torch.no_grad()
def feature_of(network: nn.Module, layer: str, images: Tensor) -> Tensor:
    """What this layer puts out for images."""
    tap = FeatureTap(network, [layer])
    try:
        with evaluating(network):
            features: dict[str, Tensor] = tap(images).features
            return features[layer]
    finally:
        tap.remove()
