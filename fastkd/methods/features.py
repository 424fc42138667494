"""Named features of any network, by forward hooks: the network's code stays as it is."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["FeatureTap", "Outputs", "layer_names", "logits_of"]

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
        layers: names of modules as in ``model.named_modules()``, each to run once in a forward pass. Where the model or a
            part of it is compiled, as they were before (without ``_orig_mod.``).

    The hooks stay on the model until :meth:`remove`, and do nothing but while the tap runs.

    Raises:
        TypeError: a string for the names.
        ValueError: a name that the model does not have; the message lists those that it has.
        RuntimeError: at the call, where a module did not run, ran twice, returned something else than a tensor, or its
            output was changed in place afterwards (``ReLU(inplace=True)`` after a tapped batch norm; not noticed inside
            of ``torch.compile`` and of ``torch.inference_mode``, whose tensors do not count their changes).
    """

    def __init__(self, model: nn.Module, layers: Iterable[str] = ()) -> None:
        super().__init__()
        names = layer_names("layers", layers)
        modules = _modules_by_name(model)
        for name in names:
            if name not in modules:
                raise ValueError(_unknown_layer(name, list(modules)))
        self.model = model
        self.training = model.training
        self.layers = tuple(dict.fromkeys(names))
        self._taps = [_Tap() for _ in self.layers]
        self._hooks = [
            modules[name].register_forward_hook(tap) for name, tap in zip(self.layers, self._taps, strict=True)
        ]

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

    def remove(self) -> None:
        """Takes the hooks off the model; the tap is of no use afterwards."""
        for hook in self._hooks:
            hook.remove()


class _Tap:
    """A forward hook that keeps what the module returned while ``outputs`` is a list. Copied with the model."""

    outputs: list[tuple[Any, int | None]] | None = None
    """Each with its version, which counts the changes in place, where it is known."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.outputs is not None:
            self.outputs.append((output, _version(output)))


def layer_names(argument: str, layers: Iterable[str]) -> tuple[str, ...]:
    """These names as a tuple; of a string they would be its letters."""
    if isinstance(layers, str):
        raise TypeError(f"fastkd: {argument} is the string {layers!r}, must be a sequence of names: [{layers!r}]")
    return tuple(layers)


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
    ((output, version),) = outputs
    if not isinstance(output, Tensor):
        raise RuntimeError(f"fastkd: layer {name!r} returned {type(output).__name__}, must be a tensor to be tapped")
    if version is not None and version != _version(output):
        raise RuntimeError(
            f"fastkd: the output of layer {name!r} was changed in place after it was tapped (by a ReLU(inplace=True)?), "
            "must stay as it is: tap the module that comes after"
        )
    return output


def _version(output: Any) -> int | None:
    # a tensor being traced has no changes in place, one made in inference mode does not count them
    if torch.compiler.is_compiling() or not isinstance(output, Tensor) or output.is_inference():
        return None
    return output._version


def _modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """All but the model itself, by the names that they have where nothing is compiled."""
    modules: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        plain = ".".join(part for part in name.split(".") if part != "_orig_mod")
        if plain:
            modules.setdefault(plain, module)
    return modules


def _unknown_layer(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 3)
    hint = f"; near it: {', '.join(near)}" if near else ""
    return f"fastkd: the model has no layer {name!r}{hint}; it has {', '.join(known) or 'none'}"
