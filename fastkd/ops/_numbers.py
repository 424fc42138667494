"""Calls operators whose schemas hold floats.

A program of torch.compile keeps a Python number that changes from call to call as a symbol. An operator's float argument
would make a constant of it: a graph for each value, and within larger expressions the value of the first call for ever,
without a word. So operators that take floats also take a tensor ``numbers``, float64 on the CPU, that replaces all of
them: it is given where one is a symbol. Elsewhere the floats go as they are, which costs nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.ops._autograd import call, transforms_active

__all__ = ["call_by_name", "number_tensor", "take_numbers"]

_CHANGING = (torch.SymFloat, torch.SymInt, Tensor)  # tensors are numpy's numbers, as dynamo has them


@functools.cache
def _operator(name: str) -> tuple[Any, list[int], list[int]]:
    """The operator, and where its floats and its lists of floats stand."""
    op = getattr(torch.ops.fastkd, name).default
    types = [str(argument.type) for argument in op._schema.arguments]
    return op, *([i for i, t in enumerate(types) if t == kind] for kind in ("float", "List[float]"))


@torch.compiler.allow_in_graph  # dynamo's own symbols look like floats; in the graph they are what they are
def call_by_name(name: str, *args: Any) -> Any:
    """``torch.ops.fastkd.<name>(*args, numbers)``, all arguments positional; ``numbers`` is the last of the schema."""
    op, floats, lists = _operator(name)
    if type(args[0]) is Tensor and not transforms_active():  # nothing is traced (tensors of torch.func do not tell)
        return call(name, op, *args, None)
    values = [args[i] for i in floats] + [value for i in lists for value in args[i]]
    if any(isinstance(value, _CHANGING) for value in values):
        return _with_symbols(op, args)
    return op(*args, None)


def _with_symbols(op: Any, args: tuple[Any, ...]) -> Any:
    numbers: list[Any] = []
    plain: list[Any] = []
    for value, argument in zip(args, op._schema.arguments, strict=False):
        kind = str(argument.type)
        if kind == "float":
            numbers.append(value)
            value = 1.0
        elif kind == "List[float]":
            numbers += value
            value = [1.0] * len(value)
        plain.append(value)
    device = torch.device("cpu")
    return op(*plain, torch.stack([number_tensor(value, device) for value in numbers]))


def take_numbers(name: str, args: Sequence[Any]) -> list[Any]:
    """What an operator in Python was called with: all arguments, its floats from ``numbers`` where these are given."""
    op, floats, _ = _operator(name)
    every = [*args, *(None,) * (len(op._schema.arguments) - len(args))]  # defaults, which are None, may be left out
    if every[-1] is not None:
        for i, value in zip(floats, every[-1].tolist(), strict=True):
            every[i] = value
    return every


def number_tensor(value: Any, device: torch.device) -> Tensor:
    """The number as float64 ``[]``, without a copy from the host, and without making a constant of a symbol."""
    if isinstance(value, _CHANGING) or torch.compiler.is_compiling():
        one = torch.ones((), dtype=torch.float64, device=device)
        number: Tensor = one * value  # torch.full would take it for a constant
        return number
    return torch.full((), value, dtype=torch.float64, device=device)
