"""What the autograd formulas of the operators share: their registration, what they keep, and second derivatives.

What a formula keeps goes through ``ctx.save_for_backward``, gradients made in the forward pass too: so torch notices where
it is changed in place, hooks of saved tensors (offloading) see it, and ``torch.utils.checkpoint`` frees and recomputes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "HOW",
    "call",
    "call_in_backward",
    "may_change_in_place",
    "once",
    "register_autograd",
    "save_tensors",
    "saved_by_hooks",
    "transforms_active",
]

try:
    from fastkd.ops._direct_autograd import (
        Function,
        apply,
        call,
        call_in_backward,
        register_autograd,
        transforms_active,
    )

    HOW = "direct"
except ImportError as error:  # a torch whose private names are others than those that we know
    HOW = f"torch.library.register_autograd, slower: torch {torch.__version__} lacks a name of fastkd's own ({error})"
    from torch.autograd import Function  # type: ignore[assignment]

    def register_autograd(
        name: str, backward: Callable[..., Any], *, setup_context: Callable[[Any, Any, Any], None]
    ) -> None:
        def setup(ctx: Any, inputs: Any, output: Any) -> None:
            setup_context(ctx, inputs, output)

        torch.library.register_autograd(f"fastkd::{name}", backward, setup_context=setup)

    def call(name: str, op: Any, *args: Any) -> Any:
        return op(*args)

    def call_in_backward(op: Any, *args: Any) -> Any:
        return op(*args)

    def apply(node: Any, *args: Any) -> Any:
        return node.apply(*args)

    def transforms_active() -> bool:
        return torch._C._functorch.peek_interpreter_stack() is not None


def save_tensors(ctx: Any, tensors: Sequence[Tensor | None]) -> None:
    """``ctx.save_for_backward`` that takes tensors made under ``torch.inference_mode`` too (a teacher's logits).

    Of those a copy is kept: torch cannot notice where they are changed before the backward pass.
    """
    if any(t is not None and t.is_inference() for t in tensors):
        with torch.inference_mode(False):
            tensors = [t.clone() if t is not None and t.is_inference() else t for t in tensors]
    ctx.save_for_backward(*tensors)


try:
    _is_graph_kept = torch._C._autograd._get_current_graph_task_keep_graph
except AttributeError:

    def _is_graph_kept() -> bool:
        return True


_innermost_hooks: Callable[[bool], object] = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: True
)


def saved_by_hooks() -> bool:
    """Whether hooks take what is saved now (offloading, checkpoints): the tensors that they give back are theirs."""
    return _innermost_hooks(True) is not None


def may_change_in_place(ctx: Any, kept: Tensor, grad: Tensor) -> bool:
    """Whether a formula may write what ``grad`` gives into a tensor that it kept.

    It may where nobody can ask for that again, no hook had it (``ctx.saved_by_hooks``), and nothing is traced or batched
    (``torch.func``, ``is_grads_batched``).
    """
    return (
        not ctx.saved_by_hooks
        and type(kept) is Tensor
        and type(grad) is Tensor
        and not _is_graph_kept()
        and not torch.is_grad_enabled()
        and not transforms_active()
        and not torch._C._functorch.is_legacy_batchedtensor(grad)
    )


def once(message: str, gradient: Tensor, *inputs: Tensor | None) -> Tensor:
    """The gradient, which depends on ``inputs`` in a way that cannot be differentiated: trying raises ``message``."""
    if not torch.is_grad_enabled():
        return gradient
    result: Tensor = apply(_Once, message, gradient, *(t for t in inputs if t is not None))
    return result


class _Once(Function):
    """The identity on a gradient."""

    @staticmethod
    def forward(ctx: Any, message: str, gradient: Tensor, *inputs: Tensor) -> Tensor:
        ctx.message = message
        with torch.set_grad_enabled(transforms_active()):
            return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(ctx.message)
