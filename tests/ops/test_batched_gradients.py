"""Every backward pass with several incoming gradients at once, in all the ways that torch has for that."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hvp, jacobian, jvp, vjp

import fastkd
from fastkd import functional as F  # noqa: N812
from fastkd.methods.representation import attention

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.cuda_kernels,
    pytest.mark.no_kernels,  # of torch's transforms: the sanitizers have each backward pass under test elsewhere
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]

TARGET = torch.tensor([0, 3, -100, 6])
OFFSETS = torch.arange(8).reshape(4, 2) % 3
ENTRIES = torch.tensor([[0, 3], [1, 2], [9, 8], [4, 0]]), torch.full((4, 2), -1.5)
FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl_div": lambda s, t: F.kl_div(s, t, 2.0),
    "kl_div rows": lambda s, t: F.kl_div(s, t, reduction="none"),
    "js_div rows": lambda s, t: F.js_div(s, t, reduction="none", beta=0.3),
    "soft_cross_entropy": lambda s, t: F.soft_cross_entropy(s, t),
    "kd_loss rows": lambda s, t: F.kd_loss(s, t, TARGET.to(s.device), reduction="none"),
    "sparse_kl_div rows": lambda s, t: F.sparse_kl_div(s * t, *(x.to(s.device) for x in ENTRIES), reduction="none"),
    "logit_stats": lambda s, t: torch.stack([*fastkd.logit_stats(s)[2:], *fastkd.logit_stats(t)[2:]]),
    "kl_div of maps, rows": lambda s, t: F.kl_div(s.view(2, 5, 4), t.view(2, 5, 4), dim=1, reduction="none"),
    "logit_stats of maps": lambda s, t: torch.stack(fastkd.logit_stats((s * t).view(2, 5, 4), dim=1)[2:]),
    "relation_loss": F.relation_loss,
    "channel_moments": lambda s, t: torch.cat([*fastkd.channel_moments(s), *fastkd.channel_moments(t.view(2, 10, 2))]),
    "channel_moments of samples": lambda s, t: torch.stack(
        fastkd.channel_moments((s * t).view(2, 5, 4), per_sample=True)
    ),
    "crop_patches": lambda s, t: fastkd.crop_patches((s * t).view(4, 1, 2, 5), OFFSETS.to(s.device), 2),
    "attention": lambda s, t: attention((s * t).view(4, 2, 1, 5)),
}
TWICE = ("crop_patches", "attention")  # have derivatives of any order
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(params=DTYPES)
def pair(request: pytest.FixtureRequest, device: torch.device, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(2, 4, 10, generator=generator, dtype=torch.float64).to(device, DTYPES[request.param])
    return x[0].clone().requires_grad_(), x[1].clone().requires_grad_()


def assert_close(ours: Tensor, expected: Tensor) -> None:
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[ours.dtype]
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def one_by_one(
    function: Callable[[Tensor, Tensor], Tensor], pair: tuple[Tensor, Tensor], upstream: Tensor
) -> list[Tensor]:
    """The gradients for each of the incoming ones, stacked."""
    each = [torch.autograd.grad(function(*pair), pair, one) for one in upstream]
    return [torch.stack(g) for g in zip(*each, strict=True)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_is_grads_batched(name: str, pair: tuple[Tensor, Tensor], generator: torch.Generator) -> None:
    function = FUNCTIONS[name]
    y = function(*pair)
    upstream = torch.randn((3, *y.shape), generator=generator).to(y)
    expected = one_by_one(function, pair, upstream)
    for retain_graph in (True, False):
        ours = torch.autograd.grad(y, pair, upstream, is_grads_batched=True, retain_graph=retain_graph)
        for a, b in zip(ours, expected, strict=True):
            assert_close(a, b)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_jacobian(name: str, pair: tuple[Tensor, Tensor]) -> None:
    slow = jacobian(FUNCTIONS[name], pair)
    for a, b in zip(jacobian(FUNCTIONS[name], pair, vectorize=True), slow, strict=True):
        assert_close(a, b)
    s, t = (x.detach() for x in pair)
    for a, b in zip(torch.func.jacrev(FUNCTIONS[name], (0, 1))(s, t), slow, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vmap_of_a_backward_pass(name: str, pair: tuple[Tensor, Tensor], generator: torch.Generator) -> None:
    function = FUNCTIONS[name]
    y, pull = torch.func.vjp(function, *(x.detach() for x in pair))
    upstream = torch.randn((3, *y.shape), generator=generator).to(y)
    for a, b in zip(torch.func.vmap(pull)(upstream), one_by_one(function, pair, upstream), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_of_each_sample(name: str, pair: tuple[Tensor, Tensor]) -> None:
    if "rows" in name or name in (
        "logit_stats",
        "channel_moments",
        "crop_patches",
        "attention",
        "kl_div",
        "soft_cross_entropy",
    ):
        students = torch.stack([pair[0].detach(), 2 * pair[0].detach()])
        total = lambda s, t: FUNCTIONS[name](s, t).float().square().sum()  # noqa: E731
        ours = torch.func.vmap(torch.func.grad(total), (0, None))(students, pair[1].detach())
        for a, student in zip(ours, students, strict=True):
            assert_close(a, torch.func.grad(total)(student, pair[1].detach()))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_derivatives_are_right_or_refused(name: str, pair: tuple[Tensor, Tensor]) -> None:
    """jvp by two backward passes, and products with the Hessian: never zeros in silence."""
    function = lambda s: FUNCTIONS[name](s, pair[1].detach())  # noqa: E731
    student = pair[0].detach()
    total = lambda s: function(s).float().square().sum()  # noqa: E731
    direction = torch.ones_like(student)
    if name in TWICE:
        assert hvp(total, student, direction)[1].abs().sum() > 0
    else:
        with pytest.raises(RuntimeError, match="differentiated again"):
            hvp(total, student, direction)
    if name.startswith(("logit_stats", "relation_loss", "channel_moments")) or (
        student.dtype == torch.float16 and name not in TWICE
    ):
        with pytest.raises(RuntimeError, match="differentiated again"):
            jvp(function, student, direction)
        return
    _, tangent = jvp(function, student, direction)
    y, pulled = vjp(function, student, torch.ones_like(function(student)))
    assert y.shape == tangent.shape
    if student.dtype in (torch.float32, torch.float64):
        assert_close(tangent.sum(), (pulled * direction).sum())
