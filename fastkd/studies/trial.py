"""The first step of a training, tried."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fastkd._names import unknown_name
from fastkd.methods import Procedure
from fastkd.training.update import TrainedPart

__all__ = ["NoUpdates"]


class NoUpdates:
    """The first step of a training, of an iteration that is only to be seen to work."""

    epoch, epochs, iteration, iterations, rank, world_size, progress = 0, 1, 0, 1, 0, 1, 0.0
    batches_per_step = 1

    def __init__(self, procedure: Procedure, parts: Mapping[str, TrainedPart]) -> None:
        self.run: Callable[..., Any] = procedure
        self._parts = parts

    def update(self, loss: Tensor, *parts: str) -> None:
        self.restart(*parts)

    def restart(self, *parts: str) -> None:
        for name in parts:
            if name not in self._parts:
                raise unknown_name("part", name, self._parts)
