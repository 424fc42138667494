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

CUDA_ERROR: str | None = None


def _load_cuda() -> bool:
    global CUDA_ERROR
    if torch.version.cuda is None:
        CUDA_ERROR = f"torch {torch.__version__} is a build without CUDA"
        return False
    paths = sorted(Path(__file__).parent.glob("_cuda*.so"))
    if not paths:
        CUDA_ERROR = "fastkd was built without CUDA kernels"
        return False
    try:
        torch.ops.load_library(str(paths[0]))
    except OSError as error:
        CUDA_ERROR = f"{paths[0].name} did not load: {error}"
        return False
    return True


def _refuse_cuda(name: str) -> Callable[..., Any]:
    def refuse(*_args: Any, **_kwargs: Any) -> Any:
        if CUDA_ERROR is not None:
            raise RuntimeError(
                f"fastkd.{name} has no CUDA kernel here: {CUDA_ERROR}. Move the tensors to the CPU, or rebuild where nvcc "
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
