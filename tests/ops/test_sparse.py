"""Sparse teachers: truth, tails of all sizes, padding, equality with the dense losses, strides, threads, infinities."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from sparse_cases import DTYPES, KINDS, TAILS, Case, assert_accurate, fused, make, truth
from torch import Tensor

import fastkd
from fastkd import functional as F  # noqa: N812
from fastkd.ops.divergence import divergence
from fastkd.ops.sparse import sparse_divergence

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.cuda_kernels]

SHAPES = [(1, 1), (2, 1), (3, 2), (41, 7), (401, 64), (1271, 5)]  # classes, entries
LONG = [(32000, 64), (128257, 40)]


# ---- truth ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", KINDS)
def test_truth(kind: str, tail: str, device: torch.device, few: bool, generator: torch.Generator) -> None:
    for classes, entries in SHAPES if few else SHAPES + LONG:
        rows = 4 if classes < 1000 else 2
        for dtype in DTYPES:
            assert_accurate(make(rows, classes, entries, dtype, generator, device, tail=tail, **KINDS[kind]))


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", KINDS)
def test_with_the_task_and_numbers_of_rows(
    kind: str, tail: str, device: torch.device, generator: torch.Generator
) -> None:
    """Temperatures and weights of each row, labels among the entries and not, in one pass."""
    temperature = torch.tensor([0.5, 1.0, 3.0, 2.0, 1.0])
    for dtype in DTYPES:
        case = make(5, 150, 9, dtype, generator, device, tail=tail, temperature=temperature, **KINDS[kind])
        entry = int(case.indices[0, 0])
        target = torch.tensor([entry, 3, -100, 149, int(case.indices[4, 1])])
        weight = torch.tensor([1.0, 0.5, 1.0, -2.0, 0.0])
        case.options.update(target=target, weight=weight, task_scale=0.3, kd_scale=0.7)
        assert_accurate(case)
        case.options.update(temperature=1.0)
        assert_accurate(case)


@pytest.mark.parametrize("kind", KINDS)
def test_given_tail(kind: str, device: torch.device, generator: torch.Generator) -> None:
    """A tail far below what log-probabilities in float32 leave."""
    for dtype in DTYPES:
        logits = torch.randn(4, 200, generator=generator, dtype=torch.float64)
        logits[:, :5] += torch.tensor([10.0, 20.0, 30.0, 40.0])[:, None]
        full = torch.log_softmax(logits, -1)
        log_probs, tail = full[:, :5].float(), full[:, 5:].logsumexp(-1).float()
        student = (logits + torch.randn(4, 200, generator=generator)).to(device, dtype)
        options = {"temperature": 1.0, "teacher_tail_log_prob": tail, **KINDS[kind]}
        assert_accurate(Case(student, torch.arange(5).repeat(4, 1), log_probs, options))


def test_long_rows(device: torch.device, generator: torch.Generator) -> None:
    """More classes than the map of a block on a GPU has bits for."""
    case = make(1, 300_001, 9, torch.bfloat16, generator, device)
    case.indices[0, :3] = torch.tensor([0, 131_071, 300_000])
    assert_accurate(case)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_class_is_the_dense_loss(kind: str, tail: str, device: torch.device, generator: torch.Generator) -> None:
    for dtype in (torch.float32, torch.float64):
        for classes in (1, 3, 41, 401):
            case = make(3, classes, classes, dtype, generator, device, tail=tail, **KINDS[kind])
            if classes > 2:  # make() leaves out one; no bucket of it
                teacher = torch.randn(3, classes, generator=generator, dtype=torch.float64)
                log_probs = torch.log_softmax(teacher / 2.0, -1).to(case.log_probs.dtype)
                case = replace(case, indices=torch.arange(classes).repeat(3, 1), log_probs=log_probs)
            teacher = torch.empty_like(case.log_probs).scatter(-1, case.indices, case.log_probs) * 2.0
            student = case.student.detach().requires_grad_()
            loss = divergence(student, teacher.to(device, dtype), reduction="none", temperature=2.0, **KINDS[kind])[0]
            (gradient,) = torch.autograd.grad((loss * torch.linspace(0.5, 2, 3).to(loss)).sum(), student)
            ours = case.run(fused)
            tight = {"rtol": 2e-6, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
            torch.testing.assert_close(ours[0], loss.detach().cpu().double(), **tight)
            torch.testing.assert_close(ours[1], gradient.cpu().double(), **tight)


# ---- proper divergences --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_bucket_is_never_negative(kind: str, device: torch.device, few: bool, generator: torch.Generator) -> None:
    """Students near the teacher and far from it, tails from nearly all to 1e-40, entries in 16 bits: finite, >= 0."""
    rows = 12 if few else 400
    for log_dtype in (torch.float32, torch.bfloat16, torch.float16):
        for distance in (0.0, 1e-6, 1e-3, 1.0):
            teacher = torch.randn(rows, 60, generator=generator)
            teacher[:, :6] += torch.linspace(-2, 95, rows)[:, None]
            student = (teacher + distance * torch.randn(rows, 60, generator=generator)).to(device)
            full = torch.log_softmax(teacher.double(), -1)
            log_probs, indices = full[:, :6].to(log_dtype).to(device), torch.arange(6).repeat(rows, 1).to(device)
            tail = full[:, 6:].logsumexp(-1).to(log_dtype).to(device)
            for given in (None, tail):
                if given is None and (kind == "reverse" or log_dtype != torch.float32):
                    continue  # rounding leaves no tail, and reverse KL is infinite; nor does it mean anything in 16 bits
                options = {"teacher_tail_log_prob": given, "reduction": "none", **KINDS[kind]}
                loss = fused(student, indices, log_probs, **options)
                assert torch.isfinite(loss).all()
                assert (loss >= 0).all()
                if distance <= 1e-6 and log_dtype == torch.float32 and given is not None:
                    assert loss.max() < 1e-10


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("kind", KINDS)
def test_identical_is_zero(kind: str, tail: str, device: torch.device, generator: torch.Generator) -> None:
    """Loss and gradient, exactly, where both sides have the same numbers."""
    for dtype in (torch.float32, torch.float64):
        for classes in (1, 2, 37, 1271):
            log_probs = torch.log_softmax(3 * torch.randn(3, classes, generator=generator, dtype=torch.float64), -1)
            log_probs = log_probs.to(dtype)
            indices = torch.arange(classes).repeat(3, 1)
            case = Case(log_probs.to(device), indices, log_probs, {"tail": tail, **KINDS[kind]})
            for part in case.run(fused):
                assert not part.any()


def test_a_bucket_is_no_more_than_the_whole(device: torch.device, generator: torch.Generator) -> None:
    """Merging classes loses information; with more entries less is lost."""
    student, teacher = (3 * torch.randn(5, 90, generator=generator) for _ in range(2))
    log_probs, indices = (x.to(device) for x in torch.log_softmax(teacher.double(), -1).topk(90))
    student, teacher = student.to(device), teacher.to(device)
    for direction in ("forward", "reverse"):
        whole = F.kl_div(student, teacher, direction=direction, reduction="none")
        losses = [
            F.sparse_kl_div(student, indices[:, :k], log_probs[:, :k], direction=direction, reduction="none")
            for k in (1, 4, 16, 64, 89)
        ]
        for less, more in zip(losses, [*losses[1:], whole], strict=True):
            assert (less <= more + 1e-5).all()


# ---- entries -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", KINDS)
def test_padding(kind: str, tail: str, device: torch.device, generator: torch.Generator) -> None:
    """As if it were not there, whatever its index; a row of nothing else has no loss."""
    for dtype in (torch.float32, torch.float64):
        case = make(1, 90, 5, dtype, generator, device, tail=tail, **KINDS[kind])
        at = [6, 1, 3, 0, 4]
        indices, log_probs = torch.tensor([[2**50, -7, 5, 90, 3, 3, 3, 0]]), torch.full((1, 8), -math.inf)
        log_probs = log_probs.to(case.log_probs.dtype)
        indices[:, at], log_probs[:, at] = case.indices, case.log_probs
        padded = replace(case, indices=indices, log_probs=log_probs)
        for x, y in zip(padded.run(fused), case.run(fused), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)
        nothing = replace(padded, log_probs=torch.full_like(log_probs, -math.inf))
        for part in nothing.run(fused):
            assert not part.any()


def test_narrow_indices(device: torch.device, generator: torch.Generator) -> None:
    case = make(3, 90, 5, torch.float32, generator, device)
    case.indices[case.log_probs == -math.inf] = -(2**31)
    narrow = replace(case, indices=case.indices.int())
    for x, y in zip(narrow.run(fused), case.run(fused), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("log_dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_of_entries(log_dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    """Any, beside any logits; what their rounding makes of a sum of 1 is no error."""
    for dtype in DTYPES:
        case = make(6, 64, 64, dtype, generator, device, tail="renormalize")
        case = replace(case, log_probs=case.log_probs.to(log_dtype))
        assert_accurate(case)
        case.options["tail"] = "drop"
        assert_accurate(case)


def test_strides(device: torch.device, fixed_order: bool, generator: torch.Generator) -> None:
    for dtype in DTYPES:
        base, wide = (torch.randn(n, n, generator=generator).to(device, dtype) for n in (40, 70))
        views = {
            "vocabulary": base[3:20, 1:34],
            "transposed": base.t()[:17, :33],
            "rows expanded": base[:1, :33].expand(17, 33),
            "every second": wide[:34:2, :66:2],
        }
        case = make(17, 33, 4, dtype, generator, device)
        strided_entries = {
            "indices": torch.stack([case.indices, case.indices], -1)[..., 0],
            "log_probs": torch.cat([case.log_probs, case.log_probs], -1)[:, :4],
        }
        for view in views.values():
            packed, strided = (replace(case, student=x) for x in (view.contiguous(), view))
            for other in (strided, replace(strided, **strided_entries)):
                for x, y in zip(packed.run(fused), other.run(fused), strict=True):
                    if fixed_order:
                        assert torch.equal(x, y)
                    torch.testing.assert_close(x, y, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


def test_bits_do_not_depend_on_threads(cpu: torch.device, generator: torch.Generator) -> None:
    case = make(61, 1271, 20, torch.float32, generator, cpu)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(case.run(fused))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


# ---- infinities ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", KINDS)
def test_masked_classes(kind: str, tail: str, device: torch.device, generator: torch.Generator) -> None:
    """Student logits of -inf: among the tail, all of it, an entry of each row, most rows."""
    for dtype in DTYPES:
        case = make(4, 61, 5, dtype, generator, device, tail=tail, **KINDS[kind])
        masked = torch.rand(4, 61, generator=generator) < 0.4
        masked[3] = True
        for row in range(4):
            kept = case.indices[row][case.log_probs[row] > -math.inf]
            masked[row, kept] = False
        masked[2, case.indices[2, 0]] = True
        case.student[masked.to(device)] = -math.inf
        loss, gradient = case.run(fused)
        expected = truth(case)
        close = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(loss, expected[0], **close)
        finite = loss.isfinite()
        assert not gradient[masked & finite[:, None] & ~(torch.arange(4)[:, None] == 2)].any()
        rounding = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(gradient[[0, 1]], expected[1][[0, 1]], rtol=rounding + 1e-5, atol=rounding)
        if kind == "forward":
            assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_that_cannot_be(kind: str, device: torch.device, generator: torch.Generator) -> None:
    """NaN and +inf, an entry or not, and nothing but -inf: NaN in this row alone."""
    for tail in ("bucket", "drop"):
        for dtype in DTYPES:
            case = make(3, 90, 5, dtype, generator, device, tail=tail, **KINDS[kind])
            before = case.run(fused)
            entry, other = int(case.indices[2, 0]), int(set(range(90)).difference(case.indices[2].tolist()).pop())
            for bad in (math.nan, math.inf):
                for c in (entry, other):
                    student = case.student.clone()
                    student[2, c] = bad
                    for x, y in zip(before, replace(case, student=student).run(fused), strict=True):
                        assert torch.isnan(y[2]).all()
                        assert torch.equal(x[:2], y[:2])
            student = case.student.clone()
            student[2] = -math.inf
            assert all(torch.isnan(part[2]).all() for part in replace(case, student=student).run(fused))


def test_rows_left_out_may_hold_anything(device: torch.device, generator: torch.Generator) -> None:
    for dtype in DTYPES:
        case = make(4, 37, 3, dtype, generator, device)
        case.student[1], case.indices[1], case.log_probs[1] = math.nan, 10**6, 5.0
        case.student[2, 3], case.log_probs[2, 0] = math.inf, math.nan
        case.options.update(target=torch.tensor([3, -100, 1, 2]), weight=torch.tensor([2.0, 1.0, 0.0, -1.0]))
        for part in case.run(fused):
            assert torch.isfinite(part).all()
            assert not part[1:3].any()
            assert (part[[0, 3]] != 0).any()


@pytest.mark.parametrize("temperature", [1e-3, 1e3, 1e30])
def test_extreme_temperatures(temperature: float, device: torch.device, generator: torch.Generator) -> None:
    for kind in KINDS.values():
        for tail in TAILS:
            case = make(4, 61, 5, torch.float32, generator, device, tail=tail, temperature=1.0, **kind)
            case.options["temperature"] = temperature
            loss, gradient = case.run(fused)
            assert not torch.isnan(loss).any()
            assert torch.isfinite(gradient).all() or kind["kind"] == "reverse"
            if temperature < 1e20:
                expected = truth(case)
                torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=1e-5 * temperature)


# ---- reductions and the whole ---------------------------------------------------------------------


def test_reductions(device: torch.device, generator: torch.Generator) -> None:
    case = make(6, 90, 5, torch.float32, generator, device)
    target = torch.tensor([0, -100, 2, 3, -100, 5]).to(device)
    inputs = case.student, case.indices.to(device), case.log_probs.to(device)
    rows, terms = sparse_divergence(*inputs, target, temperature=2.0, reduction="none", task_scale=0.5)
    total, counts = rows.double().sum(), {"sum": 1, "batchmean": 4, "mean": 4 * 90}
    for reduction, count in counts.items():
        loss, parts = sparse_divergence(*inputs, target, temperature=2.0, reduction=reduction, task_scale=0.5)
        torch.testing.assert_close(loss.double(), total / count, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(parts, terms.sum(1) / count)
    nobody = torch.full_like(target, -100)
    assert sparse_divergence(*inputs, nobody, temperature=2.0)[0] == 0
    empty = [x[:0] for x in inputs]
    assert sparse_divergence(*empty)[0] == 0
    assert sparse_divergence(*empty, reduction="none")[0].shape == (0,)


def test_functions_and_modules(device: torch.device, generator: torch.Generator) -> None:
    student = torch.randn(2, 3, 40, generator=generator).to(device).requires_grad_()
    log_probs, indices = torch.log_softmax(torch.randn(2, 3, 40, generator=generator) / 2, -1).topk(4)
    log_probs, indices, target = log_probs.to(device), indices.to(device), torch.randint(40, (2, 3)).to(device)
    entries = student, indices, log_probs

    def same(module: Tensor, function: Tensor) -> None:
        torch.testing.assert_close(module, function, rtol=0, atol=0)

    for tail in TAILS:
        for direction in ("forward", "reverse"):
            options = {"direction": direction, "tail": tail, "reduction": "none"}
            kl = F.sparse_kl_div(*entries, 2.0, **options)
            assert kl.shape == (2, 3)
            same(fastkd.SparseKLDivLoss(2.0, **options)(*entries), kl)
            loss, terms = F.sparse_kd_loss(*entries, target, 2.0, 0.25, return_terms=True, **options)
            same(fastkd.SparseKDLoss(2.0, 0.25, **options)(*entries, target), loss)
            hard = torch.nn.functional.cross_entropy(student.reshape(-1, 40), target.reshape(-1), reduction="none")
            torch.testing.assert_close(terms, {"cross_entropy": hard.detach().view(2, 3), "kl_div": kl.detach()})
            torch.testing.assert_close(loss, 0.75 * hard.view(2, 3) + 0.25 * kl)
        js = F.sparse_js_div(*entries, 2.0, beta=0.2, tail=tail)
        same(fastkd.SparseJSDivLoss(2.0, 0.2, tail=tail)(*entries), js)
        for beta, direction in ((0.0, "forward"), (1.0, "reverse")):
            same(
                F.sparse_js_div(*entries, beta=beta, tail=tail),
                F.sparse_kl_div(*entries, direction=direction, tail=tail),
            )
    only_hard = F.sparse_kd_loss(student, indices * 0, log_probs + torch.nan, target, alpha=0.0)
    torch.testing.assert_close(
        only_hard, torch.nn.functional.cross_entropy(student.reshape(-1, 40), target.reshape(-1))
    )


def test_a_tensor_of_temperatures_moves_with_the_module() -> None:
    module = fastkd.SparseKLDivLoss(torch.tensor([1.0, 2.0]))
    assert "temperature" in module.state_dict()
    assert "tail='bucket'" in repr(module)
