"""What this installation holds."""

from __future__ import annotations

from typing import Any

import torch

from fastkd import _C
from fastkd._library import CUDA_ERROR, CUDA_LOADED, CUDA_OPERATORS
from fastkd.ops._autograd import HOW

__all__ = ["build_info"]


def build_info() -> dict[str, Any]:
    """What this installation holds and uses.

    Returns a dict: ``version``, ``torch`` (running), ``torch_target`` (oldest that this build serves), ``compiler``,
    ``cpu_instruction_set`` (in use: ``baseline``, ``avx2`` or ``avx512``), ``cpu_instruction_set_best`` (of this machine),
    ``threads``, ``cuda_architectures`` (built in; empty without CUDA kernels), ``cuda_loaded``, ``cuda_operators`` (operators
    that have a CUDA kernel), ``cuda_why_not`` where they are not loaded, and ``autograd``: ``direct``, or why the operators
    are registered by ``torch.library.register_autograd``, which makes small calls slower.
    """
    info: dict[str, Any] = dict(_C.build_info())
    info["torch"] = torch.__version__
    info["threads"] = torch.get_num_threads()
    info["autograd"] = HOW
    info["cuda_loaded"] = CUDA_LOADED
    info["cuda_operators"] = CUDA_OPERATORS
    if not CUDA_LOADED:
        info["cuda_why_not"] = CUDA_ERROR
    return info
