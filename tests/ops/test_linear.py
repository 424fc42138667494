"""Numbers of the linear losses: the truth of heads and divergence together, for chunks of every size."""

from __future__ import annotations

import pytest
import torch
from linear_cases import NAMES, Heads, assert_right, make_heads
from torch import Tensor

import fastkd
from fastkd import LinearHead
from fastkd import functional as F  # noqa: N812
from fastkd.ops.linear import linear_divergence

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = {
    "forward": {"kind": "forward"},
    "reverse": {"kind": "reverse"},
    "soft_cross_entropy": {"kind": "soft_cross_entropy"},
    "jsd": {"kind": "jensen_shannon", "beta": 0.3},
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ROW = 131 * 4 * 2  # bytes of two rows of float32 logits


def ids(value: object) -> str:
    return str(value).removeprefix("torch.")


def labels(rows: int, classes: int, generator: torch.Generator, ignored: int = 5) -> Tensor:
    target = torch.randint(classes, (rows,), generator=generator)
    target[torch.randperm(rows, generator=generator)[:ignored]] = -100
    return target


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_truth(kind: str, reduction: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    upstream = torch.randn(23, generator=generator) if reduction == "none" else torch.tensor(0.7)
    plain = {**KINDS[kind], "reduction": reduction, "temperature": 2.0}
    weight = torch.rand(23, generator=generator, dtype=torch.float64)
    masked = {
        **plain,
        "target": labels(23, 131, generator),
        "weight": weight * (weight > 0.2),
        "temperature": torch.rand(23, generator=generator, dtype=torch.float64) * 3 + 0.5,
        "kd_scale": 0.7,
        "task_scale": 0.3,
    }
    capped = {"student_numbers": (0.5, 3.0), "teacher_numbers": (1.5, 5.0)}
    for budget in (1, 3 * ROW, 1 << 30):
        for heads in (
            make_heads(generator, dtype=dtype, options=plain),
            make_heads(generator, dtype=dtype, options=masked, **capped),
            make_heads(generator, dtype=dtype, options=masked, ready=True, student_numbers=(0.25, None)),
        ):
            assert_right(heads, upstream, memory_budget=budget)


@pytest.mark.parametrize(
    "shape", [(0, 3, 2, 7), (1, 1, 1, 1), (5, 3, 2, 1), (3, 8, 16, 1271), (2, 5, 4, 32000)], ids=ids
)
def test_shapes(shape: tuple[int, int, int, int], generator: torch.Generator) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for kind in KINDS.values():
            assert_right(make_heads(generator, shape, dtype, bias=False, options=kind), torch.tensor(1.0))


@pytest.mark.cuda_kernels
@pytest.mark.parametrize("skip_ignored", [False, True])
def test_on_every_device(skip_ignored: bool, device: torch.device, generator: torch.Generator) -> None:
    for kind in KINDS.values():
        options = {**kind, "target": labels(23, 131, generator).to(device), "task_scale": 0.5}
        for ready in (False, True):
            heads = make_heads(generator, device=device, options=options, ready=ready, student_numbers=(1.0, 4.0))
            assert_right(heads, torch.tensor(1.0), memory_budget=5 * ROW, skip_ignored=skip_ignored)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_on_both_sides_is_exactly_zero(kind: str, generator: torch.Generator) -> None:
    if kind == "soft_cross_entropy":
        kind = "forward"
    for dtype in DTYPES:
        heads = make_heads(generator, (37, 24, 24, 401), dtype, student_numbers=(0.5, 3.0), teacher_numbers=(0.5, 3.0))
        heads.tensors[3:] = [x.clone() for x in heads.tensors[:3]]
        heads.options = {**KINDS[kind], "reduction": "none", "temperature": 0.7}
        for budget in (1, 9 * 401 * 8, 1 << 30):
            results = heads.run(heads.fused, torch.tensor(1.0), memory_budget=budget)
            assert (results["loss"] == 0).all()
            for name in NAMES[:3] if kind == "forward" else []:
                assert (results[name] == 0).all()


def test_what_is_ignored_may_hold_anything(generator: torch.Generator) -> None:
    target, weight = labels(23, 131, generator), torch.ones(23)
    weight[3] = 0.0
    lost = (target == -100) | (weight == 0)
    options = {"target": target, "weight": weight, "task_scale": 0.5}
    heads = make_heads(generator, options=options)
    whole = heads.run(heads.fused, torch.tensor(1.0))
    for value in (torch.nan, torch.inf):
        for i in (0, 3):
            heads.tensors[i][lost] = value
        for skip in (True, False):
            broken = heads.run(heads.fused, torch.tensor(1.0), skip_ignored=skip, memory_budget=7 * ROW)
            for name, expected in whole.items():
                torch.testing.assert_close(broken[name], expected, rtol=1e-5, atol=1e-6)
            assert (broken["student_hidden"][lost] == 0).all()


@pytest.mark.parametrize("reduction", ["sum", "batchmean", "mean", "none"])
def test_all_ignored_is_zero(reduction: str, generator: torch.Generator) -> None:
    options = {"target": torch.full((23,), -100), "reduction": reduction}
    heads = make_heads(generator, options=options)
    for skip in (True, False):
        for result in heads.run(heads.fused, torch.tensor(1.0), skip_ignored=skip).values():
            assert (result == 0).all()


def test_classes_of_padded_vocabularies(generator: torch.Generator) -> None:
    for ready in (False, True):
        heads = make_heads(generator, ready=ready)
        wide = heads.tensors[3] if ready else heads.tensors[4]
        padding = torch.full((wide.shape[0], 9) if ready else (9, wide.shape[1]), torch.nan)
        heads.tensors[3 if ready else 4] = torch.cat([wide, padding], 1 if ready else 0)
        if not ready:
            heads.tensors[5] = torch.cat([heads.tensors[5], torch.full((9,), torch.nan)])
        with pytest.raises(
            ValueError, match=r"131 classes, the teacher's 140; where one .* is padded, give classes=131"
        ):
            heads.fused(heads.leaves())
        for classes in (131, 100):
            results = heads.run(heads.fused, torch.tensor(1.0), classes=classes)
            alone = make_heads(generator, ready=ready)
            alone.tensors = [None if x is None else x.detach() for x in heads.tensors]
            alone.tensors[1], alone.tensors[2] = (x[:classes] for x in heads.tensors[1:3])
            if ready:
                alone.tensors[3] = heads.tensors[3][:, :classes].contiguous()
            else:
                alone.tensors[4], alone.tensors[5] = (x[:classes] for x in heads.tensors[4:])
            expected = alone.run(alone.fused, torch.tensor(1.0))
            for name, result in results.items():
                if name in ("student_weight", "student_bias", "teacher_weight", "teacher_bias"):
                    assert (result[classes:] == 0).all()
                    result = result[:classes]
                elif ready and name == "teacher_hidden":
                    assert (result[:, classes:] == 0).all()
                    result = result[:, :classes]
                torch.testing.assert_close(result, expected[name])


def test_more_dimensions_and_ready_logits_with_a_stride(generator: torch.Generator) -> None:
    heads = make_heads(generator, (24, 16, 24, 131), ready=True)
    hidden, weight, _, logits, *_ = heads.tensors
    wide = torch.full((4, 6, 150), torch.nan)
    wide[..., :131] = logits.reshape(4, 6, 131)
    target = labels(24, 131, generator).reshape(4, 6)
    loss = F.linear_kl_div(
        hidden.reshape(4, 6, 16), weight, teacher_logits=wide[..., :131], target=target, reduction="none"
    )
    expected = F.kl_div(hidden @ weight.T, logits, target=target.flatten(), reduction="none")
    assert loss.shape == (4, 6)
    torch.testing.assert_close(loss.flatten(), expected)
    assert torch.equal(
        loss,
        F.linear_kl_div(
            hidden.reshape(4, 6, 16), weight, teacher_logits=wide, classes=131, target=target, reduction="none"
        ),
    )


def test_functions_and_modules_are_those_of_logits(generator: torch.Generator) -> None:
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias = make_heads(generator).tensors
    head = torch.nn.Linear(16, 131)
    head.load_state_dict({"weight": weight, "bias": bias})
    teacher = LinearHead(teacher_weight, teacher_bias)
    student_logits, teacher_logits = head(hidden), teacher_hidden @ teacher_weight.T + teacher_bias
    target = labels(23, 131, generator)
    sides = hidden, head, teacher_hidden, teacher
    terms = F.kd_loss(student_logits, teacher_logits, target, 2.0, 0.3, return_terms=True)
    theirs = F.linear_kd_loss(*sides, target, 2.0, 0.3, return_terms=True)
    for name, value in terms[1].items():
        torch.testing.assert_close(theirs[1][name], value)
    for ours, expected in (
        (theirs[0], terms[0]),
        (
            F.linear_kd_loss(hidden, head, None, None, target, teacher_logits=teacher_logits),
            F.kd_loss(student_logits, teacher_logits, target, 1.0, 0.5),
        ),
        (
            F.linear_kl_div(*sides, 2.0, direction="reverse", target=target),
            F.kl_div(student_logits, teacher_logits, 2.0, direction="reverse", target=target),
        ),
        (F.linear_js_div(*sides, beta=0.1), F.js_div(student_logits, teacher_logits, beta=0.1)),
        (fastkd.LinearKLDivLoss(2.0, "sum")(*sides), fastkd.KLDivLoss(2.0, "sum")(student_logits, teacher_logits)),
        (fastkd.LinearJSDivLoss(2.0)(*sides, target), fastkd.JSDivLoss(2.0)(student_logits, teacher_logits, target)),
        (fastkd.LinearKDLoss(2.0, 0.9)(*sides, target), fastkd.KDLoss(2.0)(student_logits, teacher_logits, target)),
    ):
        torch.testing.assert_close(ours, expected)


def test_entropy_of_the_student(generator: torch.Generator) -> None:
    heads = make_heads(generator, options={"target": labels(23, 131, generator), "temperature": 2.0})
    hidden, weight, bias, *teacher = heads.tensors
    entropy = linear_divergence(
        hidden, LinearHead(weight, bias), teacher[0], LinearHead(*teacher[1:]), student_entropy=True, **heads.options
    )[2]
    expected = fastkd.logit_stats(hidden @ weight.T + bias, 2.0).entropy * (heads.options["target"] != -100)
    torch.testing.assert_close(entropy, expected)


def test_16_bit_logits_where_asked(generator: torch.Generator) -> None:
    """Half the memory, at the price that the documentation names."""
    for dtype in (torch.bfloat16, torch.float16):
        heads = make_heads(generator, dtype=dtype, bias=False)
        truth = heads.run(heads.plain, torch.tensor(1.0), torch.float64)
        rough = heads.run(heads.fused, torch.tensor(1.0), logits_dtype=dtype)
        fine = heads.run(heads.fused, torch.tensor(1.0))
        eps = torch.finfo(dtype).eps
        for name in ("loss", "student_hidden", "student_weight"):
            scale = truth[name].norm()
            assert (fine[name] - truth[name]).norm() <= eps * scale
            assert (rough[name] - truth[name]).norm() <= 16 * eps * scale


def test_a_loss_scale_does_not_cost_digits(generator: torch.Generator) -> None:
    """float16: gradients of a mean over many rows are below its smallest number until a loss scale multiplies them."""
    heads = make_heads(generator, (2048, 8, 8, 131), torch.float16, bias=False)
    ours = heads.run(heads.fused, torch.tensor(2.0**14))
    truth = heads.run(heads.plain, torch.tensor(2.0**14), torch.float64)
    for name in ("student_hidden", "student_weight"):
        assert (ours[name] - truth[name]).norm() <= 2.0**-10 * truth[name].norm()


def test_the_bits_do_not_change(generator: torch.Generator) -> None:
    heads = make_heads(generator, (64, 32, 48, 1271), options={"kind": "jensen_shannon"})
    first, second = (heads.run(heads.fused, torch.tensor(0.3), memory_budget=1 << 18) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name])


def test_a_head_with_no_gradient_has_none_in_memory(generator: torch.Generator) -> None:
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias = make_heads(generator).leaves()
    operator = torch.ops.fastkd.linear_divergence
    numbers = (
        None,
        None,
        None,
        1.0,
        0,
        0.5,
        1.0,
        0.0,
        1.0,
        0.0,
        1.0,
        0.0,
        -100,
        2,
        131,
        torch.float32,
        1 << 20,
        True,
        False,
        *("", 0, 1),
    )
    tensors = hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias
    for wanted in ([True] + [False] * 5, [False] * 6, [False, True, False, True, False, False]):
        with torch.no_grad():
            gradients = operator(*tensors, *numbers, wanted)[4:]
        for x, gradient, wants in zip(tensors, gradients, wanted, strict=True):
            assert gradient.shape == (x.shape if wants else (0,))


def test_frozen_sides_get_no_gradient(generator: torch.Generator) -> None:
    heads: Heads = make_heads(generator)
    every = heads.run(heads.fused, torch.tensor(1.0))
    for trained in ((0,), (1,), (2,), (0, 1), (3,), (4, 5), (1, 3)):
        for reduction in ("batchmean", "none"):
            leaves = [x.detach().requires_grad_(i in trained) for i, x in enumerate(heads.tensors)]
            value = heads.fused(leaves, reduction=reduction, memory_budget=5 * ROW)
            value.mean().backward()
            for i, x in enumerate(leaves):
                assert (x.grad is not None) == (i in trained)
                if i in trained:
                    torch.testing.assert_close(x.grad.double(), every[NAMES[i]], rtol=1e-5, atol=1e-6)
