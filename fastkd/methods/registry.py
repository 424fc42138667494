"""Methods by name, with the weights of the study, for two given networks."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastkd._checks import check_text
from fastkd._names import unknown_name
from fastkd.methods.features import FeatureTap
from fastkd.methods.method import Method, WeightedMethod
from fastkd.methods.online import DML, ONE
from fastkd.methods.relational import RKD, SP
from fastkd.methods.representation import AT, FSP, FitNet
from fastkd.methods.response import BSS, Baseline, Hinton
from fastkd.models.layers import FeatureLayers, feature_layers
from fastkd.models.modes import evaluating

__all__ = ["NAMES", "create", "needs_teacher"]


def create(
    name: str,
    student: nn.Module | None = None,
    teacher: nn.Module | None = None,
    images: Tensor | None = None,
    **settings: Any,
) -> Method:
    """The method of this name, reading the layers that the networks have for it.

    Args:
        name: one of ``NAMES``: baseline, hinton, bss, fitnet, fsp, at, sp, rkd-d, rkd-a, rkd-da, one, dml.
        student, teacher: whose layers are taken (:func:`fastkd.models.layers.feature_layers`); not needed for methods without
            features.
        images: a batch ``[B, C, H, W]`` on the networks' device: they run once, in evaluation mode, for fitnet, which must know
            the channels of its layers, and for at, whose published weight is of a mean over 32 x 32 places or more: of maps
            that are smaller each place would weigh more, so the weight shrinks with them. Without images at keeps it.
        settings: of the method's class, in the place of the study's: ``temperature``, ``feature_weight``, ``layers``, ...

    Raises:
        ValueError: an unknown name, or setting of the method; the message has the nearest right ones.
    """
    entry = _entry(name)
    allowed = list(signature(entry.kind).parameters)
    for option in settings:
        if option not in allowed:
            raise unknown_name(f"{name}'s option", option, allowed, listed=True)
    return entry.make(student, teacher, images, settings)


def needs_teacher(name: str) -> bool:
    """Whether the method of this name learns from a teacher that is there before.

    Raises:
        ValueError: an unknown name.
    """
    return _entry(name).kind.needs_teacher


_CIFAR_PLACES = 32 * 32  # of the first maps that AT's weight was chosen for

Settings = dict[str, Any]
Maker = Callable[[nn.Module | None, nn.Module | None, Tensor | None, Settings], Method]


class _Entry(NamedTuple):
    kind: type[Method]
    make: Maker


def _entry(name: str) -> _Entry:
    if check_text("name", name) not in _METHODS:
        raise unknown_name("method", name, NAMES)
    return _METHODS[name]


def _without_features(kind: type[Method]) -> _Entry:
    return _Entry(kind, lambda student, teacher, images, settings: kind(**settings))


def _with_features(
    kind: type[WeightedMethod], layers: Callable[[FeatureLayers], tuple[str, ...]], **ours: Any
) -> _Entry:
    """Of a class that reads these layers of both networks."""

    def make(student: nn.Module | None, teacher: nn.Module | None, _: Tensor | None, settings: Settings) -> Method:
        return kind(**{**ours, **_layers(layers, student, teacher, settings), **settings})

    return _Entry(kind, make)


def _fitnet(student: nn.Module | None, teacher: nn.Module | None, images: Tensor | None, settings: Settings) -> Method:
    chosen = {**_layers(_middle, student, teacher, settings), **settings}
    if "student_channels" not in chosen or "teacher_channels" not in chosen:
        if student is None or teacher is None or images is None:
            raise ValueError(
                "fastkd: fitnet needs student, teacher and images, or student_channels and teacher_channels"
            )
        hint = FitNet(1, 1, **{name: chosen[name] for name in ("layers", "teacher_layers") if name in chosen})
        chosen.update(
            layers=hint.layers,
            teacher_layers=hint.teacher_layers,
            student_channels=_feature(student, hint.layers[0], images).shape[1],
            teacher_channels=_feature(teacher, hint.teacher_layers[0], images).shape[1],
        )
    return FitNet(**chosen)


def _at(student: nn.Module | None, teacher: nn.Module | None, images: Tensor | None, settings: Settings) -> Method:
    method = AT(**{**_layers(_stages, student, teacher, settings), **settings})
    if "feature_weight" not in settings and student is not None and teacher is not None and images is not None:
        pair = ((student, method.layers), (teacher, method.teacher_layers))
        places = min(_feature(network, layers[0], images).shape[2:].numel() for network, layers in pair)
        method.feature_weight *= min(1.0, places / _CIFAR_PLACES)
    return method


def _layers(
    pick: Callable[[FeatureLayers], tuple[str, ...]],
    student: nn.Module | None,
    teacher: nn.Module | None,
    settings: Settings,
) -> Settings:
    """``layers`` and ``teacher_layers`` of these networks, where the settings do not say and there are networks."""
    if "layers" in settings or student is None or teacher is None:
        return {}
    return {"layers": pick(feature_layers(student)), "teacher_layers": pick(feature_layers(teacher))}


def _middle(layers: FeatureLayers) -> tuple[str, ...]:
    return (layers.stages[len(layers.stages) // 2],)


def _stages(layers: FeatureLayers) -> tuple[str, ...]:
    return layers.stages


def _stem_and_stages(layers: FeatureLayers) -> tuple[str, ...]:
    return (layers.stem, *layers.stages)


def _last(layers: FeatureLayers) -> tuple[str, ...]:
    return layers.stages[-1:]


def _embedding(layers: FeatureLayers) -> tuple[str, ...]:
    return (layers.embedding,)


@torch.no_grad()
def _feature(network: nn.Module, layer: str, images: Tensor) -> Tensor:
    """A map of this layer."""
    tap = FeatureTap(network, [layer])
    try:
        with evaluating(network):
            features: dict[str, Tensor] = tap(images).features
            return features[layer]
    finally:
        tap.remove()


_METHODS: dict[str, _Entry] = {
    "baseline": _without_features(Baseline),
    "hinton": _without_features(Hinton),
    "bss": _without_features(BSS),
    "fitnet": _Entry(FitNet, _fitnet),
    "fsp": _with_features(FSP, _stem_and_stages),
    "at": _Entry(AT, _at),
    "sp": _with_features(SP, _last),
    "rkd-d": _with_features(RKD, _embedding, angle_weight=0.0),
    "rkd-a": _with_features(RKD, _embedding, distance_weight=0.0),
    "rkd-da": _with_features(RKD, _embedding),
    "one": _without_features(ONE),
    "dml": _without_features(DML),
}
NAMES = tuple(_METHODS)
