"""What a pass over many items shows while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text


@contextmanager
def passing(title: str, what: str, console: Console, *, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar with the rate and the remaining time. Yields what is to be called with the number of items that are done, and of
    all; those of the first call were there before, and do not count as work."""
    columns = TextColumn(title), BarColumn(bar_width=30), _Rate(what), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not shown) as progress:
        bars: list[TaskID] = []

        def tell(done: int, total: int) -> None:
            if bars:
                progress.update(bars[0], completed=done)
            else:
                bars.append(progress.add_task("", total=total, completed=done))

        yield tell


class _Rate(ProgressColumn):
    """Items a second, and how many of how many."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self._what = what

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        rate = "" if speed is None else f", {speed:,.0f}/s"
        return Text(f"{int(task.completed):,} of {int(task.total or 0):,} {self._what}{rate}")
