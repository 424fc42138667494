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


def standardized(logits: Tensor) -> Tensor:
    rows = []
    for row in logits:
        deviation = row - row.sum() / len(row)
        rows.append(deviation / ((deviation.pow(2).sum() / (len(row) - 1)).sqrt() + 1e-7))
    return torch.stack(rows)


def decoupled(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """TCKD and NCKD of DKD: binary probabilities of the target class, and the others among themselves, row by row."""
    tckd, nckd = [], []
    for s, t, y in zip(student, teacher, target, strict=True):
        p, q = (F.softmax(z / temperature, 0) for z in (t, s))
        pairs = [(p[y], q[y]), (1 - p[y], 1 - q[y])]
        tckd.append(sum(a * (a / b).log() for a, b in pairs))
        others = [k for k in range(len(s)) if k != y]
        p, q = p[others] / p[others].sum(), q[others] / q[others].sum()
        nckd.append((p * (p / q).log()).sum())
    return torch.stack(tckd).mean() * temperature**2, torch.stack(nckd).mean() * temperature**2


def stronger(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Both relations of DIST, samples by samples and classes by classes."""

    def distance(a: Tensor, b: Tensor) -> Tensor:
        a, b = a - a.mean(), b - b.mean()
        return 1 - (a * b).sum() / (a.norm() * b.norm() + 1e-8)

    q, p = (F.softmax(z / temperature, 1) for z in (student, teacher))
    rows = [distance(a, b) for a, b in zip(q, p, strict=True)]
    columns = [distance(a, b) for a, b in zip(q.T, p.T, strict=True)]
    return temperature**2 * torch.stack(rows).mean(), temperature**2 * torch.stack(columns).mean()


def projected(student: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor, exponent: float) -> Tensor:
    """``weight [C_t, C_s]``; features with or without places."""
    s, t = (f.reshape(*f.shape[:2], -1).mean(2) for f in (student, teacher))
    s = torch.stack([weight @ row + bias for row in s])
    s, t = ((f - f.mean(0)) / (f.var(0, unbiased=False) + 1e-4).sqrt() for f in (s, t))
    return ((s - t).abs() ** exponent).sum().log()


def embedded(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Linear, of norm 1."""
    v = torch.stack([weight @ row + bias for row in features.reshape(*features.shape[:2], -1).mean(2)])
    return v / v.norm(dim=1, keepdim=True)


def contrast(v: Tensor, memory: Tensor, index: Tensor, drawn: Tensor, scale: Tensor, temperature: float) -> Tensor:
    """``drawn [B, k]``; scale is Z. h is of Eq. 19, with the scores over Z in the place of the bare ones."""
    k, items = drawn.shape[1], len(memory)

    def h(i: int, j: Tensor) -> Tensor:
        score = (v[i] @ memory[j] / temperature).exp() / scale
        return score / (score + k / items)

    rows = [-h(i, y).log() - sum((1 - h(i, j)).log() for j in drawn[i]) for i, y in enumerate(index)]
    return torch.stack(rows).mean()


def scale_of_scores(v: Tensor, memory: Tensor, index: Tensor, drawn: Tensor, temperature: float) -> Tensor:
    """Z: as many as the memory has times the mean of the scores of those that were drawn and of the own ones."""
    scores = [(v[i] @ memory[j] / temperature).exp() for i, y in enumerate(index) for j in [y, *drawn[i]]]
    return len(memory) * torch.stack(scores).mean()


def selected(scores: Tensor, right: Tensor, ratio: float) -> list[int]:
    """Rows where the right column is the best, and of the others the first ones by its rank."""
    ranks = [int((row > row[y]).sum()) for row, y in zip(scores, right, strict=True)]
    wrong = sorted((i for i, rank in enumerate(ranks) if rank), key=lambda i: ranks[i])
    return [i for i, rank in enumerate(ranks) if not rank] + wrong[: int(len(wrong) * ratio)]


def of_rows(rows: list[int], student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return hinton(student[rows], teacher[rows], temperature)


def cosines(features: Tensor, head: torch.nn.Module) -> Tensor:
    """Of turned images with upright ones, ``[3 B, B]``, of the features of both, ``[4 B, C, ...]``, upright ones first."""
    z = head(features.reshape(*features.shape[:2], -1).mean(2))
    images = len(z) // 4
    return torch.stack([torch.stack([F.cosine_similarity(a, b, 0) for b in z[:images]]) for a in z[images:]])
