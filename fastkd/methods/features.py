"""Named features of any network, by forward hooks: the network's code stays as it is."""

from __future__ import annotations

import difflib
import threading
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node
from torch.utils.hooks import RemovableHandle

from fastkd._checks import check_count, check_dim, check_tensor

__all__ = [
    "FeatureTap",
    "JointLogits",
    "Outputs",
    "check_module",
    "classes_last",
    "layer_names",
    "logits_of",
    "logits_of_one",
]

_NONE: Mapping[str, Tensor] = MappingProxyType({})


class JointLogits(tuple[Tensor, ...]):
    """The logits of networks that learn together (:class:`fastkd.methods.ONE`, ``DML``), ``[B, ..., K]`` each.

    A tuple with a name of its own, as a network may return any tuple, and one network's logits any number of dimensions. Of
    logits in one tensor, ``[networks, B, ..., K]``, it is ``JointLogits(logits)``.
    """

    __slots__ = ()

    def __new__(cls, *logits: Any) -> JointLogits:
        """Of an iterable of tensors, or of two tensors and more, as torch builds the outputs of hooked modules anew."""
        return super().__new__(cls, logits if len(logits) > 1 else logits[0])


Logits = TypeVar("Logits", Tensor, JointLogits, Tensor | JointLogits)

# to torch a subclass of tuple is a leaf: DDP, torch.export and vmap would not see the tensors
register_pytree_node(
    JointLogits,
    lambda joint: (list(joint), None),
    lambda logits, _: JointLogits(logits),
    serialized_type_name="JointLogits",
)


class Outputs(NamedTuple):
    """What a network put out for a batch."""

    logits: Tensor | JointLogits
    """``[B, ..., K]``, classes last: ``[B, K]`` of a classifier, ``[B, T, K]`` of a language model, ``[B, H, W, K]`` of maps;
    :class:`JointLogits` of several networks that learn together, of which other methods take none."""
    features: Mapping[str, Tensor] = _NONE
    """By the name of the module that returned them, ``[B, ...]``."""

    def __reduce__(self) -> tuple[type[Outputs], tuple[Any, dict[str, Tensor]]]:
        return type(self), (self.logits, dict(self.features))  # the default can be neither copied nor pickled


class FeatureTap(nn.Module):
    """A network together with the outputs of some of its modules.

    >>> teacher = FeatureTap(torchvision.models.resnet18(), ["layer1", "avgpool"])
    >>> logits, features = teacher(images)
    >>> features["layer1"].shape

    Args:
        model: any network that returns logits (one tensor, or :class:`JointLogits`), or an object that has them as ``.logits``.
        layers: names of modules as in ``model.named_modules()``, each to run once in a forward pass. Where the model or a
            part of it is compiled, as they were before (without ``_orig_mod.``).
        class_dim: dimension of the classes in the model's logits. Those of a dense network, ``[B, K, H, W]``, have them in
            dimension 1, as a classifier's ``[B, K]`` do. They are handed on with the classes last, ``[B, H, W, K]``, as a view:
            so methods take them with targets ``[B, H, W]``, and every pixel counts the same.

    The hooks stay on the model until :meth:`remove`, and do nothing but while the tap runs. Threads may share a tap: each gets
    the features of its own forward pass.

    Raises:
        TypeError: a model that is no module, a string for the names.
        ValueError: a name that the model does not have; the message lists those that it has. At the call, a class_dim that the
            logits do not have.
        RuntimeError: at the call, where a module did not run, ran twice, returned something else than a tensor, or its
            output was changed in place afterwards (``ReLU(inplace=True)`` after a tapped batch norm; not noticed inside
            of ``torch.compile`` and of ``torch.inference_mode``, whose tensors do not count their changes).
    """

    def __init__(self, model: nn.Module, layers: Iterable[str] = (), class_dim: int = -1) -> None:
        super().__init__()
        self.model = check_module("model", model)
        self.class_dim = check_count("class_dim", class_dim)
        self.training = model.training
        self._hooks: list[RemovableHandle] = []
        self.retap(layers)

    def retap(self, layers: Iterable[str]) -> None:
        """Keeps the outputs of these modules from now on, in the place of those before; errors as of the class."""
        names = tuple(dict.fromkeys(layer_names("layers", layers)))
        modules = _modules_by_name(self.model)
        for name in names:
            if name not in modules:
                raise ValueError(_unknown_layer(name, list(modules)))
        self.remove()
        self.layers = names
        self._taps = [_Tap() for _ in names]
        self._hooks = [modules[name].register_forward_hook(tap) for name, tap in zip(names, self._taps, strict=True)]

    def forward(self, *args: Any, **kwargs: Any) -> Outputs:
        """Runs the model on these arguments."""
        for tap in self._taps:
            tap.here.outputs = []
        try:
            result = self.model(*args, **kwargs)
            features = {name: _the_one(name, tap) for name, tap in zip(self.layers, self._taps, strict=True)}
        finally:
            for tap in self._taps:
                tap.here.outputs = None
        return Outputs(classes_last(logits_of(result), self.class_dim), features)

    def remove(self) -> None:
        """Takes the hooks off the model; the tap is of no use afterwards, but for :meth:`retap`."""
        for hook in self._hooks:
            hook.remove()


class _Tap:
    """A forward hook that keeps what the module returned to this thread, while the tap runs in it. Copied with the model."""

    def __init__(self) -> None:
        self.here = threading.local()
        """``outputs``, a list while the tap runs, of each output and its version, which counts the changes in place, where it
        is known. One a thread: others may run the same model meanwhile, as DataParallel's replicas do."""

    def __reduce__(self) -> tuple[type[_Tap], tuple[()]]:
        return _Tap, ()  # copies and pickles keep nothing

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs = getattr(self.here, "outputs", None)
        if outputs is not None:
            outputs.append((output, _version(output)))


def check_module(name: str, module: object) -> nn.Module:
    if not isinstance(module, nn.Module):
        raise TypeError(f"fastkd: {name} is {type(module).__name__}, must be a torch.nn.Module")
    return module


def layer_names(argument: str, layers: Iterable[str]) -> tuple[str, ...]:
    """These names as a tuple, in their order; of a string they would be its letters."""
    if isinstance(layers, str):
        raise TypeError(f"fastkd: {argument} is the string {layers!r}, must be a sequence of names: [{layers!r}]")
    if not isinstance(layers, Iterable) or isinstance(layers, (set, frozenset)):  # a set has no order to pair them by
        raise TypeError(f"fastkd: {argument} is {layers!r}, must be a sequence of names")
    names = tuple(layers)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"fastkd: {argument} holds {name!r}, must be names of modules")
    return names


def logits_of(result: Any) -> Tensor | JointLogits:
    """The logits among what a network returned: itself, or its ``.logits``.

    Raises:
        TypeError: they are no tensor and no :class:`JointLogits`.
    """
    logits = getattr(result, "logits", result)
    if not isinstance(logits, (Tensor, JointLogits)):
        raise TypeError(
            f"fastkd: the model returned {type(result).__name__}, must be logits or have them as .logits: a tensor, or "
            "JointLogits of networks that learn together"
        )
    return logits


def classes_last(logits: Logits, class_dim: int) -> Logits:
    """The logits, of several networks each, with their classes in the last dimension: a view.

    Raises:
        ValueError: they have no such dimension.
    """
    if class_dim == -1:
        return logits
    if isinstance(logits, JointLogits):
        return JointLogits([classes_last(one, class_dim) for one in logits])
    one = check_tensor("the model's logits", logits)
    return one.movedim(check_dim("class_dim", class_dim, "the model's logits", one.shape), -1)


def logits_of_one(name: str, logits: object) -> Tensor:
    """These logits, where they are those of a single network.

    Raises:
        ValueError, TypeError: they are those of several, or no tensor.
    """
    if isinstance(logits, (tuple, list)):
        raise ValueError(
            f"fastkd: {name} are the logits of {len(logits)} networks, must be those of one, a tensor [B, ..., K]: "
            "networks that learn together are trained by ONE or DML, and kept by method.deployed(student)"
        )
    return check_tensor(name, logits)


def _the_one(name: str, tap: _Tap) -> Tensor:
    outputs = tap.here.outputs
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
