"""The moving average of a network's weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

__all__ = ["Average"]


class Average(nn.Module):
    """The moving average of a network's weights, and of its buffers, a network, too.

    As ``torch.optim.swa_utils.AveragedModel``, whose function it calls, which waits for the device in each update.

    Args:
        buffers: whether they are averaged, running statistics among them; else it goes on with its own.
    """

    def __init__(self, network: nn.Module, *, buffers: bool = True) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(False)
        self._buffers_too = buffers

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the average makes of them."""
        return self.network(*args, **kwargs)

    @torch.no_grad()
    def update(self, network: nn.Module, decay: float) -> None:
        """Takes the network in as it is now, with a weight of ``1 - decay``."""
        ours, theirs = (list(self._values(n)) for n in (self.network, network))
        floats = [i for i, value in enumerate(ours) if value.is_floating_point()]
        get_ema_multi_avg_fn(decay)([ours[i] for i in floats], [theirs[i] for i in floats], None)
        for mine, its in zip(ours, theirs, strict=True):
            if not mine.is_floating_point():
                mine.copy_(its)

    def _values(self, network: nn.Module) -> Iterable[Tensor]:
        yield from (p.detach() for p in network.parameters())
        if self._buffers_too:
            yield from network.buffers()
