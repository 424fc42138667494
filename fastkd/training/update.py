"""Steps down a gradient: each part of a procedure with its optimizer, schedule and scaler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastkd._checks import check_state
from fastkd._names import unknown_name
from fastkd.methods import Part, Procedure
from fastkd.training import distributed, optimization
from fastkd.training.settings import OF_A_PART, TrainingSettings

__all__ = ["TrainedPart", "Updates", "trained_parts"]


class TrainedPart:
    """Parameters, and what trains them."""

    def __init__(self, name: str, part: Part, settings: TrainingSettings, steps_per_epoch: int) -> None:
        for setting in part.settings:
            if setting not in OF_A_PART:
                raise unknown_name(f"part {name!r}'s setting", setting, OF_A_PART, listed=True)
        self.name, self.parameters, self.shared = name, part.parameters, part.shared
        if not self.parameters:
            raise ValueError(
                f"fastkd: part {name!r} has no parameter that requires a gradient, must have some to train"
            )
        self.settings, self._own_settings = replace(settings, **part.settings), tuple(part.settings)
        make = part.make_optimizer or (lambda parameters: optimization.make_optimizer(parameters, self.settings))
        self.optimizer = make(self.parameters)
        groups = -(-steps_per_epoch // settings.accumulate)
        self.schedule = optimization.make_schedule(self.optimizer, self.settings, groups)
        self.plateau = optimization.make_plateau(self.optimizer, self.settings)
        self.scaler = torch.amp.GradScaler(self.parameters[0].device.type, enabled=settings.amp == "fp16")
        self.optimizer.zero_grad()

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def described(self) -> dict[str, Any]:
        """How it is trained, as far as the settings of the training do not say, in plain types."""
        own = {name: getattr(self.settings, name) for name in self._own_settings}
        return {**own, "optimizer": type(self.optimizer).__name__, "parameters": len(self.parameters)}

    def state_dict(self) -> dict[str, Any]:
        """Of optimizer, schedules and scaler."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "plateau": None if self.plateau is None else self.plateau.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As :meth:`state_dict` returned it, also on another device."""
        check_state(state, ("optimizer", "schedule", "scaler"), "a part of a procedure")
        self.optimizer.load_state_dict(self._on_this_device(state["optimizer"]))
        self.schedule.load_state_dict(state["schedule"])
        if self.plateau is not None:
            self.plateau.load_state_dict(state["plateau"])
        self.scaler.load_state_dict(state["scaler"])

    def _on_this_device(self, optimizer: dict[str, Any]) -> dict[str, Any]:
        """An optimizer's state with the kernels of this one: a checkpoint of a CPU may be taken up on CUDA, or back. Before
        it is loaded, as torch keeps the steps of fused kernels on the device."""
        ours = self.optimizer.param_groups
        groups = [
            {**there, **({"fused": here["fused"]} if "fused" in here else {})}
            for there, here in zip(optimizer["param_groups"], ours, strict=True)
        ]
        return {**optimizer, "param_groups": groups}


def trained_parts(procedure: Procedure, settings: TrainingSettings, steps_per_epoch: int) -> dict[str, TrainedPart]:
    """The parts of a procedure, ready to be trained.

    Raises:
        TypeError: they are no mapping of names to parts.
        ValueError: none, parts without parameters to train, or one parameter in two parts.
    """
    parts = procedure.parts()
    given = type(parts).__name__
    if isinstance(parts, Mapping):
        given = f"a dict of {', '.join(dict.fromkeys(type(part).__name__ for part in parts.values()))}"
    if not isinstance(parts, Mapping) or not all(isinstance(part, Part) for part in parts.values()):
        raise TypeError(f"fastkd: {type(procedure).__name__}.parts() returned {given}, must be a dict of names to Part")
    if not parts:
        raise ValueError(f"fastkd: {type(procedure).__name__}.parts() is empty, must be one part or more")
    owner: dict[int, str] = {}
    for name, part in parts.items():
        for parameter in part.parameters:
            other = owner.setdefault(id(parameter), name)
            if other != name:
                raise ValueError(f"fastkd: parts {other!r} and {name!r} share parameters, must be trained once each")
    idle = [name for name, p in procedure.named_parameters() if p.requires_grad and id(p) not in owner]
    if idle:
        raise ValueError(
            f"fastkd: {len(idle)} parameters of {type(procedure).__name__} are in no part ({idle[0]}, ...): networks that are "
            "not trained are for freeze(name, network), other parameters for requires_grad_(False)"
        )
    return {name: TrainedPart(name, part, settings, steps_per_epoch) for name, part in parts.items()}


class Updates:
    """What the trainer gives to a procedure: :class:`fastkd.methods.Step`."""

    def __init__(
        self,
        procedure: Procedure,
        parts: dict[str, TrainedPart],
        settings: TrainingSettings,
        steps_per_epoch: int,
        *,
        find_unused_parameters: bool,
    ) -> None:
        self.epoch, self.epochs = 0, settings.epochs
        self.iteration, self.iterations = 0, steps_per_epoch
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        self._parts, self._accumulate, self._amp = parts, settings.accumulate, settings.amp != "off"
        self._find_unused = find_unused_parameters
        self._one_forward = procedure.one_forward
        self._procedure = procedure
        self._called: nn.Module = procedure
        distributed.take_state_of_first_rank(procedure)
        if procedure.one_forward:
            self._called = distributed.wrap(procedure, find_unused_parameters=find_unused_parameters)
        # parts with gradients that no step was made of yet, and the scaler of these
        self._pending: dict[str, torch.amp.GradScaler] = {}
        self._updated: set[str] = set()  # in this iteration

    def close(self) -> None:
        """No more steps: lets go of what the ranks share."""
        self._called = distributed.unwrap(self._called)

    @property
    def progress(self) -> float:
        return self.epoch / self.epochs

    @property
    def batches_per_step(self) -> int:
        return self._group()[1] * self.world_size

    @property
    def whole(self) -> bool:
        """Whether no gradient waits for further batches."""
        return not self._pending

    def run(self, *arguments: Any, **more: Any) -> Any:
        return self._called(*arguments, **more)

    def update(self, loss: Tensor, *parts: str) -> None:
        chosen = [self._named(name) for name in parts] or list(self._parts.values())
        self._check(loss, chosen)
        parameters = [p for part in chosen for p in part.parameters]
        scaler = chosen[0].scaler  # one scale for one gradient
        last, batches = self._group()
        with torch.autocast(loss.device.type, enabled=False) if self._amp else nullcontext():
            scaled = scaler.scale(loss if batches == 1 else loss / batches)
            if self._one_forward:  # whose hooks torch.autograd.backward would not call for some of the parameters
                scaled.backward()
            else:
                torch.autograd.backward(scaled, inputs=parameters)
        self._pending |= {part.name: scaler for part in chosen}
        if last:
            self._step(chosen, scaler)
        if self._amp:  # which keeps 16-bit copies of weights, which are others now
            torch.clear_autocast_cache()

    def restart(self, *parts: str) -> None:
        for name in parts:
            self._named(name).optimizer.state.clear()

    def begin_iteration(self, epoch: int, iteration: int) -> AbstractContextManager[None]:
        """Everything of an iteration is done inside of what it returns."""
        self.epoch, self.iteration = epoch, iteration
        self._updated.clear()
        wait = isinstance(self._called, nn.parallel.DistributedDataParallel) and not self._group()[0]
        return self._called.no_sync() if wait else nullcontext()  # type: ignore[operator]

    def end_iteration(self) -> None:
        """After all of its updates."""
        if not self._group()[0]:
            return
        for name, scaler in list(self._pending.items()):  # parts that were not updated in the last batch of theirs
            self._step([self._parts[name]], scaler)
        for part in self._parts.values():
            part.schedule.step()

    def _group(self) -> tuple[bool, int]:
        """Of the batches whose gradients make a step together: whether this is the last, and how many there are."""
        first = self.iteration - self.iteration % self._accumulate
        end = min(first + self._accumulate, self.iterations)
        return self.iteration + 1 >= end, end - first

    def _step(self, parts: Sequence[TrainedPart], scaler: torch.amp.GradScaler) -> None:
        if not self._one_forward:
            parameters = [p for part in parts if part.shared for p in part.parameters]
            distributed.average_gradients(parameters, find_unused_parameters=self._find_unused)
        for part in parts:
            if part.settings.gradient_clip:
                scaler.unscale_(part.optimizer)
                nn.utils.clip_grad_norm_(part.parameters, part.settings.gradient_clip)
            scaler.step(part.optimizer)
        scaler.update()
        for part in parts:
            del self._pending[part.name]
            part.optimizer.zero_grad()
        if self._one_forward:  # whose backward pass goes to all, whatever parts were named
            self._procedure.zero_grad()

    def _named(self, name: str) -> TrainedPart:
        if name not in self._parts:
            raise unknown_name("part", name, self._parts)
        return self._parts[name]

    def _check(self, loss: object, parts: Sequence[TrainedPart]) -> None:
        names = ", ".join(part.name for part in parts)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            given = type(loss).__name__
            if isinstance(loss, Tensor):
                given = f"of shape {tuple(loss.shape)}" if loss.numel() != 1 else "without a gradient"
            raise ValueError(f"fastkd: the loss of an update of {names} is {given}, must be a scalar with a gradient")
        if self._accumulate > 1:
            again = [part.name for part in parts if part.name in self._updated]
            if again:
                raise ValueError(
                    f"fastkd: accumulate is {self._accumulate}, must be 1 for a procedure that updates "
                    f"{', '.join(again)} more than once in an iteration"
                )
            self._updated |= {part.name for part in parts}
