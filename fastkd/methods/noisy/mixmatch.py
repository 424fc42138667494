"""MixMatch on one batch, some of whose samples are labelled and the others are not: a mask tells them apart.

Shapes do not depend on how many there are of either, and nothing is read by the host. Where few or none are of a kind, its
mean is over these few, or 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fastkd.methods.noisy import terms
from fastkd.methods.procedure import Step

__all__ = [
    "MixMatch",
    "labelled_loss",
    "logits_of_views",
    "mean_probabilities",
    "mixmatch",
    "prior_loss",
    "ramp",
    "unlabelled_loss",
]


class MixMatch(NamedTuple):
    """What a network says of mixed images, and its losses."""

    logits: Tensor
    """``[V B, K]``, view by view."""
    labelled_loss: Tensor
    unlabelled_loss: Tensor


def mixmatch(
    network: nn.Module,
    views: Sequence[Tensor],
    labels: Tensor,
    labelled: Tensor,
    alpha: float,
    class_weight: Tensor | None = None,
) -> MixMatch:
    """All views of all samples, each mixed with another (Berthelot et al., "MixMatch", 2019, Algorithm 1). A mixed row is
    labelled where the first of its two images is, which has the greater share.

    Running statistics of batch norm stay as they are: those of mixed images, which vary less, are not those of the images that
    the network is for. :func:`logits_of_views` moves them.

    Args:
        views: V of ``[B, C, H, W]``.
        labels: ``[B, K]``, given or guessed, that sum to 1.
        labelled: ``[B]``, 1 or 0.
        alpha: of the Beta distribution of shares.
        class_weight: ``[K]``, of the labelled samples' loss.
    """
    mixed = terms.mixup(torch.cat(tuple(views)), labels.repeat(len(views), 1), alpha)
    with _fixed_statistics(network):
        logits = terms.class_logits(network, mixed.images)
    kind = labelled.repeat(len(views))
    return MixMatch(
        logits,
        labelled_loss(logits, mixed.labels, kind, class_weight),
        unlabelled_loss(logits, mixed.labels, kind),
    )


def labelled_loss(logits: Tensor, labels: Tensor, labelled: Tensor, class_weight: Tensor | None = None) -> Tensor:
    """``-sum_k c_k y_ik log p_ik``, the mean over the rows that are labelled (Eq. 3 of MixMatch, with weights of classes)."""
    if class_weight is None:
        return terms.weighted_mean(terms.soft_label_loss(logits, labels), labelled)
    log_p = terms.log_probabilities(logits)
    return terms.weighted_mean(-(labels * class_weight * log_p).sum(-1), labelled)


def unlabelled_loss(logits: Tensor, labels: Tensor, labelled: Tensor) -> Tensor:
    """``(p_ik - y_ik)^2``, the mean over the rows that are not labelled, and over the classes (Eq. 4)."""
    squared = (terms.probabilities(logits) - labels).square().mean(-1)
    return terms.weighted_mean(squared, 1.0 - labelled)


def prior_loss(logits: Tensor) -> Tensor:
    """``KL(1/K || mean_i p_i)`` of all rows: 0 where all classes are predicted alike (Li et al., "DivideMix", 2020, Eq. 11).

    Of the logarithms, so that a class of which nothing is left has a gradient, too.
    """
    rows, classes = logits.shape
    log_p = terms.log_probabilities(logits)
    return math.log(rows) - math.log(classes) - log_p.logsumexp(0).mean()


@torch.no_grad()
def logits_of_views(network: nn.Module, views: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``[B, K]`` for each view, all in one pass, without a graph."""
    logits = terms.class_logits(network, torch.cat(tuple(views)))
    # autocast may have kept 16-bit copies of the weights, made without a gradient, which the next pass would take
    torch.clear_autocast_cache()
    return logits.chunk(len(views))


def mean_probabilities(logits: Sequence[Tensor]) -> Tensor:
    """The mean of the softmax of each, ``[B, K]``."""
    return torch.stack([terms.probabilities(view) for view in logits]).mean(0)


def ramp(step: Step, start: int, share: float) -> float:
    """From 0 at the beginning of epoch ``start`` linearly to 1, in this share of the training."""
    length = share * step.epochs
    done = step.epoch - start + step.iteration / step.iterations
    return 1.0 if done >= length else max(0.0, done / length)


@contextmanager
def _fixed_statistics(network: nn.Module) -> Iterator[None]:
    norms = [part for part in network.modules() if isinstance(part, _NormBase) and part.track_running_stats]
    try:
        for part in norms:  # in training mode such a batch norm reads and writes none
            part.track_running_stats = False
        yield
    finally:
        for part in norms:
            part.track_running_stats = True
