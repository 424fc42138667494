"""How good a network is on images that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fastkd.methods.loop import predict
from fastkd.methods.method import cross_entropy

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
        ValueError: no images, not as many as targets, a class out of range, or the logits of several networks.
    """
    if len(images) != len(target) or len(images) == 0:
        raise ValueError(
            f"fastkd: there are {len(images)} images and {len(target)} in target, must be as many, 1 or more"
        )
    logits = predict(network, images, batch_size=batch_size).float()
    loss = cross_entropy(logits, target)
    return {
        "test_accuracy": (logits.argmax(-1) == target).double().mean().item(),
        "test_loss": loss.item(),
    }


def evaluator(images: Tensor, target: Tensor, *, batch_size: int = 1024) -> Callable[[nn.Module], dict[str, float]]:
    """:func:`evaluate` on these images, for the ``evaluate`` of a :class:`fastkd.training.Trainer`."""
    return lambda network: evaluate(network, images, target, batch_size=batch_size)
