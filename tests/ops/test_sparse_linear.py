"""A head against a sparse teacher: the truth of both together, for chunks of every size; inside torch; what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from linear_cases import NAMES, SparseHead, assert_right, make_heads, make_sparse_head
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastkd
from fastkd import LinearHead
from fastkd import functional as F  # noqa: N812

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = {
    "forward": {"kind": "forward"},
    "reverse": {"kind": "reverse"},
    "jsd": {"kind": "jensen_shannon", "beta": 0.3},
}
TAILS = ("bucket", "renormalize", "drop")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ROW = 131 * 4 * 2  # bytes of a row of float32 logits and their gradient


def ids(value: object) -> str:
    return str(value).removeprefix("torch.")


def labels(rows: int, classes: int, generator: torch.Generator, ignored: int = 5) -> Tensor:
    target = torch.randint(classes, (rows,), generator=generator)
    target[torch.randperm(rows, generator=generator)[:ignored]] = -100
    return target


# ---- truth ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", KINDS)
def test_truth(kind: str, tail: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    weight = torch.rand(23, generator=generator, dtype=torch.float64)
    for reduction, budget in (("none", 5 * ROW), ("sum", 1), ("batchmean", 3 * ROW), ("mean", 1 << 30)):
        upstream = torch.randn(23, generator=generator) if reduction == "none" else torch.tensor(0.7)
        plain = {**KINDS[kind], "tail": tail, "reduction": reduction, "temperature": 2.0}
        masked = {
            **plain,
            "target": labels(23, 131, generator),
            "weight": weight * (weight > 0.2),
            "temperature": torch.rand(23, generator=generator, dtype=torch.float64) * 3 + 0.5,
            "kd_scale": 0.7,
            "task_scale": 0.3,
        }
        for head in (
            make_sparse_head(generator, dtype=dtype, bias=False, options=plain),
            make_sparse_head(generator, dtype=dtype, options=masked, student_numbers=(0.5, 3.0)),
        ):
            assert_right(head, upstream, memory_budget=budget)


@pytest.mark.parametrize(
    "shape", [(0, 3, 2, 7), (1, 1, 1, 1), (5, 3, 1, 2), (3, 8, 64, 1271), (2, 5, 40, 32000)], ids=ids
)
def test_shapes(shape: tuple[int, int, int, int], generator: torch.Generator) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for kind in KINDS.values():
            assert_right(make_sparse_head(generator, shape, dtype, options=kind), torch.tensor(1.0))


@pytest.mark.parametrize("kind", KINDS)
def test_given_tail(kind: str, generator: torch.Generator) -> None:
    """A tail far below what log-probabilities in float32 leave."""
    for dtype in DTYPES:
        head = make_sparse_head(generator, dtype=dtype, options=KINDS[kind])
        logits = 2 * torch.randn(23, 131, generator=generator, dtype=torch.float64)
        logits[:, :7] += torch.linspace(5, 40, 23, dtype=torch.float64)[:, None]
        full = torch.log_softmax(logits, -1)
        head.options["teacher_indices"] = torch.arange(7).repeat(23, 1)
        head.options["teacher_log_probs"] = full[:, :7].float()
        head.options["teacher_tail_log_prob"] = full[:, 7:].logsumexp(-1).float()
        assert_right(head, torch.tensor(1.0), memory_budget=5 * ROW)


@pytest.mark.cuda_kernels
@pytest.mark.parametrize("skip_ignored", [False, True])
def test_on_every_device(skip_ignored: bool, device: torch.device, generator: torch.Generator) -> None:
    for kind, tail in zip(KINDS.values(), TAILS, strict=True):
        target = labels(23, 131, generator).to(device)
        options = {**kind, "tail": tail, "target": target, "task_scale": 0.5}
        head = make_sparse_head(generator, device=device, options=options, student_numbers=(1.0, 4.0))
        assert_right(head, torch.tensor(1.0), memory_budget=9 * ROW, skip_ignored=skip_ignored)


@pytest.mark.parametrize("kind", KINDS)
def test_every_class_is_the_dense_loss(kind: str, generator: torch.Generator) -> None:
    heads = make_heads(generator, ready=True, options={**KINDS[kind], "temperature": 2.0})
    log_probs, indices = torch.log_softmax(heads.tensors[3] / 2.0, -1).sort(-1, descending=True)
    expected = heads.run(heads.fused, torch.tensor(1.0))
    for tail in ("bucket", "renormalize"):
        options = {**heads.options, "teacher_indices": indices, "teacher_log_probs": log_probs, "tail": tail}
        head = SparseHead([*heads.tensors[:3], None, None, None], options=options)
        for name, value in head.run(head.fused, torch.tensor(1.0), memory_budget=4 * ROW).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


# ---- rows, classes, memory -----------------------------------------------------------------------


def test_what_is_ignored_may_hold_anything(generator: torch.Generator) -> None:
    target, weight = labels(23, 131, generator), torch.ones(23)
    weight[3] = 0.0
    lost = (target == -100) | (weight == 0)
    head = make_sparse_head(generator, options={"target": target, "weight": weight, "task_scale": 0.5})
    whole = head.run(head.fused, torch.tensor(1.0))
    for value in (torch.nan, torch.inf):
        head.tensors[0][lost] = value
        head.options["teacher_log_probs"][lost] = value
        head.options["teacher_indices"][lost] = -5
        for skip in (True, False):
            broken = head.run(head.fused, torch.tensor(1.0), skip_ignored=skip, memory_budget=7 * ROW)
            for name, expected in whole.items():
                torch.testing.assert_close(broken[name], expected, rtol=1e-5, atol=1e-6)
            assert (broken["student_hidden"][lost] == 0).all()


@pytest.mark.parametrize("reduction", ["sum", "batchmean", "mean", "none"])
def test_all_ignored_is_zero(reduction: str, generator: torch.Generator) -> None:
    head = make_sparse_head(generator, options={"target": torch.full((23,), -100), "reduction": reduction})
    for skip in (True, False):
        for result in head.run(head.fused, torch.tensor(1.0), skip_ignored=skip).values():
            assert (result == 0).all()


def test_classes_of_a_padded_vocabulary(generator: torch.Generator) -> None:
    alone = make_sparse_head(generator)
    expected = alone.run(alone.fused, torch.tensor(1.0))
    padded = SparseHead(list(alone.tensors), options={**alone.options, "classes": 131})
    padded.tensors[1] = torch.cat([alone.tensors[1], torch.full((9, 16), torch.nan)])
    padded.tensors[2] = torch.cat([alone.tensors[2], torch.full((9,), torch.nan)])
    for name, result in padded.run(padded.fused, torch.tensor(1.0), memory_budget=4 * ROW).items():
        if name in ("student_weight", "student_bias"):
            assert (result[131:] == 0).all()
            result = result[:131]
        torch.testing.assert_close(result, expected[name])


def test_functions_and_modules_are_those_of_logits(generator: torch.Generator) -> None:
    head = make_sparse_head(generator, (24, 16, 7, 131), options={"temperature": 2.0})
    linear = torch.nn.Linear(16, 131)
    linear.load_state_dict({"weight": head.tensors[1], "bias": head.tensors[2]})
    hidden = head.tensors[0].reshape(4, 6, 16)
    names = "teacher_indices", "teacher_log_probs"
    entries = indices, log_probs = [head.options[name].reshape(4, 6, 7) for name in names]
    sides, logits = (hidden, linear, indices.int(), log_probs), (linear(hidden), *entries)
    target = labels(24, 131, generator).reshape(4, 6)
    tail = torch.log1p(-log_probs.double().exp().sum(-1))
    ours, terms = F.sparse_linear_kd_loss(*sides, target, 2.0, 0.3, return_terms=True, teacher_tail_log_prob=tail)
    expected, right = F.sparse_kd_loss(*logits, target, 2.0, 0.3, return_terms=True, teacher_tail_log_prob=tail)
    torch.testing.assert_close((ours, *terms.values()), (expected, *right.values()))
    rows = {"reduction": "none", "target": target, "direction": "reverse"}
    chunks = {"memory_budget": 1 << 14, "logits_dtype": torch.float32, "skip_ignored": False}
    for ours, expected in (
        (F.sparse_linear_kl_div(*sides, 2.0, tail="drop", **rows), F.sparse_kl_div(*logits, 2.0, tail="drop", **rows)),
        (F.sparse_linear_js_div(*sides, 2.0, beta=0.1), F.sparse_js_div(*logits, 2.0, beta=0.1)),
        (F.sparse_linear_kd_loss(*sides, target), F.sparse_kd_loss(*logits, target, 1.0, 0.5)),
        (
            fastkd.SparseLinearKLDivLoss(2.0, "sum", "reverse", "drop", **chunks)(*sides),
            fastkd.SparseKLDivLoss(2.0, "sum", "reverse", "drop")(*logits),
        ),
        (
            fastkd.SparseLinearJSDivLoss(2.0, 0.2, tail="renormalize")(*sides, target),
            fastkd.SparseJSDivLoss(2.0, 0.2, tail="renormalize")(*logits, target),
        ),
        (
            fastkd.SparseLinearKDLoss(2.0, 0.9, classes=131)(*sides, target, teacher_tail_log_prob=tail),
            fastkd.SparseKDLoss(2.0)(*logits, target, teacher_tail_log_prob=tail),
        ),
    ):
        torch.testing.assert_close(ours, expected)
    only_hard = F.sparse_linear_kd_loss(hidden, linear, indices * 0, log_probs + torch.nan, target, alpha=0.0)
    torch.testing.assert_close(
        only_hard, torch.nn.functional.cross_entropy(linear(hidden).flatten(0, 1), target.flatten())
    )
    assert repr(fastkd.SparseLinearKDLoss()).endswith("tail='bucket', alpha=0.5, direction='forward')")


def test_16_bit_logits_where_asked(generator: torch.Generator) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        head = make_sparse_head(generator, dtype=dtype, bias=False)
        truth = head.run(head.plain, torch.tensor(1.0), torch.float64)
        rough = head.run(head.fused, torch.tensor(1.0), logits_dtype=dtype)
        for name in ("loss", "student_hidden", "student_weight"):
            assert (rough[name] - truth[name]).norm() <= 16 * torch.finfo(dtype).eps * truth[name].norm()


def test_a_loss_scale_does_not_cost_digits(generator: torch.Generator) -> None:
    """float16: gradients of a mean over many rows are below its smallest number until a loss scale multiplies them."""
    head = make_sparse_head(generator, (2048, 8, 7, 131), torch.float16, bias=False)
    ours = head.run(head.fused, torch.tensor(2.0**14))
    truth = head.run(head.plain, torch.tensor(2.0**14), torch.float64)
    for name in ("student_hidden", "student_weight"):
        assert (ours[name] - truth[name]).norm() <= 2.0**-10 * truth[name].norm()


def test_the_bits_do_not_change(generator: torch.Generator) -> None:
    head = make_sparse_head(generator, (64, 32, 9, 1271))
    first, second = (head.run(head.fused, torch.tensor(0.3), memory_budget=1 << 18) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name])


def test_frozen_tensors_get_no_gradient(generator: torch.Generator) -> None:
    head = make_sparse_head(generator)
    every = head.run(head.fused, torch.tensor(1.0))
    for trained in ((0,), (1,), (2,), (0, 1)):
        for reduction in ("batchmean", "none"):
            leaves = [x.detach().requires_grad_(i in trained) for i, x in enumerate(head.tensors[:3])]
            head.fused(leaves, reduction=reduction, memory_budget=5 * ROW).mean().backward()
            for i, x in enumerate(leaves):
                assert (x.grad is not None) == (i in trained)
                if i in trained:
                    torch.testing.assert_close(x.grad.double(), every[NAMES[i]], rtol=1e-5, atol=1e-6)


def arguments(head: SparseHead, wanted: list[bool], reduction: int = 2) -> tuple[Any, ...]:
    """Of the operator."""
    target = torch.arange(len(head.tensors[0]))
    target[4] = -100
    entries = head.options["teacher_indices"], head.options["teacher_log_probs"], None
    scalars = 2.0, 0, 0.5, 0.5, 0.5, 1.0, 0.0, 0, -100, reduction, 41, torch.float32, 1000, True, False
    return (*head.tensors[:3], *entries, target, None, None, *scalars, *("", 0, 1), wanted)


def test_a_head_with_no_gradient_has_none_in_memory(generator: torch.Generator) -> None:
    head = make_sparse_head(generator, (13, 8, 5, 41))
    for wanted in ([True, False, False], [False] * 3, [False, True, False]):
        gradients = torch.ops.fastkd.sparse_linear_divergence(*arguments(head, wanted))[4:]
        assert len(gradients) == 3
        for x, gradient, wants in zip(head.tensors, gradients, wanted, strict=False):
            assert gradient.shape == (x.shape if wants else (0,))


def test_chunks_hold_logits_and_their_gradient(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget counts both, and the logits alone where no gradient is made."""
    rows: list[int] = []
    real = fastkd.ops.linear_teachers.SparseTeacher.compare

    def compare(self: Any, logits: Tensor, *rest: Any) -> Any:
        rows.append(len(logits))
        return real(self, logits, *rest)

    monkeypatch.setattr(fastkd.ops.linear_teachers.SparseTeacher, "compare", compare)
    head = make_sparse_head(generator)
    head.fused(head.leaves(), memory_budget=4 * ROW)
    assert max(rows) == 4
    rows.clear()
    head.fused(head.tensors, memory_budget=4 * ROW)
    assert max(rows) == 8


# ---- inside torch --------------------------------------------------------------------------------


@pytest.fixture
def small(generator: torch.Generator) -> SparseHead:
    return make_sparse_head(generator, (13, 8, 5, 41), bias=False)


@pytest.fixture
def entries(small: SparseHead) -> tuple[Tensor, Tensor]:
    return small.options["teacher_indices"], small.options["teacher_log_probs"]


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize(("kind", "tail"), list(zip(KINDS, TAILS, strict=True)))
def test_gradcheck(kind: str, tail: str, reduction: str, generator: torch.Generator) -> None:
    head = make_sparse_head(generator, (4, 3, 2, 5), torch.float64, student_numbers=(0.7, 2.0))
    head.options.update(**KINDS[kind], tail=tail, reduction=reduction)
    leaves = head.leaves()[:3]
    assert torch.autograd.gradcheck(lambda *x: head.fused(list(x), memory_budget=100), leaves, fast_mode=False)


@pytest.mark.parametrize("reduction", [0, 1])
def test_opcheck(reduction: int, small: SparseHead) -> None:
    small.tensors[:2] = (x.requires_grad_() for x in small.tensors[:2])
    wanted = [reduction == 1, reduction == 1, False]
    torch.library.opcheck(torch.ops.fastkd.sparse_linear_divergence.default, arguments(small, wanted, reduction))


def test_no_second_derivatives(small: SparseHead) -> None:
    for reduction in ("batchmean", "none"):
        leaves = small.leaves()
        loss = small.fused(leaves, reduction=reduction).sum()
        gradient = torch.autograd.grad(loss, leaves[0], create_graph=True)[0]
        with pytest.raises(RuntimeError, match="fused linear divergence cannot be differentiated again"):
            gradient.sum().backward()


def test_in_torch_func(small: SparseHead, entries: tuple[Tensor, Tensor]) -> None:
    sides = small.leaves()[:2]
    expected = torch.autograd.grad(F.sparse_linear_js_div(*sides, *entries), sides)
    made = torch.func.grad(lambda *x: F.sparse_linear_js_div(*x, *entries), argnums=(0, 1))(*small.tensors[:2])
    torch.testing.assert_close(made, expected)


@pytest.mark.compiles
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_compiled_whole(reduction: str, small: SparseHead, entries: tuple[Tensor, Tensor]) -> None:
    target = torch.arange(13)
    target[::4] = -100

    def loss(hidden: Tensor, weight: Tensor, *entries: Tensor, temperature: float = 2.0) -> Tensor:
        head = LinearHead(weight, scale=0.5, softcap=4.0)
        options = {"target": target[: len(hidden)], "reduction": reduction}
        return F.sparse_linear_kl_div(hidden, head, *entries, temperature, **options).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    hidden, weight = sides = small.leaves()[:2]
    for rows, temperature in ((13, 2.0), (13, 3.0), (7, 3.5)):
        inputs = hidden[:rows], weight, *(x[:rows] for x in entries)
        ours, expected = (f(*inputs, temperature=temperature) for f in (compiled, loss))
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(torch.autograd.grad(ours, sides), torch.autograd.grad(expected, sides))


def test_modules_compile(small: SparseHead, entries: tuple[Tensor, Tensor]) -> None:
    target = torch.arange(13)
    for module in (
        fastkd.SparseLinearKLDivLoss(tail="drop"),
        fastkd.SparseLinearJSDivLoss(2.0),
        fastkd.SparseLinearKDLoss(),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        inputs = *small.tensors[:2], *entries, target
        torch.testing.assert_close(compiled(*inputs), module(*inputs))


def test_checkpoints_recompute_it(small: SparseHead, entries: tuple[Tensor, Tensor]) -> None:
    sides = small.leaves()[:2]
    expected = torch.autograd.grad(F.sparse_linear_kl_div(*sides, *entries), sides)
    for reentrant in (False, True):
        for x in sides:
            x.grad = None
        checkpoint(lambda *x: F.sparse_linear_kl_div(*x, *entries), *sides, use_reentrant=reentrant).backward()
        for x, gradient in zip(sides, expected, strict=True):
            assert torch.equal(x.grad, gradient)


def test_autocast(small: SparseHead, entries: tuple[Tensor, Tensor]) -> None:
    hidden, weight = sides = small.leaves()[:2]
    with torch.autocast("cpu", torch.bfloat16):
        ours = F.sparse_linear_kl_div(hidden.bfloat16(), weight, *entries)
    assert ours.dtype == torch.float32
    expected = F.sparse_linear_kl_div(*(x.bfloat16() for x in sides), *entries)
    assert torch.equal(ours, expected)
    for a, b in zip(torch.autograd.grad(ours, sides), torch.autograd.grad(expected, sides), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


# ---- refused -------------------------------------------------------------------------------------

LABELS = torch.zeros(13, dtype=torch.int64)
TEMPERATURES = torch.ones(13)
TEMPERATURES[3] = -1.0
I, P = torch.arange(5).repeat(13, 1), torch.full((13, 5), -2.0)  # noqa: E741
REFUSED: tuple[tuple[type[Exception], str, dict[str, Any]], ...] = (
    (ValueError, "student_head.weight has shape (41, 9), must be [V, 8]", {"student_head": torch.ones(41, 9)}),
    (TypeError, "student_head is str, must be a weight [V, H], an nn.Linear", {"student_head": "lm_head"}),
    (TypeError, "student_hidden has dtype torch.int64", {"student_hidden": torch.ones(13, 8).long()}),
    (ValueError, "classes is 42, must be less than 42", {"classes": 42}),
    (ValueError, "classes is 0, must be at least 1", {"classes": 0}),
    (
        ValueError,
        "teacher_indices has shape (12, 5), must be (13, k), the rows of student_hidden",
        {"teacher_indices": I[:12]},
    ),
    (ValueError, "teacher_indices has shape (13, 5), must have 1 to 4 classes for each row", {"classes": 4}),
    (TypeError, "teacher_indices has dtype torch.float32, must be int64 or int32", {"teacher_indices": P}),
    (ValueError, "teacher_log_probs has shape (13, 4), must be (13, 5)", {"teacher_log_probs": P[:, :4]}),
    (
        ValueError,
        "teacher_log_probs requires grad, but has no gradient here; pass teacher_log_probs.detach()",
        {"teacher_log_probs": P.clone().requires_grad_()},
    ),
    (ValueError, "teacher_tail_log_prob has shape (13, 5), must be (13,)", {"teacher_tail_log_prob": P}),
    (
        ValueError,
        "teacher_tail_log_prob is given, must be None where tail is 'drop'",
        {"tail": "drop", "teacher_tail_log_prob": P[:, 0]},
    ),
    (ValueError, "tail is 'other', must be one of bucket, renormalize, drop", {"tail": "other"}),
    (ValueError, "temperature is 0.0, must be positive", {"temperature": 0.0}),
    (ValueError, "direction is 'soft_cross_entropy', must be one of", {"direction": "soft_cross_entropy"}),
    (ValueError, "reduction is 'median', must be one of", {"reduction": "median"}),
    (ValueError, "target has shape (12,), must be (13,)", {"target": LABELS[:12]}),
    (RuntimeError, "target[0] is 41, must be in [0, 41)", {"target": LABELS + 41}),
    (RuntimeError, "temperature[3] is -1, must be positive", {"temperature": TEMPERATURES}),
    (ValueError, "memory_budget is 0, must be at least 1", {"memory_budget": 0}),
    (
        ValueError,
        "logits_dtype is torch.bfloat16, must be torch.float32, or the dtype of student_hidden where that has 16 bits; "
        "student_hidden has torch.float32",
        {"logits_dtype": torch.bfloat16},
    ),
    (TypeError, "skip_ignored is str, must be True or False", {"skip_ignored": "yes"}),
    (
        ValueError,
        "teacher_log_probs is on meta, must be where student_hidden is, on cpu",
        {"teacher_log_probs": P.to("meta")},
    ),
)


@pytest.mark.parametrize(("kind", "message", "given"), REFUSED, ids=[message for _, message, _ in REFUSED])
def test_refused(kind: type[Exception], message: str, given: dict[str, Any], small: SparseHead) -> None:
    names = ("student_hidden", "student_head", "teacher_indices", "teacher_log_probs")
    given = {**dict(zip(names, (*small.tensors[:2], I, P), strict=True)), **given}
    with pytest.raises(kind, match=re.escape(message)):
        F.sparse_linear_kl_div(**given)


def test_modules_refuse_when_made() -> None:
    for make, message in (
        (lambda: fastkd.SparseLinearKLDivLoss(0.0), "temperature is 0.0"),
        (lambda: fastkd.SparseLinearKLDivLoss(direction="up"), "direction is 'up'"),
        (lambda: fastkd.SparseLinearJSDivLoss(beta=2.0), "beta is 2.0"),
        (lambda: fastkd.SparseLinearJSDivLoss(tail="none"), "tail is 'none'"),
        (lambda: fastkd.SparseLinearKDLoss(alpha=-1.0), "alpha is -1.0"),
        (lambda: fastkd.SparseLinearKDLoss(reduction="mean"), "reduction is 'mean'"),
        (lambda: fastkd.SparseLinearKDLoss(memory_budget=0), "memory_budget is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


WRONG = {
    r"teacher_indices\[19, 2\] is 131, must be in \[0, 131\)": ("teacher_indices", (19, 2), 131),
    r"teacher_indices\[19, \d\] is \d+, which the row has before": ("teacher_indices", (19, slice(0, 2)), 77),
    r"teacher_log_probs\[19, 3\] is 0.5, must be at most 0": ("teacher_log_probs", (19, 3), 0.5),
    r"teacher_log_probs\[19\] has probabilities that add up to 7": ("teacher_log_probs", (19,), 0.0),
    r"teacher_tail_log_prob\[19\] is 0.5, must be at most 0": ("teacher_tail_log_prob", (19,), 0.5),
}


@pytest.mark.cuda_kernels
@pytest.mark.parametrize("message", WRONG)
def test_rows_of_a_chunk_are_named_by_their_number_in_the_call(
    message: str, device: torch.device, reads_values: bool, generator: torch.Generator
) -> None:
    """Where kernels look at the values; elsewhere the row is NaN."""
    target = torch.zeros(23, dtype=torch.int64)
    target[[2, 3, 11]] = -100
    head = make_sparse_head(generator, device=device, options={"target": target.to(device), "reduction": "none"})
    name, at, value = WRONG[message]
    if name == "teacher_tail_log_prob":
        head.options[name] = torch.log1p(-head.options["teacher_log_probs"].exp().sum(-1))
    head.options[name][at] = value
    for budget in (1, 7 * ROW, 1 << 30):
        for skip in (True, False):
            options = {"memory_budget": budget, "skip_ignored": skip}
            if not reads_values:
                assert head.fused(head.tensors, **options).isnan().nonzero().tolist() == [[19]]
                continue
            with pytest.raises(RuntimeError, match=f"fastkd: {message}"):
                head.fused(head.tensors, **options)


# ---- the guide -----------------------------------------------------------------------------------


def test_the_guide(generator: torch.Generator) -> None:
    text = (Path(__file__).parents[2] / "docs" / "language-models.md").read_text()
    (block,) = (x for x in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "sparse_linear_kl_div" in x)
    torch.manual_seed(0)
    embedding, lm_head = torch.nn.Embedding(97, 16), torch.nn.Linear(16, 97, bias=False)
    student = SimpleNamespace(model=lambda ids: SimpleNamespace(last_hidden_state=embedding(ids)), lm_head=lm_head)
    tokens = torch.randint(97, (2, 12), generator=generator)
    log_probs, indices = torch.log_softmax(torch.randn(2, 12, 97, generator=generator) / 2.0, -1).topk(64)
    names = {"student": student, "input_ids": tokens, "labels": tokens, "indices": indices, "log_probs": log_probs}
    exec(compile(block, "docs/language-models.md", "exec"), names)
    expected = F.sparse_kl_div(
        lm_head(embedding(tokens[:, :-1])), indices[:, :-1], log_probs[:, :-1], 2.0, target=tokens[:, 1:]
    )
    torch.testing.assert_close(names["loss"], expected)
    torch.testing.assert_close(lm_head.weight.grad, torch.autograd.grad(expected, lm_head.weight)[0])
