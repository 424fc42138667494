"""Arguments of the sparse losses: gradients of all of them, opcheck, errors as a table, numbers that cannot be."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from refusals import DTYPES, refuses
from sparse_cases import KINDS, TAILS, Case, fused, make
from torch import Tensor

import fastkd
from fastkd import functional as F  # noqa: N812
from fastkd.ops.sparse import sparse_divergence
from fastkd.reference import sparse as reference

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.cuda_kernels]


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, tail: str, device: torch.device, generator: torch.Generator) -> None:
    temperature, weight = torch.tensor([0.5, 1.0, 3.0]), torch.tensor([1.0, 0.5, -2.0])
    case = make(3, 11, 4, torch.float64, generator, device, temperature=temperature)
    target = torch.tensor([int(case.indices[0, 0]), 3, -100])
    options = {"temperature": temperature, "weight": weight, "task_scale": 0.3, "tail": tail, **KINDS[kind]}
    options = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    entries = case.indices.to(device), case.log_probs.to(device)
    for reduction in ("none", "sum", "batchmean", "mean"):

        def loss(student: Tensor, reduction: str = reduction) -> Tensor:
            return fused(student, *entries, target.to(device), reduction=reduction, **options)

        assert torch.autograd.gradcheck(loss, case.student.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_opcheck(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    case = make(3, 11, 4, dtype, generator, device)
    target, weight, row = torch.tensor([0, 1, -100]), torch.ones(3), torch.full((3,), 3.0)
    target, weight, row, indices, log_probs = (
        x.to(device) for x in (target, weight, row, case.indices, case.log_probs.log_softmax(-1) - 0.1)
    )
    ahead = dtype != torch.float16
    numbers = torch.tensor([2.0, 0.5, 1.0, 0.5], dtype=torch.float64)
    for kind, tail, labels, reduction, given in (
        (0, 0, target, 2, None),
        (1, 1, None, 0, numbers),
        (2, 2, None, 1, None),
    ):
        tensors = case.student.requires_grad_(ahead), indices, log_probs, None, labels, weight, row
        scalars = 2.0, kind, tail, 0.5, 1.0, 0.5, -100, reduction, ahead, given
        torch.library.opcheck(torch.ops.fastkd.sparse_divergence.default, (*tensors, *scalars))


def test_float16_gradients_survive_a_loss_scale(device: torch.device, generator: torch.Generator) -> None:
    """The gradient of a mean is below float16's smallest number until GradScaler's 65536 has multiplied it."""
    case = make(64, 500, 9, torch.float16, generator, device)
    student, double = case.student.requires_grad_(), case.student.detach().cpu().double().requires_grad_()
    entries = case.indices.to(device), case.log_probs.to(device)
    (65536 * sparse_divergence(student, *entries, reduction="mean")[0]).backward()
    wide = case.indices, case.log_probs.double()
    (65536 * reference.sparse_divergence(double, *wide, reduction="mean")).backward()
    torch.testing.assert_close(student.grad.cpu().double(), double.grad, rtol=2e-3, atol=1e-7)


def test_teachers_need_no_gradient(device: torch.device, generator: torch.Generator) -> None:
    case = make(3, 11, 4, torch.float32, generator, device)
    entries = case.indices.to(device), case.log_probs.to(device)
    refuses("teacher_log_probs requires grad", lambda: fused(case.student, entries[0], entries[1].requires_grad_()))
    with torch.no_grad():
        fused(case.student, *entries)


# ---- errors by shape, dtype and option -----------------------------------------------------------

S = torch.zeros(4, 10)
I = torch.arange(3).repeat(4, 1)  # noqa: E741
P = torch.full((4, 3), -2.0)
KL: Callable[..., Tensor] = F.sparse_kl_div

ERRORS: dict[str, tuple[Callable[[], object], str]] = {
    "no tensor": (lambda: KL([0.0], I, P), "student_logits is list"),
    "scalar": (lambda: KL(torch.tensor(1.0), I, P), r"student_logits has shape \(\)"),
    "no classes": (lambda: KL(S[:, :0], I, P), r"student_logits has shape \(4, 0\)"),
    "rows of indices": (lambda: KL(S, I[:2], P), r"teacher_indices has shape \(2, 3\), must be \(4, k\)"),
    "scalar indices": (lambda: KL(S, I[0, 0], P), r"teacher_indices has shape \(\), must be \(4, k\)"),
    "no entries": (lambda: KL(S, I[:, :0], P[:, :0]), r"teacher_indices has shape \(4, 0\), must have 1 to 10 classes"),
    "too many entries": (lambda: KL(S[:, :2], I, P), r"teacher_indices has shape \(4, 3\), must have 1 to 2 classes"),
    "shape of log_probs": (lambda: KL(S, I, P[:, :2]), r"teacher_log_probs has shape \(4, 2\), must be \(4, 3\)"),
    "swapped": (lambda: KL(S, P, I), r"teacher_indices has dtype torch.float32, must be int64 or int32"),
    "shape of tail": (
        lambda: KL(S, I, P, teacher_tail_log_prob=P),
        r"teacher_tail_log_prob has shape \(4, 3\), must be \(4,\)",
    ),
    "tail of drop": (
        lambda: KL(S, I, P, tail="drop", teacher_tail_log_prob=P[:, 0]),
        "teacher_tail_log_prob is given, must be None where tail is 'drop'",
    ),
    "tail": (lambda: KL(S, I, P, tail="other"), "tail is 'other', must be one of bucket, renormalize, drop"),
    "direction": (lambda: KL(S, I, P, direction="up"), "direction is 'up'"),
    "reduction": (lambda: KL(S, I, P, reduction="all"), "reduction is 'all'"),
    "mean of a sum": (lambda: F.sparse_kd_loss(S, I, P, I[:, 0], reduction="mean"), "reduction is 'mean'"),
    "temperature": (lambda: KL(S, I, P, 0.0), "temperature is 0.0, must be positive"),
    "temperature nan": (lambda: KL(S, I, P, math.nan), "temperature is nan"),
    "temperatures": (lambda: KL(S, I, P, torch.ones(3)), r"temperature has shape \(3,\), must broadcast"),
    "weight": (lambda: KL(S, I, P, weight=torch.ones(5)), r"weight has shape \(5,\), must broadcast"),
    "target": (lambda: KL(S, I, P, target=I), r"target has shape \(4, 3\), must be \(4,\)"),
    "target dtype": (lambda: KL(S, I, P, target=P[:, 0]), "target has dtype torch.float32"),
    "no target": (lambda: F.sparse_kd_loss(S, I, P, None), "target is NoneType"),
    "beta": (lambda: F.sparse_js_div(S, I, P, beta=1.5), r"beta is 1.5, must be in \[0, 1\]"),
    "alpha": (lambda: F.sparse_kd_loss(S, I, P, I[:, 0], alpha=-1), "alpha is -1"),
    "device": (lambda: KL(S, I.to("meta"), P), "teacher_indices is on meta"),
    "device of log_probs": (lambda: KL(S, I, P.to("meta")), "teacher_log_probs is on meta"),
    "sparse": (lambda: KL(S, I, P.to_sparse()), "teacher_log_probs has layout torch.sparse_coo"),
    "module: tail": (lambda: fastkd.SparseKLDivLoss(tail="none"), "tail is 'none'"),
    "module: direction": (lambda: fastkd.SparseKDLoss(direction="up"), "direction is 'up'"),
    "module: beta": (lambda: fastkd.SparseJSDivLoss(beta=2.0), "beta is 2.0"),
    "module: temperature": (lambda: fastkd.SparseKLDivLoss(0.0), "temperature is 0.0"),
    **{
        f"{name} of {dtype}": (
            lambda at=at, dtype=dtype: KL(*(x.to(dtype) if i == at else x for i, x in enumerate((S, I, P)))),
            name,
        )
        for at, name in ((0, "student_logits"), (2, "teacher_log_probs"))
        for dtype in DTYPES
    },
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    call, message = ERRORS[name]
    refuses(message, call)


def test_the_operator_checks_by_itself(device: torch.device) -> None:
    """Calls that pass by Python: compiled programs may have other shapes than the traced one."""
    s, i, p = S.to(device), I.to(device), P.to(device)
    usual = (None, None, None, None, 1.0, 0, 0, 0.5, 1.0, 0.0, -100, 2, False)
    for arguments, message in (
        ((s, i[:2], p), "teacher_indices has shape"),
        ((s, i, p[:, :2]), "teacher_log_probs has shape"),
        ((s, i[:, :0], p), "teacher_indices has shape"),
        ((s[:, :2], i, p), "teacher_indices has shape"),
        ((s, p, p), "teacher_indices has dtype"),
        ((s, i, i), "teacher_log_probs has dtype"),
    ):
        with pytest.raises(RuntimeError, match=f"fastkd: {message}"):
            torch.ops.fastkd.sparse_divergence(*arguments, *usual)
    for at, value, message in (
        (5, 3, "kind is 3"),
        (6, 3, "tail is 3"),
        (7, 2.0, "beta is 2"),
        (4, 0.0, "temperature is 0"),
    ):
        scalars = list(usual)
        scalars[at] = value
        with pytest.raises(RuntimeError, match=f"fastkd: {message}"):
            torch.ops.fastkd.sparse_divergence(s, i, p, *scalars)


# ---- numbers that cannot be ----------------------------------------------------------------------


def _set(name: str, value: Any, *at: int) -> Callable[[Case], Case]:
    def change(case: Case) -> Case:
        tensor = getattr(case, name).clone() if hasattr(case, name) else case.options[name].clone()
        tensor[at] = value
        if hasattr(case, name):
            return replace(case, **{name: tensor})
        return replace(case, options={**case.options, name: tensor})

    return change


TWICE = r"teacher_indices\[2, 3\] is 7, which the row has before"
WRONG: dict[str, tuple[Callable[[Case], Case], str]] = {
    "too large": (_set("indices", 37, 2, 1), r"teacher_indices\[2, 1\] is 37, must be in \[0, 37\)"),
    "negative": (_set("indices", -1, 2, 0), r"teacher_indices\[2, 0\] is -1, must be in \[0, 37\)"),
    "huge": (_set("indices", 2**62, 2, 0), r"teacher_indices\[2, 0\] is 4611686018427387904"),
    "twice": (lambda case: _set("indices", 7, 2, 3)(_set("indices", 7, 2, 1)(case)), TWICE),
    "positive": (_set("log_probs", 0.01, 2, 1), r"teacher_log_probs\[2, 1\] is 0.01, must be at most 0"),
    "infinite": (_set("log_probs", math.inf, 2, 1), r"teacher_log_probs\[2, 1\] is inf"),
    "nan": (_set("log_probs", math.nan, 2, 1), r"teacher_log_probs\[2, 1\] is nan"),
    "more than 1": (_set("log_probs", -0.3, 2), r"teacher_log_probs\[2\] has probabilities that add up to 2\.96"),
    "temperature": (_set("temperature", 0.0, 2), r"temperature\[2\] is 0, must be positive"),
    "target": (_set("target", 37, 2), r"target\[2\] is 37, must be in"),
}
WRONG_TAIL: dict[str, tuple[Callable[[Case], Case], str]] = {
    "nan": (_set("teacher_tail_log_prob", math.nan, 2), r"teacher_tail_log_prob\[2\] is nan"),
    "positive": (_set("teacher_tail_log_prob", 0.5, 2), r"teacher_tail_log_prob\[2\] is 0.5, must be at most 0"),
    "too much": (_set("teacher_tail_log_prob", 0.0, 2), r"add up to .* with teacher_tail_log_prob, must be 1"),
    "too little": (_set("teacher_tail_log_prob", -math.inf, 2), r"add up to .* with teacher_tail_log_prob, must be 1"),
}


def assert_refused(case: Case, change: Callable[[Case], Case], message: str, reads_values: bool) -> None:
    """An error where kernels look, else NaN in this row alone."""
    if reads_values:
        with pytest.raises(RuntimeError, match=f"fastkd: .*{message}"):
            change(case).run(fused)
        return
    for before, after in zip(case.run(fused), change(case).run(fused), strict=True):
        assert torch.isnan(after[2]).all()
        assert torch.equal(before[[0, 1, 3]], after[[0, 1, 3]])


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", WRONG)
def test_numbers_that_cannot_be(
    name: str, tail: str, device: torch.device, reads_values: bool, generator: torch.Generator
) -> None:
    for kind in KINDS.values():
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for task_scale in (0.0, 0.5):
                temperature, target = torch.tensor([1.0, 4.0, 0.5, 2.0]), torch.tensor([3, -100, 36, 0])
                options = {"tail": tail, "temperature": temperature, "task_scale": task_scale, **kind}
                case = make(4, 37, 4, dtype, generator, device, **options)
                case.options["target"] = target
                assert_refused(case, *WRONG[name], reads_values)


@pytest.mark.parametrize("name", WRONG_TAIL)
def test_tails_that_cannot_be(name: str, device: torch.device, reads_values: bool, generator: torch.Generator) -> None:
    for kind in KINDS.values():
        full = torch.log_softmax(torch.randn(4, 37, generator=generator), -1)
        options = {"temperature": 1.0, "teacher_tail_log_prob": full[:, 4:].logsumexp(-1), **kind}
        student = torch.randn(4, 37, generator=generator).to(device)
        assert_refused(
            Case(student, torch.arange(4).repeat(4, 1), full[:, :4], options), *WRONG_TAIL[name], reads_values
        )


def test_rounding_is_no_error(device: torch.device, generator: torch.Generator) -> None:
    """A little above 1, as float32, bfloat16 and float16 make it of log_softmax."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        full = torch.log_softmax(torch.randn(16, 4000, generator=generator).to(device), -1).to(dtype)
        student = torch.randn(16, 4001, generator=generator).to(device)
        indices = torch.arange(4000, device=device).repeat(16, 1)
        for tail in TAILS:
            assert torch.isfinite(F.sparse_kl_div(student, indices, full, tail=tail))
