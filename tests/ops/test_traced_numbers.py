"""Python numbers that change from call to call under ``torch.compile``: the value and the gradient of each, in two graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastkd
from fastkd import functional as F  # noqa: N812
from fastkd.ops import crop as crop_ops
from fastkd.patches import seeded_crop_flip

pytestmark = [pytest.mark.compiles, pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]

S, T = torch.randn(2, 8, 10, generator=torch.Generator().manual_seed(0)).unbind()
Y = torch.arange(8)
IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
BYTES = (IMAGES * 255).to(torch.uint8)
LOSSES = torch.rand(100, generator=torch.Generator().manual_seed(2))
SEED = torch.tensor([7])
ENTRIES = torch.arange(3).repeat(len(T), 1), torch.log_softmax(T, -1)[:, :3]
VALUES = [w / 16 for w in range(1, 13)]  # more than there may be graphs of a function

# of w in (0, 1), from logits or images: anything that can be differentiated, or not
CASES: dict[str, tuple[Tensor, Callable[[Tensor, float], Tensor]]] = {
    "kl_div temperature": (S, lambda x, w: F.kl_div(x, T, w)),
    "kl_div of maps": (S, lambda x, w: F.kl_div(x.view(2, 10, 4), T.view(2, 10, 4), w, dim=1)),
    "kl_div both": (S, lambda x, w: F.kl_div(x * w, T, 1 / w)),
    "js_div beta": (S, lambda x, w: F.js_div(x * w, T, beta=w / 10)),
    "js_div temperature": (S, lambda x, w: F.js_div(x, T, 1 + w, beta=1 - w)),
    "soft_cross_entropy": (S, lambda x, w: F.soft_cross_entropy(x, T, 2 * w)),
    "kd_loss alpha": (S, lambda x, w: F.kd_loss(x, T, Y, alpha=w)),
    "kd_loss 1 - alpha": (S, lambda x, w: F.kd_loss(x, T, Y, 4 * w, alpha=1 - w)),
    "sparse_kl_div temperature": (S, lambda x, w: F.sparse_kl_div(x, *ENTRIES, w)),
    "sparse_js_div beta": (S, lambda x, w: F.sparse_js_div(x * w, *ENTRIES, beta=w / 10)),
    "sparse_kd_loss alpha": (S, lambda x, w: F.sparse_kd_loss(x, *ENTRIES, Y, 4 * w, alpha=w, tail="drop")),
    "float16": (S.half(), lambda x, w: F.kl_div(x, T.half(), w)),
    "logit_stats": (S, lambda x, w: torch.stack(fastkd.logit_stats(x, w)[2:])),
    "relation_loss": (S, lambda x, w: F.relation_loss(x, T, w, 2 * w)),
    "select_clean threshold": (LOSSES, lambda x, w: fastkd.select_clean(x, w)[0]),
    "select_clean options": (LOSSES, lambda x, w: fastkd.select_clean(x, tol=w / 1000, reg_covar=w / 50)[1]),
    "TwoGaussianMixture": (LOSSES, lambda x, w: fastkd.TwoGaussianMixture(reg_covar=w / 9, tol=0.0).fit(x).means_),
    "flip_probability": (IMAGES, lambda x, w: crop_ops.crop_offsets(SEED, 50, 2, (0, 3), (0, 3), w)[1]),
    "seeded_crop_flip": (BYTES, lambda x, w: seeded_crop_flip(x, 3, 2, w, w, (w, 1.0, 2.0), torch.float32)),
    "normalised images": (IMAGES, lambda x, w: seeded_crop_flip(x, 3, 2, 0.5, None, w, torch.float32)),
    "inverse_temperature": (S.flatten(), lambda x, w: fastkd.AliasTable(x, w, seed=1).probabilities()),
    "iqpr": (S.flatten(), lambda x, w: fastkd.AliasTable(x, iqpr=1 + w, seed=1).probabilities()),
}


def gradient_of(function: Callable[[Tensor, float], Tensor], x: Tensor, w: float) -> tuple[Tensor, Tensor | None]:
    x = x.clone().requires_grad_(x.is_floating_point())
    y = function(x, w)
    if not y.requires_grad:
        return y, None
    return y, torch.autograd.grad(y.square().sum(), x)[0]


def check(compiled: Callable[[Tensor, float], Tensor], eager: Callable[[Tensor, float], Tensor], x: Tensor) -> None:
    for w in VALUES:
        for ours, expected in zip(gradient_of(compiled, x, w), gradient_of(eager, x, w), strict=True):
            torch.testing.assert_close(ours, expected, msg=lambda text, w=w: f"at {w}: {text}")


@pytest.mark.parametrize("name", CASES)
def test_numbers(name: str) -> None:
    x, function = CASES[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    check(torch.compile(function, fullgraph=True, backend=counter), function, x)
    assert counter.frame_count <= 2  # one of the first number, one of any


@pytest.mark.parametrize("name", ["js_div beta", "relation_loss", "seeded_crop_flip", "inverse_temperature"])
def test_numbers_under_inductor(name: str) -> None:
    """It makes tensors of symbols where it can, and constants where it cannot: that is where values went stale."""
    x, function = CASES[name]
    torch._dynamo.reset()
    check(torch.compile(function, fullgraph=True), function, x)


# what torch.func differentiates within the program
TRANSFORMED: dict[str, tuple[Tensor, Callable[[Tensor, float], Tensor]]] = {
    "js_div beta": (S, lambda x, w: F.js_div(x, T, beta=w)),
    "kl_div temperature": (S, lambda x, w: F.kl_div(x, T, w)),
    "relation_loss": (S, lambda x, w: F.relation_loss(x, T, w, 2 * w)),
    "logit_stats": (S, lambda x, w: fastkd.logit_stats(x, w).entropy.sum()),
    "random_crop_flip": (IMAGES, lambda x, w: fastkd.random_crop_flip(x, 0, None, 0.0, w, 1 + w).square().sum()),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_gradients_of_torch_func(name: str) -> None:
    x, function = TRANSFORMED[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def gradient(x: Tensor, w: float) -> Tensor:
        return torch.func.grad(lambda z: function(z, w))(x)  # (torch makes a constant of each number given to it)

    compiled = torch.compile(gradient, fullgraph=True, backend=counter)
    for w in VALUES:
        torch.testing.assert_close(compiled(x, w), gradient(x, w))
    assert counter.frame_count <= 2


TABLE = fastkd.AliasTable(S.flatten(), 1.0, seed=1)
PLACES = torch.tensor([[[0, 1]], [[2, 3]]])

# of an int from 1 to 12
INTS: dict[str, tuple[Tensor, Callable[[Tensor, Any], Tensor]]] = {
    "sample_at start": (S, lambda x, n: TABLE.sample_at(1, n, 20, 3)),
    "sample_at n": (S, lambda x, n: TABLE.sample_at(1, 2, n, 3)),
    "sample_at stride": (S, lambda x, n: TABLE.sample_at(1, 2, 20, n)),
    "ignore_index": (S, lambda x, n: F.kd_loss(x, T, Y.where(Y != 3, n), ignore_index=n)),
    "ignore_index, float16": (S.half(), lambda x, n: F.kl_div(x, T.half(), target=Y, ignore_index=n)),
    "max_iter": (LOSSES, lambda x, n: fastkd.select_clean(x, max_iter=n)[1]),
    "crop_patches": (IMAGES, lambda x, n: fastkd.crop_patches(x, PLACES, n)),
    "seeded_crop_flip": (IMAGES, lambda x, n: seeded_crop_flip(x, 3, n, 0.5, None, None, torch.float32)),
}


@pytest.mark.parametrize("name", INTS)
def test_ints(name: str) -> None:
    """Sizes, counters and the like."""
    x, function = INTS[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for n in range(1, 13):
        for ours, expected in zip(gradient_of(compiled, x, n), gradient_of(function, x, n), strict=True):
            torch.testing.assert_close(ours, expected)
    assert counter.frame_count <= 2  # one of 1, one of any


@pytest.mark.parametrize("name", ["sample_at n", "crop_patches", "max_iter"])
def test_ints_under_inductor(name: str) -> None:
    x, function = INTS[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True)
    for n in (1, 2, 3, 12):
        torch.testing.assert_close(compiled(x, n), function(x, n))


OF_TENSORS = ["kl_div temperature", "js_div beta", "kd_loss 1 - alpha", "logit_stats", "relation_loss", "iqpr"]
OF_TENSORS += ["select_clean threshold", "select_clean options", "flip_probability", "seeded_crop_flip"]


@pytest.mark.parametrize("name", OF_TENSORS)
def test_numbers_out_of_tensors(name: str) -> None:
    """``.item()`` in the program: what the number is cannot be asked for there."""
    x, function = CASES[name]
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, t: function(x, t.square().item()), fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        for w in VALUES:
            root = torch.tensor(w, dtype=torch.float64).sqrt()
            torch.testing.assert_close(compiled(x, root), function(x, root.square().item()))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_numbers_of_numpy(compiler: str) -> None:
    """Dynamo makes tensors of them."""
    for name in OF_TENSORS if compiler == "aot_eager" else OF_TENSORS[:2]:
        x, function = CASES[name]
        torch._dynamo.reset()
        counter = CompileCounterWithBackend(compiler)
        compiled = torch.compile(function, fullgraph=True, backend=counter)
        for w in map(np.float64, VALUES):
            torch.testing.assert_close(compiled(x, w), function(x, w), msg=lambda text, n=name: f"{n}: {text}")
        assert counter.frame_count <= 2


@pytest.mark.parametrize(
    ("bad", "message"), [(np.float64(-2.0), "temperature is -2"), (np.ones(2), "ndarray"), (np.bool_(True), "bool")]
)
def test_bad_numbers_of_numpy_raise(bad: Any, message: str) -> None:
    torch._dynamo.reset()
    with pytest.raises(Exception, match=message):
        torch.compile(lambda w: F.kl_div(S, T, w), backend="aot_eager")(bad)


def test_bad_numbers_out_of_tensors_raise() -> None:
    """In the kernels."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: F.kl_div(S, T, t.neg().item()), fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        torch.testing.assert_close(compiled(torch.tensor(-2.0)), F.kl_div(S, T, 2.0))
        with pytest.raises(RuntimeError, match="temperature is -2"):
            compiled(torch.tensor(2.0))


ATTRIBUTES: dict[str, tuple[torch.nn.Module, str, tuple[Tensor, ...]]] = {
    "KLDivLoss": (fastkd.KLDivLoss(), "temperature", (T,)),
    "JSDivLoss": (fastkd.JSDivLoss(), "beta", (T,)),
    "KDLoss temperature": (fastkd.KDLoss(), "temperature", (T, Y)),
    "KDLoss alpha": (fastkd.KDLoss(), "alpha", (T, Y)),
    "RelationLoss": (fastkd.RelationLoss(), "angle_weight", (T,)),
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_annealed_attributes(name: str) -> None:
    module, attribute, rest = ATTRIBUTES[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for w in VALUES:
        setattr(module, attribute, w)
        torch.testing.assert_close(compiled(S, *rest), module(S, *rest))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", ["kl_div temperature", "relation_loss", "logit_stats", "inverse_temperature"])
def test_whole_numbers(name: str) -> None:
    """Python's ints are kept as symbols, too."""
    x, function = CASES[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for w in range(1, 13):
        torch.testing.assert_close(compiled(x, w), function(x, w))
    assert counter.frame_count <= 3  # of 1, which torch takes for a constant, of the first number, of any


def test_constants_stay_constants() -> None:
    """Numbers that do not change need no tensor, which would keep a program out of CUDA graphs."""
    torch._dynamo.reset()
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., object]:
        seen.extend(str(node) for node in graph.graph.nodes)
        return graph.forward

    torch.compile(lambda s: F.kd_loss(s, T, Y, 3.0, 0.5), fullgraph=True, backend=backend)(S)
    assert any("call_by_name" in name for name in seen)
    assert not any("ones" in name or "stack" in name for name in seen)


@pytest.mark.parametrize("bad", [-1.0, 0.0])
def test_bad_numbers_raise(bad: float) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda s, w: F.kl_div(s, T, w), backend="aot_eager")
    for w in (1.0, 2.0, 3.0):
        compiled(S, w)
    with pytest.raises(Exception, match="temperature is"):
        compiled(S, bad)


def test_numbers_in_a_tensor_are_checked() -> None:
    op = torch.ops.fastkd.logit_stats.default
    expected = op(S, 2.0)
    for ours, theirs in zip(op(S, 1.0, torch.tensor([2.0], dtype=torch.float64)), expected, strict=True):
        assert torch.equal(ours, theirs)
    for numbers, message in (
        (torch.tensor([2.0]), "numbers has dtype float32"),
        (torch.ones(2, dtype=torch.float64), r"numbers has shape \(2,\), must be \(1,\)"),
        (torch.tensor([-2.0], dtype=torch.float64), "temperature is -2"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(S, 1.0, numbers)


@pytest.mark.parametrize(
    "make",
    [lambda n: fastkd.JSDivLoss(beta=n), lambda n: fastkd.KDLoss(alpha=n), lambda n: fastkd.RelationLoss(n, n)],
    ids=["JSDivLoss", "KDLoss", "RelationLoss"],
)
def test_numbers_of_numpy_in_modules(make: Callable[[Any], torch.nn.Module]) -> None:
    """Kept as Python's, of which dynamo knows more."""
    torch._dynamo.reset()
    module = make(np.float64(0.5))
    inputs = [torch.randn(6, 5), torch.randn(6, 5)] + ([torch.arange(6) % 5] if type(module) is fastkd.KDLoss else [])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), module(*inputs))
