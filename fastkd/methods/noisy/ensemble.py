"""Several networks that predict together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastkd.methods.features import logits_of, logits_of_one

__all__ = ["Ensemble"]


class Ensemble(nn.Module):
    """Shape: images -> the mean of the networks' logits, ``[B, K]``."""

    def __init__(self, *networks: nn.Module) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([_logits(network, images) for network in self.networks]).mean(0)


def _logits(network: nn.Module, images: Tensor) -> Tensor:
    return logits_of_one("the logits of a network of the ensemble", logits_of(network(images)))
