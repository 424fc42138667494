"""Named features of any network, by forward hooks: the network's code stays as it is."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor, nn

__all__ = ["FeatureTap", "Outputs"]

_NONE: Mapping[str, Tensor] = MappingProxyType({})


class Outputs(NamedTuple):
    """What a network put out for a batch."""

    logits: Tensor
    """``[B, K]``; ``[networks, B, K]`` where several learn together (:class:`fastkd.methods.ONE`, ``DML``)."""
    features: Mapping[str, Tensor] = _NONE
    """By the name of the module that returned them, ``[B, ...]``."""


class FeatureTap(nn.Module):
    """A network together with the outputs of some of its modules.

    >>> teacher = FeatureTap(torchvision.models.resnet18(), ["layer1", "avgpool"])
    >>> logits, features = teacher(images)
    >>> features["layer1"].shape

    Args:
        model: any network that returns logits, or an object that has them as ``.logits``.
        layers: names of modules as in ``model.named_modules()``, each to run once in a forward pass.

    A module that works in place on the output of a tapped one (``ReLU(inplace=True)`` after a tapped batch norm) changes
    what was tapped; tap the later one. The hooks stay on the model and do nothing but while the tap runs.

    Raises:
        ValueError: a name that the model does not have; the message lists those that it has.
        RuntimeError: at the call, where a module did not run, ran twice, or returned something else than a tensor.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str] = ()) -> None:
        super().__init__()
        if isinstance(layers, str):
            raise TypeError(f"fastkd: layers is the string {layers!r}, must be a sequence of names: [{layers!r}]")
        modules = {name: module for name, module in model.named_modules() if name}
        for name in layers:
            if name not in modules:
                raise ValueError(_unknown_layer(name, list(modules)))
        self.model = model
        self.training = model.training
        self.layers = tuple(dict.fromkeys(layers))
        self._taps = [_Tap() for _ in self.layers]
        for name, tap in zip(self.layers, self._taps, strict=True):
            modules[name].register_forward_hook(tap)

    def forward(self, *args: Any, **kwargs: Any) -> Outputs:
        """Runs the model on these arguments."""
        for tap in self._taps:
            tap.outputs = []
        try:
            result = self.model(*args, **kwargs)
            features = {name: _the_one(name, tap) for name, tap in zip(self.layers, self._taps, strict=True)}
        finally:
            for tap in self._taps:
                tap.outputs = None
        return Outputs(logits_of(result), features)


class _Tap:
    """A forward hook that keeps what the module returned while ``outputs`` is a list. Copied with the model."""

    outputs: list[Any] | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.outputs is not None:
            self.outputs.append(output)


def logits_of(result: Any) -> Tensor:
    """The logits among what a network returned: itself, or its ``.logits``."""
    logits = getattr(result, "logits", result)
    if not isinstance(logits, Tensor):
        raise TypeError(f"fastkd: the model returned {type(result).__name__}, must be logits or have them as .logits")
    return logits


def _the_one(name: str, tap: _Tap) -> Tensor:
    outputs = tap.outputs or []
    if len(outputs) != 1:
        ran = f"ran {len(outputs)} times" if outputs else "did not run"
        raise RuntimeError(f"fastkd: layer {name!r} {ran} in this forward pass, must run once to be tapped")
    if not isinstance(outputs[0], Tensor):
        raise RuntimeError(
            f"fastkd: layer {name!r} returned {type(outputs[0]).__name__}, must be a tensor to be tapped"
        )
    return outputs[0]


def _unknown_layer(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 3)
    hint = f"; near it: {', '.join(near)}" if near else ""
    return f"fastkd: the model has no layer {name!r}{hint}; it has {', '.join(known) or 'none'}"
