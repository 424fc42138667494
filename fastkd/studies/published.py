"""Tables of published figures, as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from fastkd.studies.study import Published

__all__ = ["table"]

Column = TypeVar("Column")


def table(columns: Sequence[Column], text: str) -> dict[Column, dict[str, Published]]:
    """By column and method, of lines ``method mean std mean std ...``; a mean of ``-`` where there is no figure."""
    found: dict[Column, dict[str, Published]] = {column: {} for column in columns}
    for line in text.strip().splitlines():
        method, *numbers = line.split()
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        for column, (mean, std) in zip(columns, pairs, strict=True):
            if mean != "-":
                found[column][method] = Published(float(mean), float(std))
    return found
