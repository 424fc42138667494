"""Loads the native libraries and reports what they hold.

``fastkd._C`` registers the operators (``torch.ops.fastkd``) and their CPU kernels; ``fastkd/_cuda*.so`` adds CUDA
kernels and is loaded only where torch itself was built with CUDA. An operator without a CUDA kernel answers a CUDA
tensor with an error that says how to rebuild, instead of the dispatcher's; so does one whose kernels were not built for the
tensor's GPU (csrc/common/architectures.h).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

try:
    from fastkd import _C
except ImportError as error:
    raise ImportError(
        f"fastkd's native library did not load ({error}). It needs torch >= 2.10 (this is torch {torch.__version__}) "
        "and must be built for this Python: run `pip install .` in the source tree, or install a wheel for this version."
    ) from error

_C.tuning()  # what FASTKD_TUNING has is looked at here, not at the first launch

_cuda_error: str | None = None


def _load_cuda() -> bool:
    global _cuda_error
    if torch.version.cuda is None:
        _cuda_error = f"torch {torch.__version__} is a build without CUDA"
        return False
    paths = sorted(Path(__file__).parent.glob("_cuda*.so"))
    if not paths:
        _cuda_error = "fastkd was built without CUDA kernels"
        return False
    try:
        torch.ops.load_library(str(paths[0]))
    except OSError as error:
        _cuda_error = f"{paths[0].name} did not load: {error}"
        return False
    return True


def _refuse_cuda(name: str) -> Callable[..., Any]:
    def refuse(*_args: Any, **_kwargs: Any) -> Any:
        if _cuda_error is not None:
            raise RuntimeError(
                f"fastkd.{name} has no CUDA kernel here: {_cuda_error}. Move the tensors to the CPU, or rebuild where nvcc "
                "and a CUDA build of torch are installed: `FASTKD_CUDA=1 pip install --force-reinstall --no-deps .`"
            )
        raise RuntimeError(f"fastkd.{name} has no CUDA kernel in this version; move its tensors to the CPU (`.cpu()`)")

    return refuse


CUDA_LOADED = _load_cuda()
OPERATORS = sorted(
    name.removeprefix("fastkd::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastkd::")
)
CUDA_OPERATORS = [
    name for name in OPERATORS if torch._C._dispatch_has_kernel_for_dispatch_key(f"fastkd::{name}", "CUDA")
]
_refusals = torch.library.Library("fastkd", "IMPL")
for _name in OPERATORS:
    if _name not in CUDA_OPERATORS:
        _refusals.impl(_name, _refuse_cuda(_name), "CUDA")


def build_info() -> dict[str, Any]:
    """What this installation holds and uses.

    Returns a dict: ``version``, ``torch`` (running), ``torch_target`` (oldest that this build serves), ``compiler``,
    ``cpu_instruction_set`` (in use: ``baseline``, ``avx2`` or ``avx512``), ``cpu_instruction_set_best`` (of this machine),
    ``threads``, ``cuda_architectures`` (built in; empty without CUDA kernels), ``cuda_loaded``, ``cuda_operators`` (operators
    that have a CUDA kernel), ``cuda_why_not`` where they are not loaded, and ``autograd``: ``direct``, or why the operators
    are registered by ``torch.library.register_autograd``, which makes small calls slower.
    """
    from fastkd.ops._autograd import HOW

    info: dict[str, Any] = dict(_C.build_info())
    info["torch"] = torch.__version__
    info["threads"] = torch.get_num_threads()
    info["autograd"] = HOW
    info["cuda_loaded"] = CUDA_LOADED
    info["cuda_operators"] = CUDA_OPERATORS
    if not CUDA_LOADED:
        info["cuda_why_not"] = _cuda_error
    return info
