"""What a training can vary, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, Literal, get_args

import numpy as np

from fastkd._checks import check_choice

__all__ = ["OF_A_PART", "TrainingSettings", "plain_value"]

Optimizer = Literal["sgd", "adam", "adamw"]
Schedule = Literal["cosine", "step", "constant", "plateau"]
Amp = Literal["off", "bf16", "fp16"]
MOST_EPOCHS = 10**9
OF_A_PART = (
    *("optimizer", "learning_rate", "momentum", "nesterov", "betas", "weight_decay", "schedule", "milestones", "decay"),
    *("patience", "warmup_epochs", "gradient_clip"),
)
"""Settings that each part of a procedure may have for itself."""


@dataclass(frozen=True)
class TrainingSettings:
    """How a :class:`fastkd.training.Trainer` trains. The learning rate changes with each step, not each epoch.

    Raises:
        TypeError: a value of another type; numpy's numbers become Python's.
        ValueError: a value out of range; the message names it, what was given, and what is allowed.
    """

    epochs: int = 200
    """Passes over the batches."""
    optimizer: Optimizer = "sgd"
    """torch's SGD, Adam or AdamW."""
    learning_rate: float = 0.1
    """The highest: that after the warm-up."""
    momentum: float = 0.9
    """Of SGD."""
    nesterov: bool = True
    """Nesterov's momentum, for SGD."""
    betas: tuple[float, ...] = (0.9, 0.999)
    """Of Adam and AdamW: decays of the averages of the gradient and of its square."""
    weight_decay: float = 5e-4
    """Of all parameters, normalisation and biases included."""
    schedule: Schedule = "cosine"
    """Of the learning rate: half a cosine down to 0, steps down at the milestones, constant, or down a step each time that
    the validation loss has not fallen for a while."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Shares of the training after which the schedule "step" lowers the learning rate."""
    decay: float = 0.1
    """By which factor it, or the schedule "plateau", lowers it."""
    patience: int = 20
    """Epochs without a new lowest validation loss after which the schedule "plateau" lowers the learning rate."""
    warmup_epochs: float = 0.0
    """Epochs, or a part of one, over which the learning rate grows to its highest, in equal steps."""
    amp: Amp = "off"
    """Networks in bfloat16, or in float16 with scaled gradients, under torch.autocast."""
    ema: float = 0.0
    """Decay of the moving average of the weights, which is then what is evaluated and kept; 0: no average. After step t
    it is (1 + t) / (10 + t) at most, so that the initial weights are soon forgotten."""
    accumulate: int = 1
    """Batches whose gradients one step is made of, as if they were one batch; those left at the end of an epoch make a
    smaller one. Not for procedures that update a part more than once in an iteration."""
    gradient_clip: float = 0.0
    """Largest norm of the gradient; longer ones are shortened to it. 0: none are."""
    compile: bool = False
    """Networks by torch.compile."""
    seed: int = 0
    """Of what the training draws from the global generators of torch, numpy and Python."""
    checkpoint_every: int = 0
    """Steps after which a checkpoint is written within an epoch; 0: only at the end of each epoch."""
    evaluate_every: int = 1
    """Epochs after which the network is evaluated; after the last one it always is."""

    def __post_init__(self) -> None:
        self._make_plain()
        self._check_choices()
        number = math.isfinite
        for name, good, allowed in (
            ("epochs", 1 <= self.epochs <= MOST_EPOCHS, f"1 or more, and at most {MOST_EPOCHS}"),
            ("learning_rate", number(self.learning_rate) and self.learning_rate > 0, "above 0"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
            ("weight_decay", number(self.weight_decay) and self.weight_decay >= 0, "0 or more"),
            ("milestones", self._milestones_rise(), "shares of the training in (0, 1), each above the one before"),
            ("betas", len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)"),
            ("decay", 0 < self.decay <= 1, "in (0, 1]"),
            ("patience", self.patience >= 1, "1 or more"),
            ("warmup_epochs", 0 <= self.warmup_epochs < self.epochs, f"from 0 to less than epochs, {self.epochs}"),
            ("accumulate", self.accumulate >= 1, "1 or more"),
            ("ema", 0 <= self.ema < 1, "in [0, 1)"),
            ("gradient_clip", number(self.gradient_clip) and self.gradient_clip >= 0, "0 (off) or more"),
            ("seed", 0 <= self.seed < 2**63, "from 0 to 2^63 - 1"),
            ("checkpoint_every", self.checkpoint_every >= 0, "0 (off) or more"),
            ("evaluate_every", self.evaluate_every >= 1, "1 or more"),
        ):
            if not good:
                raise ValueError(f"fastkd: {name} is {getattr(self, name)}, must be {allowed}")
        if self.optimizer == "sgd" and self.nesterov and self.momentum == 0:
            raise ValueError("fastkd: nesterov is True with momentum 0, must be False, or momentum above 0")
        if self.schedule == "step" and self.milestones[0] * self.epochs <= self.warmup_epochs:
            raise ValueError(
                f"fastkd: milestones begin at {self.milestones[0]} of {self.epochs} epochs, "
                f"must be after the {self.warmup_epochs} of warmup_epochs"
            )

    def _make_plain(self) -> None:
        """A checkpoint with numpy's numbers could not be read back."""
        for field in fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            if kind is tuple:
                if not isinstance(value, list | tuple | np.ndarray):
                    raise TypeError(f"fastkd: {field.name} is {value!r}, must be a tuple of numbers")
                made: Any = tuple(plain_value(field.name, part, float) for part in value)
            else:
                made = plain_value(field.name, value, kind)
            object.__setattr__(self, field.name, made)

    def _check_choices(self) -> None:
        for name, choices in (("optimizer", Optimizer), ("schedule", Schedule), ("amp", Amp)):
            check_choice(name, getattr(self, name), get_args(choices))
        if self.schedule == "step" and not self.milestones:
            raise ValueError("fastkd: milestones is (), must be one share or more for the schedule 'step'")

    def _milestones_rise(self) -> bool:
        bounds = (0.0, *self.milestones, 1.0)
        return all(low < high for low, high in pairwise(bounds))


def plain_value(name: str, value: Any, kind: type = object) -> Any:
    """The value as Python's own ``kind``, or as the one of str, bool, int and float that it is.

    Raises:
        TypeError: it is no such.
    """
    kinds: tuple[tuple[type, tuple[type, ...], str], ...] = (
        (bool, (bool, np.bool_), "True or False"),
        (str, (str,), "text"),
        (int, (Integral,), "a whole number"),
        (float, (Real,), "a number"),
    )
    for made, of, allowed in kinds:
        if kind is made or (kind is object and isinstance(value, of)):
            if not isinstance(value, of) or (made in (int, float) and isinstance(value, bool)):
                raise TypeError(f"fastkd: {name} is {value!r}, must be {allowed}")
            try:
                return made(value)
            except OverflowError:
                raise ValueError(f"fastkd: {name} is {value}, must be a number that a float holds") from None
    raise TypeError(f"fastkd: {name} is of type {type(value).__name__}, must be text, a number, True or False")
