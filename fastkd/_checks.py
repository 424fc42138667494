"""Checks of arguments that modules and operators share; messages name the argument, what was given and what is allowed."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
Called = TypeVar("Called")
LARGEST_SIZE = 2**59  # elements, of which the operators can count the bytes
LARGEST_NUMBER = sys.float_info.max
LEAST_NUMBER = math.ulp(0.0)  # above 0
_STRIDED = torch.strided


def check_tensor(name: str, value: object) -> Tensor:
    """A dense one: no operator takes sparse, nested or MKLDNN tensors."""
    if not isinstance(value, Tensor):
        raise TypeError(f"fastkd: {name} is {type(value).__name__}, must be a tensor")
    if value.layout is not _STRIDED or value.is_nested:
        nested = "is nested, of" if value.is_nested else "has"
        raise TypeError(f"fastkd: {name} {nested} layout {value.layout}, must be a dense tensor")
    return value


def as_tensor(name: str, values: Any, device: torch.device | str = "cpu") -> Tensor:
    """A tensor as it is; what has no device, such as a list or an array, on ``device``."""
    if isinstance(values, Tensor):
        return values
    try:
        return torch.as_tensor(values, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"fastkd: {name} is {type(values).__name__}, must be a tensor or an array of numbers: {error}"
        ) from None


def check_dtype(name: str, value: object, allowed: Sequence[torch.dtype] = FLOATS) -> Tensor:
    """A tensor of one of these dtypes."""
    tensor = check_tensor(name, value)
    if tensor.dtype not in allowed:
        raise TypeError(f"fastkd: {name} has dtype {tensor.dtype}, must be {names(allowed)}")
    return tensor


def readable(numbers: Tensor) -> bool:
    """Whether there are any and looking at them costs no waiting: neither a program that is traced nor a transform of
    torch.func lets values be read."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return numbers.device.type == "cpu" and numbers.numel() > 0 and not traced


def check_number(name: str, value: object) -> float:
    """A number, NaN and infinities included; a tensor is none: its value may be on a device that would be waited for."""
    if type(value) is float:
        return value
    if isinstance(value, (torch.SymFloat, torch.SymInt)):  # a number of a program that is traced
        return value  # type: ignore[return-value]
    if is_dynamo_compiling() and isinstance(value, np.ndarray):  # what it makes of numpy's numbers
        number = torch.as_tensor(value)
        if number.dim() == 0 and number.dtype in (*FLOATS, *INTEGERS):
            return number  # type: ignore[return-value]
    if isinstance(value, (bool, np.bool_, Tensor)) or not isinstance(value, Real):
        raise TypeError(f"fastkd: {name} is {type(value).__name__}, must be a number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"fastkd: {name} is {value}, must be a number that a float holds") from None


def in_range(number: float, least: float, most: float) -> bool:
    """``least <= number <= most``, which NaN never is.

    A traced program does not know the numbers that it takes out of tensors (``.item()``), nor numpy's: they pass here, and
    the kernels look at them.
    """
    if is_dynamo_compiling() or type(number) not in (float, int):
        from torch.fx.experimental.symbolic_shapes import guard_or_true

        if isinstance(number, Tensor):
            return True
        return guard_or_true(least <= number) and guard_or_true(number <= most)
    return least <= number <= most


def is_zero(number: float) -> bool:
    """Whether the number is known to be 0: a traced program may not know it, see :func:`in_range`."""
    if is_dynamo_compiling() or type(number) not in (float, int):
        from torch.fx.experimental.symbolic_shapes import guard_or_false

        return not isinstance(number, Tensor) and guard_or_false(number == 0)
    return number == 0


def check_between(name: str, value: object, least: float, most: float) -> float:
    number = value if type(value) is float else check_number(name, value)
    if not in_range(number, least, most):
        raise ValueError(f"fastkd: {name} is {value}, must be in [{least:g}, {most:g}]")
    return number


def check_not_negative(name: str, value: object) -> float:
    number = value if type(value) is float else check_number(name, value)
    if not in_range(number, 0.0, LARGEST_NUMBER):
        raise ValueError(f"fastkd: {name} is {value}, must be finite and not negative")
    return number


def check_positive(name: str, value: object) -> float:
    number = check_number(name, value)
    if not in_range(number, LEAST_NUMBER, LARGEST_NUMBER):
        raise ValueError(f"fastkd: {name} is {value}, must be positive and finite")
    return number


def check_share(name: str, value: object) -> float:
    return check_between(name, value, 0.0, 1.0)


def index_of(value: Any) -> int | None:
    """The value as Python's int, or None where it is no whole number. True is none, and neither is 1.0."""
    if type(value) is int or isinstance(value, torch.SymInt):  # the latter under torch.compile, which keeps it variable
        return value  # type: ignore[return-value]
    if isinstance(value, bool):
        return None
    if isinstance(value, Tensor) and (value.dim() > 0 or value.dtype == torch.bool or value.is_meta):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def check_count(name: str, value: object, least: int | None = None, below: int | None = None) -> int:
    """The value as Python's int: Python's own, numpy's, or a tensor of one integer."""
    number = index_of(value)
    if number is None:
        raise TypeError(f"fastkd: {name} is {type(value).__name__}, must be an int")
    if not in_range(number, number if least is None else least, number if below is None else below - 1):
        low = least is not None and number < least
        raise ValueError(f"fastkd: {name} is {number}, must be {f'at least {least}' if low else f'less than {below}'}")
    return number


def check_size(name: str, value: object, least: int = 0) -> int:
    """A number of elements that a tensor can have, whether or not there is the memory."""
    return check_count(name, value, least, LARGEST_SIZE)


def check_dim(name: str, value: object, of: str, shape: Sequence[int]) -> int:
    """A dimension of a tensor of this shape, from the end where negative; ``of`` says whose."""
    dim = check_count(name, value)
    if not -len(shape) <= dim < len(shape):
        raise ValueError(
            f"fastkd: {name} is {dim}, must be from {-len(shape)} to {len(shape) - 1}, a dimension of {of}, {tuple(shape)}"
        )
    return dim


def check_kept_temperature(value: object) -> float | Tensor:
    """A number, or a tensor, whose values this looks at: for what is kept, not for a call, which must not wait."""
    if not isinstance(value, Tensor):
        return check_positive("temperature", value)
    check_row_values("temperature", value)
    known = type(value) is Tensor and not value.is_meta and not torch.compiler.is_compiling()
    if known and not bool(((value > 0.0) & value.isfinite()).all()):
        raise ValueError(f"fastkd: temperature is {value}, must be positive and finite")
    return value


def check_row_values(name: str, value: Tensor) -> None:
    """Of numbers that are one for each row: floats, without a gradient."""
    check_dtype(name, value)
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"fastkd: {name} requires grad, but has no gradient here; pass {name}.detach()")


def check_ignore_index(value: object) -> int:
    return check_count("ignore_index", value, -(2**63), 2**63)


def check_row_reduction(reduction: str) -> None:
    if reduction == "mean":
        raise ValueError(
            "fastkd: reduction is 'mean', must be 'batchmean', 'sum' or 'none': a mean over rows and classes "
            "would divide the cross-entropy by the number of classes"
        )


def check_text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"fastkd: {name} is {type(value).__name__}, must be text")
    return value


def check_callable(name: str, value: Called | None) -> Called | None:
    """A function or None."""
    if value is not None and not callable(value):
        raise TypeError(f"fastkd: {name} is {type(value).__name__}, must be a function or None")
    return value


def check_flag(name: str, value: object) -> bool:
    if value is True or value is False:
        return value
    if type(value).__name__ not in ("bool_", "bool"):  # numpy's, by two names
        raise TypeError(f"fastkd: {name} is {type(value).__name__}, must be True or False")
    return bool(value)


def check_choice(name: str, value: object, choices: Iterable[str]) -> str:
    """One of these words."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"fastkd: {name} is {value!r}, must be one of {', '.join(choices)}")
    return value


def check_state(state: object, needed: Iterable[str], whose: str) -> dict[str, Any]:
    """What a ``state_dict()`` returned, with these entries."""
    if not isinstance(state, Mapping):
        raise TypeError(f"fastkd: state is {type(state).__name__}, must be a dict, the state_dict() of {whose}")
    missing = set(needed) - set(state)
    if missing:
        raise ValueError(f"fastkd: state has no {', '.join(sorted(missing))}; it is not that of {whose}")
    return state  # type: ignore[return-value]


def names(dtypes: Sequence[torch.dtype]) -> str:
    if len(dtypes) == 1:
        return str(dtypes[0])
    *first, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(first)} or {last}"
