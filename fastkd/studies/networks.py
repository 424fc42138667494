"""Networks of an experiment: made by name, with weights of a file, tried on images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.models import registry as models
from fastkd.models.modes import evaluating

__all__ = ["check_network", "make_network", "read_state", "take_weights"]


def make_network(name: str, role: str, *, channels: int, classes: int, seed: int) -> nn.Module:
    """A network with fresh weights.

    Args:
        role: of the network, for messages: student or teacher.

    Raises:
        ValueError: there is none of the name, or no memory for it.
    """
    try:
        return models.create(name, in_channels=channels, num_classes=classes, seed=seed)
    except ValueError as error:
        raise ValueError(str(error).replace("fastkd: name", f"fastkd: {role}", 1)) from None
    except (RuntimeError, MemoryError) as error:  # torch's, of an allocation
        raise ValueError(f"fastkd: {role} {name!r} cannot be made: {first_line(error)}") from None


def check_network(
    network: nn.Module, name: str, role: str, images: Tensor, classes: int, *, dense: bool = False
) -> None:
    """Whether it takes the images, and has a logit for each class, ``[n, K]``; a dense one at each pixel, ``[n, K, H, W]``.

    Raises:
        ValueError: it does not.
    """
    count, _, *sides = images.shape
    shapes = {False: (count, classes), True: (count, classes, *sides)}
    try:
        with torch.no_grad(), evaluating(network):
            shape = getattr(network(images), "shape", None)
        why = "its output is not one logit for each class" + (" of each pixel" if dense else "")
    except Exception as error:  # what torch says of maps that have become too small, for instance
        shape, why = None, first_line(error)
    if shape == shapes[not dense]:
        kinds = ("a classifier", "a dense network, as segmenter-8-16-16,", "pixel")
        kinds = kinds if dense else ("a dense network", "a classifier", "image")
        raise ValueError("fastkd: {} {!r} is {}, must be {} where each {} has a class".format(role, name, *kinds))
    if shape != shapes[dense]:
        size = "x".join(map(str, images.shape[1:]))
        raise ValueError(f"fastkd: {role} {name!r} does not take images of {size}: {why}")


def read_state(path: Path) -> object:
    """A state dict, whole or under ``model``, ``state_dict`` or ``net``, as checkpoints of others have it.

    Raises:
        FileNotFoundError, ValueError: it is not there, or cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"fastkd: there are no weights {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever pickle and torch make of a damaged file
        raise ValueError(f"fastkd: the weights {path} cannot be read: {first_line(error)}") from None
    for key in ("model", "state_dict", "net"):
        state = state.get(key, state) if isinstance(state, dict) else state
    return state


def take_weights(network: nn.Module, state: Any, path: Path) -> None:
    """Gives the network the weights of a file.

    Raises:
        ValueError: they are of another.
    """
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        what = " ".join(str(error).split())[:300]
        raise ValueError(f"fastkd: the weights {path} are not of this {type(network).__name__}: {what}") from None


def first_line(error: BaseException) -> str:
    """What it says first, or what it is."""
    return next(iter(str(error).splitlines()), type(error).__name__)
