"""How well maps of classes fit: confusion counts, and the intersection over union that is made of them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd._checks import check_dtype, check_ignore_index, check_size

__all__ = ["class_iou", "confusion_matrix", "mean_iou"]


def confusion_matrix(prediction: Tensor, target: Tensor, classes: int, *, ignore_index: int = -100) -> Tensor:
    """How many places of class i were taken for class j: int64 ``[classes, classes]``, rows the truth.

    Counts of batches add up. They stay on the device, which is not waited for.

    Args:
        prediction: int64, any shape, classes in [0, classes); of logits ``[B, K, H, W]`` it is ``logits.argmax(1)``.
        target: int64 of the same shape; where it is ``ignore_index`` the place is left out, whatever the prediction.
        classes: K.

    Raises:
        TypeError, ValueError: tensors of other dtypes or of two shapes, numbers out of range. Numbers in tensors on a GPU are
            not looked at: there one out of range ends in torch's device-side assertion.
    """
    check_dtype("prediction", prediction, (torch.int64,))
    check_dtype("target", target, (torch.int64,))
    classes, ignore_index = check_size("classes", classes, 1), check_ignore_index(ignore_index)
    if prediction.shape != target.shape:
        raise ValueError(
            f"fastkd: prediction has shape {tuple(prediction.shape)}, must be that of target, {tuple(target.shape)}"
        )
    counted = target != ignore_index
    if target.device.type == "cpu":
        _check_values("prediction", prediction, counted, classes)
        _check_values("target", target, counted, classes)
    valid = (prediction >= 0) & (prediction < classes) & (target >= 0) & (target < classes)
    place = torch.where(valid, target * classes + prediction, -1).where(
        counted, classes**2
    )  # one more, of what is left out
    counts = target.new_zeros(classes**2 + 1)
    counts.scatter_add_(0, place.flatten(), counted.flatten().long())
    return counts[:-1].view(classes, classes)


def _check_values(name: str, values: Tensor, counted: Tensor, classes: int) -> None:
    outside = counted & ((values < 0) | (values >= classes))
    if bool(outside.any()):
        raise ValueError(f"fastkd: {name} holds {int(values[outside][0])}, must be in [0, {classes})")


def class_iou(confusion: Tensor) -> Tensor:
    """Intersection over union of each class, float64 ``[K]``: places of both prediction and truth over places of either.

    NaN for a class that is in neither. ``confusion`` is as of :func:`confusion_matrix`.
    """
    both = confusion.diagonal().double()
    return both / (confusion.sum(0) + confusion.sum(1) - confusion.diagonal())


def mean_iou(confusion: Tensor) -> Tensor:
    """Mean of :func:`class_iou` over the classes that are in the prediction or the truth, float64, a scalar.

    As in the PASCAL VOC challenges, the counts are those of the whole set, not of image after image. NaN where nothing was
    counted.
    """
    return class_iou(confusion).nanmean()
