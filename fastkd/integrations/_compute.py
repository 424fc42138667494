"""What heads of models in training need before a fused loss may read them: whole weights, in the dtype of the arithmetic."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def is_dtensor(value: object) -> bool:
    """Whether this is a DTensor; torch.distributed.tensor, slow to import, is there already if it is."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def is_partitioned(value: object) -> bool:
    """Whether this is a parameter of DeepSpeed's ZeRO-3, empty but while its own module runs."""
    return hasattr(value, "ds_id")


def whole(parameter: Tensor) -> Tensor:
    """All of a parameter that FSDP2 has in parts, gathered once.

    Its gradient is the mean of those of the ranks, as of every parameter of FSDP. (``full_tensor()`` alone takes the gradient
    for the same on every rank: each would keep its own part of its own.)
    """
    if not is_dtensor(parameter):
        return parameter
    from torch.distributed.tensor import Partial

    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    full: Tensor = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)  # type: ignore[operator]
    return full if not full.requires_grad else _Scaled.apply(full, 1.0 / mesh.size())


class _Scaled(torch.autograd.Function):
    """A tensor as it is, whose gradient is scaled: gloo has no mean."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, by: float) -> Tensor:
        ctx.by = by
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.by, None


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """That of the product with a head: what autocast makes of it, or the dtype of the hidden states."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


@contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Autocast would round the logits of a fused loss to bfloat16, which keeps them in float32."""
    if torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            yield
    else:
        yield
