"""All that changes in a training, to be saved and taken up again bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from fastkd._checks import check_state
from fastkd.methods import Objective
from fastkd.training import distributed, optimization, randomness
from fastkd.training.metrics import EpochMetrics, Running
from fastkd.training.settings import TrainingSettings

__all__ = ["TrainingState"]

_PROGRESS = (
    *("student", "method", "optimizer", "schedule", "scaler", "average", "epoch", "batch", "history", "seconds"),
    "of_ranks",
)
_FREE = ("checkpoint_every",)  # settings that change nothing of what is learnt


class TrainingState:
    """Networks, optimizer, schedule, scaler, average, and how far the training is.

    Args:
        objective: on its device.
        steps_per_epoch: batches of an epoch, on each rank.
        about: the caller's own description of the training, of plain types.
    """

    def __init__(
        self,
        objective: Objective,
        settings: TrainingSettings,
        steps_per_epoch: int,
        *,
        about: Mapping[str, str | int | float] | None = None,
        find_unused_parameters: bool = False,
    ) -> None:
        self.objective = objective
        self.settings = settings
        self.steps_per_epoch = steps_per_epoch
        self.about = dict(about or {})
        self.parameters = [p for p in objective.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("fastkd: objective has no parameter that requires a gradient, must have some to train")
        self.device = self.parameters[0].device
        self.trained = distributed.wrap(objective, find_unused_parameters=find_unused_parameters)
        self.optimizer = optimization.make_optimizer(self.parameters, settings)
        self.schedule = optimization.make_schedule(self.optimizer, settings, steps_per_epoch)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.amp == "fp16")
        self.average = optimization.Average(self.student, settings.ema) if settings.ema else None
        self.epoch = 0  # under way, or to begin
        self.batch = 0  # batches of it that are done
        self.running = Running(self.device)
        self.history: list[EpochMetrics] = []
        self.seconds = 0.0

    def close(self) -> None:
        """No more steps: lets go of what the ranks share. The networks stay."""
        self.trained = distributed.unwrap(self.trained)

    @property
    def student(self) -> nn.Module:
        """The networks as ``method.build_student`` made them."""
        return self.objective.student.model

    @property
    def step(self) -> int:
        """Steps done."""
        return self.epoch * self.steps_per_epoch + self.batch

    def deployed(self) -> nn.Module:
        """The network to evaluate and to keep."""
        return self.objective.method.deployed(self.student if self.average is None else self.average.network)

    def agree(self) -> None:
        """Lets all ranks have the same batch norm statistics, those of rank 0; their weights always are the same."""
        distributed.take_buffers_of_first_rank(self.objective)
        if self.average is not None:
            distributed.take_buffers_of_first_rank(self.average)

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
            "method_as_text": repr(self.objective.method),
            "student": self.student.state_dict(),
            "method": self.objective.method.state_dict(),
        }

    def state_dict(self) -> dict[str, Any]:
        """All of it, in tensors and plain types; called by all ranks, the same on all."""
        return {
            **self.description(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "epoch": self.epoch,
            "batch": self.batch,
            "history": self.history,
            "seconds": self.seconds,
            "of_ranks": distributed.gather({"random": randomness.capture(), "running": self.running.state_dict()}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes back there, but for :meth:`load_randomness`."""
        check_state(state, _PROGRESS, "a training")
        self.student.load_state_dict(state["student"])
        self.objective.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(self._on_this_device(state["optimizer"]))
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.epoch, self.batch = state["epoch"], state["batch"]
        self.history, self.seconds = list(state["history"]), state["seconds"]
        self.running.load_state_dict(state["of_ranks"][distributed.rank()]["running"])

    def _on_this_device(self, optimizer: dict[str, Any]) -> dict[str, Any]:
        """An optimizer's state with the kernels of this one: a checkpoint of a CPU may be taken up on CUDA, or back. Before
        it is loaded, as torch keeps the steps of fused kernels on the device."""
        ours = self.optimizer.param_groups
        groups = [
            {**there, "fused": here["fused"]} for there, here in zip(optimizer["param_groups"], ours, strict=True)
        ]
        return {**optimizer, "param_groups": groups}

    def load_randomness(self, state: dict[str, Any]) -> None:
        """Apart, as it comes last: nothing may be drawn between it and the next batch."""
        randomness.restore(state["of_ranks"][distributed.rank()]["random"])
