"""``fastkd methods``: what there is to distil by."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from fastkd.cli._errors import usage_errors
from fastkd.methods import registry


@dataclass(frozen=True)
class Methods:
    """All methods: family, what each needs and trains, and its source; or the options of one."""

    method: Annotated[str, tyro.conf.Positional] = ""
    """Of which to show the options."""
    plugin: Path | None = None
    """A Python file that registers methods of your own."""

    def __call__(self, console: Console) -> None:
        with usage_errors():
            if self.method:
                _show_one(registry.find(self.method), console)
            else:
                console.print(_all())


def _all() -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", no_wrap=True)
    for head in ("family", "needs", "trains", "after"):
        table.add_column(head, overflow="fold")
    for name in registry.names():
        entry = registry.find(name)
        table.add_row(name, entry.family, ", ".join(entry.needs) or "nothing", entry.trains, entry.paper)
    return table


def _show_one(entry: registry.Entry, console: Console) -> None:
    console.print(f"[bold]{entry.name}[/bold]  {entry.family}; needs {', '.join(entry.needs) or 'nothing'}")
    console.print(entry.summary, markup=False, highlight=False)
    table = Table("option", "by default", "", box=box.SIMPLE_HEAD, pad_edge=False)
    for option in entry.options().values():
        default = "" if option.default is None else str(option.default)
        table.add_row("--" + option.name.replace("_", "-"), default, option.help.replace("``", ""))
    console.print(table)
