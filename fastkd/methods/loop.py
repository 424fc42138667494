"""An optimisation loop and an inference loop for models whose data sits in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastkd._checks import check_callable, check_count, check_not_negative, check_tensor
from fastkd.methods.features import check_module, logits_of, logits_of_one

__all__ = ["evaluating", "one_thread", "optimise", "predict"]


def optimise(
    model: nn.Module,
    loss_of_batch: Callable[[], Tensor],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float = 1e-2,
    on_step: Callable[[int], None] | None = None,
) -> None:
    """AdamW for ``steps`` steps with a cosine from ``learning_rate`` to zero.

    Args:
        loss_of_batch: draws the next batch, runs the model and returns the loss.
        steps: 1 or more.
        learning_rate, weight_decay: 0 or more.
        on_step: called with the number of steps done after each one; may evaluate the model (:func:`predict`).

    Raises:
        TypeError, ValueError: other than these.
    """
    check_module("model", model)
    check_callable("on_step", on_step)
    steps = check_count("steps", steps, 1)
    learning_rate = check_not_negative("learning_rate", learning_rate)
    weight_decay = check_not_negative("weight_decay", weight_decay)
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    model.train()
    for step in range(1, steps + 1):
        optimiser.zero_grad()
        loss_of_batch().backward()
        optimiser.step()
        schedule.step()
        if on_step is not None:
            on_step(step)
    model.eval()


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, *, batch_size: int = 1024) -> Tensor:
    """Logits ``[N, ..., K]`` of all images in evaluation mode; the mode of each module is put back afterwards.

    Args:
        model: one network that returns logits, or an object that has them as ``.logits``.

    Raises:
        TypeError: a model that is none, images that are no tensor, a batch_size that is no int.
        ValueError: a batch_size below 1, or a model that returns the logits of several.
    """
    check_module("model", model)
    check_tensor("images", images)
    batch_size = check_count("batch_size", batch_size, 1)
    with evaluating(model):
        parts = (logits_of(model(batch)) for batch in torch.split(images, batch_size))
        return torch.cat([logits_of_one("the model's logits", part) for part in parts])


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Puts a module into evaluation mode inside the ``with`` block; afterwards each part of it has its own mode again.

    ``train(was_training)`` would put a part that was in evaluation mode by itself, a frozen batch norm, into training mode.
    """
    modes = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs torch's CPU operators on one thread inside the ``with`` block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
