"""Methods on dense networks, logits ``[B, K, H, W]``: through ``FeatureTap(..., class_dim=1)``, against plain formulas."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import method_formulas as formulas
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from refusals import refuses
from torch import Tensor, nn

from fastkd.methods import AT, BSS, DML, ONE, RKD, SP, Baseline, FeatureTap, FitNet, Hinton, JointLogits, Method
from fastkd.models.segmenter import Segmenter

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]

B, K, SIDE = 3, 4, 8
FORMATS = {"channels-last": torch.channels_last, "NCHW": torch.contiguous_format}


def network(seed: int, widths: tuple[int, ...] = (4, 6, 8)) -> Segmenter:
    return Segmenter(widths, classes=K, seed=seed)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, 1, SIDE, SIDE, generator=generator), torch.randint(K, (B, SIDE, SIDE), generator=generator)


def rows(maps: Tensor) -> Tensor:
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def stage(model: Segmenter, images: Tensor) -> Tensor:
    """What ``layer3`` puts out."""
    return model.layer3(model.layer2(model.layer1(images)))


def hinton(student: nn.Module, teacher: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    ours, theirs = student(images), teacher(images).detach()
    return 0.1 * F.cross_entropy(ours, target) + 0.9 * formulas.hinton(rows(ours), rows(theirs), 4.0)


def attention(student: Segmenter, teacher: Segmenter, images: Tensor, target: Tensor) -> Tensor:
    pair = [stage(student, images)], [stage(teacher, images).detach()]
    return F.cross_entropy(student(images), target) + 1000.0 * formulas.attention(*pair)


def mutual(student: nn.Module, _: None, images: Tensor, target: Tensor) -> Tensor:
    a, b = student(images)
    task = F.cross_entropy(a, target) + F.cross_entropy(b, target)
    pairs = ((a, b), (b, a))
    return task + sum(formulas.hinton(rows(x), rows(y.detach()), 1.0) for x, y in pairs)


def ensemble(student: nn.Module, _: None, images: Tensor, target: Tensor) -> Tensor:
    *branches, whole = student(images)
    task = sum(F.cross_entropy(one, target) for one in (*branches, whole))
    return task + sum(formulas.hinton(rows(one), rows(whole.detach()), 3.0) for one in branches)


METHODS: dict[str, tuple[Callable[[], Method], Callable[..., Tensor]]] = {
    "hinton": (Hinton, hinton),
    "at": (lambda: AT(["layer3"]), attention),
    "dml": (DML, mutual),
    "one": (lambda: ONE(branches=2, ramp_share=0.0), ensemble),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_that_of_the_plain_formula(name: str, form: str) -> None:
    make, plain = METHODS[name]
    method, (images, target) = make(), batch()
    images = images.to(memory_format=FORMATS[form])
    student = method.build_student(network).to(memory_format=FORMATS[form])
    teacher = network(9, (6, 6, 8)).to(memory_format=FORMATS[form]).eval() if method.needs_teacher else None
    other = copy.deepcopy(student)
    given = None if teacher is None else FeatureTap(teacher, method.teacher_layers, class_dim=1)
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    loss, logits = method.step(FeatureTap(student, method.layers, class_dim=1), given, images, target)
    assert logits.shape == (B, SIDE, SIDE, K)
    loss.total.backward()
    expected = plain(other.train(), teacher, images, target)
    torch.testing.assert_close(loss.total, expected)
    torch.testing.assert_close(sum(loss.terms.values()), loss.total.detach())
    parameters = list(other.parameters())
    for p, gradient in zip(student.parameters(), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-5)
    optimizer.step()
    assert method.step(FeatureTap(student, method.layers, class_dim=1), given, images, target)[0].total.isfinite()


@pytest.mark.parametrize("make", [Baseline, lambda: FitNet(8, 8, ["layer3"]), lambda: SP(["layer3"]), RKD])
def test_other_methods_train_on_maps(make: Callable[[], Method]) -> None:
    method, (images, target) = make(), batch()
    if isinstance(method, RKD):
        method = RKD(layers=["layer3"])
    student, teacher = network(0), network(9).eval()
    taps = (FeatureTap(model, layers, 1) for model, layers in ((student, method.layers), (teacher, method.layers)))
    method.step(*taps, images, target)[0].total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


def test_bss_moves_whole_images() -> None:
    student, teacher = (FeatureTap(network(seed), class_dim=1) for seed in (0, 1))
    with pytest.raises(ValueError, match=r"has shape \(3, 8, 8, 4\), must be \[B, K\] for BSS"):
        BSS().step(student, teacher, *batch())


def test_logits_are_handed_on_as_a_view() -> None:
    maps = torch.randn(B, K, SIDE, SIDE)
    identity = nn.Identity()
    for class_dim in (1, -3):
        logits = FeatureTap(identity, class_dim=class_dim)(maps).logits
        assert logits.data_ptr() == maps.data_ptr()
        assert torch.equal(logits, maps.permute(0, 2, 3, 1))
        joint = FeatureTap(identity, class_dim=class_dim)(JointLogits([maps, maps + 1])).logits
        assert isinstance(joint, JointLogits)
        assert torch.equal(joint[1], maps.permute(0, 2, 3, 1) + 1)
    assert FeatureTap(identity)(maps).logits is maps
    flat = maps[:, :, 0, 0]
    assert torch.equal(FeatureTap(identity, class_dim=1)(flat).logits, flat)  # a classifier's have them there, too


def test_copies_keep_the_dimension() -> None:
    tap, (images, _) = FeatureTap(network(0).eval(), ["layer3"], class_dim=1), batch()
    for other in (copy.deepcopy(tap), pickle.loads(pickle.dumps(tap))):
        assert torch.equal(other(images).logits, tap(images).logits)
    tap.retap(["layer1"])
    assert tap(images).logits.shape == (B, SIDE, SIDE, K)


@pytest.mark.compiles
def test_a_tap_of_maps_compiles() -> None:
    torch._dynamo.reset()
    tap, (images, _) = FeatureTap(network(0).eval(), ["layer3"], class_dim=1), batch()
    logits, features = torch.compile(tap, backend="aot_eager", fullgraph=True)(images)
    torch.testing.assert_close(logits, tap(images).logits)
    torch.testing.assert_close(features["layer3"], tap(images).features["layer3"])


def test_what_is_refused() -> None:
    model, (images, target) = network(0), batch()
    for wrong in (1.0, "1", None, True, [1]):
        refuses("class_dim is", lambda w=wrong: FeatureTap(model, class_dim=w))
    for wrong in (4, -5):
        tap = FeatureTap(model, class_dim=wrong)
        refuses(
            f"class_dim is {wrong}, must be from -4 to 3, a dimension of the model's logits", lambda t=tap: t(images)
        )
    refuses("the model's logits is int", lambda: FeatureTap(nn.Identity(), class_dim=1)(JointLogits([3, 4])))
    taps = [FeatureTap(network(seed)) for seed in (0, 1)]  # without class_dim
    refuses("target has shape .*FeatureTap.model, class_dim=1. puts", lambda: Hinton().step(*taps, images, target))
