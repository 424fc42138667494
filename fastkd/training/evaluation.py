"""How good a network is on images that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastkd._checks import check_count, check_dtype, check_ignore_index, check_tensor
from fastkd.methods.features import check_module
from fastkd.methods.method import cross_entropy
from fastkd.models.modes import evaluating
from fastkd.training.inference import batch_logits
from fastkd.training.segmentation import confusion_matrix, mean_iou

__all__ = ["evaluate", "evaluator"]


@torch.no_grad()
def evaluate(
    network: nn.Module,
    images: Tensor,
    target: Tensor,
    *,
    batch_size: int = 1024,
    class_dim: int = -1,
    ignore_index: int = -100,
) -> dict[str, float]:
    """``test_accuracy``, the share of rows whose class has the largest logit, and ``test_loss``, their mean cross-entropy; in
    evaluation mode, without gradients. A classifier has a row an image, a dense network one a pixel.

    Of maps (targets ``[N, H, W]``, or more dimensions), ``test_mean_iou``, too: the mean over the classes of intersection over
    union, counted over the whole set (:func:`fastkd.training.mean_iou`). The device is waited for once, at the end.

    Args:
        network: images to logits ``[N, ..., K]``, or to an object that has them as ``.logits``; a single one: of several that
            learn together, ``method.deployed(student)``.
        images: float ``[N, C, H, W]``, normalised as in the training, where the network is.
        target: int64 ``[N, ...]``, a class for each row of the logits.
        batch_size: images at once; of maps, choose it for the memory that their logits take.
        class_dim: dimension of the classes in the network's logits: 1 for maps ``[N, K, H, W]``.
        ignore_index: rows with this target are left out.

    Raises:
        TypeError: a network that is no module, images that are no tensor, a target that is not int64, a number that is no int.
        ValueError: no images, not as many as targets, a batch_size below 1, a class out of range, nothing but ``ignore_index``,
            logits without that dimension or of several networks.
    """
    check_module("network", network)
    batch_size, class_dim, ignore_index = _check_set(images, target, batch_size, class_dim, ignore_index)
    maps = target.dim() > 2
    sums, confusion = torch.zeros(3, dtype=torch.float64, device=target.device), None
    with evaluating(network):
        for batch, classes in zip(images.split(batch_size), target.split(batch_size), strict=True):
            logits = batch_logits(network, batch, class_dim).float()
            loss = cross_entropy(logits, classes, ignore_index=ignore_index, reduction="sum")
            prediction, counted = logits.argmax(-1), classes != ignore_index
            right = (prediction == classes) & counted
            sums += torch.stack([loss.double(), right.sum(), counted.sum()])
            if maps:
                counts = confusion_matrix(prediction, classes, logits.shape[-1], ignore_index=ignore_index)
                confusion = counts if confusion is None else confusion + counts
    results = sums if confusion is None else torch.cat([sums, mean_iou(confusion)[None]])
    loss_sum, right_rows, rows, *iou = results.tolist()
    if rows == 0:
        raise ValueError(f"fastkd: target holds nothing but ignore_index, {ignore_index}, must hold a class")
    return {
        "test_accuracy": right_rows / rows,
        "test_loss": loss_sum / rows,
        **({"test_mean_iou": iou[0]} if maps else {}),
    }


def evaluator(
    images: Tensor, target: Tensor, *, batch_size: int = 1024, class_dim: int = -1, ignore_index: int = -100
) -> Callable[[nn.Module], dict[str, float]]:
    """:func:`evaluate` on these images, for the ``evaluate`` of a :class:`fastkd.training.Trainer`. They are checked now."""
    size, dim, ignored = _check_set(images, target, batch_size, class_dim, ignore_index)
    return lambda network: evaluate(network, images, target, batch_size=size, class_dim=dim, ignore_index=ignored)


def _check_set(
    images: Tensor, target: Tensor, batch_size: int, class_dim: int, ignore_index: int
) -> tuple[int, int, int]:
    """Images, their classes, and the numbers, which are returned as Python's."""
    check_tensor("images", images)
    check_dtype("target", target, (torch.int64,))
    there = [t.shape[0] if t.dim() else 0 for t in (images, target)]
    if there[0] != there[1] or there[0] == 0:
        raise ValueError(f"fastkd: there are {there[0]} images and {there[1]} in target, must be as many, 1 or more")
    return (
        check_count("batch_size", batch_size, 1),
        check_count("class_dim", class_dim),
        check_ignore_index(ignore_index),
    )
