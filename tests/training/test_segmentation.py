"""Segmentation from end to end: metrics against slow loops, the evaluation of maps, the small task, its network, a training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from refusals import refuses
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fastkd._threads import one_thread
from fastkd.data import LoaderBatches, digits
from fastkd.data.segmentation import BACKGROUND, CLASSES, Scenes, scenes
from fastkd.methods import AT, Baseline, Hinton, Method, MultiBranch, Objective
from fastkd.models.segmenter import Segmenter
from fastkd.training import Trainer, TrainingSettings, class_iou, confusion_matrix, evaluate, evaluator, mean_iou
from fastkd.training.inference import predict

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]

# ---- metrics ------------------------------------------------------------------------------------


def counted_slowly(prediction: Tensor, target: Tensor, classes: int, ignored: int) -> list[list[int]]:
    counts = [[0] * classes for _ in range(classes)]
    for p, t in zip(prediction.flatten().tolist(), target.flatten().tolist(), strict=True):
        if t != ignored:
            counts[t][p] += 1
    return counts


def iou_slowly(prediction: Tensor, target: Tensor, classes: int, ignored: int) -> list[float]:
    pairs = [
        (p, t) for p, t in zip(prediction.flatten().tolist(), target.flatten().tolist(), strict=True) if t != ignored
    ]
    result = []
    for c in range(classes):
        either = sum(p == c or t == c for p, t in pairs)
        result.append(sum(p == t == c for p, t in pairs) / either if either else math.nan)
    return result


@pytest.mark.parametrize("ignored", [-100, 255, 1])
@pytest.mark.parametrize("shape", [(3, 5, 4), (40,), (2, 3, 2, 2), (0, 4, 4)])
def test_metrics(shape: tuple[int, ...], ignored: int, generator: torch.Generator) -> None:
    classes = 6
    prediction = torch.randint(4, shape, generator=generator)  # 4 is in the truth alone, 5 in neither
    target = torch.randint(5, shape, generator=generator)
    target[torch.rand(shape, generator=generator) < 0.3] = ignored
    confusion = confusion_matrix(prediction, target, classes, ignore_index=ignored)
    assert confusion.dtype == torch.int64
    assert confusion.tolist() == counted_slowly(prediction, target, classes, ignored)
    expected = torch.tensor(iou_slowly(prediction, target, classes, ignored), dtype=torch.float64)
    torch.testing.assert_close(class_iou(confusion), expected, equal_nan=True)
    torch.testing.assert_close(mean_iou(confusion), expected.nanmean(), equal_nan=True)


def test_what_is_ignored_may_be_predicted_as_anything() -> None:
    counts = confusion_matrix(torch.tensor([7, 1]), torch.tensor([-100, 1]), 2)
    assert counts.tolist() == [[0, 0], [0, 1]]
    assert mean_iou(counts).item() == 1.0
    assert mean_iou(counts * 0).isnan()


def test_what_metrics_refuse() -> None:
    x = torch.zeros(2, 3, dtype=torch.int64)
    refuses("prediction has dtype", lambda: confusion_matrix(x.float(), x, 2))
    refuses("target has dtype", lambda: confusion_matrix(x, x.int(), 2))
    refuses(r"prediction has shape \(3,\)", lambda: confusion_matrix(x[0], x, 2))
    refuses(r"target holds 2, must be in \[0, 2\)", lambda: confusion_matrix(x, x + 2, 2))
    refuses("prediction holds -1", lambda: confusion_matrix(x - 1, x, 2))
    for wrong in (0, -1, 1.5, "2", None, True):
        refuses("classes is", lambda w=wrong: confusion_matrix(x, x, w))
    refuses("ignore_index is", lambda: confusion_matrix(x, x, 2, ignore_index=0.5))


# ---- evaluation ---------------------------------------------------------------------------------


class Fixed(nn.Module):
    """Images are their own logits."""

    def forward(self, images: Tensor) -> Tensor:
        return images


@pytest.mark.parametrize("ignored", [-100, 0])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_evaluation_of_maps(form: torch.memory_format, ignored: int, generator: torch.Generator) -> None:
    logits = torch.randn(7, 5, 4, 6, generator=generator)
    target = torch.randint(4, (7, 4, 6), generator=generator)
    target[0] = target[3, 2] = ignored
    options: dict[str, Any] = {"class_dim": 1, "ignore_index": ignored, "batch_size": 3}
    result = evaluate(Fixed(), logits.to(memory_format=form), target, **options)
    counted, prediction = target != ignored, logits.argmax(1)
    expected = {
        "test_accuracy": (prediction == target)[counted].double().mean().item(),
        "test_loss": F.cross_entropy(logits, target, ignore_index=ignored).item(),
        "test_mean_iou": torch.tensor(iou_slowly(prediction, target, 5, ignored)).nanmean().item(),
    }
    assert result == pytest.approx(expected, rel=1e-6)
    assert evaluator(logits, target, **options)(Fixed()) == result
    assert torch.equal(predict(Fixed(), logits, batch_size=3, class_dim=1), logits.movedim(1, -1))


def test_mean_iou_is_of_maps_alone(generator: torch.Generator) -> None:
    logits = torch.randn(7, 4, 5, generator=generator)
    for images, target in ((logits[:, 0], torch.arange(7) % 5), (logits, torch.arange(28).view(7, 4) % 5)):
        assert list(evaluate(Fixed(), images, target)) == ["test_accuracy", "test_loss"]


def test_the_device_is_waited_for_once(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    reads: list[str] = []
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "numpy", "cpu", "nonzero"):
        original = getattr(Tensor, name)
        monkeypatch.setattr(
            Tensor, name, lambda self, *args, n=name, o=original, **more: (reads.append(n), o(self, *args, **more))[1]
        )
    # these look at the values of targets on the CPU only
    monkeypatch.setattr("fastkd.methods.method.check_target", lambda logits, target: target)
    monkeypatch.setattr("fastkd.training.segmentation._check_values", lambda name, values, counted, classes: None)
    evaluate(Fixed(), torch.randn(6, 3, 4, 4), torch.zeros(6, 4, 4, dtype=torch.int64), batch_size=2, class_dim=1)
    assert reads == ["tolist"]


def test_what_an_evaluation_refuses() -> None:
    logits, target = torch.randn(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64)
    for name, wrong in (("class_dim", 1.0), ("class_dim", True), ("ignore_index", "x")):
        refuses(f"{name} is", lambda n=name, w=wrong: evaluator(logits, target, **{n: w}))
    refuses("class_dim is 4", lambda: evaluate(Fixed(), logits, target, class_dim=4))
    refuses("target has shape", lambda: evaluate(Fixed(), logits, target))
    refuses("target holds 3, must be classes from 0 to 2", lambda: evaluate(Fixed(), logits, target + 3, class_dim=1))
    refuses("target holds nothing but", lambda: evaluate(Fixed(), logits, target - 100, class_dim=1))


# ---- the task and its network -------------------------------------------------------------------


def test_scenes() -> None:
    train, test = scenes(40, 20, side=24, digits=2, seed=3)
    assert (train.images.dtype, train.images.shape) == (torch.uint8, (40, 1, 24, 24))
    assert (train.target.dtype, train.target.shape) == (torch.int64, (40, 24, 24))
    assert len(test.images) == len(test.target) == 20
    classes = train.target.unique()
    assert classes.min() >= 0
    assert classes.max() == BACKGROUND == CLASSES - 1
    ink = train.target != BACKGROUND
    assert 0.02 < ink.double().mean().item() < 2 * 64 / 24**2
    assert (train.images[:, 0][ink] >= 64).all()
    assert -1.0 <= train.normalised().min() < train.normalised().max() <= 1.0
    again, others = scenes(40, 20, side=24, digits=2, seed=3), scenes(40, 20, side=24, digits=2, seed=4)
    assert all(torch.equal(x, y) for x, y in zip((*train, *test), (*again[0], *again[1]), strict=True))
    assert not torch.equal(train.images, others[0].images)
    assert not torch.equal(train.images[:20], test.images)


def test_a_digit_lies_where_its_class_is() -> None:
    """One digit in as small a scene as there is: the digit itself, on a photograph."""
    (train, _), (pool, _) = scenes(30, 0, side=8, digits=1), digits.image_sets()
    for image, target in zip(train.images[:, 0], train.target, strict=True):
        (label,) = target[target != BACKGROUND].unique()
        strokes = [d for d in pool.images[pool.target == label, 0] if torch.equal(d >= 64, target != BACKGROUND)]
        assert any(torch.equal(image[d >= 77], d[d >= 77]) for d in strokes)  # 77: no photograph is lighter
    empty, _ = scenes(5, 0, digits=0)
    assert (empty.target == BACKGROUND).all()


def test_what_scenes_refuse() -> None:
    for name, values in {"train_size": [-1, 1.5], "side": [7, 54, "8"], "digits": [-1, True], "seed": [None]}.items():
        for wrong in values:
            refuses(f"{name} is", lambda n=name, w=wrong: scenes(**{"train_size": 1, "test_size": 1, n: w}))


def test_the_network() -> None:
    state = torch.get_rng_state()
    network, same = (Segmenter((4, 6, 8), in_channels=2, classes=5, seed=1) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert network(torch.randn(2, 2, 12, 8)).shape == (2, 5, 12, 8)
    assert torch.equal(network.classifier[0].weight, same.classifier[0].weight)
    assert len(MultiBranch.split([network, same], "layer3").branches) == 2
    refuses("images has shape", lambda: network(torch.randn(2, 2, 7, 8)))
    for wrong in (3, (4,), (4, 0), (4, "a")):
        refuses("widths", lambda w=wrong: Segmenter(w))
    for name in ("in_channels", "classes"):
        refuses(name, lambda n=name: Segmenter((4, 4), **{n: 0}))


# ---- a training ---------------------------------------------------------------------------------

TRAIN, TEST = "train", "test"
Judge = Callable[[nn.Module], dict[str, float]]


@pytest.fixture(scope="module")
def task() -> dict[str, Scenes]:
    return dict(zip((TRAIN, TEST), scenes(384, 96), strict=True))


def trained(network: Segmenter, method: Method, teacher: nn.Module | None, scenes_: Scenes, judge: Judge) -> Segmenter:
    objective = Objective(method, network, teacher, class_dim=1)
    batches = LoaderBatches.of(TensorDataset(scenes_.normalised(), scenes_.target), 4, seed=0)
    settings = TrainingSettings(epochs=4, optimizer="adam", learning_rate=0.03, weight_decay=0.0, warmup_epochs=1.0)
    last = Trainer(objective, batches, settings, evaluate=judge, show="off").fit()[-1]
    assert last["test_mean_iou"] == judge(network)["test_mean_iou"]
    assert 0.5 < last["accuracy"] < 1.0  # of pixels
    return network


@pytest.fixture(scope="module")
def judge(task: dict[str, Scenes]) -> Judge:
    return evaluator(task[TEST].normalised(), task[TEST].target, class_dim=1)


@pytest.fixture(scope="module")
def teacher(task: dict[str, Scenes], judge: Judge) -> Segmenter:
    with one_thread():
        return trained(Segmenter((12, 32, 48, 48)), Baseline(), None, task[TRAIN], judge)


@pytest.mark.parametrize(
    "make", [lambda: Hinton(2.0), lambda: AT(["layer3", "layer4"], feature_weight=100.0)], ids=["hinton", "at"]
)
def test_distillation_on_maps(
    make: Callable[[], Method], task: dict[str, Scenes], teacher: Segmenter, judge: Judge
) -> None:
    student = Segmenter((8, 16, 24, 24), seed=1)
    nothing_but_background = 0.08  # a mean over 11 classes, 0.86 of one of them
    assert judge(teacher)["test_mean_iou"] > 0.4
    assert judge(student)["test_mean_iou"] < nothing_but_background
    after = judge(trained(student, make(), teacher, task[TRAIN], judge))
    assert after["test_mean_iou"] > 2 * nothing_but_background
