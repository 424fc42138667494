"""The logits of a network for images in memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastkd._checks import check_count, check_tensor
from fastkd.methods.features import check_module, classes_last, logits_of, logits_of_one
from fastkd.models.modes import evaluating

__all__ = ["batch_logits", "predict"]


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, *, batch_size: int = 1024, class_dim: int = -1) -> Tensor:
    """Logits ``[N, ..., K]`` of all images in evaluation mode; the mode of each module is put back afterwards.

    Args:
        model: one network that returns logits, or an object that has them as ``.logits``.
        class_dim: dimension of the classes in its logits, as of :class:`fastkd.methods.FeatureTap`; in the result the last.

    Raises:
        TypeError: a model that is none, images that are no tensor, a batch_size or class_dim that is no int.
        ValueError: a batch_size below 1, logits without that dimension, or a model that returns the logits of several.
    """
    check_module("model", model)
    check_tensor("images", images)
    batch_size, class_dim = check_count("batch_size", batch_size, 1), check_count("class_dim", class_dim)
    with evaluating(model):
        return torch.cat([batch_logits(model, batch, class_dim) for batch in torch.split(images, batch_size)])


def batch_logits(model: nn.Module, images: Tensor, class_dim: int) -> Tensor:
    """Logits ``[B, ..., K]`` of one batch, in whatever mode the model is."""
    return classes_last(logits_of_one("the model's logits", logits_of(model(images))), class_dim)
