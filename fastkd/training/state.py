"""All that changes in a training, to be saved and taken up again bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from fastkd._checks import check_state
from fastkd.data.source import BatchSource
from fastkd.methods import Procedure
from fastkd.models.average import Average
from fastkd.training import distributed, randomness
from fastkd.training.metrics import EpochMetrics, Running
from fastkd.training.settings import TrainingSettings
from fastkd.training.update import Updates, trained_parts

__all__ = ["TrainingState"]

_PROGRESS = ("networks", "procedure", "parts", "average", "epoch", "batch", "history", "seconds", "of_ranks")
_FREE = ("checkpoint_every",)  # settings that change nothing of what is learnt


class TrainingState:
    """A procedure, what trains its parts, the average, the source, and how far the training is.

    Args:
        procedure: on its device.
        batches: the source.
        about: the caller's own description of the training, of plain types.
    """

    def __init__(
        self,
        procedure: Procedure,
        settings: TrainingSettings,
        batches: BatchSource,
        *,
        about: Mapping[str, str | int | float] | None = None,
        find_unused_parameters: bool = False,
    ) -> None:
        self.procedure, self.settings, self.batches = procedure, settings, batches
        self.steps_per_epoch = len(batches)
        self.about = dict(about or {})
        self.parts = trained_parts(procedure, settings, self.steps_per_epoch)
        self.device = next(iter(self.parts.values())).parameters[0].device
        # before networks are compiled and wrapped: a copy shall be neither
        self.average = Average(procedure.network()) if settings.ema else None
        if settings.compile:
            for network in (*procedure.networks().values(), *procedure.frozen.values()):
                network.compile()
        self.updates = Updates(
            procedure, self.parts, settings, self.steps_per_epoch, find_unused_parameters=find_unused_parameters
        )
        self.epoch = 0  # under way, or to begin
        self.batch = 0  # batches of it that are done
        self.running = Running(self.device)
        self.history: list[EpochMetrics] = []
        self.seconds = 0.0
        self.saved = 0  # the step of the last checkpoint
        self._randomness: dict[str, Any] | None = None  # of a checkpoint, until it is taken up

    def close(self) -> None:
        """No more steps: lets go of what the ranks share. The networks stay."""
        self.updates.close()

    @property
    def step(self) -> int:
        """Batches done, of all epochs."""
        return self.epoch * self.steps_per_epoch + self.batch

    def learning_rates(self) -> dict[str, float]:
        """Of the next step: ``learning_rate``, with the part's name before it where there are several."""
        several = len(self.parts) > 1
        return {
            f"{name}_learning_rate" if several else "learning_rate": p.learning_rate for name, p in self.parts.items()
        }

    def network(self) -> nn.Module:
        """What the training is for: the averaged one, where there is one."""
        return self.procedure.network() if self.average is None else self.average.network

    def deployed(self) -> nn.Module:
        """The network to evaluate and to keep."""
        return self.procedure.deployed(self.network())

    def take_average(self) -> None:
        """After a step: of the weights as they are now. At first the average is short, so that the initial weights are soon
        forgotten."""
        if self.average is not None:
            decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))
            self.average.update(self.procedure.network(), decay)

    def share_statistics(self) -> None:
        """Lets all ranks have the same batch norm statistics, those of rank 0; their weights always are the same."""
        distributed.take_statistics_of_first_rank(self.procedure)
        if self.average is not None:
            distributed.take_statistics_of_first_rank(self.average)

    def end_epoch(self, line: EpochMetrics) -> None:
        """On to the next one."""
        self.history.append(line)
        self.epoch, self.batch = self.epoch + 1, 0
        self.running = Running(self.device)

    def description(self) -> dict[str, Any]:
        """What must be the same for a state to be taken up again: compared with it, key by key."""
        settings = {name: value for name, value in asdict(self.settings).items() if name not in _FREE}
        return {
            "settings": settings,
            "description": self.about,
            "ranks": distributed.world_size(),
            "steps_per_epoch": self.steps_per_epoch,
            "procedure_as_text": self.procedure.described(),
            "trained": {name: part.described() for name, part in self.parts.items()},
            "networks": {name: _tensors(network) for name, network in self.procedure.networks().items()},
            "procedure": _tensors(self.procedure, own=True),
        }

    def state_dict(self) -> dict[str, Any]:
        """All of it, in tensors and plain types; called by all ranks, the same on all."""
        return {
            **self.description(),
            "networks": {name: network.state_dict() for name, network in self.procedure.networks().items()},
            "procedure": _own_state(self.procedure),
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "average": None if self.average is None else self.average.state_dict(),
            "epoch": self.epoch,
            "batch": self.batch,
            "history": self.history,
            "seconds": self.seconds,
            "of_ranks": distributed.gather(self._of_this_rank()),
        }

    def _of_this_rank(self) -> dict[str, Any]:
        """What may be another on each rank."""
        buffers: dict[str, Tensor] = {}
        if distributed.rank() > 0:  # those of rank 0 are in the whole
            buffers = {name: buffer.cpu() for name, buffer in self.procedure.named_buffers()}
        source = getattr(self.batches, "state_dict", None)
        return {
            "random": randomness.capture(),
            "running": self.running.state_dict(),
            "buffers": buffers,
            "source": None if source is None else source(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back there, but for :meth:`restore_randomness`."""
        check_state(state, _PROGRESS, "a training")
        for name, network in self.procedure.networks().items():
            network.load_state_dict(state["networks"][name])
        self.procedure.load_state_dict(state["procedure"], strict=False)
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.epoch, self.batch = state["epoch"], state["batch"]
        self.history, self.seconds = list(state["history"]), state["seconds"]
        ours = state["of_ranks"][distributed.rank()]
        buffers = dict(self.procedure.named_buffers())
        for name, value in ours["buffers"].items():
            buffers[name].copy_(value)
        if ours["source"] is not None:
            self.batches.load_state_dict(ours["source"])  # type: ignore[attr-defined]
        self.running.load_state_dict(ours["running"])
        self.saved = self.step
        self._randomness = ours["random"]

    def restore_randomness(self) -> None:
        """Apart, as it comes last: nothing may be drawn between it and the next batch."""
        if self._randomness is not None:
            randomness.restore(self._randomness)
            self._randomness = None


def _own_state(procedure: Procedure) -> dict[str, Any]:
    """What a procedure holds beside its modules: parameters, buffers, and extra state."""
    modules = tuple(f"{name}." for name, _ in procedure.named_children())
    return {name: value for name, value in procedure.state_dict().items() if not name.startswith(modules)}


def _tensors(module: nn.Module, *, own: bool = False) -> dict[str, Tensor]:
    """Those of its state, whose shapes do not change; extra state may."""
    state = _own_state(module) if own and isinstance(module, Procedure) else module.state_dict()
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}
