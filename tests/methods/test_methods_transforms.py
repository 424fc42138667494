"""Second derivatives, batched gradients and torch.func through every method: right, or an error that says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkd.methods import (
    AT,
    BSS,
    DIST,
    DKD,
    DML,
    FSP,
    ONE,
    RKD,
    SP,
    SRD,
    Baseline,
    FitNet,
    Hinton,
    JointLogits,
    Method,
    Outputs,
)
from fastkd.methods.representation import attention
from fastkd.models.resnet import resnet

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]

B, K = 4, 3
TARGET = torch.arange(B) % K

# of plain torch, and of fastkd's fused operators
PLAIN: dict[str, Callable[[], Method]] = {
    "baseline": Baseline,
    "fitnet": lambda: FitNet(2, 2, ["a"], task_weight=1.0, kd_weight=0.0).eval(),  # no statistics that a call moves
    "srd": lambda: SRD(2, 2, ["a"], kd_weight=0.0).eval(),
    "dist": DIST,
    "fsp": lambda: FSP(["a", "b"], task_weight=1.0, kd_weight=0.0),
    "at": lambda: AT(["a", "b"]),
    "sp": lambda: SP(["a"]),
}
FUSED: dict[str, Callable[[], Method]] = {
    "hinton": Hinton,
    "hinton, no labels": lambda: Hinton(task_weight=0.0),
    "logit-std": lambda: Hinton(standardize=True),
    "dkd": DKD,
    "at": lambda: AT(["a"], kd_weight=1.0),
    "rkd": lambda: RKD(25, 50, ["a"]),
    "bss": BSS,
    "one": ONE,
    "dml": DML,
}

Loss = Callable[[Tensor, Tensor], Tensor]


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(method: Method) -> Loss:
    """Of logits ``[B, K]`` and a map ``[B, 2, 4, 4]``, of which all that the student puts out is made."""
    method = method.double()
    teacher = Outputs(random(5, B, K), {"a": random(6, B, 2, 4, 4), "b": random(7, B, 2, 2, 2)})

    def loss(logits: Tensor, feature: Tensor) -> Tensor:
        joint = JointLogits([logits, logits.square(), logits.tanh()])
        student = Outputs(joint if method.layers == () and isinstance(method, (ONE, DML)) else logits)
        student = student._replace(features={"a": feature, "b": feature[..., ::2, ::2].tanh()})
        return 0.01 * method(student, teacher, TARGET).total

    return loss


def inputs() -> tuple[Tensor, Tensor]:
    return random(1, B, K), random(2, B, 2, 4, 4)


def gradients(loss: Loss, x: tuple[Tensor, Tensor], *, create_graph: bool = False) -> Tensor:
    x = tuple(t if t.requires_grad else t.clone().requires_grad_() for t in x)  # type: ignore[assignment]
    grads = torch.autograd.grad(loss(*x), x, create_graph=create_graph, materialize_grads=True)
    return torch.cat([g.flatten() for g in grads])


def hessian(loss: Loss, *, vectorize: bool) -> Tensor:
    x = tuple(t.requires_grad_() for t in inputs())
    first = gradients(loss, x, create_graph=True)
    if vectorize:
        eye = torch.eye(len(first), dtype=first.dtype)
        rows = torch.autograd.grad(first, x, eye, is_grads_batched=True, allow_unused=True)
        return torch.cat(
            [torch.zeros(len(eye), t.numel()) if r is None else r.flatten(1) for r, t in zip(rows, x, strict=True)], 1
        )
    every = [torch.autograd.grad(g, x, retain_graph=True, materialize_grads=True) for g in first]
    return torch.stack([torch.cat([r.flatten() for r in row]) for row in every])


def samples(loss: Loss) -> Tensor:
    """The loss of three batches, by vmap."""
    logits, feature = inputs()
    return torch.func.vmap(loss)(
        torch.stack([logits, 2 * logits, -logits]), torch.stack([feature, feature.sin(), -feature])
    )


def each(loss: Loss) -> Tensor:
    logits, feature = inputs()
    pairs = ((logits, feature), (2 * logits, feature.sin()), (-logits, -feature))
    return torch.stack([loss(*pair) for pair in pairs])


def gradients_of_samples(loss: Loss) -> Tensor:
    logits, feature = inputs()
    grads = torch.func.vmap(torch.func.grad(loss, (0, 1)))(torch.stack([logits] * 2), torch.stack([feature] * 2))
    return torch.cat([g.flatten(1) for g in grads], 1)


def scaled(loss: Loss) -> Callable[[Tensor], Tensor]:
    logits, feature = inputs()
    return lambda scale: torch.stack([loss(s * logits, s * feature) for s in scale])


def jacobian(loss: Loss, *, vectorize: bool) -> Any:
    return torch.autograd.functional.jacobian(scaled(loss), torch.tensor([1.0, 0.5, 2.0]).double(), vectorize=vectorize)


def forward_mode(loss: Loss) -> Tensor:
    x = inputs()
    return torch.func.jvp(loss, x, (x[0].cos(), x[1].cos()))[1]


def along(loss: Loss) -> Tensor:
    x = inputs()
    return gradients(loss, x) @ torch.cat([t.cos().flatten() for t in x])


def functional_gradient(loss: Loss) -> Tensor:
    return torch.cat([g.flatten() for g in torch.func.grad(loss, (0, 1))(*inputs())])


def functional_jacobian(loss: Loss) -> Tensor:
    return torch.func.jacrev(scaled(loss))(torch.tensor([1.0, 0.5, 2.0]).double())


# what is asked, and how it is found without transforms
ASKED: dict[str, tuple[Callable[[Loss], Any], Callable[[Loss], Any]]] = {
    "second derivatives": (lambda loss: hessian(loss, vectorize=False), lambda loss: differences(loss)),
    "is_grads_batched of second derivatives": (
        lambda loss: hessian(loss, vectorize=True),
        lambda loss: differences(loss),
    ),
    "jacobian": (lambda loss: jacobian(loss, vectorize=True), lambda loss: jacobian(loss, vectorize=False)),
    "vmap": (samples, each),
    "vmap of grad": (gradients_of_samples, lambda loss: torch.stack([gradients(loss, inputs())] * 2)),
    "func.grad": (functional_gradient, lambda loss: gradients(loss, inputs())),
    "func.jacrev": (functional_jacobian, lambda loss: jacobian(loss, vectorize=False)),
    "func.jvp": (forward_mode, along),
}


def differences(loss: Loss) -> Tensor:
    """The Hessian, by differences of gradients."""
    logits, feature = inputs()
    flat, step = torch.cat([logits.flatten(), feature.flatten()]), 1e-6

    def at(point: Tensor) -> Tensor:
        return gradients(loss, (point[: logits.numel()].view_as(logits), point[logits.numel() :].view_as(feature)))

    rows = [(at(flat + e) - at(flat - e)) / (2 * step) for e in step * torch.eye(len(flat), dtype=flat.dtype)]
    return torch.stack(rows)


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("name", PLAIN)
def test_methods_of_plain_torch(name: str, asked: str) -> None:
    transformed, plain = ASKED[asked]
    loss = loss_of(PLAIN[name]())
    torch.testing.assert_close(transformed(loss), plain(loss), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("name", FUSED)
def test_methods_of_fused_operators(name: str, asked: str) -> None:
    """First derivatives, in reverse mode, are right; the rest is right or raises fastkd's own error."""
    transformed, plain = ASKED[asked]
    loss = loss_of(FUSED[name]())
    refused = None
    try:
        ours = transformed(loss)
    except RuntimeError as error:
        refused = str(error)
    if refused is not None:
        assert "fastkd: " in refused
        assert asked not in ("func.grad", "func.jacrev")
        return
    torch.testing.assert_close(ours, plain(loss), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("make", [Baseline, Hinton, lambda: Hinton(task_weight=0.0)])
def test_labels_of_each_sample(make: Callable[[], Method]) -> None:
    """Within a transform no label can be looked at; the loss is that of each."""
    method, logits, teacher = make(), random(1, 3, B, K), random(2, 3, B, K)
    target = torch.stack([TARGET, (TARGET + 1) % K, TARGET.flip(0)])

    def loss(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return method(Outputs(s), Outputs(t), y).total

    expected = torch.stack([loss(s, t, y) for s, t, y in zip(logits, teacher, target, strict=True)])
    torch.testing.assert_close(torch.func.vmap(loss)(logits, teacher, target), expected)


@pytest.mark.parametrize("wrong", [-100, -1, K])
@pytest.mark.parametrize("make", [Baseline, Hinton])
def test_no_label_is_left_out_within_a_transform(make: Callable[[], Method], wrong: int) -> None:
    method, teacher, target = make(), Outputs(random(2, B, K)), TARGET.clone()
    target[1] = wrong
    with pytest.raises((ValueError, IndexError, RuntimeError), match=f"(?i)target.*{wrong}"):
        torch.func.grad(lambda logits: method(Outputs(logits), teacher, target).total)(random(1, B, K))


def test_attention_of_any_order() -> None:
    feature = random(3, 2, 3, 2, 2).requires_grad_()
    options = {"check_forward_ad": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(attention, feature, check_batched_forward_grad=True, **options)
    assert torch.autograd.gradgradcheck(attention, feature, check_batched_grad=True, check_fwd_over_rev=True)
    total = lambda x: attention(x).pow(3).sum()  # noqa: E731
    expected = torch.autograd.functional.hessian(total, feature)
    for hessian_of in (torch.func.hessian(total), torch.func.jacrev(torch.func.grad(total))):
        torch.testing.assert_close(hessian_of(feature.detach()), expected)


def test_attention_compiles() -> None:
    network = resnet(8, in_channels=1)
    torch._dynamo.reset()
    images = torch.randn(2, 1, 8, 8)
    compiled = torch.compile(lambda x: attention(network.conv1(x)), fullgraph=True, backend="aot_eager")(images)
    torch.testing.assert_close(compiled, attention(network.conv1(images)))
