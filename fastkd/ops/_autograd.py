"""Registers the autograd formula of an operator, as ``torch.library.register_autograd`` does, at a third of its cost.

The registration of torch fills in default arguments on every call by copying the operator's argument list once for each
argument: 37 us of the 56 us that a forward of the 14-argument ``divergence`` took. Our callers pass every argument, so
this one goes straight to the kernel below autograd; contract (``setup_context``, ``backward``) and behaviour under
``torch.compile`` and ``opcheck`` are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

_library = torch.library.Library("fastkd", "IMPL")


def register_autograd(
    name: str, backward: Callable[..., Any], *, setup_context: Callable[[Any, Sequence[Any], Any], None]
) -> None:
    """Gives ``torch.ops.fastkd.<name>`` the formula ``backward(ctx, *grads)``; all its arguments are positional."""
    op = getattr(torch.ops.fastkd, name).default
    arity = len(op._schema.arguments)

    def below_autograd(keyset: torch._C.DispatchKeySet, args: Sequence[Any]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def forward(ctx: Any, *args_and_keyset: Any) -> Any:
        *args, keyset = args_and_keyset
        output = below_autograd(keyset, args)
        setup_context(ctx, args, output)
        return output

    def formula(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return (*backward(ctx, *grads), None)

    node = type(f"fastkd_{name}", (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(formula)})

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if len(args) != arity:  # the dispatcher drops arguments that equal their defaults; ours have none
            raise TypeError(f"fastkd: {name} takes {arity} positional arguments, got {len(args)}")
        if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            return node.apply(*args, keyset)
        return below_autograd(keyset, args)

    _library.impl(name, kernel, "Autograd", with_keyset=True)
