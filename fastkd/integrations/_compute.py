"""What heads of models in training need before a fused loss may read them: whole weights."""

from __future__ import annotations

import sys


def is_dtensor(value: object) -> bool:
    """Whether this is a DTensor; torch.distributed.tensor, slow to import, is there already if it is."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def is_partitioned(value: object) -> bool:
    """Whether this is a parameter of DeepSpeed's ZeRO-3, empty but while its own module runs."""
    return hasattr(value, "ds_id")
