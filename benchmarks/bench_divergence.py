"""Losses against torch eager, torch.compile and Liger-Kernel: raw logits in, loss and student gradient out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import fastkd
from benchmarks import floors
from benchmarks.gpu import Contenders, LazyCase, Settings, graph_replay, relative_error, short_name
from benchmarks.harness import Case
from fastkd.reference import divergence as reference

TEMPERATURE = 4.0
# of distillation of language models, and the one at which Liger-Kernel, which has no temperature, needs the fewest passes
LM_TEMPERATURE = 1.0
CLASSES = (1000, 10000, 32000, 50257, 128256, 152064, 262144)
COMPILED = (1000, 32000, 128256)  # a compilation takes seconds
ROW_SAMPLE = 64

Loss = Callable[[Tensor, Tensor], Tensor]


def eager_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Forward KL as most distillation loops write it."""
    log_q = F.log_softmax(_heated(student_logits, temperature), -1)
    p = F.softmax(_heated(teacher_logits, temperature), -1)
    return F.kl_div(log_q, p, reduction="batchmean") * temperature**2


def eager_js(student_logits: Tensor, teacher_logits: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Jensen-Shannon from log-probabilities (TRL's formula at beta = 0.5)."""
    log_q = F.log_softmax(_heated(student_logits, temperature), -1)
    log_p = F.log_softmax(_heated(teacher_logits, temperature), -1)
    log_m = torch.logsumexp(torch.stack([log_q, log_p]), 0) - torch.tensor(2.0).log()
    kl_q = F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)
    kl_p = F.kl_div(log_m, log_p, reduction="batchmean", log_target=True)
    return (kl_q + kl_p) / 2 * temperature**2


def liger_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Liger's fused KL, with the softmaxes that it leaves to the caller."""
    from liger_kernel.transformers import LigerKLDIVLoss

    log_q = F.log_softmax(_heated(student_logits, temperature), -1)
    loss: Tensor = LigerKLDIVLoss(reduction="batchmean")(log_q, F.softmax(_heated(teacher_logits, temperature), -1))
    return loss if temperature == 1.0 else loss * temperature**2


def liger_js(student_logits: Tensor, teacher_logits: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Liger's fused Jensen-Shannon, with the softmaxes that it leaves to the caller."""
    from liger_kernel.transformers import LigerJSD

    log_q = F.log_softmax(_heated(student_logits, temperature), -1)
    loss: Tensor = LigerJSD(beta=0.5)(log_q, F.log_softmax(_heated(teacher_logits, temperature), -1))
    return loss if temperature == 1.0 else loss * temperature**2


def _heated(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1.0 else logits / temperature


def cases() -> Iterator[Case]:
    """Shapes of the design's targets, on the CPU."""
    kl, js = fastkd.KLDivLoss(TEMPERATURE), fastkd.JSDivLoss(TEMPERATURE)
    compiled = torch.compile(eager_kl)
    shapes = (
        (512, 32000, {"torch eager": 15.0, "torch.compile": 4.0}, 9),
        (1024, 1000, {"torch eager": 8.0, "torch.compile": 4.0}, 41),
        (128, 10, {"torch eager": 1.3}, 401),
    )
    for rows, classes, targets, rounds in shapes:
        student, teacher = torch.randn(rows, classes, requires_grad=True), torch.randn(rows, classes)

        def step(loss, student=student, teacher=teacher):
            return gradient_step(loss, student, teacher)

        torch.testing.assert_close(step(kl), step(eager_kl), rtol=1e-3, atol=1e-7)
        yield Case(
            f"KL {rows}x{classes}",
            lambda step=step: step(kl),
            {"torch eager": lambda step=step: step(eager_kl), "torch.compile": lambda step=step: step(compiled)},
            targets,
            rounds,
        )
        if classes == 32000:
            torch.testing.assert_close(step(js), step(eager_js), rtol=1e-2, atol=1e-7)
            peers = {"torch eager": lambda step=step: step(eager_js)}
            yield Case(f"JSD {rows}x{classes}", lambda step=step: step(js), peers, {"torch eager": 15.0}, 7)


def gradient_step(loss: Loss, student: Tensor, teacher: Tensor) -> Tensor:
    """The student's gradient; it is freed by the harness, outside the clock."""
    loss(student, teacher).backward()
    gradient, student.grad = student.grad, None
    assert gradient is not None
    return gradient


FAST_PEERS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "KL": {"torch eager": eager_kl, "Liger-Kernel": liger_kl},
    "JSD": {"torch eager": eager_js, "Liger-Kernel": liger_js},
}
_TARGETS = {"torch.compile": 2.0, "Liger-Kernel": 3.0}


def gpu_cases(settings: Settings) -> Iterator[LazyCase]:
    """Everything that is quick to prepare first; then what torch has to compile."""
    yield from _small(settings)
    for classes in CLASSES:
        for dtype in (torch.bfloat16, torch.float32):
            for kind in FAST_PEERS:
                yield _with_gradient(settings, kind, classes, dtype)
    for classes in (32000, 128256):
        for dtype in (torch.bfloat16, torch.float32):
            yield _forward_only(settings, classes, dtype)
            yield _statistics(settings, classes, dtype)
    if settings.compile:
        for kind, all_classes in (("KL", COMPILED), ("JSD", COMPILED[1:])):
            for classes in all_classes:
                for dtype in (torch.bfloat16, torch.float32)[: 2 if kind == "KL" else 1]:
                    yield _with_gradient(settings, kind, classes, dtype, compiled=True)


def _with_gradient(
    settings: Settings, kind: str, classes: int, dtype: torch.dtype, *, compiled: bool = False
) -> LazyCase:
    rows = settings.rows(classes, dtype)
    name = f"{kind} {rows}x{classes} {short_name(dtype)}"

    def build() -> Case:
        student, teacher = _logits(settings, rows, classes, dtype)
        ours = fastkd.KLDivLoss(LM_TEMPERATURE) if kind == "KL" else fastkd.JSDivLoss(LM_TEMPERATURE)
        losses = FAST_PEERS[kind]
        if compiled:
            torch._dynamo.reset()  # each shape by itself: a recompilation would be for any shape, and slower
            losses = {"torch.compile": torch.compile(losses["torch eager"], dynamic=False)}
        sample = _sample(rows, settings)
        truth = _truth(kind, student[sample], teacher[sample]) / rows
        contenders = Contenders(
            partial(gradient_step, ours, student, teacher),
            {
                peer: partial(gradient_step, partial(loss, temperature=LM_TEMPERATURE), student, teacher)
                for peer, loss in losses.items()
            },
            lambda gradient: relative_error(gradient[sample], truth),
            # 16-bit log-probabilities near -11 are wrong in the second digit, and so are the gradients made of them
            *((1e-2, 0.15) if dtype == torch.bfloat16 else (1e-4, 1e-2)),
        )
        floor = floors.divergence(rows, classes, dtype.itemsize)
        return contenders.case(name, settings, targets=_TARGETS, rounds=9, floor_bytes=floor)

    return LazyCase(name, build)


def _sample(rows: int, settings: Settings) -> Tensor:
    return torch.linspace(0, rows - 1, min(rows, ROW_SAMPLE), device=settings.device).long()


def _truth(kind: str, student: Tensor, teacher: Tensor) -> Tensor:
    """The gradient of the sum over these rows, in float64."""
    student = student.detach().double().requires_grad_()
    kinds = {"KL": "forward", "JSD": "jensen_shannon"}
    rows = reference.divergence_rows(student, teacher.double(), kind=kinds[kind], temperature=LM_TEMPERATURE)
    return torch.autograd.grad(rows.sum(), student)[0]


def _forward_only(settings: Settings, classes: int, dtype: torch.dtype) -> LazyCase:
    rows = settings.rows(classes, dtype)
    name = f"KL forward only {rows}x{classes} {short_name(dtype)}"

    def build() -> Case:
        student, teacher = (x.detach() for x in _logits(settings, rows, classes, dtype))
        parts = zip(student.split(ROW_SAMPLE), teacher.split(ROW_SAMPLE), strict=True)
        truth = torch.stack([reference.divergence_rows(s.double(), t.double()).sum() for s, t in parts]).sum() / rows
        ours = fastkd.KLDivLoss(LM_TEMPERATURE)
        contenders = Contenders(
            lambda: ours(student, teacher),
            {"torch eager": lambda: eager_kl(student, teacher, LM_TEMPERATURE)},
            lambda loss: relative_error(loss, truth),
            1e-4,
            0.1,
        )
        floor = floors.divergence(rows, classes, dtype.itemsize, student_gradient=False)
        return contenders.case(name, settings, rounds=9, floor_bytes=floor)

    return LazyCase(name, build)


def _statistics(settings: Settings, classes: int, dtype: torch.dtype) -> LazyCase:
    rows = settings.rows(classes, dtype)
    name = f"logit_stats {rows}x{classes} {short_name(dtype)}"

    def build() -> Case:
        logits = _logits(settings, rows, classes, dtype)[0].detach()
        sample = _sample(rows, settings)
        truth = torch.stack(_floats(reference.logit_stats(logits[sample].double())))
        contenders = Contenders(
            lambda: fastkd.logit_stats(logits),
            {"torch eager": lambda: reference.logit_stats(logits)},
            lambda stats: relative_error(torch.stack([s[sample].double() for s in _floats(stats)]), truth),
            1e-5,
            0.05,
        )
        floor = floors.logit_stats(rows, classes, dtype.itemsize)
        return contenders.case(name, settings, rounds=9, floor_bytes=floor)

    return LazyCase(name, build)


def _floats(stats: tuple[Tensor, ...]) -> list[Tensor]:
    return [s for s in stats if s.is_floating_point()]


def _small(settings: Settings) -> Iterator[LazyCase]:
    """Launch-bound: 256 x 100 in an eager loop, and as a replayed CUDA graph."""
    rows, classes, replays = 256, 100, 20

    def contenders(wrap: Callable[[Callable[[], Tensor]], Callable[[], Tensor]], losses: dict[str, Loss]) -> Contenders:
        student, teacher = _logits(settings, rows, classes, torch.float32)
        wide = student.detach().double().requires_grad_()
        truth = gradient_step(eager_kl, wide, teacher.double())
        steps = {
            name: wrap(partial(gradient_step, loss, student, teacher))
            for name, loss in {"fastkd": fastkd.KLDivLoss(TEMPERATURE), **losses}.items()
        }
        return Contenders(steps.pop("fastkd"), steps, lambda gradient: relative_error(gradient, truth), 1e-4, 1e-2)

    eager = f"KL {rows}x{classes} fp32, eager loop"
    yield LazyCase(
        eager, lambda: contenders(lambda run: run, FAST_PEERS["KL"]).case(eager, settings, rounds=51, latency=True)
    )
    if settings.device.type != "cuda":
        return
    replayed = f"KL {rows}x{classes} fp32, CUDA graph replay"

    def build() -> Case:
        found = contenders(partial(graph_replay, replays=replays), {"torch eager": eager_kl})
        found.missing["Liger-Kernel"] = "its backward reads a value on the host, which no graph can hold"
        return found.case(replayed, settings, rounds=51, scale=dict.fromkeys(("fastkd", "torch eager"), 1 / replays))

    yield LazyCase(replayed, build)


def _logits(settings: Settings, rows: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    student, teacher = (torch.randn(rows, classes, dtype=dtype, device=settings.device) for _ in range(2))
    return student.requires_grad_(), teacher
