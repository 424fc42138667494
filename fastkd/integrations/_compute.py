"""What heads of models in training need before a fused loss may read them: whole weights, in the dtype of the arithmetic."""

from __future__ import annotations

import sys

import torch
from torch import Tensor


def is_dtensor(value: object) -> bool:
    """Whether this is a DTensor; torch.distributed.tensor, slow to import, is there already if it is."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def is_partitioned(value: object) -> bool:
    """Whether this is a parameter of DeepSpeed's ZeRO-3, empty but while its own module runs."""
    return hasattr(value, "ds_id")


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """That of the product with a head: what autocast makes of it, or the dtype of the hidden states."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return hidden.dtype
