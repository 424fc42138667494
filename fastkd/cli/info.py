"""``fastkd info``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from fastkd import build_info


@dataclass(frozen=True)
class Info:
    """What this installation holds: versions, instruction set in use, CUDA kernels."""

    def __call__(self, console: Console) -> None:
        table = Table(box=box.SIMPLE, show_header=False, title="fastkd", title_justify="left", title_style="bold")
        table.add_column(style="cyan", no_wrap=True)
        table.add_column()
        for key, value in build_info().items():
            table.add_row(key.replace("_", " "), _text(value))
        console.print(table)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value) or "none"
