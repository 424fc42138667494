"""The losses of the zoo in plain torch, as their papers and the usual comparisons of them have it, term by term.

Written for clarity and independently of ``fastkd.methods``: loops over samples and layers where they are the formula.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def hinton(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p = F.softmax(teacher / temperature, 1)
    return (p * (p.log() - F.log_softmax(student / temperature, 1))).sum() / len(student) * temperature**2


def fitnet(student: Tensor, teacher: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """``weight [C_t, C_s]`` of a 1x1 convolution; gamma and beta of the batch norm, ``[C_t]``."""
    guided = torch.einsum("ts,bshw->bthw", weight, student)
    mean, variance = guided.mean((0, 2, 3), keepdim=True), guided.var((0, 2, 3), unbiased=False, keepdim=True)
    guided = (guided - mean) / (variance + 1e-5).sqrt() * gamma[:, None, None] + beta[:, None, None]
    return (guided.clamp(min=0) - teacher).pow(2).mean()


def pooled(maps: Tensor, to: Tensor) -> Tensor:
    """Where larger than the other, in height and width a multiple of it."""
    return F.avg_pool2d(maps, maps.shape[-1] // to.shape[-1]) if maps.shape[-1] > to.shape[-1] else maps


def fsp(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    def flow(before: Tensor, after: Tensor) -> Tensor:
        before, after = pooled(before, after), pooled(after, before)
        return (before[:, :, None] * after[:, None]).mean((3, 4))

    loss = student[0].new_zeros(())
    for i in range(len(student) - 1):
        loss = loss + (flow(*student[i : i + 2]) - flow(*teacher[i : i + 2])).pow(2).mean()
    return loss


def attention(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    def one(maps: Tensor) -> Tensor:
        energy = maps.abs().pow(2).mean(1).reshape(len(maps), -1)
        return energy / energy.norm(dim=1, keepdim=True)

    pairs = [(pooled(s, t), pooled(t, s)) for s, t in zip(student, teacher, strict=True)]
    return sum(((one(s) - one(t)).pow(2).mean() for s, t in pairs), student[0].new_zeros(()))


def similarity(student: Tensor, teacher: Tensor) -> Tensor:
    def rows(features: Tensor) -> Tensor:
        flat = features.reshape(len(features), -1)
        products = torch.stack([torch.stack([(a * b).sum() for b in flat]) for a in flat])
        return products / products.norm(dim=1, keepdim=True)

    return (rows(student) - rows(teacher)).pow(2).sum() / len(student) ** 2


def distances(student: Tensor, teacher: Tensor) -> Tensor:
    def relative(features: Tensor) -> Tensor:
        flat = features.reshape(len(features), -1)
        pairs = torch.stack([(a - b).norm() for i, a in enumerate(flat) for j, b in enumerate(flat) if i != j])
        return pairs / pairs.mean()

    error = F.smooth_l1_loss(relative(student), relative(teacher), reduction="sum")
    return error / len(student) ** 2  # the diagonal counts, as 0


def angles(student: Tensor, teacher: Tensor) -> Tensor:
    def cosines(features: Tensor) -> Tensor:
        flat = features.reshape(len(features), -1)
        result = []
        for j, vertex in enumerate(flat):
            rays = [F.normalize(a - vertex, dim=0) if i != j else torch.zeros_like(a) for i, a in enumerate(flat)]
            result += [(a * b).sum() for a in rays for b in rays]
        return torch.stack(result)

    return F.smooth_l1_loss(cosines(student), cosines(teacher))


def one(logits: Tensor, target: Tensor, weight: float, temperature: float) -> Tensor:
    """``logits [branches + 1, B, K]``."""
    loss = sum((F.cross_entropy(z, target) for z in logits), logits.new_zeros(()))
    for branch in logits[:-1]:
        loss = loss + weight * hinton(branch, logits[-1].detach(), temperature)
    return loss


def mutual(logits: Tensor, target: Tensor) -> Tensor:
    """``logits [networks, B, K]``."""
    loss = logits.new_zeros(())
    for i, ours in enumerate(logits):
        others = [hinton(ours, theirs.detach(), 1.0) for j, theirs in enumerate(logits) if j != i]
        loss = loss + F.cross_entropy(ours, target) + torch.stack(others).mean()
    return loss


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return -(F.softmax(teacher / temperature, 1) * F.log_softmax(student / temperature, 1)).sum() / len(student)
