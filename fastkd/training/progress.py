"""What a training shows while it runs: a bar on a terminal, a line an epoch elsewhere, or nothing."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal, Protocol

from fastkd.training.metrics import EpochMetrics, is_loss, is_share

if TYPE_CHECKING:
    from rich.console import Console
    from typing_extensions import Self

__all__ = ["Display", "Show", "make_display"]

Show = Literal["auto", "bar", "lines", "off"]
_INTERVAL = 0.25  # seconds between two readings of the losses, each of which waits for the device


class Display(AbstractContextManager["Display"], Protocol):
    """Shows how far the training is."""

    def due(self) -> bool:
        """Whether it is time to show again."""

    def show(self, epoch: int, batch: int, means: EpochMetrics) -> None:
        """Within an epoch, from 0 on, after so many batches of it."""

    def epoch(self, line: EpochMetrics) -> None:
        """After an epoch."""


def make_display(show: Show, epochs: int, batches: int, console: Console | None = None) -> Display:
    """The display; ``auto`` is a bar where the output is a terminal and rich is installed, else lines."""
    if show == "off":
        return Silent()
    rich = importlib.util.find_spec("rich") is not None
    terminal = console.is_terminal if console is not None else sys.stdout.isatty()
    if show == "bar" or (show == "auto" and terminal and rich):
        if not rich:
            raise ModuleNotFoundError('fastkd: show is "bar", which needs rich: pip install "fastkd[cli]"')
        return Bar(epochs, batches, console)
    return Lines(epochs, console)


class Silent:
    """Nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def due(self) -> bool:
        return False

    def show(self, epoch: int, batch: int, means: EpochMetrics) -> None:
        pass

    def epoch(self, line: EpochMetrics) -> None:
        pass


class Lines(Silent):
    """A line an epoch."""

    def __init__(self, epochs: int, console: Console | None = None) -> None:
        self._epochs = epochs
        self._print: Callable[[str], object] = print if console is None else console.print

    def epoch(self, line: EpochMetrics) -> None:
        numbers = (f"{name.replace('_', ' ')} {_short(name, x)}" for name, x in line.items() if name != "epoch")
        self._print(f"epoch {int(line['epoch']):>{len(str(self._epochs))}}/{self._epochs}: {', '.join(numbers)}")


class Bar:
    """One bar for the whole training, renewed a few times a second."""

    def __init__(self, epochs: int, batches: int, console: Console | None = None) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._epochs, self._batches = epochs, batches
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}/" + str(epochs)),
            BarColumn(bar_width=24),
            TextColumn("batch {task.fields[batch]}/" + str(batches)),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("", total=epochs * batches, epoch=1, batch=0)
        self._test = ""
        self._next = 0.0

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def due(self) -> bool:
        return time.monotonic() >= self._next

    def show(self, epoch: int, batch: int, means: EpochMetrics) -> None:
        said = f"{_said(means)}{self._test}"
        self._progress.update(
            self._task, completed=epoch * self._batches + batch, epoch=epoch + 1, batch=batch, description=said
        )
        self._next = time.monotonic() + _INTERVAL

    def epoch(self, line: EpochMetrics) -> None:
        if "test_accuracy" in line:
            self._test = f", test {100 * line['test_accuracy']:.1f} %"
        self.show(int(line["epoch"]) - 1, self._batches, line)


def _said(means: EpochMetrics) -> str:
    """The loss and the accuracy, or what comes first where there is none."""
    terms = [name for name in means if is_loss(name) or is_share(name)]
    chosen = [name for name in ("loss", "accuracy") if name in means] or terms[:2]
    numbers = (f"{100 * means[name]:.1f} %" if is_share(name) else f"{means[name]:.3f}" for name in chosen)
    return ", ".join(f"{name.replace('_', ' ')} {number}" for name, number in zip(chosen, numbers, strict=True))


def _short(name: str, value: float) -> str:
    if name == "step":
        return str(int(value))
    if is_share(name):
        return f"{100 * value:.1f} %"
    return f"{value:.0f}" if name == "seconds" else f"{value:.4g}"
