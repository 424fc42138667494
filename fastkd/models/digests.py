"""Which weights a network has, in a few letters."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

__all__ = ["weights_digest"]


def weights_digest(network: nn.Module) -> str:
    """sha256 over names, dtypes, shapes and bytes of all that ``state_dict()`` holds: hex. The same on every device."""
    made = hashlib.sha256()
    for name, value in network.state_dict().items():
        if isinstance(value, torch.Tensor):
            made.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            # flat, as a number has no bytes of its own to be viewed as
            made.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            made.update(f"{name} {value!r}\n".encode())
    return made.hexdigest()
