"""Networks by name: fastkd's for small images, and torchvision's where it is installed."""

from __future__ import annotations

import importlib
import re
from typing import Any

from torch import nn

from fastkd._checks import check_size, check_text
from fastkd._names import unknown_name
from fastkd._seeding import seeded
from fastkd.models import resnet as _resnet
from fastkd.models import wide_resnet as _wide_resnet
from fastkd.models.layers import MOST_DEPTH, MOST_WIDTH

__all__ = ["create", "names"]

TORCHVISION = "torchvision/"
TORCHVISION_RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
USUAL_WIDE = ("wrn-10-2", "wrn-16-1", "wrn-16-2", "wrn-22-2", "wrn-28-2", "wrn-28-10", "wrn-40-1", "wrn-40-2")


def names() -> tuple[str, ...]:
    """The usual names that :func:`create` takes; other depths, widths and networks of torchvision are taken, too."""
    own = (f"resnet{depth}" for depth in _resnet.USUAL_DEPTHS)
    return (*own, *USUAL_WIDE, *(TORCHVISION + name for name in TORCHVISION_RESNETS))


def create(name: str, *, in_channels: int = 3, num_classes: int = 10, seed: int = 0) -> nn.Module:
    """A network with fresh weights.

    Args:
        name: ``resnet<depth>`` (:func:`fastkd.models.resnet.resnet`), ``wrn-<depth>-<width>``
            (:func:`fastkd.models.wide_resnet.wide_resnet`), or a classification network of torchvision by its name there,
            with ``torchvision/`` before it where fastkd has the name, too. resnet50 and resnet152, which could be
            depths of either family, are torchvision's.
        in_channels: channels of the images. Where it is not 3, the first convolution of a network of torchvision is
            replaced by one that takes them.
        num_classes: number of logits K.
        seed: of the initial weights; torch's global generator stays as it is.

    Raises:
        TypeError: a name that is no text, numbers that are no ints.
        ValueError: an unknown name, answered with the nearest right ones; a depth or width that the family has not;
            no channels or classes.
        ImportError: a name of torchvision, which is not installed or does not load.
    """
    lower = check_text("name", name).lower()
    in_channels, num_classes = check_size("in_channels", in_channels, 1), check_size("num_classes", num_classes, 1)
    if lower not in TORCHVISION_RESNETS and not lower.startswith(TORCHVISION):
        if match := re.fullmatch(r"resnet(\d{1,9})", lower):
            depth = int(match[1])
            if 8 <= depth <= MOST_DEPTH and depth % 6 == 2:
                return _resnet.resnet(depth, in_channels=in_channels, num_classes=num_classes, seed=seed)
        if match := re.fullmatch(r"wrn-(\d{1,9})-(\d{1,9})", lower):
            depth, width = int(match[1]), int(match[2])
            if 10 <= depth <= MOST_DEPTH and depth % 6 == 4 and 1 <= width <= MOST_WIDTH:
                return _wide_resnet.wide_resnet(
                    depth, width, in_channels=in_channels, num_classes=num_classes, seed=seed
                )
    return _from_torchvision(name, in_channels, num_classes, seed)


def _from_torchvision(name: str, in_channels: int, num_classes: int, seed: int) -> nn.Module:
    theirs = name.lower().removeprefix(TORCHVISION)
    known = name.lower().startswith(TORCHVISION) or theirs in TORCHVISION_RESNETS
    hint = f"wrn depths are 6 n + 4, resnet depths 6 n + 2, up to {MOST_DEPTH}, and wrn widths up to {MOST_WIDTH}"
    try:
        models: Any = importlib.import_module("torchvision.models")
    except Exception as error:  # its operators fail to load with RuntimeError where it was built for another torch
        why = "is not installed" if isinstance(error, ModuleNotFoundError) else "does not load"
        if known:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ImportError(f"fastkd: name {name!r} is a network of torchvision, which {why}: {reason}") from error
        raise unknown_name("name", name, names(), f"{hint}; torchvision, whose names are taken, too, {why}") from None
    available = list(models.list_models(module=models))  # without its detection and segmentation networks
    if theirs not in available:
        raise unknown_name("name", name, [*names(), *available], hint)
    with seeded(seed):
        model: nn.Module = models.get_model(theirs, weights=None, num_classes=num_classes)
        if in_channels != 3:
            _take_channels(model, in_channels)
    return model


def _take_channels(model: nn.Module, in_channels: int) -> None:
    """Puts a fresh first convolution for ``in_channels`` in place of that for 3."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            fresh = nn.Conv2d(
                in_channels,
                module.out_channels,
                module.kernel_size,  # type: ignore[arg-type]
                module.stride,  # type: ignore[arg-type]
                module.padding,  # type: ignore[arg-type]
                bias=module.bias is not None,
            )
            model.set_submodule(name, fresh)
            return
    raise ValueError(
        f"fastkd: in_channels is {in_channels}, must be 3: {type(model).__name__} has no convolution to replace"
    )
