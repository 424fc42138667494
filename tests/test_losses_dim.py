"""Losses and statistics of maps ``[B, K, H, W]``: the dimension of the classes, memory formats, what is copied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as tF  # noqa: N812
from torch import Tensor

import fastkd
import fastkd.functional as F  # noqa: N812
from fastkd.ops import divergence as ops

# views of the logits, in Python: the sanitizers have the kernels under test elsewhere
pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread"), pytest.mark.cuda_kernels]

B, K, H, W = 2, 5, 3, 4
SHAPE, MAP = (B, K, H, W), (B, H, W)
FORMATS = {"channels-last": torch.channels_last, "NCHW": torch.contiguous_format}
VOLUMES = {4: (SHAPE, torch.channels_last), 5: ((B, K, 2, H, W), torch.channels_last_3d)}
TARGET = torch.arange(B * H * W).reshape(MAP) % K
TARGET[0, 1, 2] = TARGET[1, :, 0] = -100
WEIGHT, TEMPERATURES = torch.arange(12.0).reshape(H, W), torch.linspace(1, 3, W)
Loss = Callable[[Tensor, Tensor], Tensor]


def kl(s: Tensor, t: Tensor, temperature: Any = 1.0) -> Tensor:
    log_q, log_p = tF.log_softmax(s / temperature, 1), tF.log_softmax(t / temperature, 1)
    return tF.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1) * temperature**2


def js(s: Tensor, t: Tensor, beta: float) -> Tensor:
    q, p = tF.softmax(s, 1), tF.softmax(t, 1)
    m = (beta * p + (1 - beta) * q).log()
    both = (tF.kl_div(m, x, reduction="none").sum(1) for x in (p, q))
    return sum(share * each for share, each in zip((beta, 1 - beta), both, strict=True))


def valid(rows: Tensor) -> Tensor:
    return torch.where(TARGET != -100, rows, 0.0)


# ours, of dim=1, and what one writes in torch
LOSSES: dict[str, tuple[Loss, Loss]] = {
    "kl": (lambda s, t: F.kl_div(s, t, 2.0, dim=1), lambda s, t: kl(s, t, 2.0).mean()),
    "from the end": (lambda s, t: F.kl_div(s, t, dim=-3, reduction="none"), kl),
    "mean": (lambda s, t: F.kl_div(s, t, dim=1, reduction="mean"), lambda s, t: kl(s, t).mean() / K),
    "js": (lambda s, t: F.js_div(s, t, beta=0.3, dim=1, reduction="none"), lambda s, t: js(s, t, 0.3)),
    "soft": (
        lambda s, t: F.soft_cross_entropy(s, t, dim=1),
        lambda s, t: tF.cross_entropy(s, tF.softmax(t, 1)),
    ),
    "kd": (
        lambda s, t: F.kd_loss(s, t, TARGET.to(s.device), 2.0, 0.7, dim=1),
        lambda s, t: 0.3 * tF.cross_entropy(s, TARGET) + 0.7 * valid(kl(s, t, 2.0)).sum() / (TARGET != -100).sum(),
    ),
    "weights, ignored": (
        lambda s, t: F.kl_div(s, t, dim=1, target=TARGET.to(s.device), weight=WEIGHT.to(s.device)),
        lambda s, t: (valid(kl(s, t)) * WEIGHT).sum() / (TARGET != -100).sum(),
    ),
    "KLDivLoss": (
        lambda s, t: fastkd.KLDivLoss(TEMPERATURES.to(s.device), "none", "reverse", dim=1)(s, t),
        lambda s, t: kl(t, s, TEMPERATURES.to(s.dtype)),
    ),
    "JSDivLoss": (lambda s, t: fastkd.JSDivLoss(beta=0.5, dim=1)(s, t), lambda s, t: js(s, t, 0.5).mean()),
    "KDLoss": (
        lambda s, t: fastkd.KDLoss(1.0, 0.5, "none", dim=1)(s, t, TARGET.to(s.device)),
        lambda s, t: 0.5 * (tF.cross_entropy(s, TARGET, reduction="none") + valid(kl(s, t))),
    ),
    "entropy": (
        lambda s, t: fastkd.logit_stats(s, 2.0, dim=1).entropy,
        lambda s, t: -(tF.softmax(s / 2, 1) * tF.log_softmax(s / 2, 1)).sum(1),
    ),
}


def maps(generator: torch.Generator, shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, Tensor]:
    return torch.randn(2, *shape, generator=generator, dtype=torch.float64).unbind()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_against_torch(name: str, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
    """Values and gradients, in the memory format of each side's logits, whatever that of the other."""
    ours, theirs = LOSSES[name]
    s, t = (x.to(dtype) for x in maps(generator))
    sides = [x.double().requires_grad_() for x in (s, t)]
    expected = theirs(*sides)
    upstream = torch.randn(expected.shape, generator=generator)
    gradients = torch.autograd.grad(expected, sides, upstream, materialize_grads=True, allow_unused=True)
    exact = dtype == torch.float64
    tolerance = {} if exact else {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    for student_format in FORMATS.values():
        for teacher_format in FORMATS.values():
            student = s.to(device, memory_format=student_format).detach().requires_grad_()
            teacher = t.to(device, memory_format=teacher_format).detach().requires_grad_()
            loss = ours(student, teacher)
            assert loss.dtype == (torch.float64 if exact else torch.float32)
            torch.testing.assert_close(loss.cpu().double(), expected.detach(), rtol=1e-5, atol=1e-5)
            assert loss.shape == expected.shape
            mine = torch.autograd.grad(loss, (student, teacher), upstream.to(loss), allow_unused=True)
            for gradient, right, form in zip(mine, gradients, (student_format, teacher_format), strict=True):
                if gradient is not None:
                    assert gradient.is_contiguous(memory_format=form)
                    torch.testing.assert_close(gradient.cpu().double(), right, **tolerance)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str, form: str, device: torch.device, generator: torch.Generator, few: bool) -> None:
    pair = [
        x.to(device, memory_format=FORMATS[form]).detach().requires_grad_(name != "entropy" or i == 0)
        for i, x in enumerate(maps(generator))
    ]
    assert torch.autograd.gradcheck(LOSSES[name][0], pair, fast_mode=few)


def test_statistics(device: torch.device, generator: torch.Generator) -> None:
    logits = maps(generator)[0].to(device)
    expected = fastkd.logit_stats(logits.movedim(1, -1).contiguous(), 2.0)
    for form in FORMATS.values():
        stats = fastkd.logit_stats(logits.to(memory_format=form), 2.0, dim=1)
        assert all(value.shape == MAP for value in stats)
        torch.testing.assert_close(tuple(stats), tuple(expected))
        assert torch.equal(stats.argmax, logits.argmax(1))


@pytest.mark.parametrize("dim", range(-3, 3))
def test_any_dimension(dim: int, device: torch.device, generator: torch.Generator) -> None:
    s, t = (x.to(device).requires_grad_() for x in maps(generator, (3, 4, 5)))
    rows, terms = F.kd_loss(
        s, t, s.detach().argmin(dim), reduction="none", return_terms=True, dim=np.int64(dim) if dim > 0 else dim
    )
    flat = F.kd_loss(s.movedim(dim, -1), t.movedim(dim, -1), s.detach().argmin(dim), reduction="none")
    assert rows.shape == terms["kl_div"].shape == s.select(dim, 0).shape
    assert torch.equal(rows, flat)
    both = [torch.autograd.grad(loss.square().sum(), (s, t)) for loss in (rows, flat)]
    for a, b in zip(*both, strict=True):
        assert a.is_contiguous()
        assert torch.equal(a, b)
    columns = F.kl_div(s[0], t[0], dim=0, reduction="none")
    assert torch.equal(columns, F.kl_div(s[0].T, t[0].T, reduction="none"))
    assert F.kl_div(s[0, 0], t[0, 0], dim=0).shape == ()
    assert F.kl_div(s[:, :0], t[:, :0], dim=2).item() == F.kl_div(s[:0], t[:0], dim=1).item() == 0.0


def reached(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of operators, from now on."""
    calls: list[tuple[Any, ...]] = []
    original = ops.call_by_name

    def call(name: str, *arguments: Any) -> Any:
        calls.append(arguments)
        return original(name, *arguments)

    monkeypatch.setattr(ops, "call_by_name", call)
    return calls


@pytest.mark.parametrize("dims", VOLUMES)
def test_channels_last_is_not_copied(dims: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the logits on their way in nor the gradient on its way out; of NCHW maps one copy of each."""
    shape, form = VOLUMES[dims]
    calls = reached(monkeypatch)
    s, t = (x.float() for x in maps(generator, shape))
    student, teacher = s.to(memory_format=form).detach().requires_grad_(), t.to(memory_format=form)
    loss, stats = F.kl_div(student, teacher, dim=1), fastkd.logit_stats(student, dim=1)
    for logits, given in ((student, calls[0][0]), (teacher, calls[0][1]), (student, calls[1][0])):
        assert given.data_ptr() == logits.data_ptr()
        assert given.shape == (logits.numel() // K, K)
        assert given.stride() == (K, 1)
    made: list[Tensor] = []
    calls[0][0].register_hook(made.append)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.data_ptr() == made[0].data_ptr()
    assert gradient.is_contiguous(memory_format=form)
    assert (stats.max.shape, stats.max.is_contiguous()) == (shape[:1] + shape[2:], True)
    calls.clear()
    F.kl_div(s, t, dim=1)
    assert calls[0][0].data_ptr() != s.data_ptr()
    assert calls[0][0].is_contiguous()


def test_batchmean_is_the_mean_over_valid_pixels(device: torch.device, generator: torch.Generator) -> None:
    s, t = (x.to(device) for x in maps(generator))
    target = TARGET.to(device)
    rows = F.kl_div(s, t, dim=1, target=target, reduction="none")
    assert rows.shape == MAP
    assert not rows[target == -100].any()
    mean = rows.sum() / (target != -100).sum()
    torch.testing.assert_close(F.kl_div(s, t, dim=1, target=target), mean)


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.compiles
def test_compile(name: str, dynamic: bool | None, generator: torch.Generator) -> None:
    torch._dynamo.reset()
    loss = LOSSES[name][0]
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for form in FORMATS.values():
        pair = [x.float().to(memory_format=form).detach().requires_grad_() for x in maps(generator)]
        results = []
        for function in (loss, compiled):
            value = function(*pair)
            gradients = torch.autograd.grad(value.square().sum(), pair, allow_unused=True)
            assert all(g is None or g.is_contiguous(memory_format=form) for g in gradients)
            results.append((value.detach(), *(g for g in gradients if g is not None)))
        torch.testing.assert_close(results[1], results[0])


@pytest.mark.compiles
def test_compile_where_the_dimension_changes(generator: torch.Generator) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda s, t, dim: F.kl_div(s, t, reduction="none", dim=dim), fullgraph=True, backend="aot_eager"
    )
    s, t = maps(generator)
    for dim in (1, 2, 3, -4):
        torch.testing.assert_close(compiled(s, t, dim), F.kl_div(s, t, reduction="none", dim=dim))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms(device: torch.device, generator: torch.Generator) -> None:
    """Of NCHW maps, whose copy has a backward pass of its own."""
    s, t = (x.to(device) for x in maps(generator))
    loss = lambda s, t: F.kl_div(s, t, dim=0)  # noqa: E731
    each = torch.vmap(torch.func.grad(loss))(s, t)
    torch.testing.assert_close(each, torch.stack([torch.func.grad(loss)(*pair) for pair in zip(s, t, strict=True)]))
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.func.grad(lambda s: torch.func.grad(loss)(s, t[0]).sum())(s[0])
    student = s[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(student, t[0]), student, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        gradient.sum().backward()


def test_opcheck_of_strided_rows(device: torch.device, generator: torch.Generator) -> None:
    """What reaches the operators of columns, ``dim=0``, without a gradient: rows whose classes are apart."""
    s, t = (x[0, :, 0].to(device, torch.float32).movedim(0, -1) for x in maps(generator))
    tail = (None, None, None, 2.0, 2, 0.3, 0.9, 0.1, -100, 2, False, False)
    torch.library.opcheck(torch.ops.fastkd.divergence.default, (s, t, *tail))
    torch.library.opcheck(torch.ops.fastkd.logit_stats.default, (s, 2.0))


CALLS: dict[str, Callable[[Tensor, Tensor, Any], object]] = {
    "kl_div": lambda s, t, dim: F.kl_div(s, t, dim=dim),
    "js_div": lambda s, t, dim: F.js_div(s, t, dim=dim),
    "soft_cross_entropy": lambda s, t, dim: F.soft_cross_entropy(s, t, dim=dim),
    "kd_loss": lambda s, t, dim: F.kd_loss(s, t, torch.zeros(MAP, dtype=torch.int64), dim=dim),
    "logit_stats": lambda s, t, dim: fastkd.logit_stats(s, dim=dim),
    "KLDivLoss": lambda s, t, dim: fastkd.KLDivLoss(dim=dim)(s, t),
    "JSDivLoss": lambda s, t, dim: fastkd.JSDivLoss(dim=dim)(s, t),
    "KDLoss": lambda s, t, dim: fastkd.KDLoss(dim=dim)(s, t, torch.zeros(MAP, dtype=torch.int64)),
}
MODULES = {"KLDivLoss": fastkd.KLDivLoss, "JSDivLoss": fastkd.JSDivLoss, "KDLoss": fastkd.KDLoss}


@pytest.mark.parametrize("name", CALLS)
def test_what_is_refused(name: str) -> None:
    x = torch.zeros(SHAPE)
    for dim in (4, -5, 2**70):
        with pytest.raises(ValueError, match=rf"fastkd: dim is {dim}, must be from -4 to 3, .*logits, \(2, 5, 3, 4\)"):
            CALLS[name](x, x, dim)
    for dim, given in ((True, "bool"), (1.0, "float"), (-1.0, "float"), ("1", "str"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"fastkd: dim is {given}, must be an int"):
            CALLS[name](x, x, dim)
        if name in MODULES:  # at construction
            with pytest.raises(TypeError, match=f"fastkd: dim is {given}, must be an int"):
                MODULES[name](dim=dim)
    with pytest.raises(ValueError, match=r"\(2, 0, 3, 4\), must be classes in dimension 1, classes > 0"):
        CALLS[name](x[:, :0], x[:, :0], 1)


def test_shapes_are_named_as_they_were_given() -> None:
    x, target = torch.zeros(SHAPE), torch.zeros(MAP, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"teacher_logits has shape \(2, 4, 3, 4\), must be .*\(2, 5, 3, 4\); .*vocab"):
        F.kl_div(x, x[:, :4], dim=1)
    with pytest.raises(ValueError, match=r"teacher_logits has shape \(2, 5, 3\), must be .*, \(2, 5, 3, 4\)$"):
        F.kl_div(x, x[..., 0], dim=1)
    with pytest.raises(ValueError, match=r"target has shape \(2, 5, 3\), must be \(2, 3, 4\)"):
        F.kd_loss(x, x, x[..., 0].long(), dim=1)
    with pytest.raises(ValueError, match=r"weight has shape \(2, 1, 5\), must broadcast to the rows, \(2, 3, 4\)"):
        F.kd_loss(x, x, target, dim=1, weight=x[:, :1, 0, :1].expand(2, 1, 5))
