"""What backward passes keep: all of it in autograd's saved tensors, and no more than they need."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import fastkd
from fastkd import functional as F  # noqa: N812
from fastkd.methods.representation import attention

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.cuda_kernels]

Function = Callable[[Tensor, Tensor], Tensor]
TARGET = torch.tensor([0, 3, -100, 6, 9, 1])
OFFSETS = torch.arange(12).reshape(6, 2) % 3


def entries(device: torch.device) -> tuple[Tensor, Tensor]:
    """Of a sparse teacher: classes and their log-probabilities."""
    return torch.arange(3, device=device).repeat(6, 1), torch.full((6, 3), -2.0, device=device)


FUNCTIONS: dict[str, Function] = {
    "kl_div": lambda s, t: F.kl_div(s, t, 2.0),
    "reverse": lambda s, t: F.kl_div(s, t, direction="reverse", reduction="none"),
    "js_div": lambda s, t: F.js_div(s, t, beta=0.3),
    "soft_cross_entropy": lambda s, t: F.soft_cross_entropy(s, t, weight=torch.ones(6, device=s.device)),
    "kd_loss": lambda s, t: F.kd_loss(s, t, TARGET.to(s.device)),
    "sparse_kl_div": lambda s, t: F.sparse_kl_div(s + t, *entries(s.device), 2.0),
    "sparse_kd_loss": lambda s, t: F.sparse_kd_loss(s + t, *entries(s.device), TARGET.to(s.device), tail="drop"),
    "logit_stats": lambda s, t: fastkd.logit_stats(s).entropy + fastkd.logit_stats(t).logsumexp,
    "relation_loss": F.relation_loss,
    "channel_moments": lambda s, t: fastkd.channel_moments(s).var + fastkd.channel_moments(t.view(3, 10, 2)).mean,
    "crop_patches": lambda s, t: fastkd.crop_patches((s * t).view(6, 1, 2, 5), OFFSETS.to(s.device), 3),
    "random_crop_flip": lambda s, t: fastkd.random_crop_flip(
        (s + t).view(6, 1, 2, 5), 0, flip_probability=0.0, std=2.0
    ),
    "attention": lambda s, t: attention((s + t).view(6, 2, 1, 5)),
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "float64": torch.float64}


@pytest.fixture(params=DTYPES)
def pair(request: pytest.FixtureRequest, device: torch.device, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(2, 6, 10, generator=generator, dtype=torch.float64).to(device, DTYPES[request.param])
    return x[0].clone().requires_grad_(), x[1].clone().requires_grad_()


def nodes_of(y: Tensor) -> Iterator[Node]:
    todo, seen = [y.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        todo += [following for following, _ in node.next_functions]


def gradients(y: Tensor, inputs: tuple[Tensor, ...], **options: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y.float().square().sum(), inputs, **options)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_tensor_is_kept_elsewhere(name: str, pair: tuple[Tensor, Tensor]) -> None:
    """A tensor on a node itself is invisible to checkpointing, hooks and offloading, and no version counter watches it."""
    with torch.inference_mode():
        given = pair[1].detach() * 2
    for teacher in (pair[1], given):
        if teacher is given and name in ("logit_stats", "crop_patches", "random_crop_flip", "attention"):
            continue  # torch's own arithmetic with an inference tensor keeps it, or refuses to
        kept = [
            value
            for node in nodes_of(FUNCTIONS[name](pair[0], teacher))
            for value in getattr(node, "__dict__", {}).values()
        ]
        assert not [leaf for leaf in pytree.tree_leaves(kept) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_hooks_see_all(name: str, pair: tuple[Tensor, Tensor]) -> None:
    """What was kept may go through any other memory and come back as another tensor."""
    expected = gradients(FUNCTIONS[name](*pair), pair)
    for pack, unpack in (
        (lambda t: (t.device, t.cpu().clone()), lambda packed: packed[1].to(packed[0])),  # offloading
        (lambda t: t, lambda t: t),
    ):
        with saved_tensors_hooks(pack, unpack):
            y = FUNCTIONS[name](*pair)
        for _ in range(2):
            for ours, theirs in zip(gradients(y, pair, retain_graph=True), expected, strict=True):
                assert torch.equal(ours, theirs)
        for ours, theirs in zip(gradients(y, pair), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_checkpoint_recomputes(name: str, pair: tuple[Tensor, Tensor]) -> None:
    calls, expected = 0, gradients(FUNCTIONS[name](*pair), pair)

    def function(s: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return FUNCTIONS[name](s, t)

    y = checkpoint(function, *pair, use_reentrant=False)
    assert calls == 1
    ours = gradients(y, pair)
    assert calls == 2
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_checkpoint_keeps_no_gradient(device: torch.device) -> None:
    """A few numbers of each call, where torch keeps the logits; the gradient of 64 x 1000 would be 256 kB."""
    student, teacher = torch.randn(2, 64, 1000, device=device).unbind()
    student.requires_grad_()
    seen: list[weakref.ref[Tensor]] = []

    def pack(t: Tensor) -> Tensor:
        seen.append(weakref.ref(t))
        return t

    def step(s: Tensor) -> Tensor:
        with saved_tensors_hooks(pack, lambda t: t):
            return F.kl_div(s, teacher)

    plain = step(student)
    assert sum(t().numel() for t in seen if t() is not None) >= student.numel()
    del plain
    seen.clear()
    loss = checkpoint(lambda s: F.kl_div(s, teacher), student, use_reentrant=False)
    node = next(n for n in nodes_of(loss) if "divergence" in n.name())
    assert not [v for v in node.__dict__.values() if isinstance(v, Tensor)]
    loss.backward()
    assert student.grad is not None


@pytest.mark.parametrize("name", ["kl_div", "reverse", "js_div", "soft_cross_entropy", "kd_loss", "relation_loss"])
def test_teacher_of_inference_mode(name: str, pair: tuple[Tensor, Tensor]) -> None:
    """It has no version counter: overwritten before the backward pass, it must not show."""
    student, function = pair[0], FUNCTIONS[name]
    with torch.inference_mode():
        teacher = pair[1].detach() * 1
    (expected,) = gradients(function(student, pair[1].detach()), (student,))
    loss = function(student, teacher)
    with torch.inference_mode():
        teacher.zero_()
    (ours,) = gradients(loss, (student,))
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("name", ["kl_div", "reverse", "js_div", "soft_cross_entropy", "kd_loss", "relation_loss"])
@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_teacher_is_let_go(name: str, mode: str, device: torch.device, generator: torch.Generator) -> None:
    """Forty losses of a step do not hold forty teachers."""
    student, source = torch.randn(2, 6, 10, generator=generator).to(device).unbind()
    student.requires_grad_()
    with getattr(torch, mode)():
        teacher = source * 2
    alive = weakref.ref(teacher)
    loss = FUNCTIONS[name](student, teacher)
    del teacher
    assert alive() is None
    assert gradients(loss, (student,))[0].isfinite().all()


@pytest.mark.parametrize("name", ["kl_div", "reverse", "js_div", "kd_loss"])
def test_a_graph_that_is_kept(name: str, pair: tuple[Tensor, Tensor]) -> None:
    """Scaling in place would change what a second backward finds, or what the first one returned."""
    y = FUNCTIONS[name](*pair)
    upstream = torch.full_like(y, 3.0)
    first = torch.autograd.grad(y, pair, upstream, retain_graph=True)
    copies = [g.clone() for g in first]
    ones = torch.autograd.grad(y, pair, torch.ones_like(y), retain_graph=True)
    for gradient in ones:
        gradient.zero_()  # a caller's own
    again = torch.autograd.grad(y, pair, upstream)
    for a, b, c in zip(first, copies, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(b, c)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, pair, upstream)


@pytest.mark.parametrize("name", ["kl_div", "reverse", "js_div", "kd_loss"])
def test_what_hooks_give_back_is_theirs(name: str, pair: tuple[Tensor, Tensor]) -> None:
    """Hooks that keep equal tensors once: of two equal losses none may write into what the other one is given, too."""
    student, teacher = pair
    cache: dict[int, Tensor] = {}

    def pack(t: Tensor) -> int:
        key = hash((t.shape, t.dtype, tuple(t.detach().flatten().tolist())))
        cache.setdefault(key, t)
        return key

    with saved_tensors_hooks(pack, cache.__getitem__):
        one, other = (FUNCTIONS[name](student, teacher).sum() for _ in range(2))
    ours = torch.autograd.grad(2 * one + 5 * other, pair)
    expected = torch.autograd.grad(7 * FUNCTIONS[name](student, teacher).sum(), pair)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", ["kl_div", "reverse", "js_div", "kd_loss"])
def test_learned_weights_of_rows(name: str, pair: tuple[Tensor, Tensor]) -> None:
    """A gradient may be differentiated with respect to what it was scaled by; with respect to logits it raises."""
    student, teacher = pair
    if student.dtype == torch.float16:
        pytest.skip("its gradients are computed with the scale, and say so")
    function = {
        "kl_div": lambda s, t: F.kl_div(s, t, reduction="none"),
        "js_div": lambda s, t: F.js_div(s, t, reduction="none"),
        "kd_loss": lambda s, t: F.kd_loss(s, t, TARGET.to(s.device), reduction="none"),
    }.get(name, FUNCTIONS[name])
    rows = function(student, teacher.detach())
    weight = torch.rand(6, device=rows.device, dtype=rows.dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad(rows, student, weight, create_graph=True)
    direction = torch.randn_like(gradient)
    (ours,) = torch.autograd.grad((gradient * direction).sum(), weight, retain_graph=True)
    unscaled = torch.autograd.grad(function(student, teacher.detach()).sum(), student)[0]
    torch.testing.assert_close(ours, (unscaled * direction).sum(-1).to(ours.dtype))
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(gradient.sum(), student)
