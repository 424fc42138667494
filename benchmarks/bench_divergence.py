"""Losses against what one would use instead: raw logits in, loss and student gradient out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import fastkd
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
from fastkd.reference import divergence as reference

Loss = Callable[..., Tensor]  # (student_logits, teacher_logits, temperature) -> scalar

CPU_TEMPERATURE = 4.0
# of distillation of language models, and the one at which Liger-Kernel, which has no temperature, needs the fewest passes
GPU_TEMPERATURE = 1.0
ROW_SAMPLE = 64  # rows whose gradient is compared with float64
PEER_TENSORS = 9  # of the size of the logits that an eager loss holds at its peak


def eager_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Forward KL as most distillation loops write it."""
    log_q = F.log_softmax(_heated(student_logits, temperature), -1)
    p = F.softmax(_heated(teacher_logits, temperature), -1)
    return F.kl_div(log_q, p, reduction="batchmean") * temperature**2


def mdistiller_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """As mdistiller's KD: unreduced, summed over classes, mean over rows, or over the pixels of maps."""
    log_q = F.log_softmax(_heated(student_logits, temperature), 1)
    p = F.softmax(_heated(teacher_logits, temperature), 1)
    return F.kl_div(log_q, p, reduction="none").sum(1).mean() * temperature**2


def eager_js(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Jensen-Shannon from probabilities; wrong where one of them underflows."""
    q = F.softmax(_heated(student_logits, temperature), -1)
    p = F.softmax(_heated(teacher_logits, temperature), -1)
    log_m = ((p + q) / 2).log()
    kl_q, kl_p = (F.kl_div(log_m, x, reduction="batchmean") for x in (q, p))
    return (kl_q + kl_p) / 2 * temperature**2


def trl_js(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Jensen-Shannon from log-probabilities, as TRL's generalised loss at beta = 0.5."""
    log_q = F.log_softmax(_heated(student_logits, temperature), -1)
    log_p = F.log_softmax(_heated(teacher_logits, temperature), -1)
    log_m = torch.logsumexp(torch.stack([log_q, log_p]), 0) - torch.tensor(2.0).log()
    kl_q = F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)
    kl_p = F.kl_div(log_m, log_p, reduction="batchmean", log_target=True)
    return (kl_q + kl_p) / 2 * temperature**2


def trl_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Forward KL as TRL's generalised loss at beta = 0: both sides as log-probabilities."""
    log_q = F.log_softmax(_heated(student_logits, temperature), -1)
    log_p = F.log_softmax(_heated(teacher_logits, temperature), -1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * temperature**2


def liger_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Liger's fused KL, with the softmaxes that it leaves to the caller."""
    from liger_kernel.transformers import LigerKLDIVLoss

    log_q = F.log_softmax(_heated(student_logits, temperature), -1)
    loss: Tensor = LigerKLDIVLoss(reduction="batchmean")(log_q, F.softmax(_heated(teacher_logits, temperature), -1))
    return loss if temperature == 1.0 else loss * temperature**2


def liger_js(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Liger's fused Jensen-Shannon, with the softmaxes that it leaves to the caller."""
    from liger_kernel.transformers import LigerJSD

    log_q = F.log_softmax(_heated(student_logits, temperature), -1)
    loss: Tensor = LigerJSD(beta=0.5)(log_q, F.log_softmax(_heated(teacher_logits, temperature), -1))
    return loss if temperature == 1.0 else loss * temperature**2


def _heated(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1.0 else logits / temperature


OURS: dict[str, Callable[[float], Loss]] = {"KL": fastkd.KLDivLoss, "JSD": fastkd.JSDivLoss}
PEERS: dict[str, dict[str, Loss]] = {
    "KL": {
        "torch eager": eager_kl,
        "mdistiller-style": mdistiller_kl,
        "TRL-style": trl_kl,
        "torch.compile": eager_kl,
        "Liger-Kernel": liger_kl,
    },
    "JSD": {"torch eager": eager_js, "TRL-style": trl_js, "torch.compile": trl_js, "Liger-Kernel": liger_js},
}
COMPILED = ("torch.compile",)
FAST = ("torch eager", "Liger-Kernel")  # peers of a GPU that are quick to prepare

QUICK = (("KL", 128, 10), ("KL", 1024, 1000), ("KL", 512, 32000), ("JSD", 512, 32000))
FULL = (
    *(("KL", rows, classes) for rows, classes in ((16, 10), (1024, 10), (128, 100), (4096, 100), (128, 1000))),
    *(("KL", rows, classes) for rows, classes in ((8192, 1000), (64, 32000), (4096, 32000), (512, 128256))),
    *(("KL", rows, classes) for rows, classes in ((2048, 128256), (8192, 128256))),
    *(("JSD", rows, classes) for rows, classes in ((128, 10), (1024, 1000), (512, 128256), (4096, 128256))),
)
# on a CPU
TARGETS = {
    ("KL", 512, 32000): {"torch eager": 15.0, "torch.compile": 4.0},
    ("KL", 1024, 1000): {"torch eager": 8.0, "torch.compile": 4.0},
    ("KL", 128, 10): {"torch eager": 1.3},
    ("JSD", 512, 32000): {"TRL-style": 15.0},
}
WHY_NOT_FASTER = (
    "Nearly all of so small a call is Python, torch's dispatcher and its autograd engine (python -m benchmarks.layers)."
)
GPU_TARGETS = {"torch.compile": 2.0, "Liger-Kernel": 3.0}
GPU_CLASSES = (1000, 10000, 32000, 50257, 128256, 152064, 262144)
GPU_COMPILED = (1000, 32000, 128256)  # a compilation takes seconds


def cases(settings: Settings) -> Iterator[Case]:
    """Losses of growing size, the statistics of rows; on a GPU at first what is quick to prepare."""
    if settings.sizes == "gpu":
        yield from _gpu_cases(settings)
        return
    for kind, rows, classes in settings.pick(QUICK, FULL):
        yield _loss(settings, kind, rows, classes, torch.float32)
    yield _statistics(settings, 512, 32000, torch.float32)
    if settings.sizes == "full":
        yield _maps(settings, torch.float32)
        yield _maps(settings, torch.bfloat16)
        for rows, classes in ((1024, 1000), (512, 32000)):
            yield _loss(settings, "KL", rows, classes, torch.bfloat16)
        yield _forward_only(settings, 512, 32000, torch.float32)
        yield _loss(settings, "KL", 512, 32000, torch.float32, temperature=1.0)
        yield _loss(settings, "KL", 512, 32000, torch.float32, cold=True)
        yield from on_threads(_loss(settings, "KL", 512, 32000, torch.float32, ("torch eager",)), thread_counts())


def _gpu_cases(settings: Settings) -> Iterator[Case]:
    yield _small(settings, graph=False)
    if settings.device.type == "cuda":
        yield _small(settings, graph=True)
    dtypes = (torch.bfloat16, torch.float32)
    for classes in GPU_CLASSES:
        for dtype in dtypes:
            for kind in PEERS:
                yield _loss(settings, kind, settings.rows(classes, dtype), classes, dtype, FAST)
    for classes in (32000, 128256):
        for dtype in dtypes:
            yield _forward_only(settings, settings.rows(classes, dtype), classes, dtype)
            yield _statistics(settings, settings.rows(classes, dtype), classes, dtype)
    if settings.compile:
        for kind, all_classes in (("KL", GPU_COMPILED), ("JSD", GPU_COMPILED[1:])):
            for classes in all_classes:
                for dtype in dtypes[: 2 if kind == "KL" else 1]:
                    yield _loss(settings, kind, settings.rows(classes, dtype), classes, dtype, COMPILED)


def _loss(
    settings: Settings,
    kind: str,
    rows: int,
    classes: int,
    dtype: torch.dtype,
    peers: Sequence[str] | None = None,
    *,
    temperature: float | None = None,
    cold: bool = False,
) -> Case:
    usual = GPU_TEMPERATURE if settings.sizes == "gpu" else CPU_TEMPERATURE
    name = f"{kind} {rows}x{classes} {short_name(dtype)}"
    name += f", T={temperature:g}" if temperature is not None else ""
    name += ", caches cold" if cold else ""
    name += f" ({', '.join(peers)})" if peers == COMPILED else ""
    t = usual if temperature is None else temperature
    nbytes = rows * classes * dtype.itemsize

    def build() -> Work:
        student, teacher = _logits(settings, rows, classes, dtype)
        losses = {peer: loss for peer, loss in PEERS[kind].items() if peers is None or peer in peers}
        compiled = losses.pop("torch.compile", None)
        if compiled is not None and settings.compile:
            torch._dynamo.reset()  # each shape by itself: a recompilation would be for any shape, and slower
            losses["torch.compile"] = torch.compile(compiled, dynamic=False)
        work = Work(
            partial(gradient_step, OURS[kind](t), student, teacher),
            {
                peer: partial(gradient_step, partial(loss, temperature=t), student, teacher)
                for peer, loss in losses.items()
            },
            _truth(kind, student, teacher, t),
            # 16-bit log-probabilities near -11 are wrong in the second digit, and so are the gradients made of them
            *((1e-2, 0.15) if dtype == torch.bfloat16 else (1e-4, 1e-2)),
            floor_bytes=floors.divergence(rows, classes, dtype.itemsize),
            targets=GPU_TARGETS if settings.sizes == "gpu" else _cpu_targets(kind, rows, classes, dtype),
            target_percent=90.0 if settings.device.type == "cuda" and nbytes >= 1 << 30 else None,
            cold=cold,
            reason=WHY_NOT_FASTER if rows * classes < 10_000 else "",
        )
        if settings.device.type == "cpu" and "Liger-Kernel" in losses:
            work.leave_out("Liger-Kernel", "runs on GPUs only")
        return peers_that_fit(work, PEER_TENSORS * nbytes, settings)

    return Case(name, build, 3 * nbytes)


def _cpu_targets(kind: str, rows: int, classes: int, dtype: torch.dtype) -> dict[str, float]:
    return TARGETS.get((kind, rows, classes), {}) if dtype == torch.float32 else {}


class Step(NamedTuple):
    """What a step makes; it is freed outside the clock."""

    loss: Tensor
    gradient: Tensor


def gradient_step(loss: Loss, student: Tensor, teacher: Tensor) -> Step:
    """The loss and the student's gradient."""
    value = loss(student, teacher)
    value.backward()
    gradient, student.grad = student.grad, None
    assert gradient is not None
    return Step(value.detach(), gradient)


def _rows(kind: str, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The divergence of each row, in float64."""
    kinds = {"KL": "forward", "JSD": "jensen_shannon"}
    return reference.divergence_rows(student.double(), teacher.double(), kind=kinds[kind], temperature=temperature)


def _loss_truth(kind: str, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    parts = zip(student.split(ROW_SAMPLE), teacher.split(ROW_SAMPLE), strict=True)
    return torch.stack([_rows(kind, s, t, temperature).sum() for s, t in parts]).sum() / len(student)


def _truth(kind: str, student: Tensor, teacher: Tensor, temperature: float) -> Callable[[Step], float]:
    """The relative error of a step: of the loss, and of the gradient of some rows."""
    student, count = student.detach(), len(student)
    loss = _loss_truth(kind, student, teacher, temperature)
    sample = torch.linspace(0, count - 1, min(count, ROW_SAMPLE), device=student.device).long()
    few = student[sample].double().requires_grad_()
    gradient = torch.autograd.grad(_rows(kind, few, teacher[sample], temperature).sum(), few)[0] / count

    def error(step: Step) -> float:
        return max(relative_error(step.loss, loss), relative_error(step.gradient[sample], gradient))

    return error


def _forward_only(settings: Settings, rows: int, classes: int, dtype: torch.dtype) -> Case:
    nbytes = rows * classes * dtype.itemsize

    def build() -> Work:
        student, teacher = (x.detach() for x in _logits(settings, rows, classes, dtype))
        truth = _loss_truth("KL", student, teacher, 1.0)
        ours = fastkd.KLDivLoss(1.0)
        work = Work(
            lambda: ours(student, teacher),
            {"torch eager": lambda: eager_kl(student, teacher)},
            lambda loss: relative_error(loss, truth),
            1e-4,
            0.1,
            floor_bytes=floors.divergence(rows, classes, dtype.itemsize, student_gradient=False),
        )
        return peers_that_fit(work, PEER_TENSORS * nbytes, settings)

    return Case(f"KL forward only {rows}x{classes} {short_name(dtype)}", build, 2 * nbytes)


def _maps(settings: Settings, dtype: torch.dtype) -> Case:
    """Segmentation: the classes of a pixel lie side by side in channels-last maps, H * W apart in NCHW ones."""
    batch, classes, side = 8, 21, 128
    t, rows = CPU_TEMPERATURE, batch * side**2

    def build() -> Work:
        student, teacher = _logits(settings, rows, classes, dtype)
        truth = _truth("KL", student, teacher, t)
        forms = {}
        for form in (torch.channels_last, torch.contiguous_format):
            maps = (x.detach().view(batch, side, side, classes).movedim(-1, 1) for x in (student, teacher))
            ours, theirs = (x.clone(memory_format=form) for x in maps)
            forms[form] = ours.requires_grad_(), theirs
        last, nchw = forms.values()
        ours, eager = fastkd.KLDivLoss(t, dim=1), partial(mdistiller_kl, temperature=t)

        def error(step: Step) -> float:
            return truth(Step(step.loss, step.gradient.movedim(1, -1).reshape(rows, classes)))

        return Work(
            partial(gradient_step, ours, *last),
            {
                "NCHW": partial(gradient_step, ours, *nchw),
                "torch eager": partial(gradient_step, eager, *last),
                "torch eager, NCHW": partial(gradient_step, eager, *nchw),
            },
            error,
            *((1e-2, 0.15) if dtype == torch.bfloat16 else (1e-4, 1e-2)),
            floor_bytes=floors.divergence(rows, classes, dtype.itemsize),
            own=("NCHW",),
        )

    name = f"KL of maps {batch}x{classes}x{side}x{side} {short_name(dtype)}, channels-last"
    return Case(name, build, 3 * rows * classes * dtype.itemsize)


def _statistics(settings: Settings, rows: int, classes: int, dtype: torch.dtype) -> Case:
    def build() -> Work:
        # around 3, as an error relative to the mean of one row says nothing where that is about 0
        logits = 3.0 + _logits(settings, rows, classes, dtype)[0].detach()
        sample = torch.linspace(0, rows - 1, min(rows, ROW_SAMPLE), device=settings.device).long()
        truth = torch.stack(_all(reference.logit_stats(logits[sample].double())))
        return Work(
            lambda: fastkd.logit_stats(logits),
            {"torch eager": lambda: reference.logit_stats(logits)},
            lambda stats: max(map(relative_error, _all([s[sample] for s in stats]), truth)),
            1e-5,
            0.1,
            floor_bytes=floors.logit_stats(rows, classes, dtype.itemsize),
        )

    name = f"logit_stats {rows}x{classes} {short_name(dtype)}"
    return Case(name, build, PEER_TENSORS * rows * classes * dtype.itemsize)


def _all(stats: Sequence[Tensor]) -> list[Tensor]:
    return [s.double() for s in stats]


def _small(settings: Settings, *, graph: bool) -> Case:
    """Launch-bound: 256 x 100 in an eager loop, or as a replayed CUDA graph."""
    rows, classes, replays, t = 256, 100, 20, 4.0

    def build() -> Work:
        student, teacher = _logits(settings, rows, classes, torch.float32)
        losses = {"torch eager": eager_kl, "Liger-Kernel": liger_kl}
        steps = {
            name: partial(gradient_step, loss, student, teacher)
            for name, loss in {
                "fastkd": fastkd.KLDivLoss(t),
                **{peer: partial(loss, temperature=t) for peer, loss in losses.items()},
            }.items()
        }
        missing = {}
        if graph:
            del steps["Liger-Kernel"]
            missing["Liger-Kernel"] = "its backward reads a value on the host, which no graph can hold"
            steps = {name: graph_replay(step, replays) for name, step in steps.items()}
        return Work(
            steps.pop("fastkd"),
            dict(steps),
            _truth("KL", student, teacher, t),
            1e-4,
            1e-2,
            target_ms=0.006 if graph else None,
            scale=dict.fromkeys(("fastkd", *steps), 1 / replays) if graph else {},
            missing=missing,
            latency=not graph,
        )

    return Case(f"KL {rows}x{classes} fp32, {'CUDA graph replay' if graph else 'eager loop'}", build)


def _logits(settings: Settings, rows: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    student, teacher = (torch.randn(rows, classes, dtype=dtype, device=settings.device) for _ in range(2))
    return student.requires_grad_(), teacher


def test_divergence(case: Case, contest: Contest) -> None:
    """Each case."""
    contest(case)
