"""Losses of classes that lie on several ranks: what one of four ranks does in a step, in a group of its own.

Exchanges between ranks cost the same whoever makes them; here they go nowhere. What is compared is the work around them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

import fastkd
from benchmarks import floors
from benchmarks.bench_divergence import ROW_SAMPLE
from benchmarks.bench_sparse import IN_A_ROW
from benchmarks.case import Case, Contest, Settings, Work, peers_that_fit, relative_error, short_name
from fastkd.reference import divergence as reference

Loss = Callable[[Tensor, Tensor], Tensor]  # (student_logits, teacher_logits)

CLASSES = 32064  # a quarter of 128,256
PEER_TENSORS = 9  # of the size of the logits that an eager loss holds at its peak
KINDS = {"KL": {"kind": "forward"}, "JSD": {"kind": "jensen_shannon"}}
SWEEPS = {"KL": 2, "JSD": 3}  # over the logits
TARGETS = {"torch eager": 1.5}


class LogSoftmax(torch.autograd.Function):
    """Of the classes of all ranks, with a gradient as short as it can be: the sum that it needs is exchanged, too."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, logits: Tensor) -> Tensor:
        top = logits.amax(-1, keepdim=True)
        dist.all_reduce(top, dist.ReduceOp.MAX)
        below = logits - top
        total = below.exp().sum(-1, keepdim=True)
        dist.all_reduce(total)
        log_probs = below - total.log()
        ctx.save_for_backward(log_probs)
        return log_probs

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:  # type: ignore[override]
        (log_probs,) = ctx.saved_tensors  # type: ignore[attr-defined]
        total = grad.sum(-1, keepdim=True)
        dist.all_reduce(total)
        return grad - log_probs.exp() * total


class SumOfAll(torch.autograd.Function):
    """The sum over ranks; each has the gradient of its own part."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, part: Tensor) -> Tensor:
        total = part.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


def eager_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    log_q, log_p = _log_softmax(student_logits), _log_softmax(teacher_logits)
    total: Tensor = SumOfAll.apply((log_p.exp() * (log_p - log_q)).sum())  # type: ignore[no-untyped-call]
    return total / len(student_logits)


def eager_js(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    log_q, log_p = _log_softmax(student_logits), _log_softmax(teacher_logits)
    q, p = log_q.exp(), log_p.exp()
    log_m = (0.5 * (p + q)).log()
    total: Tensor = SumOfAll.apply(0.5 * (p * (log_p - log_m) + q * (log_q - log_m)).sum())  # type: ignore[no-untyped-call]
    return total / len(student_logits)


def _log_softmax(logits: Tensor) -> Tensor:
    log_probs: Tensor = LogSoftmax.apply(logits.float())  # type: ignore[no-untyped-call]
    return log_probs


LOSSES: dict[str, Loss] = {"KL": fastkd.KLDivLoss(), "JSD": fastkd.JSDivLoss()}
EAGER: dict[str, Loss] = {"KL": eager_kl, "JSD": eager_js}


def cases(settings: Settings) -> Iterator[Case]:
    """Both kinds."""
    dtype = torch.bfloat16 if settings.sizes == "gpu" else torch.float32
    rows = settings.rows(CLASSES, dtype) if settings.sizes == "gpu" else 512
    for kind in LOSSES:
        yield _case(settings, kind, rows, dtype)
    if settings.sizes == "full":
        yield _case(settings, "KL", rows, torch.bfloat16)


def _case(settings: Settings, kind: str, rows: int, dtype: torch.dtype) -> Case:
    nbytes = rows * CLASSES * dtype.itemsize

    def build() -> Work:
        _be_a_group(settings.device)
        student, teacher = (2 * torch.randn(2, rows, CLASSES, device=settings.device)).to(dtype)
        student.requires_grad_()
        group = dist.group.WORLD
        work = Work(
            partial(_step, partial(LOSSES[kind], group=group), student, teacher),
            {
                "torch eager": partial(_step, EAGER[kind], student, teacher),
                "fastkd, one rank": partial(_step, LOSSES[kind], student, teacher),
            },
            _truth(kind, student, teacher),
            *((1e-2, 0.15) if dtype == torch.bfloat16 else (1e-4, 1e-2)),
            floor_bytes=floors.divergence(rows, CLASSES, dtype.itemsize, sweeps=SWEEPS[kind]),
            targets=TARGETS,
            own=("fastkd, one rank",),
            in_a_row=IN_A_ROW,
        )
        return peers_that_fit(work, PEER_TENSORS * rows * CLASSES * 4, settings, ("torch eager",))

    return Case(f"a rank's {kind} {rows}x{CLASSES} {short_name(dtype)}", build, 3 * nbytes)


def _be_a_group(device: torch.device) -> None:
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def _step(loss: Loss, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and the student's gradient, which is freed outside the clock."""
    value = loss(student, teacher)
    value.backward()
    gradient, student.grad = student.grad, None
    assert gradient is not None
    return value.detach(), gradient


def _truth(kind: str, student: Tensor, teacher: Tensor) -> Callable[[tuple[Tensor, Tensor]], float]:
    """The relative error of a step: of the loss, and of the gradient of some rows."""
    rows = torch.linspace(0, len(student) - 1, min(len(student), ROW_SAMPLE), device=student.device).long()
    parts = zip(student.detach().split(ROW_SAMPLE), teacher.split(ROW_SAMPLE), strict=True)
    loss = sum(reference.divergence_rows(s.double(), t.double(), **KINDS[kind]).sum() for s, t in parts) / len(student)
    few = student.detach()[rows].double().requires_grad_()
    value = reference.divergence_rows(few, teacher[rows].double(), **KINDS[kind]).sum() / len(student)
    (gradient,) = torch.autograd.grad(value, few)

    def error(made: tuple[Tensor, Tensor]) -> float:
        return max(relative_error(made[0], torch.as_tensor(loss)), relative_error(made[1][rows], gradient))

    return error


def test_divergence_shard(case: Case, contest: Contest) -> None:
    """Each case."""
    contest(case)
