"""Several networks as one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastkd.methods.features import check_module
from fastkd.methods.noisy.terms import class_logits

__all__ = ["Ensemble"]


class Ensemble(nn.Module):
    """Networks whose logits are averaged, images to ``[B, K]``. It has their parameters: its average is that of each.

    Args:
        networks: images to logits ``[B, K]``, one or more.
    """

    def __init__(self, *networks: nn.Module) -> None:
        super().__init__()
        if not networks:
            raise ValueError("fastkd: networks is empty, must be one network or more")
        self.networks = nn.ModuleList([check_module("networks", network) for network in networks])

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([class_logits(network, images) for network in self.networks]).mean(0)
