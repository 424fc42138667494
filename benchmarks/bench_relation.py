"""Relational distillation (RKD) with the student's gradient, against the form that everybody uses, B x B x d differences, and
against one in plain torch that takes all cosines from Gram matrices.

RepDistiller itself is not installed from anywhere: its peer here is written from the formulas, operation for operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks import floors
from benchmarks.case import (
    Case,
    Contest,
    Settings,
    Work,
    on_threads,
    peers_that_fit,
    relative_error,
    short_name,
    thread_counts,
)
from benchmarks.clock import graph_replay
from fastkd.functional import relation_loss

WEIGHTS = (25.0, 50.0)
CUBES = 8  # numbers of B^3 (of B^2 d, where that is more) that a peer holds at its peak, or fewer
MOST_FOR_TRUTH = 256  # points: beyond, fastkd in float64 is the truth, which the peers are held to, too

QUICK = ((64, 128, torch.float32), (256, 256, torch.float32))
FULL = ((64, 128, torch.bfloat16), (128, 512, torch.float32), (512, 512, torch.float32))
GPU = ((64, 128, torch.float32), (256, 256, torch.float32), (512, 512, torch.float32), (512, 512, torch.bfloat16))
TARGETS = {(256, 256): {"RepDistiller-style": 10.0}}


def distances(x: Tensor) -> Tensor:
    """Over the mean of the positive ones, from a Gram matrix, as RepDistiller has them."""
    square = x.square().sum(1)
    squared = square[:, None] + square[None] - 2 * x @ x.mT
    apart = 1 - torch.eye(len(x), dtype=x.dtype, device=x.device)
    distance = squared.clamp(min=1e-12).sqrt() * apart
    return distance * (len(x) * (len(x) - 1) / distance.sum())


def angles_of_differences(x: Tensor) -> Tensor:
    """``[a, b, c]`` from normalised differences ``[B, B, d]``."""
    direction = F.normalize(x[None] - x[:, None], dim=2)
    return torch.bmm(direction, direction.mT)


def angles_of_gram(x: Tensor) -> Tensor:
    """``[a, b, c]`` by the law of cosines from a Gram matrix: B^3 numbers, but no ``[B, B, d]``."""
    x = x - x.mean(0)
    gram = x @ x.mT
    square = gram.diagonal()
    squared = square[:, None] + square[None] - 2 * gram
    apart = 1 - torch.eye(len(x), dtype=x.dtype, device=x.device)
    inverse = squared.clamp(min=1e-12).rsqrt() * apart
    product = gram[None] - gram[:, :, None] - gram[:, None, :] + square[:, None, None]
    return product * inverse[:, :, None] * inverse[:, None, :]


def plain_loss(student: Tensor, teacher: Tensor, angles: Callable[[Tensor], Tensor]) -> Tensor:
    """In float32 or better, as the peers' losses are."""
    student, teacher = (x if x.dtype == torch.float64 else x.float() for x in (student, teacher))
    with torch.no_grad():
        distance, angle = distances(teacher), angles(teacher)
    terms = F.smooth_l1_loss(distances(student), distance), F.smooth_l1_loss(angles(student), angle)
    return WEIGHTS[0] * terms[0] + WEIGHTS[1] * terms[1]


def repdistiller_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """RKD as RepDistiller computes it."""
    return plain_loss(student, teacher, angles_of_differences)


def gram_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """RKD from Gram matrices in plain torch."""
    return plain_loss(student, teacher, angles_of_gram)


def fastkd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Ours."""
    return relation_loss(student, teacher, *WEIGHTS)


PEERS = {"RepDistiller-style": repdistiller_loss, "torch eager, Gram": gram_loss, "torch.compile": repdistiller_loss}
COMPILED = "torch.compile"


def truth_of(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64, one vertex after the other; B^3 numbers at once would be gigabytes."""
    student, teacher = student.detach().double().requires_grad_(), teacher.double()
    loss = WEIGHTS[0] * F.smooth_l1_loss(distances(student), distances(teacher))
    loss.backward()
    for a in range(len(student)):
        directions = [F.normalize(x - x[a], dim=1) for x in (student, teacher)]
        angle = WEIGHTS[1] * F.smooth_l1_loss(*(direction @ direction.mT for direction in directions)) / len(student)
        angle.backward()
        loss = loss.detach() + angle.detach()
    assert student.grad is not None
    return loss, student.grad


def step(loss: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and the student's gradient."""
    value = loss(student, teacher)
    return value.detach(), torch.autograd.grad(value, student)[0]


def cases(settings: Settings) -> Iterator[Case]:
    """From the usual batch to one whose B^3 numbers fill memory."""
    for points, features, dtype in settings.pick(QUICK, FULL, GPU):
        yield _case(settings, points, features, dtype)
    if settings.device.type == "cuda":
        yield _case(settings, 64, 128, torch.float32, graph=True)
    if settings.sizes == "full":
        yield from on_threads(_case(settings, 256, 256, torch.float32), thread_counts())


def _case(settings: Settings, points: int, features: int, dtype: torch.dtype, *, graph: bool = False) -> Case:
    def build() -> Work:
        student, teacher = (torch.randn(points, features, device=settings.device).to(dtype) for _ in range(2))
        student.requires_grad_()
        if points <= MOST_FOR_TRUTH:
            truth = truth_of(student, teacher)
        else:
            truth = step(fastkd_loss, student.detach().double().requires_grad_(), teacher.double())

        def error(result: tuple[Tensor, Tensor]) -> float:
            return max(relative_error(value, right) for value, right in zip(result, truth, strict=True))

        losses = dict(PEERS)
        compiled = losses.pop(COMPILED)
        if settings.compile:
            losses[COMPILED] = torch.compile(compiled, dynamic=False)
        replays = 20

        def ours() -> tuple[Tensor, Tensor]:
            return step(fastkd_loss, student, teacher)

        work = Work(
            graph_replay(ours, replays) if graph else ours,
            {} if graph else {peer: lambda loss=loss: step(loss, student, teacher) for peer, loss in losses.items()},
            error,
            1e-6 if dtype == torch.float32 else 1e-2,
            1e-3 if dtype == torch.float32 else 1e-2,
            floor_bytes=floors.relation(points, features, dtype.itemsize),
            targets=TARGETS.get((points, features), {}) if settings.device.type == "cpu" else {},
            scale={"fastkd": 1 / replays} if graph else {},
        )
        return peers_that_fit(work, 4.0 * CUBES * points * points * max(points, features), settings)

    nbytes = 64 * points * points + 3 * points * features * dtype.itemsize + 2048 * points
    name = f"RKD {points}x{features} {short_name(dtype)}"
    return Case(f"{name}, CUDA graph replay" if graph else name, build, nbytes)


def test_relation(case: Case, contest: Contest) -> None:
    """Each case."""
    contest(case)
