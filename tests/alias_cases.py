"""Arguments that the tests of alias tables share."""

from __future__ import annotations

import torch
from torch import Tensor


def lambda_of(value: float, device: torch.device | str = "cpu") -> Tensor:
    """An inverse temperature as the operators take it."""
    return torch.tensor(value, dtype=torch.float64, device=device)


def stream_of(seed: int, start: int, device: torch.device | str = "cpu") -> Tensor:
    """Seed and number of the first draw."""
    return torch.tensor([seed, start], device=device)
