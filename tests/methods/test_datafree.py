"""Distillation without data: every method trained, killed and gone on with; what is bad about images and networks."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datafree_cases import BATCH, ITERATIONS, METHODS, Steps, broken, datafree, in_two, teacher
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from training_cases import CLASSES, Batches, Linear, assert_same_end, differences, evaluated, fit, make_settings, small
from training_processes import start_ranks

from fastkd._seeding import seeded
from fastkd.data import NoBatches
from fastkd.methods import registry
from fastkd.methods.datafree import DataFree
from fastkd.methods.datafree.judged import glance, judge, own_losses
from fastkd.methods.datafree.lessons import Lessons, choose
from fastkd.methods.datafree.watched_teacher import WatchedTeacher
from fastkd.methods.registry import Given, create_procedure, find
from fastkd.selection import select_clean
from fastkd.training import TrainingSettings, checkpoint

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread", "no_figures")]


# ---- all methods ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_killed_and_gone_on_with_equals_not_killed(method: str, tmp_path: Path) -> None:
    settings = make_settings(epochs=3, learning_rate=0.02, checkpoint_every=2, ema=0.9 if method == "dafl" else 0.0)
    fit(datafree(method), NoBatches(ITERATIONS), settings, tmp_path / "whole", evaluate=evaluated)
    stops = sorted(random.Random(method).sample(range(1, 3 * ITERATIONS), 2))
    for i, stop in enumerate([*stops, None]):  # the weights of seed i are not those of the checkpoint
        found = (tmp_path / "parts" / "checkpoint.pt").exists()
        procedure = datafree(method, seed=i if found else 0)
        fit(
            procedure,
            NoBatches(ITERATIONS),
            settings,
            tmp_path / "parts",
            evaluate=evaluated,
            resume="auto",
            stop_at=stop,
        )
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


UPDATES = {
    "ta-dfkd": {"generator": 1, "student": 3},
    "dafl": {"generator": 1, "student": 1},
    "dfad": {"generator": 1, "student": 5},
    "zskt": {"generator": 1, "student": 7},
    "dfq": {"generator": 1, "student": 1},
    "deep-inversion": {"restart drawn": 1, "drawn": 3, "student": 2},
    "cmi": {
        "restart generator": 1,
        "restart drawn": 1,
        "generator": 3,
        "head": 3,
        "drawn": 3,
        "student": 2,
    },
    "pre-dfkd": {"generator": 1, "student": 1, "replay": 1},
    "nayer": {"restart generator": 1, "restart drawn": 1, "generator": 3, "drawn": 3, "student": 2},
}


@pytest.mark.parametrize("method", METHODS)
def test_an_iteration(method: str) -> None:
    """Its updates; its terms are those of the weights, and their sum is the loss; all parts get gradients."""
    procedure, step = datafree(method), Steps()
    found = procedure.iteration(None, step)  # type: ignore[arg-type]
    assert step.updated == UPDATES[method]
    expected = {f"{name}_loss" for name, weight in procedure.weights.items() if weight}
    expected |= {"loss", "generator_loss"} | ({"replay_loss"} if method == "pre-dfkd" else set())
    assert set(found) == expected
    terms = sum(value for name, value in found.items() if name not in ("loss", "generator_loss", "replay_loss"))
    torch.testing.assert_close(terms, found["generator_loss"])
    made = procedure.judge(*procedure.maker())
    torch.stack(list(procedure.generator_terms(made).values())).sum().backward()
    for name, part in procedure.parts().items():
        for parameter in part.parameters if name not in ("student", "replay") else ():
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_the_teacher_runs_once_on_a_batch(method: str) -> None:
    procedure = datafree(method)
    rows = []
    network = procedure.frozen["teacher"]
    network.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    made = []
    procedure.maker.register_forward_hook(lambda *_: made.append(1))
    procedure.iteration(None, Steps())  # type: ignore[arg-type]
    more = {
        "cmi": procedure.generator_steps,  # the other view of the images
        "zskt": procedure.student_steps,  # feature maps, which the selection of images does not keep
        "pre-dfkd": 3,  # what the memory makes: for the student, and twice for itself
    }
    assert len(rows) == len(made) + more.get(method, 0)


@pytest.mark.forks
@pytest.mark.parametrize("method", ["ta-dfkd", "cmi"])
def test_two_processes_stay_equal(method: str, tmp_path: Path) -> None:
    """Of other noise each, and the same weights."""
    start_ranks(in_two, tmp_path, make_settings(epochs=2, learning_rate=0.02), method)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    own = ("running_", "num_batches", "bank.", "drawn", "tally")  # what belongs to the images of each
    shared = [{k: v for k, v in state.items() if not any(word in k for word in own)} for state in (first, second)]
    assert not differences(*shared)
    assert differences(first, second) if method == "cmi" else True


def test_what_is_published() -> None:
    """Weights and schedules as the papers' code has them."""
    ours = {name: {option: o.default for option, o in find(name).options().items()} for name in METHODS}
    table = {
        "ta-dfkd": {
            "adversarial": 1.0,
            "bn_statistics": 10.0,
            "total_variation": 1.5e-5,
            "l2": 6e-3,
            "student_steps": 10,
        },
        "dafl": {"class_prior": 1.0, "balance": pytest.approx(5 / 2.302585), "activation": 0.1, "distance": "kl"},
        "dfad": {"adversary": "l1", "distance": "l1", "student_steps": 5, "latent": 256},
        "zskt": {"adversary": "kl", "attention": 250.0, "student_steps": 7},
        "dfq": {"bn_statistics": 1.0, "class_prior": 1.0, "adversarial": 1.0, "balance": 20.0},
        "deep-inversion": {"total_variation": 2.5e-5, "jitter": 2, "source": "pixels"},
        "cmi": {"bn_statistics": 1.0, "class_prior": 0.5, "adversarial": 0.5, "contrast": 0.8, "capacity": 4096},
        "pre-dfkd": {"distance": "l1", "memory": "replay", "activation": 0.1},
        "nayer": {"adversarial": 1.33, "bn_statistics": 10.0, "class_prior": 0.5, "generator_steps": 40, "renew": 10},
    }
    for name, options in table.items():
        assert {option: ours[name][option] for option in options} == options


def test_a_student_learns_without_data() -> None:
    """The teacher of images in four classes; chance is 1/4."""
    images, target, _ = Batches(batch=256).of(5)
    network = small(77)
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), target).backward()
        optimizer.step()
    assert evaluated(network)["test_accuracy"] > 0.9
    with seeded(0):
        given = Given(small(3), network, images[:2], 32, num_classes=CLASSES)
        procedure = create_procedure("ta-dfkd", given, latent=16, width=16, student_steps=5)
    settings = TrainingSettings(epochs=4, learning_rate=0.05, nesterov=False)
    trainer = fit(procedure, NoBatches(30), settings, evaluate=evaluated)
    history = trainer._state.history  # type: ignore[union-attr]
    assert history[-1]["test_accuracy"] > 0.75
    assert 0.3 < history[-1]["selected"] <= 1.0
    assert history[-1]["filled"] > 0.99


def test_a_method_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A term beside the others, with an option of its own; all options of the procedure are there."""
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))  # what is registered here goes with the test

    @registry.register(
        "brightest", family="data-free", needs=("teacher",), adversarial=1.0, adversary="kl", latent=6, width=4
    )
    class Brightest(DataFree):
        """Images that are bright.

        Args:
            brightness: weight of minus the mean pixel.
        """

        def __init__(self, *given: Any, brightness: float = 0.5, **options: Any) -> None:
            super().__init__(*given, **options)
            self.brightness = brightness

        def generator_terms(self, made: Any) -> dict[str, Tensor]:
            return {**super().generator_terms(made), "brightness": -self.brightness * made.images.mean()}

    options = find("brightest").options()
    assert (options["brightness"].default, options["adversary"].default, options["width"].default) == (0.5, "kl", 4)
    assert options["brightness"].help == "weight of minus the mean pixel."
    assert "student" not in options
    given = Given(small(0), teacher(), Batches().of(0)[0], BATCH)
    procedure = create_procedure("brightest", given, brightness=2.0)
    found = procedure.iteration(None, Steps())  # type: ignore[arg-type]
    assert set(found) == {"loss", "generator_loss", "adversarial_loss", "brightness_loss"}


# ---- selection -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("selected", [0, 1, 3, 8, 20])
def test_places_are_filled_in_turn(selected: int) -> None:
    mask = torch.zeros(20, dtype=torch.bool)
    where = torch.randperm(20, generator=torch.Generator().manual_seed(selected))[:selected].sort().values
    mask[where] = True
    chosen = choose(mask, 8)
    assert chosen.index.shape == (8,)
    if selected:
        assert chosen.index.tolist() == [where[i % min(selected, 8)].item() for i in range(8)]
    assert chosen.weight.tolist() == [float(selected > 0)] * 8
    assert chosen.filled.item() == min(selected, 8) / 8


def test_lessons_are_those_that_select_clean_takes() -> None:
    procedure = datafree("ta-dfkd")
    lessons = procedure.lessons
    assert lessons.rounds == 2 * lessons.steps
    batches = [procedure.judge(*procedure.maker()) for _ in range(lessons.rounds)]
    found = list(lessons(batches))
    kept = []
    for batch in batches:
        own = nn.functional.cross_entropy(batch.logits, batch.logits.argmax(1), reduction="none")
        torch.testing.assert_close(own_losses([batch])[0], own)
        kept.append(batch.images[select_clean(own)[0]])
    places = lessons.steps * BATCH
    expected = torch.cat([*kept, *kept])[:places].detach()  # where there are too few, they come again
    assert lessons.tally[2].item() == pytest.approx(min(1.0, sum(map(len, kept)) / places))
    assert torch.equal(torch.cat([lesson.images for lesson in found]), expected)
    for lesson in found:
        assert lesson.weight.tolist() == pytest.approx([1 / BATCH] * BATCH)
        with torch.no_grad():
            torch.testing.assert_close(procedure.teacher(lesson.images), lesson.logits)


def test_lessons_of_nothing() -> None:
    """Images of which none is finite: what is not there weighs nothing, and holds no NaN."""
    procedure = datafree("ta-dfkd")
    images = torch.full((BATCH, *procedure.maker.shape), float("nan"))
    found = list(procedure.lessons([glance(procedure.teacher, images)] * procedure.lessons.rounds))
    assert len(found) == procedure.lessons.steps
    for lesson in found:
        assert not lesson.images.any()
        assert not lesson.logits.any()
        assert not lesson.weight.any()


def test_rounds_follow_what_is_selected() -> None:
    lessons = Lessons(10, 10, select=True)
    for share, filled, rounds in ((0.9, 1.0, 13), (0.6, 1.0, 19), (0.5, 0.9, 22), (0.05, 0.3, 80)):
        lessons.begin_epoch()
        lessons.tally += torch.tensor([4.0, 4 * share, 4 * filled, 4.0 * (filled < 1), 4.0])
        said = lessons.end_epoch(0)
        assert said["selected"] == pytest.approx(share)
        assert lessons.rounds == rounds
    again = Lessons(10, 10, select=True)
    again.load_state_dict(lessons.state_dict())
    assert again.rounds == 80


def test_a_warning_where_there_is_no_room_for_more_rounds() -> None:
    lessons = Lessons(10, 1, select=True, most_rounds=2)
    for expected in (1, 0):  # once
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            lessons.begin_epoch()
            lessons.tally += torch.tensor([1.0, 0.1, 0.3, 1.0, 1.0])
            lessons.end_epoch(6)
        assert len(caught) == expected
        if caught:
            assert "30 % of the student's places were filled in epoch 7" in str(caught[0].message)


# ---- what makes a batch hard ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_image_does_no_harm(method: str, value: float) -> None:
    """It is no part of any loss, and of no lesson."""
    procedure = datafree(method)
    procedure.maker.register_forward_hook(lambda _, __, made: made._replace(images=broken(made.images, [0, 3], value)))
    found = procedure.iteration(None, Steps())  # type: ignore[arg-type]
    assert all(term.isfinite() for term in found.values())
    made = procedure.judge(*procedure.maker())
    assert made.usable.tolist() == [i not in (0, 3) for i in range(BATCH)]
    assert not procedure.lessons.mask([made])[0, [0, 3]].any()
    for module in procedure.modules():
        for buffer in module.buffers():
            assert buffer.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_nothing_but_broken_images(method: str) -> None:
    """No batch breaks the training; its epoch ends it with a line."""
    procedure = datafree(method)
    procedure.maker.register_forward_hook(
        lambda _, __, made: made._replace(images=broken(made.images, slice(None), torch.nan))
    )
    step = Steps()
    procedure.before_epoch(step)  # type: ignore[arg-type]
    found = procedure.iteration(None, step)  # type: ignore[arg-type]
    if procedure.bank is None and procedure.replay is None:
        assert found["loss"].item() == 0.0
    with pytest.raises(FloatingPointError, match=r"no image of epoch 1 was finite.*lower generator_learning_rate"):
        procedure.after_epoch(step)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bright_images_are_finite(dtype: torch.dtype) -> None:
    """Although their sum is no number of 16 bits, nor is that of the teacher's logits."""
    images = torch.full((2, 3, 80, 80), 4.0, dtype=dtype)
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 20)).to(dtype)
    with torch.no_grad():
        network[2].bias.add_(5e3)  # type: ignore[union-attr,operator]
    made = judge(WatchedTeacher(network, images), images)
    assert made.usable.all()
    assert torch.equal(made.images, images)


def test_equal_losses_are_all_selected() -> None:
    """Of images that are all the same."""
    procedure = datafree("ta-dfkd")
    procedure.maker.register_forward_hook(
        lambda _, __, made: made._replace(images=made.images[:1].expand(BATCH, -1, -1, -1))
    )
    made = procedure.judge(*procedure.maker())
    assert procedure.lessons.mask([made]).all()
    assert procedure.iteration(None, Steps())["loss"].isfinite()  # type: ignore[arg-type]


def test_none_selected() -> None:
    procedure = datafree("ta-dfkd", threshold=1.0)
    step = Steps()
    procedure.before_epoch(step)  # type: ignore[arg-type]
    found = procedure.iteration(None, step)  # type: ignore[arg-type]
    assert found["loss"].item() == 0.0
    assert found["adversarial_loss"].item() == 1.0
    assert procedure.after_epoch(step)["selected"] == 0.0  # type: ignore[arg-type]


def test_attention_to_none_selected() -> None:
    """What was not selected is no part of the student's loss."""
    procedure = datafree("zskt", select=True, threshold=1.0)
    assert procedure.iteration(None, Steps())["loss"].item() == 0.0  # type: ignore[arg-type]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no terms": ({"adversarial": 0.0}, "are all 0, must be one above 0"),
    "negative": ({"balance": -1.0}, "balance is -1.0, must be"),
    "adversary": ({"adversary": "l2"}, "adversary is 'l2', must be"),
    "temperature": ({"temperature": 0.0}, "temperature is 0.0, must be"),
    "learning rate": ({"generator_learning_rate": -1.0}, "generator_learning_rate is -1.0, must be"),
    "steps": ({"student_steps": 0}, "student_steps is 0, must be"),
    "rounds": ({"select": True, "most_rounds": 1}, "most_rounds is 1, must be"),
    "threshold": ({"threshold": 1.5}, "threshold is 1.5, must be"),
    "latents without a bank": ({"source": "latents"}, "memory is not 'bank', must be"),
    "bank and shared": ({"memory": "bank", "share_images": True}, "share_images is True, must be False"),
    "bank and selected": ({"memory": "bank", "select": True}, "select is True, must be False"),
    "capacity": ({"memory": "bank", "capacity": 0}, "capacity is 0, must be"),
    "channels of pixels": (
        {"source": "pixels", "memory": "bank", "mean": (0.1, 0.2), "std": (1.0, 1.0)},
        "mean has 2 values, must be one for each",
    ),
    "jitter": ({"jitter": 2}, "jitter is 2, must be 0 for the source 'noise'"),
    "sigmoid": ({"squash": "sigmoid", "mean": None, "std": None}, "mean is None, must be"),
    "channels": (
        {"squash": "sigmoid", "mean": (0.1, 0.2), "std": (1.0, 1.0)},
        "mean has 2 values, must be one for each",
    ),
    "batch": ({"batch_size": 1}, "batch_size is 1, must be"),
    "small images": (
        {"images": torch.zeros(2, 1, 3, 3)},
        "must be \\(C, H, W\\) with sides of 4",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_options_that_cannot_be(case: str) -> None:
    options, message = WRONG[case]
    given = {"student": small(0), "teacher": teacher(), "images": Batches().of(0)[0], "batch_size": BATCH}
    if case == "small images":
        given |= {
            "student": nn.Sequential(nn.Flatten(), nn.Linear(9, 4)),
            "teacher": nn.Sequential(nn.Flatten(), nn.Linear(9, 4)),
        }
        options = {"images": options["images"]}
    with pytest.raises((ValueError, TypeError), match=f"fastkd: .*{message}"):
        DataFree(**{**given, "adversarial": 1.0, "latent": 6, "width": 4, **options})


def test_networks_that_do_not_go_together() -> None:
    images = Batches().of(0)[0]
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES + 1))
    with pytest.raises(
        ValueError, match=r"student has logits of shape \(12, 5\), must be that of the teacher's, \(12, 4\)"
    ):
        DataFree(other, teacher(), images, adversarial=1.0)
    with pytest.raises(ValueError, match=r"bn_statistics is asked of a Linear without batch norms .* must be 0 for it"):
        DataFree(small(0), Linear(1), images, bn_statistics=1.0)
    # the rest works without
    for method in METHODS:
        if method != "zskt":  # which reads maps
            given = Given(Linear(0), Linear(1), images, BATCH, num_classes=CLASSES)
            procedure = create_procedure(
                method, given, latent=6, width=4, bn_statistics=0.0, generator_steps=1, capacity=16
            )
            assert procedure.iteration(None, Steps())["loss"].isfinite()  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS)
def test_networks_of_double_precision(method: str) -> None:
    assert datafree(method).double().iteration(None, Steps())["loss"].isfinite()  # type: ignore[arg-type]


class Copies(TorchDispatchMode):
    """Counts tensors made of Python's numbers, for which a GPU would be waited for."""

    found = 0

    def __torch_dispatch__(self, function: Any, _: Any, arguments: Any = (), named: Any = None) -> Any:
        self.found += function is torch.ops.aten.lift_fresh.default
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize("method", METHODS)
def test_no_iteration_makes_tensors_of_numbers(method: str) -> None:
    procedure = datafree(method)
    with Copies() as copies:
        procedure.iteration(None, Steps())  # type: ignore[arg-type]
    assert not copies.found


@pytest.mark.parametrize("option", [{"select": False}, {"threshold": 0.9}, {"most_rounds": 3}])
def test_a_training_goes_on_with_the_same_selection(option: dict[str, Any], tmp_path: Path) -> None:
    settings = make_settings(epochs=2, checkpoint_every=1)
    fit(datafree("ta-dfkd"), NoBatches(2), settings, tmp_path, stop_at=2)
    with pytest.raises(ValueError, match="is of another training"):
        fit(datafree("ta-dfkd", **option), NoBatches(2), settings, tmp_path, resume=True)


def test_a_checkpoint_has_what_is_needed(tmp_path: Path) -> None:
    settings = make_settings(epochs=1)
    fit(datafree("cmi"), NoBatches(2), settings, tmp_path, evaluate=evaluated)
    networks = checkpoint.read(tmp_path / "checkpoint.pt")["networks"]
    assert set(networks) == {"student", "maker", "bank", "contrast", "lessons"}
    assert networks["bank"]["_extra_state"] == {"added": 2 * BATCH}
