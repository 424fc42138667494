"""Losses of heads against what one would use instead: hidden states in, loss and gradients of hidden states and head out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import fastkd
from benchmarks.bench_divergence import eager_kl, trl_js
from benchmarks.bench_sparse import ENTRIES, eager_bucket
from benchmarks.case import Case, Contest, Settings, Work, peers_that_fit, relative_error, short_name
from fastkd import functional
from fastkd.ops.linear_operator import CPU_BUDGET
from fastkd.reference import divergence as reference
from fastkd.reference import sparse as sparse_reference

Loss = Callable[
    [Tensor, Tensor, Tensor, Tensor], Tensor
]  # (student_hidden, student_weight, teacher_hidden, teacher_weight)

ROW_SAMPLE = 64  # rows whose gradient is compared with float64
PEER_TENSORS = 9  # of the size of the logits that an eager loss holds at its peak


class Size(NamedTuple):
    """Rows, features of student and teacher, classes."""

    rows: int
    student: int
    teacher: int
    classes: int


QUICK = (Size(1024, 512, 1024, 32000),)
FULL = (Size(256, 512, 1024, 32000), Size(512, 256, 512, 128256))
GPU = (Size(8192, 2048, 4096, 128256), Size(1024, 2048, 4096, 128256), Size(4096, 896, 3584, 151936))
TARGETS = {"KL": {"torch eager": 1.1, "TRL": 3.0}, "JSD": {"torch eager": 1.5, "TRL": 3.0}}
GPU_TARGETS = {"torch eager": 1.0, "TRL": 1.3}
GPU_TARGET_MS = 45.0  # Jensen-Shannon at the first of the sizes
TRL_BETA = {"KL": 0.0, "JSD": 0.5}


def of_logits(loss: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """The loss with the logits of both sides in memory."""
    return lambda s, s_weight, t, t_weight: loss(s @ s_weight.T, t @ t_weight.T)


def trl(beta: float, *sides: Tensor) -> Tensor:
    """TRL's, on tiles, which computes the logits anew in the backward."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    s, s_weight, t, t_weight = sides
    rows, _ = ChunkedDivergenceFunction.apply(s, s_weight, None, t, t_weight, None, beta, 1.0)
    loss: Tensor = rows.mean()
    return loss


def liger_js(*sides: Tensor) -> Tensor:
    """Liger's chunked and compiled one."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    labels = torch.zeros(len(sides[0]), dtype=torch.int64, device=sides[0].device)
    loss: Tensor = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5)(*sides, labels)
    return loss


def gemms(kind: str, sides: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """The four GEMMs, in fastkd's chunks, with the gradient of the logits at hand: what is left where a loss costs nothing."""
    hidden, weight, teacher_hidden, teacher_weight = (side.detach() for side in sides)
    rows, classes = len(hidden), len(weight)
    chunk = CPU_BUDGET // (2 * classes * hidden.element_size())
    ready = torch.empty(rows, classes)
    loss = torch.zeros([])
    parts = zip(hidden.split(ROW_SAMPLE), teacher_hidden.split(ROW_SAMPLE), ready.split(ROW_SAMPLE), strict=True)
    for of_student, of_teacher, gradient in parts:
        logits = (of_student @ weight.T).requires_grad_()
        value = reference.divergence_rows(logits, of_teacher @ teacher_weight.T, **KINDS[kind]).sum() / rows
        gradient.copy_(torch.autograd.grad(value, logits)[0])
        loss += value.detach()
    buffers = torch.empty(chunk, classes), torch.empty(chunk, classes)

    def run() -> tuple[Tensor, ...]:
        of_hidden, of_weight = torch.empty_like(hidden), torch.empty_like(weight)
        for begin in range(0, rows, chunk):
            some = slice(begin, min(begin + chunk, rows))
            count = some.stop - begin
            torch.mm(hidden[some], weight.T, out=buffers[0][:count])
            torch.mm(teacher_hidden[some], teacher_weight.T, out=buffers[1][:count])
            torch.addmm(of_weight, ready[some].T, hidden[some], beta=float(begin > 0), out=of_weight)
            torch.mm(ready[some], weight, out=of_hidden[some])
        return loss, of_hidden, of_weight

    return run


GEMMS = "the four GEMMs alone"
KINDS: dict[str, dict[str, Any]] = {"KL": {"kind": "forward"}, "JSD": {"kind": "jensen_shannon"}}
OURS: dict[str, Loss] = {"KL": functional.linear_kl_div, "JSD": functional.linear_js_div}
LOGITS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"KL": fastkd.KLDivLoss(), "JSD": fastkd.JSDivLoss()}
EAGER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"KL": eager_kl, "JSD": trl_js}


def cases(settings: Settings) -> Iterator[Case]:
    """Both kinds at each size."""
    dtypes = (torch.bfloat16,) if settings.sizes == "gpu" else (torch.float32,)
    for size in _sizes(settings):
        for dtype in dtypes:
            for kind in OURS:
                yield _loss(settings, kind, size, dtype)
    first = _sizes(settings)[0]
    yield _loss(settings, "KL", first, dtypes[0], frozen=True)
    yield _cross_entropy(settings, first, dtypes[0])
    yield _sparse(settings, first, dtypes[0])
    if settings.sizes == "full":
        yield _loss(settings, "KL", first, torch.bfloat16)


def _sizes(settings: Settings) -> list[Size]:
    sizes = settings.pick(QUICK, FULL, GPU)
    if settings.sizes != "gpu" or settings.nbytes >= 1 << 26:
        return sizes
    return [Size(rows // 64, student // 64, teacher // 64, classes // 64) for rows, student, teacher, classes in sizes]


def _loss(settings: Settings, kind: str, size: Size, dtype: torch.dtype, *, frozen: bool = False) -> Case:
    rows, student, teacher, classes = size
    name = f"linear {kind} {rows}x{student}, {rows}x{teacher}, {classes} classes, {short_name(dtype)}"
    name += ", head frozen" if frozen else ""
    logits = rows * classes * dtype.itemsize
    weights = classes * (student + teacher) * dtype.itemsize

    def build() -> Work:
        sides = _sides(settings, size, dtype)
        sides[1].requires_grad_(not frozen)
        losses: dict[str, Loss] = {
            "fastkd, logits in memory": of_logits(LOGITS[kind]),
            "torch eager": of_logits(EAGER[kind]),
            "TRL": partial(trl, TRL_BETA[kind]),
        }
        if kind == "JSD":
            losses["Liger-Kernel"] = liger_js
        alone = {}
        if settings.device.type == "cpu" and dtype == torch.float32 and not frozen:
            alone[GEMMS] = gemms(kind, sides)
        if settings.compile:
            torch._dynamo.reset()
            losses["torch.compile"] = torch.compile(of_logits(EAGER[kind]), dynamic=False)
        on_gpu = settings.sizes == "gpu"
        targets = GPU_TARGETS if on_gpu else TARGETS[kind] if dtype == torch.float32 and not frozen else {}
        work = Work(
            partial(step, OURS[kind], sides),
            {peer: partial(step, loss, sides) for peer, loss in losses.items()} | alone,
            _truth(kind, sides),
            # of 16 bits, logits in memory are rounded, and gradients near the teacher are off by more than that
            *((1e-2, 0.3) if dtype == torch.bfloat16 else (1e-4, 1e-2)),
            targets=targets if size in (QUICK[0], *GPU) else {},
            target_ms=GPU_TARGET_MS if on_gpu and size == GPU[0] and kind == "JSD" else None,
            own=("fastkd, logits in memory", GEMMS),
        )
        if settings.device.type == "cpu" and dtype != torch.float32:
            work.leave_out("TRL", "widens the weights of both heads at every tile")
        return peers_that_fit(work, PEER_TENSORS * logits + weights, settings)

    return Case(name, build, logits + 2 * weights)


def torch_linear(*sides: Tensor, target: Tensor) -> Tensor:
    """torch's own, in chunks."""
    if not hasattr(F, "linear_cross_entropy"):
        raise NotImplementedError("this torch has none")
    loss: Tensor = F.linear_cross_entropy(*sides[:2], target, options=torch.nn.LinearCrossEntropyOptions())
    return loss


def _cross_entropy(settings: Settings, size: Size, dtype: torch.dtype) -> Case:
    """The labels alone: alpha = 0. fastkd's side reads the teacher's logits, too, which the others do not have."""
    rows, student, _, classes = size

    def build() -> Work:
        sides = _sides(settings, size, dtype)[:2]
        sides[1].requires_grad_()
        target = torch.randint(classes, (rows,), device=settings.device)
        ours = partial(
            functional.linear_kd_loss,
            teacher_hidden=None,
            teacher_head=None,
            target=target,
            alpha=0.0,
            teacher_logits=torch.randn(rows, classes, device=settings.device).to(dtype),
        )
        losses: dict[str, Any] = {
            "torch eager": lambda hidden, weight: F.cross_entropy((hidden @ weight.T).float(), target),
            "torch linear_cross_entropy": partial(torch_linear, target=target),
        }
        if settings.compile:
            torch._dynamo.reset()
            losses["torch.compile"] = torch.compile(losses["torch eager"], dynamic=False)
        work = Work(
            partial(step, ours, sides),
            {peer: partial(step, loss, sides) for peer, loss in losses.items()},
            _truth_by_rows(sides, lambda logits, some: F.cross_entropy(logits, target[some], reduction="sum")),
            *((1e-2, 0.3) if dtype == torch.bfloat16 else (1e-4, 1e-2)),
        )
        return peers_that_fit(work, 4 * rows * classes * 4 + classes * student * dtype.itemsize, settings)

    nbytes = (rows + 2 * student) * classes * dtype.itemsize
    return Case(f"linear KD, alpha 0, {rows}x{student}, {classes} classes, {short_name(dtype)}", build, nbytes)


def _sparse(settings: Settings, size: Size, dtype: torch.dtype) -> Case:
    """A teacher of which a cache holds the most probable classes."""
    rows, student, _, classes = size

    def build() -> Work:
        sides = _sides(settings, size, dtype)[:2]
        sides[1].requires_grad_()
        logits = 2 * torch.randn(rows, classes, device=settings.device)
        log_probs, indices = (x.clone() for x in torch.log_softmax(logits, -1).topk(ENTRIES))
        entries = {"teacher_indices": indices, "teacher_log_probs": log_probs}

        def truth(logits: Tensor, some: slice) -> Tensor:
            return sparse_reference.sparse_divergence(logits, indices[some], log_probs[some], reduction="sum")

        losses: dict[str, Any] = {
            "fastkd, logits in memory": lambda h, w: functional.sparse_kl_div(h @ w.T, **entries),
            "torch eager": lambda h, w: eager_bucket((h @ w.T).float(), indices, log_probs, 1.0),
        }
        if settings.compile:
            torch._dynamo.reset()
            losses["torch.compile"] = torch.compile(losses["torch eager"], dynamic=False)
        work = Work(
            partial(step, partial(functional.sparse_linear_kl_div, **entries), sides),
            {peer: partial(step, loss, sides) for peer, loss in losses.items()},
            _truth_by_rows(sides, truth),
            *((1e-2, 0.3) if dtype == torch.bfloat16 else (1e-4, 1e-2)),
            own=("fastkd, logits in memory",),
        )
        return peers_that_fit(work, 7 * rows * classes * 4 + classes * student * dtype.itemsize, settings)

    nbytes = 2 * rows * classes * 4 + 2 * student * classes * dtype.itemsize
    name = f"linear KL {rows}x{student}, {classes} classes, {ENTRIES} entries, bucket, {short_name(dtype)}"
    return Case(name, build, nbytes)


def _truth_by_rows(
    sides: list[Tensor], loss: Callable[[Tensor, slice], Tensor]
) -> Callable[[tuple[Tensor, ...]], float]:
    """The relative error of a step, of the loss and the gradient of the hidden states, by parts in float64.

    Args:
        loss: the sum of some rows', of their logits and which they are.
    """
    hidden, weight = (side.detach() for side in sides)
    losses, gradients = [], []
    for begin in range(0, len(hidden), ROW_SAMPLE):
        some = slice(begin, begin + ROW_SAMPLE)
        few = hidden[some].double().requires_grad_()
        losses.append(loss(few @ weight.double().T, some))
        gradients.append(torch.autograd.grad(losses[-1], few)[0])
    mean, gradient = torch.stack(losses).sum() / len(hidden), torch.cat(gradients) / len(hidden)
    return lambda result: max(relative_error(result[0], mean), relative_error(result[1], gradient))


def step(loss: Callable[..., Tensor], sides: list[Tensor]) -> tuple[Tensor, ...]:
    """The loss, and the gradients of the student's hidden states and head, which are freed outside the clock."""
    value = loss(*sides)
    value.backward()
    gradients = [side.grad for side in sides[:2] if side.requires_grad]
    sides[0].grad = sides[1].grad = None
    return (value.detach(), *(gradient for gradient in gradients if gradient is not None))


def _sides(settings: Settings, size: Size, dtype: torch.dtype) -> list[Tensor]:
    """Logits of size 1, so that the softmaxes are neither flat nor certain."""

    def normal(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(rows, columns, device=settings.device) * scale).to(dtype)

    rows, student, teacher, classes = size
    hidden = normal(rows, student).requires_grad_()
    head = normal(classes, student, student**-0.5)
    return [hidden, head, normal(rows, teacher), normal(classes, teacher, teacher**-0.5)]


def _truth(kind: str, sides: list[Tensor]) -> Callable[[tuple[Tensor, ...]], float]:
    """The relative error of a step: of the loss of all rows, and of the gradient of some rows' hidden states."""
    hidden, weight, teacher_hidden, teacher_weight = (side.detach() for side in sides)

    def rows(hidden: Tensor, teacher_hidden: Tensor, dtype: torch.dtype) -> Tensor:
        logits = hidden @ weight.to(dtype).T, teacher_hidden.to(dtype) @ teacher_weight.to(dtype).T
        return reference.divergence_rows(*logits, **KINDS[kind])

    parts = zip(hidden.split(ROW_SAMPLE), teacher_hidden.split(ROW_SAMPLE), strict=True)
    loss = torch.stack([rows(s.float(), t, torch.float32).double().sum() for s, t in parts]).sum() / len(hidden)
    sample = torch.linspace(0, len(hidden) - 1, min(len(hidden), ROW_SAMPLE), device=hidden.device).long()
    few = hidden[sample].double().requires_grad_()
    gradient = torch.autograd.grad(rows(few, teacher_hidden[sample], torch.float64).sum(), few)[0] / len(hidden)

    def error(made: tuple[Tensor, ...]) -> float:
        return max(relative_error(made[0], loss), relative_error(made[1][sample], gradient))

    return error


def test_linear(case: Case, contest: Contest) -> None:
    """Each case."""
    contest(case)
