"""Losses from a sparse teacher against what trainers write in torch: raw logits and k entries in, loss and gradient out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import fastkd
from benchmarks import floors
from benchmarks.bench_divergence import ROW_SAMPLE, Step
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
from fastkd.reference import sparse as reference

Loss = Callable[..., Tensor]  # (student_logits, indices, log_probs, temperature) -> scalar

TEMPERATURE = 2.0
PEER_TENSORS = 7  # of the size of the logits that an eager loss holds at its peak


def eager_drop(student_logits: Tensor, indices: Tensor, log_probs: Tensor, temperature: float) -> Tensor:
    """The usual one: log_softmax over all classes, k of them gathered."""
    log_q = F.log_softmax(student_logits / temperature, -1).gather(-1, indices)
    return (log_probs.exp() * (log_probs - log_q)).sum(-1).mean() * temperature**2


def gathered_drop(student_logits: Tensor, indices: Tensor, log_probs: Tensor, temperature: float) -> Tensor:
    """Gathered first, so that only the logsumexp is over all classes."""
    z = student_logits / temperature
    log_q = z.gather(-1, indices) - z.logsumexp(-1, keepdim=True)
    return (log_probs.exp() * (log_probs - log_q)).sum(-1).mean() * temperature**2


def eager_bucket(student_logits: Tensor, indices: Tensor, log_probs: Tensor, temperature: float) -> Tensor:
    """The tail's logsumexp of a copy in which the entries are masked."""
    z = student_logits / temperature
    tail = z.scatter(-1, indices, -torch.inf).logsumexp(-1, keepdim=True)
    log_q = torch.cat([z.gather(-1, indices), tail], -1).log_softmax(-1)
    rest = torch.log1p(-log_probs.exp().sum(-1, keepdim=True))
    log_p = torch.cat([log_probs, rest], -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean() * temperature**2


def eager_renormalize(student_logits: Tensor, indices: Tensor, log_probs: Tensor, temperature: float) -> Tensor:
    """Softmaxes of the k entries."""
    log_q = (student_logits.gather(-1, indices) / temperature).log_softmax(-1)
    log_p = log_probs.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean() * temperature**2


PEERS: dict[str, dict[str, Loss]] = {
    "drop": {"torch eager": eager_drop, "torch eager, gathered first": gathered_drop, "torch.compile": eager_drop},
    "bucket": {"torch eager": eager_bucket, "torch.compile": eager_bucket},
    "renormalize": {"torch eager": eager_renormalize},
}
CLASSES, ENTRIES = 128256, 64
QUICK = (("drop", 2048), ("bucket", 512))
FULL = (("drop", 512), ("bucket", 2048), ("renormalize", 512))
# runs of a turn: after a slow peer's, the first waits for the host of a virtual machine, which took free pages back
IN_A_ROW = 3
DRAWS = 64
GPU_CLASSES = (32000, 128256, 152064)
TARGETS = {"drop": {"torch eager": 10.0}}  # on a CPU


def cases(settings: Settings) -> Iterator[Case]:
    """What becomes of the tail, rows, dtypes."""
    if settings.sizes == "gpu":
        for classes in GPU_CLASSES:
            for dtype in (torch.bfloat16, torch.float32):
                for tail in ("drop", "bucket"):
                    yield _case(settings, tail, settings.rows(classes, dtype), classes, dtype)
            yield _draws(settings, settings.rows(classes, torch.bfloat16), classes, torch.bfloat16)
        return
    for tail, rows in settings.pick(QUICK, FULL):
        yield _case(settings, tail, rows, CLASSES, torch.float32)
    yield _case(settings, "drop", 512, CLASSES, torch.float32, pages_kept=True)
    yield _draws(settings, 512, CLASSES, torch.float32)
    if settings.sizes == "full":
        yield _case(settings, "drop", 512, CLASSES, torch.bfloat16)
        yield _case(settings, "drop", 512, CLASSES, torch.float32, gradient=False)
        yield from on_threads(_case(settings, "bucket", 512, CLASSES, torch.float32), thread_counts())


def _case(
    settings: Settings,
    tail: str,
    rows: int,
    classes: int,
    dtype: torch.dtype,
    *,
    gradient: bool = True,
    pages_kept: bool = False,
) -> Case:
    nbytes = rows * classes * dtype.itemsize
    with_targets = settings.sizes != "gpu" and gradient and not pages_kept and dtype == torch.float32
    losses = dict(PEERS[tail])
    if not settings.compile:
        losses.pop("torch.compile", None)
    if settings.sizes != "gpu" and not pages_kept:
        losses.pop("torch eager, gathered first", None)  # it takes more fresh pages than the other, and twice the time

    def build() -> Work:
        student = torch.randn(rows, classes, dtype=dtype, device=settings.device).requires_grad_(gradient)
        indices, log_probs = _entries(settings, rows, classes)
        inputs = student, indices, log_probs
        if "torch.compile" in losses:
            torch._dynamo.reset()
            losses["torch.compile"] = torch.compile(PEERS[tail]["torch.compile"], dynamic=False)
        work = Work(
            partial(_step, fastkd.SparseKLDivLoss(TEMPERATURE, tail=tail), *inputs),  # type: ignore[arg-type]
            {peer: partial(_step, partial(loss, temperature=TEMPERATURE), *inputs) for peer, loss in losses.items()},
            _truth(tail, *inputs),
            *((1e-2, 0.15) if dtype == torch.bfloat16 else (1e-4, 1e-2)),
            floor_bytes=floors.sparse_divergence(
                rows, classes, ENTRIES, dtype.itemsize, student_gradient=gradient, whole=tail != "renormalize"
            ),
            targets=TARGETS.get(tail, {}) if with_targets else {},
            in_a_row=IN_A_ROW,
            pages_kept=pages_kept,
        )
        return peers_that_fit(work, PEER_TENSORS * nbytes, settings)

    only = "" if gradient else " forward only"
    name = f"sparse KL{only} {rows}x{classes}, {ENTRIES} entries, {tail} {short_name(dtype)}"
    return Case(name + (", pages kept" if pages_kept else ""), build, 3 * nbytes)


def torch_draws(logits: Tensor, draws: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Draws of torch.multinomial, counted by sorting them."""
    drawn = torch.multinomial(torch.softmax(logits / temperature, -1), draws, replacement=True).sort(-1).values
    new = torch.ones_like(drawn, dtype=torch.bool)
    new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    place = new.cumsum(-1) - 1
    counts = torch.zeros_like(drawn).scatter_add(-1, place, torch.ones_like(drawn))
    return torch.zeros_like(drawn).scatter(-1, place, drawn), (counts / draws).log()


def _draws(settings: Settings, rows: int, classes: int, dtype: torch.dtype) -> Case:
    """Sampled teachers."""
    nbytes = rows * classes * dtype.itemsize

    def build() -> Work:
        logits = 3 * torch.randn(rows, classes, dtype=dtype, device=settings.device)
        work = Work(
            partial(fastkd.functional.sample_teacher, logits, DRAWS, TEMPERATURE),
            {"torch eager": partial(torch_draws, logits, DRAWS, TEMPERATURE)},
            _wrong_draws(logits),
            1e-5,
            1e-5,
        )
        return peers_that_fit(work, 3 * rows * classes * 4, settings)

    return Case(f"sample teacher {rows}x{classes}, {DRAWS} draws {short_name(dtype)}", build, 2 * nbytes)


def _wrong_draws(logits: Tensor) -> Callable[[tuple[Tensor, Tensor]], float]:
    """How far the shares of a row are from adding up to one; inf where the mean log-probability of the draws is six deviations
    from what it is to be, minus the entropy."""

    def log_p(part: Tensor) -> Tensor:
        return torch.log_softmax(part.double() / TEMPERATURE, -1)

    def moment(power: int) -> Tensor:
        return torch.cat([(x.exp() * x**power).sum(-1) for x in map(log_p, logits.split(ROW_SAMPLE))])

    means = moment(1)
    deviation = (moment(2) - means.square()).sum().div(DRAWS).sqrt() / len(logits)

    def error(drawn: tuple[Tensor, Tensor]) -> float:
        indices, shares = drawn[0], drawn[1].double().exp()
        parts = zip(logits.split(ROW_SAMPLE), indices.split(ROW_SAMPLE), shares.split(ROW_SAMPLE), strict=True)
        drawn_mean = torch.cat([(share * log_p(part).gather(-1, index)).sum(-1) for part, index, share in parts]).mean()
        if not (drawn_mean - means.mean()).abs() < 6 * deviation:
            return float("inf")
        return float((shares.sum(-1) - 1).abs().max())

    return error


def _entries(settings: Settings, rows: int, classes: int) -> tuple[Tensor, Tensor]:
    """The largest of normal logits, made in parts: a teacher as large as the student would be half of the memory."""
    parts = []
    for begin in range(0, rows, ROW_SAMPLE):
        teacher = torch.randn(min(ROW_SAMPLE, rows - begin), classes, device=settings.device)
        parts.append(torch.log_softmax(3 * teacher / TEMPERATURE, -1).topk(min(ENTRIES, classes)))
    log_probs, indices = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return indices, log_probs


def _step(loss: Loss, student: Tensor, indices: Tensor, log_probs: Tensor) -> Step:
    value = loss(student, indices, log_probs)
    if not student.requires_grad:
        return Step(value, student)
    value.backward()
    gradient, student.grad = student.grad, None
    assert gradient is not None
    return Step(value.detach(), gradient)


def _truth(tail: str, student: Tensor, indices: Tensor, log_probs: Tensor) -> Callable[[Step], float]:
    """The relative error of a step: of the loss, and of the gradient of some rows."""
    count, with_gradient, student = len(student), student.requires_grad, student.detach()

    def rows(x: Tensor, index: Tensor, log_p: Tensor) -> Tensor:
        return reference.sparse_rows(x.double(), index, log_p.double(), tail=tail, temperature=TEMPERATURE)

    tensors = student, indices, log_probs
    parts = zip(*(x.split(ROW_SAMPLE) for x in tensors), strict=True)
    loss = torch.stack([rows(*part).sum() for part in parts]).sum() / count
    sample = torch.linspace(0, count - 1, min(count, ROW_SAMPLE), device=student.device).long()
    few = student[sample].double().requires_grad_()
    gradient = torch.autograd.grad(rows(few, indices[sample], log_probs[sample]).sum(), few)[0] / count

    def error(step: Step) -> float:
        of_loss = relative_error(step.loss, loss)
        return max(of_loss, relative_error(step.gradient[sample], gradient)) if with_gradient else of_loss

    return error


def test_sparse(case: Case, contest: Contest) -> None:
    """Each case."""
    contest(case)
