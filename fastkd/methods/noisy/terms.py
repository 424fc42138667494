"""Terms of the losses of learning with noisy labels. Logits ``[B, K]`` go in raw; sums run in float32 or better."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastkd import _checks, functional
from fastkd.methods.features import logits_of, logits_of_one

__all__ = [
    "Mixed",
    "accuracy",
    "balance",
    "check_mixing",
    "class_logits",
    "consistency",
    "log_probabilities",
    "mixup",
    "negative_learning",
    "one_hot",
    "probabilities",
    "sharpened",
    "soft_label_loss",
    "weighted_mean",
]

LEAST_ALPHA = 0.01


def probabilities(logits: Tensor) -> Tensor:
    """Softmax, in float32 or better."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)


def log_probabilities(logits: Tensor) -> Tensor:
    """Its logarithm."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def class_logits(network: nn.Module, images: Tensor) -> Tensor:
    """What a classifier puts out, ``[B, K]``."""
    return logits_of_one("the logits of the network", logits_of(network(images)))


def accuracy(logits: Tensor, target: Tensor) -> Tensor:
    """Share of the given labels that are predicted."""
    return (logits.detach().argmax(-1) == target).float().mean()


def one_hot(target: Tensor, like: Tensor) -> Tensor:
    """``[B, K]`` of classes ``[B]``, in the shape and dtype of ``like``."""
    return torch.zeros_like(like).scatter_(1, target[:, None], 1.0)


def negative_learning(logits: Tensor, target: Tensor, weight: Tensor | None = None, *, correct: bool = True) -> Tensor:
    """``-mean_i w_i sum_k log(1 - p_ik)`` over the classes of which the sample is none: all but the given label and the one
    that is predicted, the corrected label (Zong et al., Eq. 2).

    Args:
        target: int64 ``[B]``, the given labels.
        weight: ``[B]``.
        correct: whether there is a corrected label.
    """
    p = probabilities(logits)
    labels = torch.stack([target, logits.argmax(-1)], 1) if correct else target[:, None]
    wrong = torch.ones_like(p).scatter_(1, labels, 0.0)
    rows = -(wrong * torch.log((1 - p).clamp(1e-5, 1.0))).sum(-1)
    return (rows if weight is None else weight * rows).mean()


def balance(p: Tensor) -> Tensor:
    """``-mean_k log mean_i p_ik`` of probabilities ``[B, K]``: lowest, log K, where all classes are predicted alike."""
    return -p.mean(0).clamp(1e-4, 1.0).log().mean()


def consistency(logits: Tensor, other: Tensor) -> Tensor:
    """``KL(p || p')`` of the predictions for two views of the same images, the first taken as given."""
    return functional.kl_div(other, logits.detach())


def sharpened(p: Tensor, temperature: float) -> Tensor:
    """``p^(1/T)`` over its sum (Berthelot et al., "MixMatch", 2019, Eq. 7)."""
    highest = p.amax(-1, keepdim=True)  # which stays, whatever vanishes at a low temperature
    powers = (p / highest) ** (1.0 / temperature)
    return powers / powers.sum(-1, keepdim=True)


def soft_label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """``-sum_k y_ik log p_ik``, ``[B]``, of labels ``[B, K]`` that sum to 1."""
    return functional.soft_cross_entropy(logits, labels.log(), reduction="none")


def weighted_mean(rows: Tensor, weight: Tensor) -> Tensor:
    """Of rows ``[B]``; 0 where all weights are."""
    total = weight.sum()
    return (rows * weight).sum() / torch.where(total > 0, total, 1)  # over a tiny number gradients would be infinite


class Mixed(NamedTuple):
    """Images that are mixed in pairs."""

    images: Tensor
    labels: Tensor
    order: Tensor
    """The second of each pair, int64 ``[B]``."""
    share: float
    """Of the first, 0.5 or more."""

    def mix(self, rows: Tensor) -> Tensor:
        """Other rows of these images, mixed alike."""
        return self.share * rows + (1.0 - self.share) * rows[self.order]


def check_mixing(name: str, alpha: object) -> float:
    """Of a Beta distribution, 0 or 0.01 and more: of smaller numbers torch draws halves."""
    number = _checks.check_not_negative(name, alpha)
    if 0.0 < number < LEAST_ALPHA:
        raise ValueError(f"fastkd: {name} is {alpha}, must be 0 (images are not mixed) or {LEAST_ALPHA} or more")
    return number


def mixup(images: Tensor, labels: Tensor, alpha: float) -> Mixed:
    """Each image with another, and their labels ``[B, K]``: ``l x + (1 - l) x'``, with one l for all of Beta(alpha, alpha),
    or 1 - l if that is more (Zhang et al., "mixup", 2018, as MixMatch has it). alpha 0: as they are."""
    order = torch.randperm(len(images), device=images.device)
    share = 1.0
    if alpha:
        share = float(torch.distributions.Beta(alpha, alpha).sample())  # on the CPU: nothing is waited for
        share = max(share, 1.0 - share)
    mixed = Mixed(images, labels, order, share)
    return mixed._replace(images=mixed.mix(images), labels=mixed.mix(labels))
