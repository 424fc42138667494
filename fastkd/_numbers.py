"""Whole numbers and numbers as arguments: Python's, numpy's, and tensors of one integer."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["index_of", "real", "whole"]


def index_of(value: Any) -> int | None:
    """The value as Python's int, or None where it is no whole number. True is none, and neither is 1.0."""
    if type(value) is int or isinstance(value, torch.SymInt):  # the latter under torch.compile, which keeps it variable
        return value  # type: ignore[return-value]
    if isinstance(value, bool) or (isinstance(value, Tensor) and (value.dim() > 0 or value.dtype == torch.bool)):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def whole(name: str, value: Any, least: int | None = None, below: int | None = None) -> int:
    """The value of an argument as Python's int.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is less than ``least``, or not less than ``below``.
    """
    number = index_of(value)
    if number is None:
        raise TypeError(f"fastkd: {name} is {type(value).__name__}, must be an int")
    if least is not None and number < least:
        raise ValueError(f"fastkd: {name} is {number}, must be at least {least}")
    if below is not None and number >= below:
        raise ValueError(f"fastkd: {name} is {number}, must be less than {below}")
    return number


def real(name: str, value: Any) -> float:
    """The value of an argument as a float, NaN and infinities included; a TypeError where it is no number."""
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return value  # type: ignore[return-value]
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"fastkd: {name} is {type(value).__name__}, must be a number")
    return float(value)
