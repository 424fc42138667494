"""How good a network is on images that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastkd._checks import check_count, check_dtype, check_tensor
from fastkd.methods.features import check_module
from fastkd.methods.method import cross_entropy
from fastkd.training.inference import predict

__all__ = ["evaluate", "evaluator"]


def evaluate(network: nn.Module, images: Tensor, target: Tensor, *, batch_size: int = 1024) -> dict[str, float]:
    """``test_accuracy``, the share of images whose class has the largest logit, and ``test_loss``, their mean
    cross-entropy; in evaluation mode, without gradients.

    Args:
        network: images to logits ``[N, ..., K]``, or to an object that has them as ``.logits``; a single one: of several that
            learn together, ``method.deployed(student)``.
        images: float ``[N, C, H, W]``, normalised as in the training, where the network is.
        target: int64 ``[N, ...]``, a class for each row of the logits.

    Raises:
        TypeError: a network that is no module, images that are no tensor, a target that is not int64.
        ValueError: no images, not as many as targets, a batch_size below 1, a class out of range, or the logits of several
            networks.
    """
    check_module("network", network)
    batch_size = _check_set(images, target, batch_size)
    logits = predict(network, images, batch_size=batch_size).float()
    loss = cross_entropy(logits, target)
    return {
        "test_accuracy": (logits.argmax(-1) == target).double().mean().item(),
        "test_loss": loss.item(),
    }


def evaluator(images: Tensor, target: Tensor, *, batch_size: int = 1024) -> Callable[[nn.Module], dict[str, float]]:
    """:func:`evaluate` on these images, for the ``evaluate`` of a :class:`fastkd.training.Trainer`. They are checked now."""
    _check_set(images, target, batch_size)
    return lambda network: evaluate(network, images, target, batch_size=batch_size)


def _check_set(images: Tensor, target: Tensor, batch_size: int) -> int:
    """Images and their classes; the batch size."""
    check_tensor("images", images)
    check_dtype("target", target, (torch.int64,))
    there = [t.shape[0] if t.dim() else 0 for t in (images, target)]
    if there[0] != there[1] or there[0] == 0:
        raise ValueError(f"fastkd: there are {there[0]} images and {there[1]} in target, must be as many, 1 or more")
    return check_count("batch_size", batch_size, 1)
