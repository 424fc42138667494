"""The latter part of a network, which learns wrong labels first."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastkd.models.heads import linear_head
from fastkd.models.layers import feature_layers

__all__ = ["renew", "tail_of", "tensors_of"]


def tail_of(network: nn.Module, images: Tensor, stages: int = 0) -> tuple[str, ...]:
    """Names of the modules without children that are the head, with so many of the last stages before it.

    Args:
        network: ends with a linear layer; where ``stages`` is above 0, with :func:`fastkd.models.layers.feature_layers`, and
            with its modules in the order in which they run.
        images: a few, where the network is.

    Raises:
        ValueError: it has fewer stages, or as many: something is to be left.
    """
    if not stages:
        return (linear_head(network, images).name,)
    of_network = feature_layers(network).stages
    if stages >= len(of_network):
        raise ValueError(
            f"fastkd: renewed_stages is {stages}, must be in [0, {len(of_network)}): {type(network).__name__} has "
            f"{len(of_network)} stages, {', '.join(of_network)}"
        )
    kept = of_network[-stages - 1]
    leaves = [name for name, module in network.named_modules() if not any(module.children())]
    last = max(i for i, name in enumerate(leaves) if f"{name}.".startswith(f"{kept}."))
    return tuple(leaves[last + 1 :])


def tensors_of(network: nn.Module, modules: tuple[str, ...]) -> Iterator[Tensor]:
    """Parameters and buffers of these modules."""
    for name in modules:
        module = network.get_submodule(name)
        yield from module.parameters(recurse=False)
        yield from module.buffers(recurse=False)


@torch.no_grad()
def renew(network: nn.Module, fresh: nn.Module, modules: tuple[str, ...]) -> None:
    """These modules become those of ``fresh``, a network like it, of that of rank 0 in all processes."""
    for ours, theirs in zip(tensors_of(network, modules), tensors_of(fresh, modules), strict=True):
        ours.copy_(theirs)
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(ours, 0)
