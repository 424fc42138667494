"""Trains a copy of a model in rounds that can be timed, and says what its first step did."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

LEARNING_RATE = 1e-3  # weights stay near the first ones over all rounds

# Where a generator is given (to compare contenders), it says which crops and draws, by fastkd's functions.
Source = torch.Generator | None
Losses = Callable[[nn.Module, Source], Iterator[Tensor]]  # of the steps of a round, each made when the last was taken


class Done(NamedTuple):
    """What a round returns."""

    loss: Tensor
    """Of its last step."""
    first_gradient: Callable[[], Tensor]
    """Of the first step from the first weights, with the crops and draws that all contenders share."""


class Trainer:
    """Trains a copy of a model, channels-last: a round of steps at each call."""

    def __init__(self, first: nn.Module, losses: Losses, device: torch.device) -> None:
        self.first, self.losses, self.device = first.to(memory_format=torch.channels_last), losses, device
        self.model = copy.deepcopy(first)
        # given outputs are no network: what an optimizer takes for them would hide data and loss
        self.optimizer = None if isinstance(first, Given) else _optimizer(self.model)

    def __call__(self) -> Done:
        for loss in self.losses(self.model, None):
            self.model.zero_grad()
            loss.backward()
            if self.optimizer is not None:
                self.optimizer.step()
        return Done(loss.detach(), self.first_gradient)

    def first_gradient(self) -> Tensor:
        """As :attr:`Done.first_gradient`, ``[parameters]``."""
        model = copy.deepcopy(self.first)
        next(self.losses(model, torch.Generator(self.device).manual_seed(1))).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9, weight_decay=5e-4)


class Given(nn.Module):
    """Stands for a network: returns the same values whatever it is given, the first ones for fewer inputs."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)

    def forward(self, images: Tensor) -> Tensor:
        few = len(images)
        return self.values if few == len(self.values) else self.values[:few]
