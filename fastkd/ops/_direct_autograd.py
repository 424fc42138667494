"""Registers the autograd formula of an operator, as ``torch.library.register_autograd`` does, at a third of its cost.

The registration of torch fills in default arguments on every call by copying the operator's argument list once for each
argument: 37 us of the 56 us that a forward of the 14-argument ``divergence`` took. Our only default is None, so this one
goes straight to the kernel below autograd; contract (``setup_context``, ``backward``) and behaviour under
``torch.compile`` and ``opcheck`` are the same. It works inside ``torch.func.grad`` and ``vmap``; forward-mode
derivatives, which torch would silently take for zero, are refused.

It stands on private names of torch, all of them looked up while this module is imported, so that an import error tells
:mod:`fastkd.ops._autograd` that this torch lacks one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import (  # type: ignore[attr-defined]
    enable_single_level_autograd_function as _single_level,
)
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

try:
    _after_autograd = torch._C._after_autograd_keyset
    _below_autograd = torch._C._AutoDispatchBelowAutograd
    _compiled_key = torch.autograd.Function._compiled_autograd_key
    _no_tangents = forward_ad._current_level  # looked at below, where it changes
    _redispatch = torch._ops.OpOverload.redispatch
    _transforms_active = torch._C._are_functorch_transforms_active
except AttributeError as error:
    raise ImportError(str(error)) from error

_library = torch.library.Library("fastkd", "IMPL")
_kernels: dict[str, Callable[..., Any]] = {}


class Function(_SingleLevelFunction):
    """torch's function of one level, without what ``torch.autograd.Function`` looks for at each call."""

    _compiled_autograd_key = staticmethod(_compiled_key)  # for compiled autograd


def register_autograd(
    name: str, backward: Callable[..., Any], *, setup_context: Callable[[Any, Any, Any], None]
) -> None:
    """Gives ``torch.ops.fastkd.<name>`` the formula ``backward(ctx, *grads)``; all its arguments are positional."""
    op = getattr(torch.ops.fastkd, name).default
    arity = len(op._schema.arguments)

    def below_autograd(keyset: torch._C.DispatchKeySet | None, args: Sequence[Any]) -> Any:
        with _below_autograd():
            return op(*args) if keyset is None else _redispatch(op, keyset & _after_autograd, *args)

    def forward(ctx: Any, *args_and_keyset: Any) -> Any:
        *args, keyset = args_and_keyset
        if _transforms_active():
            with torch.enable_grad():  # for the outer levels; this one has none below its function
                output = below_autograd(keyset, args)
        else:
            output = below_autograd(keyset, args)
        setup_context(ctx, args, output)
        return output

    def formula(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        if not _transforms_active():  # theirs come to the kernels of what a backward calls
            _refuse_tangents(f"{name}_backward", grads)
        return (*backward(ctx, *grads), None)

    node = type(f"fastkd_{name}", (Function,), {"forward": staticmethod(forward), "backward": staticmethod(formula)})

    def kernel(keyset: torch._C.DispatchKeySet | None, *args: Any) -> Any:
        if len(args) != arity:  # the dispatcher drops arguments that equal their defaults, which are None
            args = (*args, *(None,) * (arity - len(args)))
        _refuse_tangents(name, args)
        if torch.is_grad_enabled():
            for value in args:
                if isinstance(value, Tensor) and value.requires_grad:
                    return apply(node, *args, keyset)
        return below_autograd(keyset, args)

    _kernels[name] = kernel
    _library.impl(name, kernel, "Autograd", with_keyset=True)
    _kernels[name] = kernel


def call(name: str, op: Any, *args: Any) -> Any:
    """``op(*args)`` outside of transforms, past the dispatcher's way to ``kernel`` where it can be: 10 us of small calls."""
    kernel = _kernels.get(name)
    return op(*args) if kernel is None else kernel(None, *args)


def call_in_backward(op: Any, *args: Any) -> Any:
    """``op(*args)`` in a formula. Where nothing of ``kernel`` is needed, that spares the way through it: 6 us."""
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return op(*args)
    with _below_autograd():
        return op(*args)


def apply(node: Any, *args: Any) -> Any:
    """``node.apply``; within a transform of torch.func this kernel stands at one of its levels."""
    if _transforms_active():
        with _single_level():
            return node.apply(*args)
    return node.apply(*args)


def transforms_active() -> bool:
    """Whether this runs within a transform of torch.func."""
    return _transforms_active()


def _refuse_tangents(name: str, args: Sequence[Any]) -> None:
    if forward_ad._current_level >= 0 and any(_has_tangent(a) for a in args):
        raise RuntimeError(
            f"fastkd: {name} has no forward-mode derivative (jvp); use the plain-torch form in fastkd.reference"
        )


def _has_tangent(value: Any) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value)[1] is not None
