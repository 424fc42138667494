"""Registers the autograd formula of an operator, as ``torch.library.register_autograd`` does, at a third of its cost.

The registration of torch fills in default arguments on every call by copying the operator's argument list once for each
argument: 37 us of the 56 us that a forward of the 14-argument ``divergence`` took. Our callers pass every argument, so
this one goes straight to the kernel below autograd; contract (``setup_context``, ``backward``) and behaviour under
``torch.compile`` and ``opcheck`` are the same. It works inside ``torch.func.grad`` and ``vmap``; forward-mode
derivatives, which torch would silently take for zero, are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

_library = torch.library.Library("fastkd", "IMPL")


class Function(_SingleLevelFunction):
    """torch's function of one level, without what ``torch.autograd.Function`` looks for at each call."""

    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)  # for compiled autograd


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
        if torch._C._are_functorch_transforms_active():
            with torch.enable_grad():  # for the outer levels; this one has none below its function
                output = below_autograd(keyset, args)
        else:
            output = below_autograd(keyset, args)
        setup_context(ctx, args, output)
        return output

    def formula(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        if not torch._C._are_functorch_transforms_active():  # theirs come to the kernels of what a backward calls
            _refuse_tangents(f"{name}_backward", grads)
        if once is None or not torch.is_grad_enabled():
            return (*backward(ctx, *grads), None)
        with torch.set_grad_enabled(torch._C._are_functorch_transforms_active()):  # outer levels want their graph
            results = backward(ctx, *grads)
        inputs = [t for t in ctx.saved_tensors if t is not None]
        return (*(None if g is None else _apply(_Once, once, g, *inputs) for g in results), None)

    node = type(f"fastkd_{name}", (Function,), {"forward": staticmethod(forward), "backward": staticmethod(formula)})

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if len(args) != arity:  # the dispatcher drops arguments that equal their defaults; ours have none
            raise TypeError(f"fastkd: {name} takes {arity} positional arguments, got {len(args)}")
        _refuse_tangents(name, args)
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return _apply(node, *args, keyset)
        return below_autograd(keyset, args)

    _library.impl(name, kernel, "Autograd", with_keyset=True)


def call_in_backward(op: Any, *args: Any) -> Any:
    """``op(*args)`` in a formula. Where nothing of ``kernel`` is needed, that spares the way through it: 6 us."""
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


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
        with torch.set_grad_enabled(torch._C._are_functorch_transforms_active()):
            return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(ctx.message)


def _refuse_tangents(name: str, args: Sequence[Any]) -> None:
    if forward_ad._current_level >= 0 and any(_has_tangent(a) for a in args):
        raise RuntimeError(
            f"fastkd: {name} has no forward-mode derivative (jvp); use the plain-torch form in fastkd.reference"
        )


def _has_tangent(value: Any) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value)[1] is not None


def save_tensors(ctx: Any, tensors: Sequence[Tensor | None]) -> None:
    """``ctx.save_for_backward`` that takes tensors made under ``torch.inference_mode`` too (a teacher's logits)."""
    if any(t is not None and t.is_inference() for t in tensors):
        ctx.save_for_backward(*(None if t is None or t.is_inference() else t for t in tensors))
        ctx.inference_tensors = [t if t is not None and t.is_inference() else None for t in tensors]
    else:
        ctx.save_for_backward(*tensors)
        ctx.inference_tensors = None


def saved_tensors(ctx: Any) -> Sequence[Tensor | None]:
    """What :func:`save_tensors` saved."""
    saved: Sequence[Tensor | None] = ctx.saved_tensors
    if ctx.inference_tensors is None:
        return saved
    return [b if a is None else a for a, b in zip(saved, ctx.inference_tensors, strict=True)]
