"""The logits of a network for images in memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastkd._checks import check_count, check_tensor
from fastkd.methods.features import check_module, logits_of, logits_of_one
from fastkd.models.modes import evaluating

__all__ = ["predict"]


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
