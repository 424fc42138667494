"""What a training asks of a source of batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from fastkd._checks import check_count
from fastkd.data.batch import as_batches

__all__ = ["BatchSource", "NoBatches", "ParallelBatches", "check_source", "check_start"]


class BatchSource(Protocol):
    """Batches of an epoch, the same whenever they are asked for: what exact resume stands on.

    A source whose batches also follow from what happened before, such as scores that were updated, has ``state_dict()`` and
    ``load_state_dict(state)``, of tensors and plain types; they become part of the checkpoint.
    """

    def __len__(self) -> int:
        """Batches of an epoch, on each rank."""

    def epoch(self, epoch: int, /, start: int = 0) -> Iterator[Any]:
        """Those of an epoch, from 0 on, but for the first ``start``: what :func:`fastkd.data.batch.as_batches` takes.

        What comes out of it depends on the epoch and the number of the batch. A batch may also draw from the global
        generators as it is made, but nothing of that comes before the first one is asked for, save to skip.
        """


class NoBatches:
    """So many iterations an epoch, without any data: for procedures that make their own.

    Args:
        iterations: of an epoch, 1 or more.
    """

    def __init__(self, iterations: int) -> None:
        self._iterations = check_count("iterations", iterations, 1)

    def __len__(self) -> int:
        return self._iterations

    def epoch(self, epoch: int, /, start: int = 0) -> Iterator[None]:
        """None, as often as iterations are left."""
        _, start = check_start(self, epoch, start)
        return iter([None] * (len(self) - start))


class ParallelBatches:
    """Batches of several sources side by side: those of a task and images of another domain, for instance.

    >>> ParallelBatches(task=ImageBatches(task, 128, seed=0), other=ImageBatches(other, 256, seed=0))

    An epoch is one of the first source. The others go on from epoch to epoch, each through epochs of its own.

    Args:
        sources: one or more, each of which gives a batch (not several, and not none).
    """

    def __init__(self, **sources: BatchSource) -> None:
        if not sources:
            raise ValueError("fastkd: sources is empty, must be one source or more, by name")
        self.sources = {name: check_source(name, source) for name, source in sources.items()}

    def __len__(self) -> int:
        return len(next(iter(self.sources.values())))

    def epoch(self, epoch: int, /, start: int = 0) -> Iterator[dict[str, Any]]:
        """A mapping of the names to batches."""
        epoch, start = check_start(self, epoch, start)
        streams = {name: _endless(source, epoch * len(self) + start) for name, source in self.sources.items()}
        return ({name: as_batches(next(stream)) for name, stream in streams.items()} for _ in range(start, len(self)))

    def state_dict(self) -> dict[str, Any]:
        """Of those sources that have one."""
        return {name: source.state_dict() for name, source in self.sources.items() if hasattr(source, "state_dict")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As :meth:`state_dict` returned it."""
        for name, its in state.items():
            self.sources[name].load_state_dict(its)


def _endless(source: BatchSource, number: int) -> Iterator[Any]:
    """All batches from this one on, counted over the epochs. Skipping is done at once, as of an epoch."""
    epoch, start = divmod(number, len(source))
    first = source.epoch(epoch, start=start)

    def batches() -> Iterator[Any]:
        yield from first
        later = epoch
        while True:
            later += 1
            yield from source.epoch(later)

    return batches()


def check_source(name: str, source: Any) -> Any:
    """Something with ``len()`` and ``epoch()``, of one batch or more."""
    if not callable(getattr(source, "epoch", None)) or not hasattr(source, "__len__"):
        raise TypeError(
            f"fastkd: {name} is {type(source).__name__}, must be a BatchSource, with len() and epoch(): "
            "LoaderBatches(loader) of a DataLoader, NoBatches(iterations) without data"
        )
    if len(source) < 1:
        raise ValueError(f"fastkd: {name} is empty, must be one batch an epoch or more")
    return source


def check_start(source: BatchSource, epoch: object, start: object) -> tuple[int, int]:
    """The epoch, and the number of the first batch that is wanted."""
    epoch, start = check_count("epoch", epoch, 0), check_count("start", start)
    if not 0 <= start <= len(source):
        raise ValueError(f"fastkd: start is {start}, must be in [0, {len(source)}], the batches of an epoch")
    return epoch, start
