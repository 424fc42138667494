"""Where distillation methods look into a network: the names of its stem, its stages and its embedding."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

__all__ = ["FeatureLayers", "feature_layers"]

MOST_DEPTH, MOST_WIDTH = 2_000, 100  # of the networks here: more is a slip of the finger that would take all memory
MOST_CHANNELS = 64 * MOST_WIDTH  # as many as the widest has


class FeatureLayers(NamedTuple):
    """Names of modules, as ``model.get_submodule`` takes them, each called once in a forward.

    Their outputs are read: maps ``[N, C, H, W]`` of ``stem`` (before the first stage) and of each of the ``stages`` (the
    last one after its activation), and ``embedding``, which has one value a channel, ``[N, C, 1, 1]`` or ``[N, C]``; of a
    dense network it may be maps, too.
    """

    stem: str
    stages: tuple[str, ...]
    embedding: str


def feature_layers(model: nn.Module) -> FeatureLayers:
    """The layers of a network that has an attribute ``feature_layers``, or modules named as torchvision's ResNet has.

    The latter are ``layer1``, ``layer2``, ... and ``avgpool``; the stem is ``maxpool`` where there is one, else ``relu``.

    Raises:
        ValueError: neither of these, or a declared name that is no module of the network.
    """
    declared = getattr(model, "feature_layers", None)
    if declared is not None:
        stem, stages, embedding = declared
        layers = FeatureLayers(stem, tuple(stages), embedding)
        modules = {name for name, _ in model.named_modules()}
        for name in (layers.stem, *layers.stages, layers.embedding):
            if name not in modules:
                raise ValueError(f"fastkd: model declares the feature layer {name!r}, which is no module of it")
        return layers
    children = [name for name, _ in model.named_children()]
    numbers = range(1, len(children) + 1)
    stages = tuple(f"layer{i}" for i in numbers if all(f"layer{j}" in children for j in range(1, i + 1)))
    stem = next((name for name in ("maxpool", "relu") if name in children), None)
    if stem is None or not stages or "avgpool" not in children:
        raise ValueError(
            f"fastkd: model is a {type(model).__name__}, whose layers are not known; name them by hand, "
            f"FeatureLayers(stem, stages, embedding): its modules are {', '.join(children) or 'none'}"
        )
    return FeatureLayers(stem, stages, "avgpool")
