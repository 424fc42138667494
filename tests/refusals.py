"""What tests of arguments share: dtypes and numbers to be refused, and how a refusal looks."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

FLOAT8 = getattr(torch, "float8_e4m3fn", None)
DTYPES = [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, *([FLOAT8] if FLOAT8 else [])]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NAN, INF = math.nan, math.inf


def refuses(argument: str, call: Callable[[], object], *, also: type[Exception] = ValueError) -> None:
    with pytest.raises((TypeError, ValueError, also), match=f"fastkd: (the )?.*{argument}") as caught:
        call()
    assert type(caught.value) in (TypeError, ValueError, also)
