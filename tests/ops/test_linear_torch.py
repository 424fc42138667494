"""The linear losses inside torch: autograd, torch.compile, checkpoints, autocast, memory; and what they refuse."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from linear_cases import make_heads
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastkd
from fastkd import LinearHead
from fastkd import functional as F  # noqa: N812

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]


@pytest.fixture
def sides(generator: torch.Generator) -> list[Tensor]:
    """Hidden states and weights of both sides, which all require grad."""
    tensors = make_heads(generator, (13, 8, 12, 41)).tensors
    return [tensors[i].requires_grad_() for i in (0, 1, 3, 4)]


def gradients(loss: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_gradcheck(kind: str, reduction: str, generator: torch.Generator) -> None:
    heads = make_heads(generator, (4, 3, 2, 5), torch.float64, student_numbers=(0.7, 2.0), teacher_numbers=(1.0, 3.0))
    heads.options = {"kind": kind, "reduction": reduction, "temperature": 1.5}
    assert torch.autograd.gradcheck(lambda *x: heads.fused(list(x), memory_budget=100), heads.leaves(), fast_mode=False)


@pytest.mark.parametrize("reduction", [0, 1])  # gradients of a mean are scaled where they lie, as nobody else has them
def test_opcheck(reduction: int, sides: list[Tensor]) -> None:
    target = torch.arange(13)
    target[4] = -100
    for teacher in ((sides[2], sides[3], None), (torch.randn(13, 41).requires_grad_(), None, None)):
        wanted = [reduction == 1, reduction == 1, False, reduction == 1, False, False]
        numbers = (
            2.0,
            0,
            0.5,
            0.5,
            0.5,
            1.0,
            0.0,
            1.0,
            0.0,
            -100,
            reduction,
            41,
            torch.float32,
            1000,
            True,
            False,
            *("", 0, 1),
            wanted,
        )
        arguments = (sides[0], sides[1], None, *teacher, target, None, None, *numbers)
        torch.library.opcheck(torch.ops.fastkd.linear_divergence.default, arguments)
    x = torch.randn(3, 7)
    torch.library.opcheck(
        torch.ops.fastkd.divergence_.default,
        (x, x.clone(), None, None, None, 1.0, 0, 0.5, 1.0, 0.0, -100, True, False),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_gradients_may_be_asked_for_twice(sides: list[Tensor]) -> None:
    loss = F.linear_kl_div(*sides)
    first = torch.autograd.grad(loss, sides, 2.0 * torch.ones([]), retain_graph=True)
    for a, b in zip(first, gradients(loss, sides), strict=True):
        torch.testing.assert_close(a, 2 * b)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_no_second_derivatives(reduction: str, sides: list[Tensor]) -> None:
    loss = F.linear_kl_div(*sides, reduction=reduction).sum()
    gradient = torch.autograd.grad(loss, sides[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="fused linear divergence cannot be differentiated again"):
        gradient.sum().backward()


def test_in_torch_func(sides: list[Tensor]) -> None:
    expected = gradients(F.linear_js_div(*sides), sides)
    made = torch.func.grad(lambda *x: F.linear_js_div(*x), argnums=(0, 1, 2, 3))(*(x.detach() for x in sides))
    for a, b in zip(made, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_compiled_whole(reduction: str, sides: list[Tensor]) -> None:
    target = torch.arange(13)
    target[::4] = -100

    def loss(*x: Tensor, temperature: float = 2.0) -> Tensor:
        head = LinearHead(x[1], scale=0.5, softcap=4.0)
        return F.linear_kl_div(
            x[0], head, x[2], x[3], temperature, target=target[: len(x[0])], reduction=reduction
        ).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows, temperature in ((13, 2.0), (13, 3.0), (7, 3.5)):
        inputs = [sides[0][:rows], sides[1], sides[2][:rows], sides[3]]
        ours, expected = (f(*inputs, temperature=temperature) for f in (compiled, loss))
        torch.testing.assert_close(ours, expected)
        for a, b in zip(gradients(ours, sides), gradients(expected, sides), strict=True):
            torch.testing.assert_close(a, b)


def test_compiled_by_inductor(sides: list[Tensor]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: F.linear_kl_div(*(2 * y for y in x)), fullgraph=True)
    expected = F.linear_kl_div(*(2 * x for x in sides))
    ours = compiled(*sides)
    torch.testing.assert_close(ours, expected)
    for a, b in zip(gradients(ours, sides), gradients(expected, sides), strict=True):
        torch.testing.assert_close(a, b)


def test_checkpoints_recompute_it(sides: list[Tensor]) -> None:
    expected = gradients(F.linear_kl_div(*sides), sides)
    for reentrant in (False, True):
        loss = checkpoint(lambda *x: F.linear_kl_div(*x), *sides, use_reentrant=reentrant)
        for x in sides:
            x.grad = None
        loss.backward()
        for x, b in zip(sides, expected, strict=True):
            assert torch.equal(x.grad, b)


def test_autocast(sides: list[Tensor]) -> None:
    """Hidden states, which a body under autocast returns in its dtype, meet a head in float32."""
    hidden, weight, teacher_hidden, teacher_weight = sides
    with torch.autocast("cpu", torch.bfloat16):
        ours = F.linear_kl_div(hidden.bfloat16(), weight, teacher_hidden, teacher_weight)
    assert ours.dtype == torch.float32
    expected = F.linear_kl_div(*(x.bfloat16() for x in sides))
    assert torch.equal(ours, expected)
    for a, b in zip(gradients(ours, sides), gradients(expected, sides), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


MEMORY = """
import resource, torch
from fastkd.functional import linear_js_div
torch.set_num_threads(2)
hidden, weight = torch.randn(512, 64).requires_grad_(), torch.randn(32000, 64).requires_grad_()
teacher_hidden, teacher_weight = torch.randn(512, 32), torch.randn(32000, 32)
weight.grad, hidden.grad = torch.zeros_like(weight), torch.zeros_like(hidden)
small = slice(0, 8)
linear_js_div(hidden[small], weight[:100], teacher_hidden[small], teacher_weight[:100]).backward()  # torch's own
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
loss = linear_js_div(hidden, weight, teacher_hidden, teacher_weight)
loss.backward()
print(peak() - before - weight.numel() * 4 / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux reports it")
def test_memory_is_that_of_chunks() -> None:
    """MiB at the peak beyond inputs and gradients: the logits of both sides would be 125, and their softmaxes as much."""
    out = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True).stdout
    assert float(out) < 64


def head(classes: int = 41, features: int = 8, bias: int | None = None, **more: Any) -> LinearHead:
    return LinearHead(torch.ones(classes, features), None if bias is None else torch.ones(bias), **more)


LABELS = torch.zeros(13, dtype=torch.int64)
TEMPERATURES = torch.ones(13)
TEMPERATURES[3] = -1.0
VOCABULARIES = "student's head has 41 classes, the teacher's 43; where one vocabulary is padded, give classes=41"
REFUSED: tuple[tuple[type[Exception], str, dict[str, Any]], ...] = (
    (ValueError, "student_head.weight has shape (41, 9), must be [V, 8]", {"student_head": torch.ones(41, 9)}),
    (ValueError, "student_head.weight has shape (8,), must be [V, 8]", {"student_head": torch.ones(8)}),
    (TypeError, "student_head is str, must be a weight [V, H], an nn.Linear", {"student_head": "lm_head"}),
    (TypeError, "must be that of the hidden states, torch.float32", {"student_head": torch.ones(41, 8).double()}),
    (ValueError, "student_head.bias has shape (7,), must be (41,)", {"student_head": head(bias=7)}),
    (ValueError, "student_head.softcap is 0.0, must be positive", {"student_head": head(softcap=0.0)}),
    (ValueError, "student_head.scale is nan, must be finite", {"student_head": head(scale=float("nan"))}),
    (ValueError, VOCABULARIES, {"teacher_head": head(43, 12)}),
    (ValueError, "classes is 42, must be less than 42", {"classes": 42}),
    (TypeError, "give teacher_hidden and teacher_head, or teacher_logits", {"teacher_head": None}),
    (TypeError, "teacher_logits are given, so", {"teacher_logits": torch.ones(13, 41)}),
    (ValueError, "teacher_hidden has shape (12, 12), must be (13, ...)", {"teacher_hidden": torch.ones(12, 12)}),
    (TypeError, "student_hidden has dtype torch.int64", {"student_hidden": torch.ones(13, 8).long()}),
    (ValueError, "temperature is 0.0, must be positive", {"temperature": 0.0}),
    (ValueError, "direction is 'sideways', must be one of", {"direction": "sideways"}),
    (ValueError, "reduction is 'median', must be one of", {"reduction": "median"}),
    (ValueError, "target has shape (12,), must be (13,)", {"target": LABELS[:12]}),
    (RuntimeError, "target[0] is 41, must be in [0, 41)", {"target": LABELS + 41}),
    (RuntimeError, "temperature[3] is -1, must be positive", {"temperature": TEMPERATURES}),
    (ValueError, "memory_budget is 0, must be at least 1", {"memory_budget": 0}),
    (ValueError, "logits_dtype is torch.bfloat16, must be torch.float32, or", {"logits_dtype": torch.bfloat16}),
    (TypeError, "skip_ignored is str, must be True or False", {"skip_ignored": "yes"}),
    (ValueError, "target is on meta, must be where student_hidden is, on cpu", {"target": LABELS.to("meta")}),
)


@pytest.mark.parametrize(("kind", "message", "given"), REFUSED, ids=[message for _, message, _ in REFUSED])
def test_refused(kind: type[Exception], message: str, given: dict[str, Any], sides: list[Tensor]) -> None:
    names = ("student_hidden", "student_head", "teacher_hidden", "teacher_head")
    arguments = {**dict(zip(names, (x.detach() for x in sides), strict=True)), **given}
    with pytest.raises(kind, match=re.escape(message)):
        F.linear_kl_div(**arguments)


def test_modules_refuse_when_made() -> None:
    for make, message in (
        (lambda: fastkd.LinearKLDivLoss(0.0), "temperature is 0.0"),
        (lambda: fastkd.LinearKLDivLoss(classes=0), "classes is 0, must be at least 1"),
        (lambda: fastkd.LinearJSDivLoss(beta=2.0), "beta is 2.0"),
        (lambda: fastkd.LinearKDLoss(alpha=-1.0), "alpha is -1.0"),
        (lambda: fastkd.LinearKDLoss(memory_budget=0), "memory_budget is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
