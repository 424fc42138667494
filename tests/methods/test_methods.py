"""The methods of the zoo against independent formulas, value and gradients, and what they refuse."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import method_formulas as plain
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fastkd.methods import (
    AT,
    BSS,
    CRD,
    DIST,
    DKD,
    DML,
    FSP,
    ONE,
    RKD,
    SP,
    SRD,
    SSKD,
    Baseline,
    FeatureTap,
    FitNet,
    Hinton,
    Method,
    Outputs,
)
from fastkd.models.resnet import resnet

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]

BATCH, CLASSES = 6, 10


def features(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(BATCH, *shape, generator=generator, dtype=torch.float64) for shape in shapes]


def outputs(seed: int, layers: tuple[str, ...], *shapes: tuple[int, ...]) -> Outputs:
    """Random logits and features, of which the gradient is asked."""
    logits, *maps = (x.requires_grad_() for x in features(seed, (CLASSES,), *shapes))
    return Outputs(logits, dict(zip(layers, maps, strict=True)))


TARGET = torch.tensor([0, 3, 9, 3, 1, 7])

STUDENT = {"hint": (4, 8, 8), "a": (3, 8, 8), "b": (5, 8, 8), "c": (7, 4, 4), "embedding": (12, 1, 1)}
TEACHER = {"hint": (6, 4, 4), "a": (3, 16, 16), "b": (5, 8, 8), "c": (7, 4, 4), "embedding": (20, 1, 1)}

# a method, and its X in plain torch of (method, student's features, teacher's features)
X = Callable[[Method, list[Tensor], list[Tensor]], Tensor]


def _fitnet(method: Method, s: list[Tensor], t: list[Tensor]) -> Tensor:
    convolution, norm, _ = method.regressor
    return plain.fitnet(plain.pooled(s[0], t[0]), t[0], convolution.weight[:, :, 0, 0], norm.weight, norm.bias)


def _srd(method: Method, s: list[Tensor], t: list[Tensor]) -> Tensor:
    return plain.projected(s[0], t[0], method.projector.weight, method.projector.bias, method.exponent)


METHODS: dict[str, tuple[Callable[[], Method], float, X]] = {
    "fitnet": (lambda: FitNet(4, 6, ["hint"]), 100.0, _fitnet),
    "srd": (lambda: SRD(12, 20, ["embedding"], temperature=4.0), 2.0, _srd),
    "srd, maps, another exponent": (lambda: SRD(4, 6, ["hint"], temperature=4.0, exponent=1.5), 2.0, _srd),
    "fsp": (lambda: FSP(["a", "b", "c"]), 50.0, lambda _, s, t: plain.fsp(s, t)),
    "at": (lambda: AT(["a", "b", "c"]), 1000.0, lambda _, s, t: plain.attention(s, t)),
    "sp": (lambda: SP(["c"]), 3000.0, lambda _, s, t: plain.similarity(s[0], t[0])),
    "sp, other sizes": (lambda: SP(["hint"]), 3000.0, lambda _, s, t: plain.similarity(s[0], t[0])),
    "rkd-d": (lambda: RKD(25, 0, ["embedding"]), 25.0, lambda _, s, t: plain.distances(s[0], t[0])),
    "rkd-a": (lambda: RKD(0, 50, ["embedding"]), 50.0, lambda _, s, t: plain.angles(s[0], t[0])),
    "rkd-da": (
        lambda: RKD(25, 50, ["embedding"]),
        1.0,
        lambda _, s, t: 25 * plain.distances(s[0], t[0]) + 50 * plain.angles(s[0], t[0]),
    ),
}


def pair_of(method: Method) -> tuple[Outputs, Outputs]:
    student = outputs(1, method.layers, *(STUDENT[name] for name in method.layers))
    teacher = outputs(2, method.layers, *(TEACHER[name] for name in method.teacher_layers))
    return student, Outputs(teacher.logits.detach(), {name: f.detach() for name, f in teacher.features.items()})


def gradients(loss: Tensor, of: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, of, materialize_grads=True))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("response", [(1.0, 0.0), (0.1, 0.9), (0.5, 2.0), (0.0, 0.0)])
def test_value_and_gradients(name: str, response: tuple[float, float]) -> None:
    make, weight, distance = METHODS[name]
    method = make().double()
    method.task_weight, method.kd_weight = response
    student, teacher = pair_of(method)
    of = [student.logits, *student.features.values(), *method.parameters()]
    loss = method(student, teacher, TARGET)
    r, a = response
    x = distance(method, list(student.features.values()), list(teacher.features.values()))
    kd = plain.hinton(student.logits, teacher.logits, 4.0)
    expected = r * F.cross_entropy(student.logits, TARGET) + a * kd + weight * x
    torch.testing.assert_close(loss.total, expected, rtol=1e-6, atol=1e-9)
    for ours, theirs in zip(gradients(loss.total, of), gradients(expected, of), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(sum(loss.terms.values()), loss.total.detach())
    torch.testing.assert_close(loss.terms[method.term], weight * x.detach(), rtol=1e-6, atol=1e-9)
    assert not any(term.requires_grad for term in loss.terms.values())


@pytest.mark.parametrize(
    ("task_weight", "kd_weight", "temperature"), [(0.1, 0.9, 4.0), (1.0, 1.0, 2.0), (0.0, 1.0, 1.0)]
)
def test_hinton(task_weight: float, kd_weight: float, temperature: float) -> None:
    student, teacher = outputs(1, ()), Outputs(outputs(2, ()).logits.detach())
    loss = Hinton(temperature, task_weight=task_weight, kd_weight=kd_weight)(student, teacher, TARGET)
    kd = plain.hinton(student.logits, teacher.logits, temperature)
    expected = task_weight * F.cross_entropy(student.logits, TARGET) + kd_weight * kd
    torch.testing.assert_close(loss.total, expected)
    (ours,), (theirs,) = gradients(loss.total, [student.logits]), gradients(expected, [student.logits])
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(sum(loss.terms.values()), expected.detach())


def test_baseline_needs_no_teacher() -> None:
    student = outputs(1, ())
    loss = Baseline()(student, None, TARGET)
    torch.testing.assert_close(loss.total, F.cross_entropy(student.logits, TARGET))
    assert list(loss.terms) == ["task_loss"]


def test_in_a_loop_of_ones_own() -> None:
    """As the docstring of Method has it: FeatureTap around the networks, the method's weights to the optimizer."""
    student, teacher = resnet(8, in_channels=1, seed=1), resnet(14, in_channels=1, seed=2).eval()
    method = FitNet(32, 32)
    tapped, asked = FeatureTap(student, method.layers), FeatureTap(teacher, method.teacher_layers)
    optimizer = torch.optim.SGD([*student.parameters(), *method.parameters()], 0.01)
    images, target = torch.randn(16, 1, 12, 12), torch.arange(16) % CLASSES
    losses = []
    for _ in range(12):
        with torch.no_grad():
            given = asked(images)
        loss = method(tapped(images), given, target)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(loss.terms["hint_loss"].item())
    assert losses[-1] < 0.7 * losses[0]


def test_dead_maps_have_gradients() -> None:
    """A student whose ReLU gives 0 everywhere: norms of 0 are divided by."""
    zero = Outputs(torch.zeros(BATCH, CLASSES), {"c": torch.zeros(BATCH, 7, 4, 4, requires_grad=True)})
    alive = Outputs(torch.zeros(BATCH, CLASSES), {"c": torch.rand(BATCH, 7, 4, 4)})
    for method in (AT(["c"]), SP(["c"]), RKD(25, 50, ["c"])):
        loss = method(zero, alive, TARGET).total
        (gradient,) = torch.autograd.grad(loss, zero.features["c"])
        assert loss.isfinite()
        assert gradient.isfinite().all()


def cast(given: Outputs, dtype: torch.dtype) -> Outputs:
    return Outputs(given.logits.detach().to(dtype), {k: f.detach().to(dtype) for k, f in given.features.items()})


def test_half_precision_features() -> None:
    """What networks under autocast put out: the loss is that of the same numbers in float32."""
    for make, _, _ in METHODS.values():
        method = make()
        half = [cast(o, torch.bfloat16) for o in pair_of(method)]
        expected = method(*(cast(o, torch.float32) for o in half), TARGET)
        with torch.autocast("cpu", torch.bfloat16):
            loss = method(*half, TARGET)
        torch.testing.assert_close(loss.terms, expected.terms, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_regressor_of_another_dtype(dtype: torch.dtype) -> None:
    method = FitNet(4, 6, ["hint"])
    given = [cast(cast(o, dtype), torch.float32) for o in pair_of(method)]
    expected = method(*given, TARGET).terms["hint_loss"]
    loss = method.to(dtype)(*(cast(o, dtype) for o in given), TARGET)
    loss.total.backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in method.parameters())
    torch.testing.assert_close(loss.terms["hint_loss"].float(), expected, rtol=0.02, atol=0)
    assert loss.total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize(
    ("method", "student", "teacher", "message"),
    [
        (SP(["c"]), [], None, r"teacher is None, must be its outputs for SP"),
        (
            SP(["c"]),
            [],
            [("c", (7, 4, 4))],
            r"the student's features lack 'c'; there are none: FeatureTap\(model, \['c'\]\)",
        ),
        (SP(["c"], ["d"]), [("c", (7, 4, 4))], [("c", (7, 4, 4))], r"the teacher's features lack 'd'; there are c"),
        (
            FSP(["a", "b"], ["x", "y"]),
            [("a", (3, 8, 8)), ("b", (5, 8, 8))],
            [("x", (3, 8, 8)), ("y", (6, 8, 8))],
            r"student's layer 'b' is \(6, 5, 8, 8\), the teacher's layer 'y' \(6, 6, 8, 8\): FSP needs equal",
        ),
        (
            FitNet(4, 6, ["hint"]),
            [("hint", (4, 8, 8))],
            [("hint", (5, 8, 8))],
            r"layer 'hint' is \(6, 4, 8, 8\), .*\(6, 5, 8, 8\): channels must be student_channels, 4, and teacher_channels, 6",
        ),
        (
            AT(["a"]),
            [("a", (3,))],
            [("a", (3, 8, 8))],
            r"student's layer 'a' is \(6, 3\), the teacher's layer 'a' \(6, 3, 8, 8\): both must be maps \[B, C, H, W\]",
        ),
    ],
)
def test_outputs_that_do_not_fit(
    method: Method,
    student: list[tuple[str, tuple[int, ...]]],
    teacher: list[tuple[str, tuple[int, ...]]] | None,
    message: str,
) -> None:
    def made(layers: list[tuple[str, tuple[int, ...]]]) -> Outputs:
        return Outputs(torch.zeros(BATCH, CLASSES), {name: torch.zeros(BATCH, *shape) for name, shape in layers})

    with pytest.raises(ValueError, match=message):
        method(made(student), None if teacher is None else made(teacher), TARGET)


@pytest.mark.parametrize("method", [SP(["c"], ["d"]), RKD(25, 50, ["c"], ["d"]), AT(["c"], ["d"])])
def test_batches_that_differ(method: Method) -> None:
    student = Outputs(torch.zeros(BATCH, CLASSES), {"c": torch.zeros(BATCH, 7, 4, 4)})
    teacher = Outputs(torch.zeros(BATCH, CLASSES), {"d": torch.zeros(4, 7, 4, 4)})
    message = r"student's layer 'c' is \(6, 7, 4, 4\), the teacher's layer 'd' \(4, 7, 4, 4\): .* of the same batch"
    with pytest.raises(ValueError, match=message):
        method(student, teacher, TARGET)


@pytest.mark.parametrize("wrong", [10, -1, -100, -(2**63)])
@pytest.mark.parametrize("method", [Baseline(), Hinton(), DKD(), DIST(), BSS()])
def test_labels_out_of_range(method: nn.Module, wrong: int) -> None:
    target = TARGET.clone()
    target[2] = wrong
    with pytest.raises(ValueError, match=f"target holds {wrong}, must be classes from 0 to 9"):
        method(outputs(1, ()), Outputs(torch.zeros(BATCH, CLASSES, dtype=torch.float64)), target)
    with pytest.raises(ValueError, match=f"target holds {wrong}, must be classes from 0 to 9"):
        method(outputs(1, ()), outputs(2, ()), torch.full_like(target, wrong))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Hinton(0.0), "temperature is 0.0, must be positive and finite"),
        (lambda: Hinton(task_weight=-1), "task_weight is -1, must be finite and not negative"),
        (lambda: AT(feature_weight=float("nan")), "feature_weight is nan"),
        (lambda: RKD(angle_weight=-2.0), "angle_weight is -2.0"),
        (lambda: FSP(["layer1"]), r"layers is \('layer1',\), must be 2 names or more"),
        (lambda: SP(["layer1", "layer2"]), r"layers is .*, must be one name"),
        (lambda: AT(["layer1", "layer2"], ["layer1"]), r"teacher_layers is \('layer1',\), must be as many as layers"),
    ],
)
def test_settings_out_of_range(make: Callable[[], Method], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("argument", ["layers", "teacher_layers"])
def test_names_of_layers(argument: str) -> None:
    with pytest.raises(TypeError, match=f"{argument} is the string 'layer1', must be a sequence of names"):
        AT(**{"layers": ["layer1"], argument: "layer1"})
    method = AT((f"layer{i}" for i in (1, 2)), (f"layer{i}" for i in (2, 3)))
    assert (method.layers, method.teacher_layers) == (("layer1", "layer2"), ("layer2", "layer3"))


# of each argument of a constructor, another value than its default
OTHERS = {
    "layers": ["layer1"],
    "teacher_layers": ["other"],
    "branch_at": "layer2",
    "bounds": (-1.0, 1.0),
    "ramp_share": 0.5,
    "warmup_share": 0.5,
    "turned_ratio": 0.25,
    "alike_ratio": 0.25,
    "memory_momentum": 0.25,
    "standardize": True,
}


@pytest.mark.parametrize("kind", [AT, BSS, CRD, DIST, DKD, DML, FSP, ONE, RKD, SP, SRD, SSKD, Baseline, FitNet, Hinton])
def test_each_setting_shows(kind: type[Method]) -> None:
    """A checkpoint knows its method by this text."""
    arguments = inspect.signature(kind).parameters
    given = {name: 3 for name, argument in arguments.items() if argument.default is argument.empty}
    if "layers" in arguments:
        given["layers"] = ["layer3"] if kind is not FSP else ["layer3", "layer4"]
    default = repr(kind(**given))
    for name in arguments:
        other = {**given, name: OTHERS.get(name, 7)}
        if kind is FSP and name in ("layers", "teacher_layers"):
            other[name] = ["one", "two"]
        assert repr(kind(**other)) != default, name
        assert f"{name}=" in repr(kind(**other))
