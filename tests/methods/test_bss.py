"""BSS: the loss, and the attack against the authors' steps in plain torch, sample by sample."""

from __future__ import annotations

import method_formulas as plain
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fastkd.methods import BSS, FeatureTap, Outputs, response
from fastkd.models.resnet import resnet

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]

CLASSES = 5


def small(seed: int) -> FeatureTap:
    """A network whose decisions differ between images."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, CLASSES, bias=False))
    with torch.no_grad():
        model[3].weight.mul_(4.0)
    return FeatureTap(model.double())


def images_and_target(teacher: FeatureTap, n: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(n, 3, 2, 2, generator=generator, dtype=torch.float64)
    target = teacher(images).logits.argmax(1)
    target[::5] = (target[::5] + 1) % CLASSES  # some that the teacher gets wrong
    return images, target


def attacked_one_by_one(
    teacher: FeatureTap, image: Tensor, start: int, towards: int, steps: int, size: float, bounds: tuple[float, float]
) -> Tensor:
    """The published attack on one image."""
    for _ in range(steps):
        image = image.detach().requires_grad_()
        scores = teacher(image[None]).logits[0]
        (gradient,) = torch.autograd.grad(scores[towards] - scores[start], image)
        if int(scores.argmax()) != start:
            break
        with torch.no_grad():
            gap = scores[start] - scores[towards]
            image = (image + size * (gap + 1e-4) * gradient / gradient.norm()).clamp(*bounds)
    return image.detach()


def record_draws(patch: pytest.MonkeyPatch) -> list[Tensor]:
    drawn: list[Tensor] = []
    draw = response._draw
    patch.setattr(response, "_draw", lambda odds: drawn.append(draw(odds)) or drawn[-1])
    return drawn


def test_the_attack_is_the_published_one(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = small(0), small(1)
    images, target = images_and_target(teacher)
    s, t = student(images).logits, teacher(images).logits
    drawn = record_draws(monkeypatch)
    method = BSS(attack_size=10, attack_steps=4, bounds=(-2.0, 2.0))
    attacked = method.attack(teacher, images, s, t, target)

    p, q = t.detach().softmax(1), s.detach().softmax(1)
    right = [i for i in range(len(images)) if int(p[i].argmax()) == int(target[i]) == int(q[i].argmax())]
    score = {i: sum(float(p[i, k] - q[i, k]) ** 2 for k in range(CLASSES) if k != int(target[i])) for i in right}
    best = sorted(right, key=lambda i: -score[i])[:10]
    count = len(best)
    assert 3 < count <= 10
    assert attacked.weight.tolist() == [1.0] * count + [0.0] * (10 - count)
    moved = 0
    for row, i in enumerate(best):
        start, towards = int(target[i]), int(drawn[0][row])
        assert towards != start
        expected = attacked_one_by_one(teacher, images[i], start, towards, 4, 0.3, (-2.0, 2.0))
        torch.testing.assert_close(attacked.images[row], expected)
        moved += int(teacher(expected[None]).logits.argmax()) != start
    assert moved > 0
    assert attacked.images.abs().max() <= 2.0


def test_targets_are_drawn_by_the_teachers_probabilities() -> None:
    n = 4000
    teacher = small(0)
    logits = torch.tensor([[3.0, 1.0, 0.0, -1.0, 2.0]], dtype=torch.float64).expand(n, -1)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        drawn = record_draws(patch)
        images = torch.randn(n, 3, 2, 2, dtype=torch.float64)
        BSS(attack_size=n, attack_steps=1).attack(teacher, images, logits, logits, torch.zeros(n, dtype=torch.int64))
    share = drawn[0].flatten().bincount(minlength=CLASSES) / n
    odds = logits[0].softmax(0) * torch.tensor([0.0, 1, 1, 1, 1])
    torch.testing.assert_close(share.double(), odds / odds.sum(), atol=0.025, rtol=0)
    assert share[0] == 0


def test_the_loss_is_the_papers() -> None:
    teacher, student = small(0), small(1)
    images, target = images_and_target(teacher)
    method = BSS(attack_size=10)
    for progress in (0.0, 0.3, 0.75, 1.0):
        torch.manual_seed(3)
        loss, logits = method.step(student, teacher, images, target, progress)
        s, t = student(images).logits, teacher(images).logits.detach()
        expected = F.cross_entropy(s, target) + (3 * (1 - progress) + 1) * plain.soft_cross_entropy(s, t, 3.0)
        if progress < 0.75:
            torch.manual_seed(3)
            attacked = method.attack(teacher, images, s, t, target)
            chosen = attacked.images[attacked.weight > 0]
            boundary = plain.soft_cross_entropy(student(chosen).logits, teacher(chosen).logits.detach(), 3.0)
            expected = expected + 2 * (1 - 4 / 3 * progress) * boundary
        torch.testing.assert_close(loss.total, expected)
        assert torch.equal(logits, s)
        assert ("boundary_loss" in loss.terms) == (progress < 0.75)
        torch.testing.assert_close(sum(loss.terms.values()), loss.total.detach())
        of = list(student.parameters())
        for ours, theirs in zip(torch.autograd.grad(loss.total, of), torch.autograd.grad(expected, of), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_where_nobody_is_right_nothing_is_added() -> None:
    teacher, student = small(0), small(1)
    images, _ = images_and_target(teacher)
    target = (teacher(images).logits.argmax(1) + 1) % CLASSES
    loss, _ = BSS().step(student, teacher, images, target)
    assert loss.terms["boundary_loss"] == 0.0
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss.total, list(student.parameters())))


def test_batch_norm_sees_qualifying_samples_only() -> None:
    """Samples that do not qualify may hold anything: the loss and the student's statistics stay."""
    teacher = small(0)
    images, _ = images_and_target(teacher)
    target = teacher(images).logits.argmax(1)
    method = BSS(attack_size=16, attack_steps=1)

    def attacked(others: float) -> tuple[Tensor, Tensor]:
        given = images.clone()
        given[5:] = others
        right = F.one_hot(torch.where(torch.arange(24) < 5, target, (target + 1) % CLASSES), CLASSES).double()
        torch.manual_seed(0)
        result = method.attack(teacher, given, right, right + teacher(images).logits.softmax(1) / 9, target)
        return result.images, result.weight

    (first, weight), (second, _) = attacked(0.0), attacked(2.0)
    assert weight.tolist() == [1.0] * 5 + [0.0] * 11
    assert torch.equal(first, second)
    nearest = torch.cdist(first.flatten(1), images[:5].flatten(1)).argmin(1)
    assert nearest.tolist() == [nearest[i % 5] for i in range(16)]
    assert sorted(nearest[:5].tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_attack_keeps_the_images_dtype(dtype: torch.dtype) -> None:
    teacher = small(0)
    images, target = images_and_target(teacher)
    teacher, images = teacher.to(dtype), images.to(dtype)
    logits = teacher(images).logits.detach()
    attacked = BSS(attack_steps=2).attack(teacher, images, logits, logits, target)
    assert attacked.images.dtype == dtype
    assert not any(torch.equal(row, image) for row, image in zip(attacked.images[:3], images[:3], strict=True))


def test_the_attack_leaves_the_teacher_alone() -> None:
    teacher = FeatureTap(resnet(8, in_channels=3, num_classes=CLASSES).requires_grad_(False))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    images = torch.randn(8, 3, 8, 8)
    teacher.train()
    with torch.no_grad():
        logits = teacher.eval()(images).logits
    teacher.train()
    BSS(attack_steps=2).attack(teacher, images, logits, logits, logits.argmax(1))
    assert teacher.training
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_a_sure_teacher_and_constant_images() -> None:
    """All other classes at probability 0, a gradient of 0: still defined."""
    logits = torch.full((4, CLASSES), -1e4)
    logits[:, 2] = 1e4

    class Constant(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return logits[: len(images)] + 0.0 * images.sum()

    attacked = BSS().attack(FeatureTap(Constant()), torch.zeros(4, 1, 2, 2), logits, logits, torch.full((4,), 2))
    assert attacked.images.isfinite().all()
    assert attacked.weight.tolist() == [1.0] * 4


@pytest.mark.parametrize("tap_first", [True, False])
def test_attack_leaves_the_mode_of_each_module(tap_first: bool) -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, CLASSES))
    teacher = FeatureTap(model if tap_first else model.eval())
    model.eval()
    assert tap_first or not teacher.training
    student = small(1).float()
    images = torch.randn(16, 3, 2, 2)
    target = teacher(images).logits.argmax(1)
    model[2].train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = [BSS().step(student, teacher, images, target)[0].terms["kd_loss"] for _ in range(2)]
    assert [module.training for module in model] == [False, False, True]
    assert torch.equal(*losses)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0, must be positive and finite"),
        ({"attack_size": 0}, "attack_size is 0, must be at least 1"),
        ({"attack_steps": 0}, "attack_steps is 0, must be at least 1"),
        ({"step_size": 0.0}, "step_size is 0.0"),
        ({"bounds": (1.0, 1.0)}, r"bounds is \(1.0, 1.0\), must be a lower and a higher number"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BSS(**settings)  # type: ignore[arg-type]


def test_without_a_teacher() -> None:
    student = small(1)
    images, target = images_and_target(small(0))
    with pytest.raises(ValueError, match="teacher is None, must be a network for BSS"):
        BSS().step(student, None, images, target)
    with pytest.raises(ValueError, match="teacher is None, must be its outputs for BSS"):
        BSS()(Outputs(torch.zeros(2, 2)), None, torch.zeros(2, dtype=torch.int64))
