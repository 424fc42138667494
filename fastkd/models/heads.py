"""The linear layer that a classifier ends with: ``logits = W u + b`` of a latent vector u."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastkd.models.modes import evaluating

__all__ = ["LinearHead", "linear_head", "watch_latents", "with_head"]


class LinearHead(NamedTuple):
    """Of a network."""

    name: str
    """As ``network.get_submodule`` takes it."""
    layer: nn.Linear


@torch.no_grad()
def linear_head(network: nn.Module, images: Tensor) -> LinearHead:
    """The ``nn.Linear`` whose output the logits are; the network runs once, in evaluation mode.

    Args:
        network: images to logits ``[B, K]``, or to an object that has them as ``.logits``.
        images: one or more, ``[B, C, H, W]``, where the network is.

    Raises:
        ValueError: no linear layer puts out the logits.
    """
    outputs: list[tuple[str, nn.Linear, Tensor]] = []
    with ExitStack() as hooks, evaluating(network):
        for name, module in network.named_modules():
            if isinstance(module, nn.Linear):

                def keep(layer: nn.Module, _: Any, output: Tensor, name: str = name) -> None:
                    assert isinstance(layer, nn.Linear)
                    outputs.append((name, layer, output))

                hooks.callback(module.register_forward_hook(keep).remove)
        found = network(images)
    logits = getattr(found, "logits", found)
    for name, layer, output in reversed(outputs):
        # views of it too: whatever reshapes, but computes nothing
        if isinstance(logits, Tensor) and output.shape == logits.shape and output.data_ptr() == logits.data_ptr():
            return LinearHead(name, layer)
    raise ValueError(
        f"fastkd: the logits of {type(network).__name__} come out of none of its linear layers "
        f"({', '.join(name for name, *_ in outputs) or 'there are none'}), must be those of one, W u + b"
    )


@contextmanager
def watch_latents(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Inside the ``with`` block, what went into the layer each time that it ran, ``[B, p]``, is added to the list."""
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        hook.remove()


def with_head(network: nn.Module, name: str, head: nn.Module) -> nn.Module:
    """The same network with another head; parameters and buffers are shared, the network itself stays as it is.

    With ``nn.Identity()`` it puts out latent vectors.

    Args:
        name: of the layer in whose place it stands, as of :class:`LinearHead`.
    """
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    made = copy.deepcopy(network, shared)
    made.set_submodule(name, head)
    return made
