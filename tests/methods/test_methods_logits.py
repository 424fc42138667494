"""Whose logits are whose: of one network with any number of leading dimensions, and of several that learn together."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
    Cohort,
    FeatureTap,
    FitNet,
    Hinton,
    JointLogits,
    Method,
    MultiBranch,
    Objective,
    Outputs,
)
from fastkd.training.evaluation import evaluate
from fastkd.training.inference import predict

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]

B, T, K = 3, 5, 7

# that read one network's logits
SINGLE: dict[str, Callable[[], Method]] = {
    "baseline": Baseline,
    "hinton": Hinton,
    "hinton, no labels": lambda: Hinton(task_weight=0.0),
    "logit-std": lambda: Hinton(standardize=True),
    "dkd": DKD,
    "dist": DIST,
    "srd": lambda: SRD(4, 4, ["a"]),
    "fitnet": lambda: FitNet(4, 4, ["a"]),
    "fsp": lambda: FSP(["a", "b"]),
    "at": lambda: AT(["a"], kd_weight=1.0),
    "sp": lambda: SP(["a"]),
    "rkd": lambda: RKD(25, 50, ["a"]),
}
JOINT: dict[str, Callable[[], Method]] = {"one": ONE, "dml": DML}


def maps(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(B, 4, 4, 4, generator=generator) for name in ("a", "b")}


def rows(seed: int, *leading: int) -> Tensor:
    return torch.randn(*leading, K, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("leading", [(B,), (B, T), (B, 2, T), (1, T), (B, 1)])
@pytest.mark.parametrize("name", SINGLE)
def test_a_token_is_a_row(name: str, leading: tuple[int, ...]) -> None:
    """``[B, T, K]`` with labels ``[B, T]`` is ``[B T, K]`` with labels ``[B T]``, in value, terms and gradient."""
    method = SINGLE[name]()
    student, teacher = rows(1, *leading).requires_grad_(), rows(2, *leading)
    target = torch.arange(teacher[..., 0].numel()).reshape(leading) % K
    whole = method(Outputs(student, maps(1)), Outputs(teacher, maps(2)), target)
    flat = method(
        Outputs(student.reshape(-1, K), maps(1)), Outputs(teacher.reshape(-1, K), maps(2)), target.reshape(-1)
    )
    torch.testing.assert_close(whole.terms, flat.terms)
    ours, theirs = (torch.autograd.grad(loss.total, student)[0] for loss in (whole, flat))
    torch.testing.assert_close(ours, theirs)
    assert (ours.reshape(-1, K).abs().sum(1) > 0).all()  # each row counts


@pytest.mark.parametrize("name", JOINT)
def test_networks_that_learn_together_on_tokens(name: str) -> None:
    method = JOINT[name]()
    stack = rows(1, 3, B, T)
    target = torch.arange(B * T).reshape(B, T) % K
    whole = method(Outputs(JointLogits(stack)), None, target, 0.1)
    flat = method(Outputs(JointLogits(stack.reshape(3, -1, K))), None, target.reshape(-1), 0.1)
    torch.testing.assert_close(whole.terms, flat.terms)


class OfTokens(nn.Module):
    """A language model: int64 ``[B, T]`` to logits ``[B, T, K]``."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.head = nn.Embedding(K, 6), nn.Linear(6, K)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens).cumsum(1))


class Wrapped(nn.Module):
    """As transformers' models return their logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(logits=self.network(x))


@pytest.mark.parametrize("wrap", [lambda network: network, Wrapped])
@pytest.mark.parametrize("make", [Baseline, Hinton, lambda: SP(["embedding"]), DML])
def test_a_language_model_is_not_its_first_sequence(
    make: Callable[[], Method], wrap: Callable[[nn.Module], nn.Module]
) -> None:
    method = make()
    if method.layers and wrap is Wrapped:
        method = SP(["network.embedding"])
    tokens, target = torch.arange(B * T).reshape(B, T) % K, torch.arange(B * T).reshape(B, T) % 3
    student, teacher = method.build_student(lambda seed: wrap(OfTokens(seed))), wrap(OfTokens(9))
    loss, logits = Objective(method, student, teacher)(tokens, target)
    assert logits.shape == (B, T, K)
    loss.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    kept = method.deployed(student)
    every = predict(kept, tokens)
    assert every.shape == (B, T, K)
    result = evaluate(kept, tokens, target, batch_size=2)
    assert result["test_loss"] == pytest.approx(F.cross_entropy(every.reshape(-1, K), target.reshape(-1)).item())
    accuracy = (every.argmax(2) == target).double().mean().item()
    assert result["test_accuracy"] == pytest.approx(accuracy)


STACK = torch.zeros(2, B, K)
NETWORKS = pytest.mark.parametrize(
    "several", [JointLogits(STACK), tuple(STACK), list(STACK)], ids=["JointLogits", "tuple", "list"]
)


WHOSE = [(name, whose) for name in (*SINGLE, "bss") for whose in ("student", "teacher")]


@NETWORKS
@pytest.mark.parametrize(("name", "whose"), [pair for pair in WHOSE if pair != ("baseline", "teacher")])
def test_one_network_is_not_several(name: str, whose: str, several: Any) -> None:
    method = {**SINGLE, "bss": BSS}[name]()
    if hasattr(method, "kd_weight") and name != "baseline":
        method.kd_weight = 1.0
    given = {"student": STACK[0], "teacher": STACK[0], whose: several}
    student, teacher = (Outputs(given[side], maps(0)) for side in ("student", "teacher"))
    with pytest.raises(
        ValueError, match=rf"fastkd: {whose}\.logits are the logits of 2 networks, must be those of one"
    ):
        method(student, teacher, torch.zeros(B, dtype=torch.int64))


@NETWORKS
@pytest.mark.parametrize("name", JOINT)
def test_several_networks_in_any_sequence(name: str, several: Any) -> None:
    loss = JOINT[name]()(Outputs(several), None, torch.zeros(B, dtype=torch.int64))
    assert loss.total.isfinite()


@pytest.mark.parametrize("leading", [(), (B, T)])
def test_bss_takes_whole_images(leading: tuple[int, ...]) -> None:
    given = Outputs(torch.zeros(*leading, K))
    target = torch.zeros(leading, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"student.logits has shape \(.*7,?\), must be \[B, "):
        BSS()(given, given, target)
    tap = FeatureTap(nn.Linear(2, 2))
    for wrong in ((given.logits, STACK[0]), (STACK[0], given.logits), (JointLogits(STACK), STACK[0])):
        with pytest.raises(ValueError, match=r"fastkd: (student|teacher)_logits .*must be (\[B, |those of one)"):
            BSS().attack(tap, torch.zeros(B, 2), *wrong, target)


# shapes of student.logits, teacher.logits and target, and what the message says of Baseline, of Hinton and of BSS
TEACHER = r"teacher.logits has shape \(3, \d\), must be that of student.logits"
TARGET, LOGITS = (
    "target has shape {}, must be {}, a class for each row",
    r"student.logits has shape {}, must be \[B, ..., K\]",
)
IMAGES = r"student.logits has shape \(3, 5, 7\), must be \[B, K\] for BSS"
SHAPES: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], list[str | None]]] = [
    ((B, T, K), (B, K), (B, T), [None, TEACHER, IMAGES]),
    ((B, K), (B, K + 1), (B,), [None, TEACHER, TEACHER]),
    ((B, T, K), (B, T, K), (B,), [*[TARGET.format(r"\(3,\)", r"\(3, 5\)")] * 2, IMAGES]),
    ((B, K), (B, K), (B, 1), [TARGET.format(r"\(3, 1\)", r"\(3,\)")] * 3),
    ((B, K), (B, K), (1,), [TARGET.format(r"\(1,\)", r"\(3,\)")] * 3),
    ((B, K), (B, K), (B, K), [TARGET.format(r"\(3, 7\)", r"\(3,\)")] * 3),
    ((K,), (K,), (), [LOGITS.format(r"\(7,\)")] * 3),
    ((B, 0), (B, 0), (B,), [LOGITS.format(r"\(3, 0\)")] * 3),
]
MISFITS = [
    pytest.param(make, student, teacher, target, message, id=f"{make.__name__} {student} {teacher} {target}")
    for student, teacher, target, messages in SHAPES
    for make, message in zip((Baseline, Hinton, BSS), messages, strict=True)
    if message is not None
]


@pytest.mark.parametrize(("make", "student", "teacher", "target", "message"), MISFITS)
def test_shapes_that_do_not_fit(
    make: Callable[[], Method],
    student: tuple[int, ...],
    teacher: tuple[int, ...],
    target: tuple[int, ...],
    message: str,
) -> None:
    with pytest.raises(ValueError, match="fastkd: " + message):
        make()(Outputs(torch.zeros(student)), Outputs(torch.zeros(teacher)), torch.zeros(target, dtype=torch.int64))


def test_evaluation_takes_one_network() -> None:
    cohort = Cohort([nn.Linear(4, K), nn.Linear(4, K)])
    images, target = torch.randn(B, 4), torch.zeros(B, dtype=torch.int64)
    for call in (lambda: predict(cohort, images), lambda: evaluate(cohort, images, target)):
        with pytest.raises(ValueError, match="the model's logits are the logits of 2 networks, must be those of one"):
            call()
    assert evaluate(DML().deployed(cohort), images, target)["test_loss"] > 0


def test_a_cohort_of_cohorts_is_refused() -> None:
    inner = Cohort([nn.Linear(4, K), nn.Linear(4, K)])
    with pytest.raises(ValueError, match="the logits of a network of the cohort are the logits of 2 networks"):
        Cohort([inner, nn.Linear(4, K)])(torch.zeros(B, 4))


def branched() -> MultiBranch:
    torch.manual_seed(0)
    branches = [nn.Sequential(nn.Flatten(), nn.Linear(8, K)) for _ in range(2)]
    return MultiBranch(nn.Conv2d(1, 2, 3), branches, 2)


def side_by_side() -> Cohort:
    torch.manual_seed(0)
    return Cohort([nn.Sequential(nn.Flatten(), nn.Linear(16, K)) for _ in range(2)])


@pytest.mark.parametrize("make", [branched, side_by_side])
def test_joint_logits_go_everywhere(make: Callable[[], nn.Module]) -> None:
    """Through taps, copies, torch.compile, autocast, activation checkpoints, hooks and saving, as the logits of one do."""
    student, images = make().eval(), torch.randn(4, 1, 4, 4)
    expected = student(images)
    assert isinstance(expected, JointLogits)
    assert isinstance(FeatureTap(student)(images).logits, JointLogits)
    assert isinstance(FeatureTap(Wrapped(student))(images).logits, JointLogits)
    assert isinstance(copy.deepcopy(JointLogits(logits.detach() for logits in expected)), JointLogits)
    torch._dynamo.reset()
    compiled = torch.compile(student, fullgraph=True, backend="aot_eager")
    for result in (compiled(images), FeatureTap(compiled)(images).logits):
        assert isinstance(result, JointLogits)
        for ours, theirs in zip(result, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    checkpointed = checkpoint(student, images, use_reentrant=False)
    assert isinstance(checkpointed, JointLogits)
    with torch.autocast("cpu", torch.bfloat16):
        half = student(images)
    assert isinstance(half, JointLogits)
    method = ONE() if isinstance(student, MultiBranch) else DML()
    target = torch.arange(4)
    for given in (checkpointed, half):
        loss = method(Outputs(given), None, target)
        torch.testing.assert_close(loss.total, method(Outputs(expected), None, target).total, atol=0.05, rtol=0.02)
        loss.total.backward()


@pytest.mark.parametrize("name", JOINT)
def test_a_compiled_step(name: str) -> None:
    method = JOINT[name]()
    student = branched() if name == "one" else side_by_side()
    objective, images, target = Objective(method, student), torch.randn(4, 1, 4, 4), torch.arange(4)
    expected, logits = objective(images, target)
    torch._dynamo.reset()
    compiled, ours = torch.compile(objective, fullgraph=True, backend="aot_eager")(images, target)
    torch.testing.assert_close(compiled.total, expected.total)
    torch.testing.assert_close(ours, logits)


def cohort() -> Cohort:
    return Cohort([nn.Linear(4, 3), nn.Linear(4, 3)])


def test_joint_logits_are_a_tuple_to_torch() -> None:
    """Not a leaf, in which vmap, torch.export and DDP's static graphs would see no tensors."""
    student, images = cohort(), torch.randn(5, 4)
    expected = student(images)
    leaves, spec = torch.utils._pytree.tree_flatten(expected)
    assert len(leaves) == 2
    assert isinstance(torch.utils._pytree.tree_unflatten(leaves, spec), JointLogits)
    mapped = torch.vmap(student)(images)
    exported = torch.export.export(student, (images,)).module()(images)
    for result in (mapped, exported):
        torch.testing.assert_close(tuple(result), tuple(expected))


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_hooks_of_a_module_with_joint_logits(register: str) -> None:
    student, seen = cohort(), []
    getattr(student, register)(lambda *args: seen.append(len(args)))
    logits = student(torch.randn(5, 4, requires_grad=True))
    assert isinstance(logits, JointLogits)
    assert len(logits) == 2
    DML()(Outputs(logits), None, torch.arange(5) % 3).total.backward()
    assert seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize(
    "method",
    [FitNet(3, 3, ["a"]), SRD(3, 3, ["a"]), AT(["a"]), SP(["a"]), RKD(layers=["a"])],
    ids=lambda m: type(m).__name__,
)
def test_features_of_a_teacher_in_inference_mode(method: Method, dtype: torch.dtype) -> None:
    student = torch.randn(4, 3, 2, 2, dtype=dtype, requires_grad=True)
    logits = torch.randn(4, 5, requires_grad=True)
    given = torch.randn(4, 3, 2, 2, dtype=dtype), torch.randn(4, 5)
    with torch.inference_mode():
        features, teacher_logits = (t.clone() for t in given)
    gradients = []
    for maps, theirs in ((features, teacher_logits), given):
        loss = method(Outputs(logits, {"a": student}), Outputs(theirs, {"a": maps}), torch.arange(4)).total
        gradients.append(torch.autograd.grad(loss, [student, logits]))
    torch.testing.assert_close(*gradients)
