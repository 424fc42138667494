"""Optimizer and learning rates, as the settings say: torch's."""

from __future__ import annotations

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from fastkd.training.settings import TrainingSettings

__all__ = ["make_optimizer", "make_plateau", "make_schedule"]


def make_optimizer(parameters: list[nn.Parameter], settings: TrainingSettings) -> Optimizer:
    """SGD, Adam or AdamW."""
    # one kernel; and a GradScaler need not wait for the device to know whether to step
    fused = True if all(p.is_cuda for p in parameters) else None
    if settings.optimizer != "sgd":
        kind = AdamW if settings.optimizer == "adamw" else Adam
        first, second = settings.betas
        return kind(
            parameters, settings.learning_rate, (first, second), weight_decay=settings.weight_decay, fused=fused
        )
    return SGD(
        parameters,
        settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.nesterov,
        fused=fused,
    )


def make_schedule(optimizer: Optimizer, settings: TrainingSettings, steps_per_epoch: int) -> LRScheduler:
    """The learning rate of each step t, from 0 on, of all N, W of them warm-up, up to ``learning_rate``, l:

    ``l (t + 1) / W`` in the warm-up; then ``l (1 + cos(pi (t - W) / (N - W))) / 2``, ``l decay^(milestones <= t)`` with
    milestones rounded to whole steps, or ``l``, which :func:`make_plateau` lowers.
    """
    steps = settings.epochs * steps_per_epoch
    warmup = min(round(settings.warmup_epochs * steps_per_epoch), steps - 1)
    schedule: LRScheduler
    if settings.schedule == "cosine":
        schedule = CosineAnnealingLR(optimizer, steps - warmup)
    elif settings.schedule == "step":
        milestones = [round(share * steps) - warmup for share in settings.milestones]
        schedule = MultiStepLR(optimizer, milestones, settings.decay)
    else:
        schedule = ConstantLR(optimizer, factor=1.0)
    if warmup == 0:
        return schedule
    grow = LinearLR(optimizer, 1 / warmup, total_iters=warmup - 1)
    return SequentialLR(optimizer, [grow, schedule], [warmup])


def make_plateau(optimizer: Optimizer, settings: TrainingSettings) -> ReduceLROnPlateau | None:
    """What lowers the learning rate where the schedule is "plateau", stepped with the validation loss of each epoch."""
    if settings.schedule != "plateau":
        return None
    # torch counts the epochs that are waited out, not the one that is one too many
    return ReduceLROnPlateau(optimizer, factor=settings.decay, patience=settings.patience - 1, threshold=0.0)
