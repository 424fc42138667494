"""Networks by name: fastkd's for small images, and torchvision's where it is installed."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from fastkd._checks import check_size, check_text
from fastkd._names import unknown_name
from fastkd._seeding import seeded
from fastkd.models import cifar_resnet, densenet, resnet, segmenter, shufflenet_v2, vgg, wide_resnet
from fastkd.models.layers import MOST_CHANNELS, MOST_DEPTH, MOST_WIDTH
from fastkd.models.lenet import LeNet5
from fastkd.models.mobilenet_v2 import MobileNetV2
from fastkd.models.two_conv_net import TwoConvNet

__all__ = ["create", "names"]

Maker = Callable[..., nn.Module]  # takes in_channels, num_classes and seed

TORCHVISION = "torchvision/"
TORCHVISION_RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
USUAL_WIDE = ((10, 2), (16, 1), (16, 2), (22, 2), (28, 2), (28, 10), (40, 1), (40, 2))

# "cifar-" is before what torchvision, too, has by that name, for larger images
NETWORKS: dict[str, Maker] = {
    **{f"resnet{depth}": partial(resnet.resnet, depth) for depth in resnet.USUAL_DEPTHS},
    **{f"wrn-{depth}-{width}": partial(wide_resnet.wide_resnet, depth, width) for depth, width in USUAL_WIDE},
    **{f"cifar-resnet{depth}": partial(cifar_resnet.CifarResNet, depth) for depth in cifar_resnet.BLOCKS},
    **{f"cifar-vgg{depth}": partial(vgg.VGG, depth) for depth in vgg.CONVOLUTIONS},
    **{
        f"densenet-bc-{depth}-{growth}": partial(densenet.densenet_bc, depth, growth)
        for depth, growth in densenet.USUAL
    },
    **{f"cifar-densenet{depth}": partial(densenet.cifar_densenet, depth) for depth in densenet.LAYERS},
    "cifar-mobilenetv2": MobileNetV2,
    "cifar-mobilenetv2-0.5": partial(MobileNetV2, 0.5),
    "cifar-shufflenetv2": shufflenet_v2.ShuffleNetV2,
    **{f"cifar-shufflenetv2-{width}": partial(shufflenet_v2.ShuffleNetV2, width) for width in (0.5, 1.5, 2.0)},
    "lenet5": LeNet5,
    "lenet5-half": partial(LeNet5, half=True),
    "twoconvnet": TwoConvNet,
    **{"-".join(map(str, ("segmenter", *widths))): partial(segmenter.segmenter, *widths) for widths in segmenter.USUAL},
}


class _Family(NamedTuple):
    """Networks by numbers, which are in the groups of the pattern of their names, several of one group with - between."""

    pattern: str
    has: Callable[..., bool]
    make: Maker


_FAMILIES = (
    _Family(r"resnet(\d{1,9})", lambda depth: 8 <= depth <= MOST_DEPTH and depth % 6 == 2, resnet.resnet),
    _Family(
        r"wrn-(\d{1,9})-(\d{1,9})",
        lambda depth, width: 10 <= depth <= MOST_DEPTH and depth % 6 == 4 and 1 <= width <= MOST_WIDTH,
        wide_resnet.wide_resnet,
    ),
    _Family(
        r"densenet-bc-(\d{1,9})-(\d{1,9})",
        lambda depth, growth: 10 <= depth <= MOST_DEPTH and depth % 6 == 4 and 1 <= growth <= MOST_WIDTH,
        densenet.densenet_bc,
    ),
    _Family(
        r"segmenter-(\d{1,9}(?:-\d{1,9})+)",
        lambda *widths: len(widths) <= MOST_DEPTH and all(1 <= width <= MOST_CHANNELS for width in widths),
        segmenter.segmenter,
    ),
)


def names() -> tuple[str, ...]:
    """The usual names that :func:`create` takes; other depths, widths and networks of torchvision are taken, too."""
    return (*NETWORKS, *(TORCHVISION + name for name in TORCHVISION_RESNETS))


def create(name: str, *, in_channels: int = 3, num_classes: int = 10, seed: int = 0) -> nn.Module:
    """A network with fresh weights.

    Args:
        name: ``resnet<depth>`` (:func:`fastkd.models.resnet.resnet`), ``wrn-<depth>-<width>``
            (:func:`fastkd.models.wide_resnet.wide_resnet`), ``densenet-bc-<depth>-<growth>``
            (:func:`fastkd.models.densenet.densenet_bc`), ``segmenter-<width>-<width>-...``, a width for each of two stages or
            more (:class:`fastkd.models.segmenter.Segmenter`, a dense network), another of :func:`names`, or a classification
            network of torchvision by its name there, with ``torchvision/`` before it where fastkd has the name, too. resnet50
            and resnet152, which could be depths of either family, are torchvision's; ``cifar-resnet18``, ``cifar-vgg11``, ...
            are fastkd's for images of 32 x 32 pixels.
        in_channels: channels of the images. Where it is not 3, the first convolution of a network of torchvision is
            replaced by one that takes them.
        num_classes: number of logits K, of a dense network for each pixel.
        seed: of the initial weights; torch's global generator stays as it is.

    Raises:
        TypeError: a name that is no text, numbers that are no ints.
        ValueError: an unknown name, answered with the nearest right ones; a depth or width that the family has not;
            no channels or classes.
        ImportError: a name of torchvision, which is not installed or does not load.
    """
    make = _maker(check_text("name", name).lower())
    in_channels, num_classes = check_size("in_channels", in_channels, 1), check_size("num_classes", num_classes, 1)
    if make is None:
        return _from_torchvision(name, in_channels, num_classes, seed)
    return make(in_channels=in_channels, num_classes=num_classes, seed=seed)


def _maker(name: str) -> Maker | None:
    """Of the network of this name, if fastkd has it."""
    if name in NETWORKS:
        return NETWORKS[name]
    for family in _FAMILIES:
        match = re.fullmatch(family.pattern, name)
        if match and name not in TORCHVISION_RESNETS:
            numbers = [int(number) for group in match.groups() for number in group.split("-")]
            if family.has(*numbers):
                return partial(family.make, *numbers)
    return None


def _from_torchvision(name: str, in_channels: int, num_classes: int, seed: int) -> nn.Module:
    theirs = name.lower().removeprefix(TORCHVISION)
    known = name.lower().startswith(TORCHVISION) or theirs in TORCHVISION_RESNETS
    hint = (
        f"segmenters have two widths or more, up to {MOST_CHANNELS}; wrn and densenet-bc depths are 6 n + 4, resnet depths "
        f"6 n + 2, up to {MOST_DEPTH}, and densenet-bc growths and wrn widths up to {MOST_WIDTH}"
    )
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
