"""MixMatch as authors' code has it, row by row."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastkd.methods.noisy import terms


def mixing(seed: int, rows: int, alpha: float) -> tuple[Tensor, float]:
    """The order and the share that a MixMatch draws after this seed."""
    torch.manual_seed(seed)
    mixed = terms.mixup(torch.zeros(rows, 1), torch.zeros(rows, 1), alpha)
    return mixed.order, mixed.share


def cut_mixmatch(
    network: nn.Module, views: list[Tensor], labels: Tensor, labelled: Tensor, order: Tensor, share: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of all mixed rows; of the labelled ones logarithms of probabilities and labels; the mean squared error of the
    others. Rows are cut out as authors' code has them."""
    images, targets = torch.cat(views), torch.cat([labels] * len(views))
    images = share * images + (1 - share) * images[order]
    targets = share * targets + (1 - share) * targets[order]
    logits = network(images)
    rows = torch.cat([labelled] * len(views)).bool()
    log_p = logits[rows].log_softmax(1)
    squared = ((logits[~rows].softmax(1) - targets[~rows]) ** 2).mean()
    return logits, log_p, targets[rows], squared


def sharp(p: Tensor, temperature: float = 0.5) -> Tensor:
    powers = p ** (1 / temperature)
    return powers / powers.sum(1, keepdim=True)
