"""Registers the fake of an operator: the shapes and dtypes of its results, for tracing and for meta tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Fake = TypeVar("Fake", bound=Callable[..., Any])


def register_fake(name: str) -> Callable[[Fake], Fake]:
    """``torch.library.register_fake`` for ``fastkd::<name>``, which first refuses tensors on different devices.

    A meta tensor among real ones comes to the fake too, whose results would be real, and uninitialised. The fake does not
    get ``numbers``, the last argument of some: they are on the CPU, and no result's shape depends on them.
    """
    names = [argument.name for argument in getattr(torch.ops.fastkd, name).default._schema.arguments]
    names = [name for name in names if name != "numbers"]

    def decorate(fake: Fake) -> Fake:
        @functools.wraps(fake)
        def checked(*args: Any, **kwargs: Any) -> Any:
            args = args[: len(names)]
            kwargs.pop("numbers", None)
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            tensors = [(key, value) for key, value in given.items() if isinstance(value, Tensor)]
            for key, value in tensors[1:]:
                if value.device != tensors[0][1].device:
                    raise ValueError(
                        f"fastkd: {key} is on {value.device}, must be where {tensors[0][0]} is, on {tensors[0][1].device}"
                    )
            return fake(*args, **kwargs)

        torch.library.register_fake(f"fastkd::{name}")(checked)
        return fake

    return decorate
