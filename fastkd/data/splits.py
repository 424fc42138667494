"""Splits of a data set that comes without one."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd._checks import check_dtype, check_number
from fastkd._seeding import mixed_generator

__all__ = ["stratified_split"]


def stratified_split(target: Tensor, test_share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of training and test samples, int64 and ascending: ``round(test_share n_c)`` of each class c to test on.

    Args:
        target: int64 ``[N]``, the classes.
        test_share: in (0, 1).
        seed: of the choice.
    """
    check_dtype("target", target, [torch.int64])
    if target.dim() != 1:
        raise ValueError(f"fastkd: target has shape {tuple(target.shape)}, must be [N]")
    if not 0.0 < check_number("test_share", test_share) < 1.0:
        raise ValueError(f"fastkd: test_share is {test_share}, must be in (0, 1)")
    generator = mixed_generator("split", seed)
    test = torch.zeros(len(target), dtype=torch.bool, device="cpu")
    for label in target.unique().tolist():
        members = (target == label).nonzero().flatten()
        chosen = torch.randperm(len(members), generator=generator, device="cpu")[: round(test_share * len(members))]
        test[members[chosen]] = True
    return (~test).nonzero().flatten(), test.nonzero().flatten()
