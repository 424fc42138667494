"""Distillation without data, part by part: generators, the bank, the memory, a watched teacher, pictures, compiled steps."""

from __future__ import annotations

import pytest
import torch
from datafree_cases import BATCH, Steps, broken, datafree, teacher
from torch import Tensor, nn
from training_cases import (
    Batches,
    small_resnet,
)

from fastkd._seeding import seeded
from fastkd.methods.datafree.bank import Bank
from fastkd.methods.datafree.judged import glance, judge, own_losses
from fastkd.methods.datafree.maker import Maker
from fastkd.methods.datafree.replay import Replay
from fastkd.methods.datafree.watched_teacher import WatchedTeacher
from fastkd.models.generator import Encoder, Generator

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread", "no_figures")]


def test_a_memory_learns_of_two_images() -> None:
    """Of the smallest ones, whose batch norms would have one number each."""
    replay = Replay(6, (1, 4, 4), width=4)
    images = torch.randn(2, 1, 4, 4)
    assert replay.loss(images, images.flatten(1), lambda made: made.flatten(1)).isfinite()


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 5, 4), (2, 17, 9)])
def test_generators_of_any_size(shape: tuple[int, int, int]) -> None:
    noise = torch.randn(6, 10)
    made = Generator(10, shape, width=4)(noise)
    assert made.shape == (6, *shape)
    torch.testing.assert_close(made.mean((0, 2, 3)), torch.zeros(shape[0]), atol=1e-5, rtol=0)
    bounded = Generator(10, shape, width=4, mean=[0.5] * shape[0], std=[0.25] * shape[0])(noise)
    assert bounded.min() >= -2.0
    assert bounded.max() <= 2.0
    mean, log_variance = Encoder(10, shape, width=4)(made)
    assert mean.shape == log_variance.shape == (6, 10)


def test_a_generator_begins_anew() -> None:
    generator = Generator(10, (1, 8, 8), width=4)
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    with seeded(3):
        generator.reset()
    after = generator.state_dict()
    assert all(not torch.equal(after[name], before[name]) for name in before if name.endswith("0.weight"))


def test_pixels_stay_values_of_an_image() -> None:
    procedure = datafree("deep-inversion")
    procedure.maker.draw_anew(generator=False)
    procedure.maker.keep_in_range()
    assert procedure.maker.drawn is not None
    pixels = 0.4 + 0.3 * procedure.maker.drawn
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1.0 + 1e-6


def test_pixels_are_shifted_around_the_edges() -> None:
    """By numbers that no compiled step takes for constants."""
    maker = Maker("pixels", 2, (1, 8, 9), jitter=2)
    pixels = maker.drawn
    assert pixels is not None
    rolled = {(y, x): pixels.detach().roll((y, x), (2, 3)) for y in range(-2, 3) for x in range(-2, 3)}
    seen = set()
    with torch._dynamo.config.patch(error_on_recompile=True):
        make = torch.compile(maker, fullgraph=True, backend="aot_eager")
        for _ in range(150):
            images = make().images
            seen.add(next(shift for shift, ours in rolled.items() if torch.equal(images, ours)))
    assert {y for y, _ in seen} == {x for _, x in seen} == set(range(-2, 3))
    images = maker().images
    images.square().sum().backward()
    assert torch.equal(pixels.grad, 2 * pixels.detach())


def test_labels_are_of_all_classes_alike() -> None:
    labels = datafree("cmi").maker().labels
    assert labels is not None
    assert labels.bincount().tolist() == [3, 3, 3, 3]


def test_a_bank_keeps_the_last() -> None:
    bank = Bank(5, x=(2,), y=())
    with pytest.raises(RuntimeError, match="bank is empty"):
        bank.draw(1)
    for start in (0, 2, 4, 6):
        rows = torch.arange(start, start + 2).float()
        bank.add(x=rows[:, None].expand(2, 2), y=rows)
        assert len(bank) == min(start + 2, 5)
    assert bank.all()["y"].sort().values.tolist() == [3, 4, 5, 6, 7]
    drawn = bank.draw(200)
    assert set(drawn["y"].tolist()) == {3, 4, 5, 6, 7}
    assert torch.equal(drawn["x"][:, 0], drawn["y"])
    again = Bank(5, x=(2,), y=())
    again.load_state_dict(bank.state_dict())
    assert len(again) == 5
    assert again.added == 8
    with pytest.raises(ValueError, match="rows are 6 of x, y, must be at most 5 of x, y"):
        bank.add(x=torch.zeros(6, 2), y=torch.zeros(6))
    with pytest.raises(ValueError, match="rows are 1 of x, must be at most 5 of x, y"):
        bank.add(x=torch.zeros(1, 2))


def test_a_watched_teacher() -> None:
    network, images = teacher(), Batches().of(3)[0].requires_grad_()
    watched = WatchedTeacher(network, images, layers=["features.3"], statistics=True, latents=True, instances=True)
    seen = watched.look(images)
    torch.testing.assert_close(seen.logits, network(images))
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    inputs = [network.features[0](images), network.features[4](seen.features["features.3"])]  # type: ignore[index,operator]
    assert len(norms) == len(seen.moments) == 2
    for moments, x in zip(seen.moments, inputs, strict=True):
        torch.testing.assert_close(moments.mean, x.mean((0, 2, 3)))
        torch.testing.assert_close(moments.var, x.var((0, 2, 3), correction=0))
    torch.testing.assert_close(seen.description, torch.cat([x.mean((2, 3)) for x in inputs], 1))
    torch.testing.assert_close(seen.latents, network.features(images))  # type: ignore[operator]
    # nothing is kept outside of a look
    watched(images)
    assert not watched._moments
    assert not watched._latents


def test_moments_are_compared_with_those_of_the_same_batch_norm() -> None:
    """In a ResNet the shortcut runs before the branch, which the modules have first."""
    network, images = teacher(small_resnet), Batches().of(3)[0]
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    ran = []
    for norm in norms:
        norm.register_forward_pre_hook(lambda norm, inputs: ran.append((norm, inputs[0].clone())))
    seen = WatchedTeacher(network, images, statistics=True).look(images)
    assert {norm for norm, _ in ran} == set(norms)
    assert [norm for norm, _ in ran] != norms
    for (norm, x), moments, (mean, var) in zip(ran, seen.moments, seen.running, strict=True):
        torch.testing.assert_close(moments.mean, x.mean((0, 2, 3)))
        assert mean is norm.running_mean
        assert var is norm.running_var


def test_a_glance() -> None:
    """Of images of the student: their logits and nothing else."""
    procedure = datafree("ta-dfkd")
    images = broken(procedure.maker().images.detach(), [1], float("nan"))
    closely, made = judge(procedure.teacher, images), glance(procedure.teacher, images)
    assert made.images.data_ptr() == images.data_ptr()
    assert len(closely.seen.moments) == 2
    assert torch.equal(made.logits, closely.logits)
    assert made.usable.tolist() == closely.usable.tolist() == [i != 1 for i in range(BATCH)]
    assert torch.equal(own_losses([made]).nan_to_num(-1.0), own_losses([closely]).nan_to_num(-1.0))


def test_pictures() -> None:
    figures = datafree("ta-dfkd").pictures(Steps())  # type: ignore[arg-type]
    assert set(figures) == {"images", "losses"}
    titles = [axes.get_title(loc) for axes in figures["images"].axes for loc in ("left", "center")]
    assert any(title.startswith("selected") for title in titles)
    assert set(datafree("cmi").pictures(Steps())) == {"images", "losses"}  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["ta-dfkd", "dfq"])
def test_steps_compile_into_one_graph(method: str) -> None:
    """No part of a step is left to Python, or waits for the device: the whole of it can be captured."""
    procedure = datafree(method)

    def generator_loss(noise: Tensor) -> Tensor:
        generator = procedure.maker.generator
        assert generator is not None
        made = judge(procedure.teacher, generator(noise))
        return torch.stack(list(procedure.generator_terms(made).values())).sum()

    def lessons(noise: Tensor) -> Tensor:
        generator = procedure.maker.generator
        assert generator is not None
        with torch.no_grad():
            batches = [glance(procedure.teacher, generator(noise)) for _ in range(procedure.lessons.rounds)]
            found = list(procedure.lessons(batches))
        return torch.stack([procedure.student_loss(x.images, x.logits, x.weight) for x in found]).sum()

    noise = torch.randn(BATCH, 6)
    for function in (generator_loss, lessons):
        state = {name: value.clone() for name, value in procedure.state_dict().items() if isinstance(value, Tensor)}
        eager = function(noise)
        procedure.load_state_dict(state, strict=False)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(noise), eager)
