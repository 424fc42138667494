"""What a method is made for."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.methods.features import FeatureTap
from fastkd.models.modes import evaluating

__all__ = ["Given", "arguments_of", "feature_of"]


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
    class_dim: int = -1
    """Dimension of the classes in the networks' logits: 1 for dense networks, ``[B, K, H, W]``, whose targets are
    ``[B, H, W]``."""
    mean: tuple[float, ...] | None = None
    """Of the images before they are normalised, in [0, 1], a number a channel."""
    std: tuple[float, ...] | None = None
    """And their standard deviation."""
    padding: int | None = None
    """Pixels that random crops of the images may reach into."""
    flip: bool | None = None
    """Whether a mirrored image is still one of its class."""
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
        parameters = {name: parameter for name, (parameter, _) in arguments_of(kind).items()}
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name in parameters}
        for name, value in found.items():
            if value is None and parameters[name].default is inspect.Parameter.empty:
                raise ValueError(f"fastkd: {name} is None, must be given for {kind.__name__}")
        return {name: value for name, value in found.items() if value is not None}


def arguments_of(kind: type) -> dict[str, tuple[inspect.Parameter, Any]]:
    """What a class takes, with the annotation of each; where it hands on what it does not name (``**options``), what the class
    before it takes, too."""
    found: dict[str, tuple[inspect.Parameter, Any]] = {}
    for one in kind.__mro__:
        if "__init__" not in vars(one):
            continue
        init: Any = vars(one)["__init__"]
        hints = typing.get_type_hints(init)
        parameters = list(inspect.signature(init).parameters.values())[1:]
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        found = {**{p.name: (p, hints.get(p.name, Any)) for p in named}, **found}
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return found


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
