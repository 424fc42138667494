"""Registers the autograd formula of an operator, as ``torch.library.register_autograd`` does, at a third of its cost.

The registration of torch fills in default arguments on every call by copying the operator's argument list once for each
argument: 37 us of the 56 us that a forward of the 14-argument ``divergence`` took. Our callers pass every argument, so
this one goes straight to the kernel below autograd; contract (``setup_context``, ``backward``) and behaviour under
``torch.compile`` and ``opcheck`` are the same. It works inside ``torch.func.grad`` and ``vmap``; forward-mode
derivatives, which torch would silently take for zero, are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction as Function

_library = torch.library.Library("fastkd", "IMPL")


def register_autograd(
    name: str,
    backward: Callable[..., Any],
    *,
    setup_context: Callable[[Any, Any, Any], None],
    once: str | None = None,
) -> None:
    """Gives ``torch.ops.fastkd.<name>`` the formula ``backward(ctx, *grads)``; all its arguments are positional.

    ``once`` marks a backward that cannot be differentiated: it runs without a graph, and differentiating what it
    returned (``create_graph=True``) raises this message. The context must have saved the inputs that need gradients.
    """
    op = getattr(torch.ops.fastkd, name).default
    arity = len(op._schema.arguments)

    def below_autograd(keyset: torch._C.DispatchKeySet, args: Sequence[Any]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def forward(ctx: Any, *args_and_keyset: Any) -> Any:
        *args, keyset = args_and_keyset
        with _outer_levels():
            output = below_autograd(keyset, args)
        setup_context(ctx, args, output)
        return output

    def formula(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        if once is None:
            return (*backward(ctx, *grads), None)
        with _outer_levels(otherwise=torch.no_grad):
            results = backward(ctx, *grads)
        if torch.is_grad_enabled():
            inputs = [t for t in ctx.saved_tensors if t is not None]
            results = [None if g is None else _apply(_Once, once, g, *inputs) for g in results]
        return (*results, None)

    node = type(f"fastkd_{name}", (Function,), {"forward": staticmethod(forward), "backward": staticmethod(formula)})

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if len(args) != arity:  # the dispatcher drops arguments that equal their defaults; ours have none
            raise TypeError(f"fastkd: {name} takes {arity} positional arguments, got {len(args)}")
        if forward_ad._current_level >= 0 and any(_has_tangent(a) for a in args):
            raise RuntimeError(
                f"fastkd: {name} has no forward-mode derivative (jvp); use the plain-torch form in fastkd.reference"
            )
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return _apply(node, *args, keyset)
        return below_autograd(keyset, args)

    _library.impl(name, kernel, "Autograd", with_keyset=True)


def _outer_levels(otherwise: Callable[[], Any] = nullcontext) -> AbstractContextManager[Any]:
    """Within torch.func: a function's forward runs without a graph of its own level, but the outer levels want theirs."""
    return torch.enable_grad() if torch._C._are_functorch_transforms_active() else otherwise()


def _apply(node: Any, *args: Any) -> Any:
    """``node.apply``; within a transform of torch.func this kernel stands at one of its levels."""
    if torch._C._are_functorch_transforms_active():
        from torch._functorch import autograd_function as functorch

        with functorch.enable_single_level_autograd_function():  # type: ignore[attr-defined]
            return node.apply(*args)
    return node.apply(*args)


class _Once(Function):
    """The identity on a gradient that depends on ``inputs`` in a way that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, message: str, gradient: Tensor, *inputs: Tensor) -> Tensor:
        ctx.message = message
        with _outer_levels():
            return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(ctx.message)


def _has_tangent(value: Any) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value)[1] is not None


def save_tensors(ctx: Any, tensors: Sequence[Tensor | None]) -> None:
    """``ctx.save_for_backward`` that takes tensors made under ``torch.inference_mode`` too (a teacher's logits)."""
    inference = [t is not None and t.is_inference() for t in tensors]
    ctx.save_for_backward(*(None if i else t for t, i in zip(tensors, inference, strict=True)))
    ctx.inference_tensors = [t if i else None for t, i in zip(tensors, inference, strict=True)]


def saved_tensors(ctx: Any) -> list[Tensor | None]:
    """What :func:`save_tensors` saved."""
    return [b if a is None else a for a, b in zip(ctx.saved_tensors, ctx.inference_tensors, strict=True)]
