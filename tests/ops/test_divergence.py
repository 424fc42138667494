"""Numbers of the divergences: truth, odd shapes, infinities, masks, extreme temperatures, determinism."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from divergence_cases import CPU, KINDS, Case, assert_accurate, assert_same, fused, logits, off_alignment, truth
from torch import Tensor

from fastkd import _C, build_info
from fastkd.ops.divergence import divergence
from fastkd.reference import divergence as reference

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.cuda_kernels]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TEMPERATURES = [0.05, 1.0, 4.0, "rows"]
SMALL = [(0, 7), (1, 1), (5, 1), (1, 2), (4, 3), (2, 41), (3, 401), (2, 1271)]


def make(
    rows: int,
    classes: int,
    dist: str,
    dtype: torch.dtype,
    generator: torch.Generator,
    device: torch.device = CPU,
    **options: object,
) -> Case:
    student, teacher = logits(rows, classes, dist, dtype, generator, device)
    if options.get("temperature") == "rows":
        options["temperature"] = torch.rand(rows, generator=generator, dtype=torch.float64) * 8 + 0.05
    return Case(student, teacher, torch.randn(rows, generator=generator), options)


def ids(value: object) -> str:
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("temperature", TEMPERATURES, ids=ids)
@pytest.mark.parametrize("kind", KINDS)
def test_truth(
    kind: str, temperature: float | str, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    for dist in ("normal", "huge", "close", "masked", *(["masked_apart"] if "jsd" in kind else [])):
        assert_accurate(make(48, 41, dist, dtype, generator, device, temperature=temperature, **KINDS[kind]))


@pytest.mark.parametrize("shape", SMALL, ids=ids)
@pytest.mark.parametrize("kind", ["forward", "reverse", "soft_cross_entropy", "jsd0.3"])
def test_shapes(kind: str, shape: tuple[int, int], device: torch.device, generator: torch.Generator) -> None:
    for dtype in DTYPES:
        assert_accurate(make(*shape, "normal", dtype, generator, device, temperature=2.0, **KINDS[kind]))


@pytest.mark.parametrize("classes", [32000, 128257])
@pytest.mark.parametrize("kind", ["forward", "reverse", "soft_cross_entropy", "jsd0.3"])
def test_large_vocabularies(kind: str, classes: int, device: torch.device, generator: torch.Generator) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert_accurate(make(3, classes, "normal", dtype, generator, device, temperature=1.0, **KINDS[kind]))


# kernels change their mapping of classes to threads around powers of two, and keep tails of fewer than a register
BOUNDARIES = [*range(1, 41), *(2**i + d for i in range(6, 15) for d in (-1, 0, 1))]


@pytest.mark.parametrize("kind", ["forward", "jsd0.3"])
def test_every_number_of_classes(kind: str, device: torch.device, generator: torch.Generator) -> None:
    for classes in BOUNDARIES:
        for dtype in (torch.float32, torch.bfloat16):
            assert_accurate(make(2, classes, "normal", dtype, generator, device, temperature=2.0, **KINDS[kind]))


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("kind", ["forward", "jsd0.3"])
def test_off_alignment(kind: str, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    for classes in (1, 2, 3, 7, 8, 9, 31, 33, 41, 100, 401, 1000, 1271):
        case = make(3, classes, "normal", dtype, generator, device, temperature=2.0, **KINDS[kind])
        shifted = {"student": off_alignment(case.student), "teacher": off_alignment(case.teacher)}
        for sides in (["student"], ["teacher"], ["student", "teacher"]):
            assert_accurate(replace(case, **{side: shifted[side] for side in sides}))


def test_streamed_gradients_are_the_cached_ones(generator: torch.Generator) -> None:
    """Gradients beyond 24 MiB are written around the caches of the CPU; odd rows start off their alignment."""
    student, teacher = logits(198, 32000, "normal", torch.float32, generator)
    for classes in (32000, 31999):
        s, t = student[:, :classes].contiguous(), teacher[:, :classes].contiguous()
        whole = Case(s, t, torch.ones(198), {"temperature": 2.0, "kind": "forward"}).run(fused)
        part = Case(s[:5], t[:5], torch.ones(5), {"temperature": 2.0, "kind": "forward"}).run(fused)
        for a, b in zip(whole, part, strict=True):
            assert torch.equal(a[:5], b)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("temperature", [1.0, 4.0, "rows"], ids=ids)
@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd0.3", "soft_cross_entropy"])
def test_cross_entropy_with_labels(
    kind: str, temperature: float | str, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    target = torch.randint(401, (24,), generator=generator)
    target[::5] = -1
    weight = torch.randn(24, generator=generator)
    scales = {"kd_scale": 0.7, "task_scale": 0.3, "ignore_index": -1, "target": target, "weight": weight}
    assert_accurate(make(24, 401, "normal", dtype, generator, device, temperature=temperature, **KINDS[kind], **scales))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignored", [0, 2, 6])
def test_reductions(
    reduction: str, weighted: bool, ignored: int, device: torch.device, generator: torch.Generator
) -> None:
    student, teacher = logits(6, 9, "normal", torch.float64, generator, device)
    target = torch.arange(6)
    target[:ignored] = -100
    weight = torch.tensor([-1.0, 0.0, 2.0, 0.0, 0.5, 3.0], dtype=torch.float64) if weighted else None
    options = {"kd_scale": 0.9, "task_scale": 0.1, "temperature": 3.0, "reduction": reduction}
    student.requires_grad_()
    expected = reference.divergence(student.cpu(), teacher.cpu(), target, weight=weight, **options)
    there = None if weight is None else weight.to(device)
    ours, terms = (x.cpu() for x in divergence(student, teacher, target.to(device), weight=there, **options))
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(0.1 * terms[0] + 0.9 * terms[1], ours.detach())
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    gradients = [torch.autograd.grad(loss, student, upstream)[0] for loss in (ours, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("rows", [12, 40])
def test_valid_rows_are_those_of_this_call(rows: int, device: torch.device, generator: torch.Generator) -> None:
    """Their number lies where an earlier call may have left its own."""
    student, teacher = logits(rows, 60, "normal", torch.float32, generator, device)
    student.requires_grad_()
    options = {"kd_scale": 0.9, "task_scale": 0.1, "reduction": "mean"}
    for valid in (rows, 3, 7, 1, 5):
        target = torch.arange(rows) % 60
        target[valid:] = -100
        exact = student.detach().cpu().double().requires_grad_()
        expected = reference.divergence(exact, teacher.cpu().double(), target, temperature=2.0, **options)
        ours, _ = divergence(student, teacher, target.to(device), temperature=2.0, **options)
        torch.testing.assert_close(ours.detach().cpu().double(), expected.detach(), rtol=1e-5, atol=0)
        gradients = torch.autograd.grad(ours, student)[0], torch.autograd.grad(expected, exact)[0]
        torch.testing.assert_close(gradients[0].cpu().double(), gradients[1], rtol=1e-4, atol=1e-7)


def test_reduction_of_many_rows(device: torch.device, generator: torch.Generator) -> None:
    """So many that a cluster of blocks counts the valid ones and sums the losses, after the kernel of the rows."""
    student, teacher = logits(9000, 3, "normal", torch.float32, generator, device)
    target = torch.randint(3, (9000,), generator=generator)
    target[::7] = -100
    options = {"kd_scale": 0.9, "task_scale": 0.1, "temperature": 2.0, "reduction": "mean"}
    expected = reference.divergence(student.cpu().double(), teacher.cpu().double(), target, **options)
    ours, _ = divergence(student, teacher, target.to(device), **options)
    torch.testing.assert_close(ours.cpu().double(), expected, rtol=1e-6, atol=0)


def test_reference_is_what_torch_computes(generator: torch.Generator) -> None:
    """The truth of these tests against torch.nn.functional, where the latter is exact."""
    s, t = logits(8, 17, "normal", torch.float64, generator)
    F = torch.nn.functional  # noqa: N806
    log_q, p = F.log_softmax(s / 2, -1), F.softmax(t / 2, -1)
    target = torch.arange(8)
    m = 0.3 * p + 0.7 * log_q.exp()
    jsd = 0.3 * F.kl_div(m.log(), p, reduction="sum") + 0.7 * F.kl_div(m.log(), log_q.exp(), reduction="sum")
    for kind, expected in {
        "forward": F.kl_div(log_q, p, reduction="batchmean") * 4,
        "reverse": F.kl_div(p.log(), log_q, reduction="batchmean", log_target=True) * 4,
        "soft_cross_entropy": F.cross_entropy(s / 2, p) * 4,
        "jensen_shannon": jsd / 8 * 4,
    }.items():
        torch.testing.assert_close(reference.divergence(s, t, kind=kind, temperature=2.0, beta=0.3), expected)
    both = reference.divergence(s, t, target, kd_scale=0.0, task_scale=1.0)
    torch.testing.assert_close(both, F.cross_entropy(s, target))


# ---- infinities, NaN, masks --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("kind", ["forward", "reverse", "soft_cross_entropy"])
def test_infinite_divergence(
    kind: str, dtype: torch.dtype, device: torch.device, fixed_order: bool, generator: torch.Generator
) -> None:
    """The loss of the row is inf; its "to" side still learns; the "from" side's gradient says that there is none."""
    case = make(3, 37, "normal", dtype, generator, device, temperature=2.0, kind=kind)
    to, source = (case.teacher, case.student) if kind == "reverse" else (case.student, case.teacher)
    to[1, 5] = -math.inf
    source[1, 7] = -math.inf
    loss, student_gradient, teacher_gradient = case.run(fused)
    assert loss[1] == math.inf
    to_gradient, from_gradient = student_gradient, teacher_gradient
    if kind == "reverse":
        to_gradient, from_gradient = teacher_gradient, student_gradient
    p_to, p_source = (torch.softmax(x[1].cpu().double() / 2, -1) for x in (to, source))
    expected = case.upstream[1].double() * 2 * (p_to - p_source)
    torch.testing.assert_close(to_gradient[1], expected, rtol=3 * torch.finfo(dtype).eps, atol=1e-6)
    assert not torch.isfinite(from_gradient[1, [0, 5, 36]]).any()
    assert from_gradient[1, 7] == 0
    for row in (0, 2):  # untouched
        alone = Case(*(x[row : row + 1] for x in (case.student, case.teacher, case.upstream)), case.options)
        for all_rows, one in zip((loss, student_gradient, teacher_gradient), alone.run(fused), strict=True):
            assert_same(all_rows[row], one[0], dtype, fixed_order)


@pytest.mark.parametrize("teacher_gradient", [True, False], ids=["both", "student"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=ids)
def test_nan_stays_in_its_row(
    kind: str, side: str, poison: float, teacher_gradient: bool, device: torch.device, generator: torch.Generator
) -> None:
    for dtype in DTYPES:
        case = make(3, 37, "normal", dtype, generator, device, temperature=2.0, **KINDS[kind])
        clean = case.run(fused, teacher_gradient)
        getattr(case, side)[1, 20] = poison
        for before, after in zip(clean, case.run(fused, teacher_gradient), strict=True):
            assert torch.equal(before[[0, 2]], after[[0, 2]])
            # no class of the row gets a plausible number; nor the row that is -inf throughout
            assert torch.isnan(after[1]).all()
        getattr(case, side)[1, :] = -math.inf
        assert all(torch.isnan(part[1]).all() for part in case.run(fused, teacher_gradient))


@pytest.mark.parametrize("classes", [37, 1271, 2500])
@pytest.mark.parametrize("kind", KINDS)
def test_masked_classes(kind: str, classes: int, device: torch.device, generator: torch.Generator) -> None:
    """-inf on both sides, here and there, in whole stretches and nearly everywhere: the others as if they were alone."""
    for dtype in DTYPES:
        case = make(3, classes, "normal", dtype, generator, device, temperature=2.0, **KINDS[kind])
        masked = torch.zeros(3, classes, dtype=torch.bool)
        masked[0] = torch.rand(classes, generator=generator) < 0.3
        masked[1, classes // 3 :] = True
        masked[2, 2:-3] = True
        case.student[masked] = -math.inf
        case.teacher[masked] = -math.inf
        case = replace(case, student=off_alignment(case.student), teacher=off_alignment(case.teacher))
        kept = ~masked
        eps = float(torch.finfo(dtype).eps)
        for teacher_gradient in (True, False):
            loss, *gradients = case.run(fused, teacher_gradient)
            for row in range(3):
                sides = (x[row : row + 1].cpu()[:, kept[row]] for x in (case.student, case.teacher))
                alone = Case(*sides, case.upstream[row : row + 1], case.options)
                expected = truth(alone)
                torch.testing.assert_close(loss[row], expected[0][0], rtol=1e-5, atol=1e-6)
                for ours, theirs in zip(gradients, expected[1:], strict=False):
                    torch.testing.assert_close(
                        ours[row, kept[row]], theirs[0], rtol=4 * eps + 1e-5, atol=4 * eps + 1e-6
                    )
                    assert not ours[row, masked[row]].any()


@pytest.mark.parametrize("teacher_gradient", [True, False], ids=["both", "student"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_left_out_may_hold_anything(
    kind: str, teacher_gradient: bool, device: torch.device, generator: torch.Generator
) -> None:
    for dtype in DTYPES:
        case = make(4, 37, "normal", dtype, generator, device, temperature=2.0, **KINDS[kind])
        case.student[1], case.teacher[1] = math.nan, math.inf
        case.student[2, 3], case.teacher[2, 4] = math.inf, math.nan
        target = torch.tensor([3, -100, 1, 2])
        weight = torch.tensor([2.0, 1.0, 0.0, -1.0])
        case.options.update(target=target, weight=weight, task_scale=0.5)
        for part in case.run(fused, teacher_gradient):
            assert torch.isfinite(part).all()
            assert (part[1:3] == 0).all()
            assert (part[[0, 3]] != 0).any()


@pytest.mark.parametrize("teacher_gradient", [True, False], ids=["both", "student"])
@pytest.mark.parametrize("beta", [0.01, 0.3, 0.5, 0.99, 1e-9, 1 - 1e-9])
def test_jsd_where_probabilities_underflow(beta: float, teacher_gradient: bool, device: torch.device) -> None:
    """Both sides, either side, or their ratio below the smallest normal number (NaN in Liger-Kernel#1453)."""
    below = torch.tensor([0.0, -80.0, -86.0, -87.5, -88.0, -90.0, -95.0, -103.0, -104.0, -120.0, -1e4, -math.inf])
    student, teacher = below.repeat_interleave(12), below.repeat(12)  # every pair
    student, teacher = (torch.cat([x.new_full((30,), 1.0), x])[None].clone() for x in (student, teacher))
    options = {"kind": "jensen_shannon", "beta": beta, "temperature": 1.0}
    case = Case(student, teacher, torch.ones(1), options).to(device)
    for part, expected in zip(case.run(fused, teacher_gradient), truth(case), strict=False):
        torch.testing.assert_close(part, expected, rtol=2e-6, atol=1e-8)


# ---- temperatures, weights, small and large numbers ---------------------------------------------


@pytest.mark.parametrize("temperature", [1e10, 1e40, 1e100, 1e155, 1e308])
@pytest.mark.parametrize("kind", [name for name in KINDS if name != "soft_cross_entropy"])
def test_overflowing_temperatures(
    kind: str, temperature: float, device: torch.device, generator: torch.Generator
) -> None:
    """Softmaxes are uniform to the last digit, and T^2 overflows: no NaN, and nothing below 0, comes of it."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        student, teacher = logits(5, 37, "normal", dtype, generator, device)
        student.requires_grad_()
        rows, _ = divergence(student, teacher, temperature=temperature, reduction="none", **KINDS[kind])
        rows.sum().backward()
        assert (rows >= 0).all()
        assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("temperature", [1e-320, 1e-40, 1e-6, 1e-3])
@pytest.mark.parametrize("kind", KINDS)
def test_small_temperatures(kind: str, temperature: float, device: torch.device, generator: torch.Generator) -> None:
    """Finite, and T times the gap of the logits to first order; the hard cross-entropy does not depend on T."""
    for dtype in (torch.float32, torch.float64):
        student, teacher = logits(5, 37, "normal", dtype, generator, device)
        target = torch.arange(5)
        student.requires_grad_()
        options = {"temperature": temperature, **KINDS[kind]}
        loss, terms = divergence(student, teacher, target.to(device), task_scale=1.0, reduction="none", **options)
        loss.sum().backward()
        assert torch.isfinite(student.grad).all()
        student, teacher, terms = (x.detach().cpu().double() for x in (student, teacher, terms))
        task = torch.nn.functional.cross_entropy(student, target, reduction="none")
        torch.testing.assert_close(terms[0], task, rtol=1e-6, atol=1e-6)
        expected = torch.zeros(5, dtype=torch.float64)
        if temperature >= 1e-6:
            expected = reference.divergence_rows(student, teacher, **options)
        torch.testing.assert_close(terms[1], expected, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("temperature", [1e3, 1e6, 1e40])
@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd0.5"])
def test_large_temperatures(kind: str, temperature: float, device: torch.device, generator: torch.Generator) -> None:
    """Gradients near their limit (s - mean s - t + mean t) / K, labels unaffected, losses of float64 too."""
    target = torch.arange(5)
    for dtype in (torch.float32, torch.float64):
        student, teacher = logits(5, 37, "normal", dtype, generator, device)
        student.requires_grad_()
        there = target.to(device)
        _, terms = divergence(student, teacher, there, temperature=temperature, reduction="none", task_scale=1.0)
        double = student.detach().cpu().double().requires_grad_()
        task = torch.nn.functional.cross_entropy(double.detach(), target, reduction="none")
        torch.testing.assert_close(terms[0].cpu().double(), task, rtol=1e-6, atol=1e-6)
        if temperature > 1e6:
            continue
        options = {"temperature": temperature, "reduction": "sum", **KINDS[kind]}
        gradient = torch.autograd.grad(divergence(student, teacher, **options)[0], student)[0].cpu().double()
        expected = torch.autograd.grad(reference.divergence(double, teacher.cpu().double(), **options), double)[0]
        # T (q - p), where each of the two is rounded at its size, 1 / K
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=4 * torch.finfo(dtype).eps * temperature / 37)


def test_float16_gradients_survive_a_loss_scale(device: torch.device, generator: torch.Generator) -> None:
    """The gradient of a mean is below float16's smallest number until GradScaler's 65536 has multiplied it."""
    student, teacher = logits(512, 1000, "normal", torch.float16, generator, device)
    student.requires_grad_()
    (65536 * divergence(student, teacher, reduction="mean")[0]).backward()
    double = student.detach().cpu().double().requires_grad_()
    (65536 * reference.divergence(double, teacher.cpu().double(), reduction="mean")).backward()
    torch.testing.assert_close(student.grad.cpu().double(), double.grad, rtol=2e-3, atol=6e-8)


def test_float16_gradient_overflows_to_infinity(device: torch.device) -> None:
    student = torch.tensor([[0.0, 60000.0]], dtype=torch.float16, device=device, requires_grad=True)
    teacher = student.detach().flip(-1)
    divergence(student, teacher, temperature=1e2)[0].backward()
    assert student.grad.tolist() == [[-100.0, 100.0]]
    student.grad = None
    divergence(student, teacher, temperature=1e2, weight=torch.tensor([1e4], device=device))[0].backward()
    assert student.grad.tolist() == [[-math.inf, math.inf]]


@pytest.mark.parametrize("teacher_gradient", [True, False], ids=["both", "student"])
def test_negative_weights(teacher_gradient: bool, device: torch.device, generator: torch.Generator) -> None:
    for kind in KINDS:
        case = make(4, 37, "normal", torch.float32, generator, device, temperature=2.0, **KINDS[kind])
        plus = case.run(fused, teacher_gradient)
        case.options["weight"] = -torch.ones(4)
        for a, b in zip(plus, case.run(fused, teacher_gradient), strict=True):
            assert torch.equal(a, -b)


# ---- numbers that cannot be ----------------------------------------------------------------------


def assert_only_this_row(case: Case, clean: Case, row: int, reads_values: bool, message: str) -> None:
    """A row that cannot be computed: an error where kernels look, else NaN, and the other rows as they were."""
    if reads_values:
        with pytest.raises(RuntimeError, match=message):
            case.run(fused)
        return
    others = [i for i in range(len(clean.upstream)) if i != row]
    for before, after in zip(clean.run(fused), case.run(fused), strict=True):
        assert torch.isnan(after[row]).all()
        assert torch.equal(before[others], after[others])


@pytest.mark.parametrize("teacher_gradient", [True, False], ids=["both", "student"])
@pytest.mark.parametrize("task_scale", [0.0, 0.5])
@pytest.mark.parametrize("label", [37, -1, 2**40, -(2**63)])
def test_labels_out_of_range(
    label: int,
    task_scale: float,
    teacher_gradient: bool,
    device: torch.device,
    reads_values: bool,
    generator: torch.Generator,
) -> None:
    target = torch.tensor([3, -100, 36, 0])
    wrong = target.index_fill(0, torch.tensor([2]), label)
    for kind in KINDS:
        for dtype in DTYPES:
            options = {"temperature": 2.0, "task_scale": task_scale, "target": target, **KINDS[kind]}
            case = make(4, 37, "normal", dtype, generator, device, **options)
            broken = replace(case, options={**case.options, "target": wrong})
            assert_only_this_row(broken, case, 2, reads_values, rf"target\[2\] is {label}, must be in \[0, 37\)")


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("temperature", [0.0, -2.0, math.nan, math.inf], ids=ids)
def test_temperatures_out_of_range(
    temperature: float, wide: bool, device: torch.device, reads_values: bool, generator: torch.Generator
) -> None:
    temperatures = torch.tensor([1.0, 4.0, 0.5, 2.0], dtype=torch.float64 if wide else torch.float32)
    wrong = temperatures.index_fill(0, torch.tensor([1]), temperature)
    for kind in KINDS:
        for dtype in DTYPES:
            case = make(4, 37, "normal", dtype, generator, device, temperature=temperatures, **KINDS[kind])
            broken = replace(case, options={**case.options, "temperature": wrong})
            assert_only_this_row(broken, case, 1, reads_values, r"temperature\[1\] is .*, must be positive and finite")


# ---- the same bits everywhere ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd0.3"])
def test_bits_do_not_depend_on_threads(kind: str, cpu: torch.device, generator: torch.Generator) -> None:
    student, teacher = logits(61, 1271, "normal", torch.float32, generator, cpu)
    target = torch.arange(61)

    def run() -> list[Tensor]:
        s, t = student.clone().requires_grad_(), teacher.clone().requires_grad_()
        loss, terms = divergence(s, t, target, temperature=3.0, task_scale=0.5, **KINDS[kind])
        (3 * loss).backward()
        return [loss.detach(), terms, s.grad, t.grad]

    results = []
    for count in (1, 2, 5, 2):
        torch.set_num_threads(count)
        results.append(run())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_instruction_sets_agree(generator: torch.Generator) -> None:
    sets = ["baseline", "avx2", "avx512"]
    sets = sets[: sets.index(build_info()["cpu_instruction_set_best"]) + 1]
    for kind in KINDS:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            case = make(8, 401, "normal", dtype, generator, temperature=0.05, **KINDS[kind])
            results = []
            try:
                for name in sets:
                    _C.set_instruction_set(name)
                    results.append(case.run(fused))
            finally:
                _C.set_instruction_set(sets[-1])
            for other in results[1:]:
                torch.testing.assert_close(other[0], results[0][0], rtol=1e-6, atol=1e-9)
                for a, b in zip(other[1:], results[0][1:], strict=True):
                    torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("teacher_gradient", [True, False], ids=["both", "student"])
@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd0.3"])
def test_strides(
    kind: str, teacher_gradient: bool, device: torch.device, fixed_order: bool, generator: torch.Generator
) -> None:
    """Sliced vocabularies, transposes, expanded rows and classes: as their contiguous copies."""
    for dtype in DTYPES:
        base, wide = (torch.randn(n, n, generator=generator).to(device, dtype) for n in (40, 70))
        views = {
            "vocabulary": base[3:20, 1:34],
            "transposed": base.t()[:17, :33],
            "rows expanded": base[:1, :33].expand(17, 33),
            "classes expanded": base[:17, :1].expand(17, 33),
            "every second": wide[:34:2, :66:2],
            "one class": base[:17, 5:6],
        }
        options = {"temperature": 2.0, **KINDS[kind]}
        for view in views.values():
            other = torch.randn(view.shape, generator=generator).to(device, dtype)
            for student, teacher in ((view, other), (other, view)):
                strided = Case(student, teacher, torch.ones(17), options)
                packed = Case(student.contiguous(), teacher.contiguous(), torch.ones(17), options)
                for x, y in zip(strided.run(fused, teacher_gradient), packed.run(fused, teacher_gradient), strict=True):
                    assert_same(x, y, dtype, fixed_order)
