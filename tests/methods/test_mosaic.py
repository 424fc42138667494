"""MosaicKD: its terms against independent formulas, crops against convolutions, trained, killed and gone on with."""

from __future__ import annotations

import copy
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from datafree_cases import Steps, broken
from mosaic_cases import BATCH, MEAN, SIDE, STD, STEPS, Foreign, foreign, in_two, mosaic
from torch import Tensor, nn
from training_cases import CLASSES, assert_same_end, differences, evaluated, fit, make_settings
from training_processes import start_ranks

from fastkd._seeding import seeded
from fastkd.data import Batch
from fastkd.methods.datafree.terms import shares
from fastkd.methods.mosaic import discriminator_loss
from fastkd.methods.registry import find
from fastkd.models.patch_discriminator import PatchDiscriminator
from fastkd.patches import crop_patches, random_patches

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread", "no_figures")]


# ---- patches -------------------------------------------------------------------------------------------


def grid(stride: int, size: int, side: int) -> Tensor:
    """Offsets ``[n, 2]`` of all patches at this distance that lie within an image."""
    starts = torch.arange(0, side - size + 1, stride)
    return torch.cartesian_prod(starts, starts)


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (4, 2), (8, 4), (10, 4)])
def test_crops_at_regular_places_are_the_convolution(size: int, stride: int) -> None:
    """Without padding: the logits, the gradient in the images and in the weights, and the statistics of the batch norm, which
    has one number of each patch. (Of larger patches another batch norm sees the inside of each, where patches overlap.)"""
    torch.manual_seed(0)
    images = torch.randn(3, 2, 26, 26, dtype=torch.float64, requires_grad=True)
    offsets = grid(stride, size, 26).expand(len(images), -1, -1).contiguous()
    found = []
    for cropped in (True, False):
        with seeded(1):
            network = PatchDiscriminator(2, size, width=3).double()
        logits = network(crop_patches(images, offsets, size) if cropped else images).view(len(images), -1)
        weights = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits)
        gradients = torch.autograd.grad((logits * weights).sum(), [images, *network.parameters()])
        found.append([logits, *gradients, *network.buffers()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 10, 18, 22])
@pytest.mark.parametrize("padded", [False, True])
def test_in_evaluation_mode_any_size_agrees(size: int, padded: bool) -> None:
    """Where no patch reaches beyond the edges."""
    torch.manual_seed(0)
    images = torch.randn(2, 2, 48, 48, dtype=torch.float64, requires_grad=True)
    whole = PatchDiscriminator(2, size, width=3, padded=padded).double().eval()
    plain = PatchDiscriminator(2, size, width=3).double().eval()
    plain.load_state_dict(whole.state_dict())
    logits = whole(images)
    stride, first = 1, 0
    for layer in convolutions(whole)[:-1]:
        first -= stride * int(layer.padding[0])
        stride *= int(layer.stride[0])
    starts = [(i, first + stride * i) for i in range(logits.shape[2])]
    inner = [(i, start) for i, start in starts if start >= 0 and start + size <= 48]
    assert len(inner) >= 2
    index, places = (torch.tensor(numbers) for numbers in zip(*inner, strict=True))
    offsets = torch.cartesian_prod(places, places).expand(2, -1, -1).contiguous()
    ours = plain(crop_patches(images, offsets, size)).view(2, len(inner), len(inner))
    theirs = logits[:, 0][:, index][:, :, index]
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    pair = [torch.autograd.grad((x * weight).sum(), images)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*pair)


def convolutions(network: nn.Module) -> list[nn.Conv2d]:
    return [module for module in network.modules() if isinstance(module, nn.Conv2d)]


def test_patches_are_random_and_each_image_has_its_own() -> None:
    procedure = mosaic().eval()  # else all patches meet in the batch norm
    images = torch.randn(BATCH, 1, SIDE, SIDE, requires_grad=True)
    torch.manual_seed(3)
    logits = procedure.patch_logits(images)
    torch.manual_seed(3)
    patches, offsets = random_patches(images, 4, 3)
    assert logits.shape == (BATCH, 3)
    assert len(offsets.flatten(0, 1).unique(dim=0)) > 6
    torch.testing.assert_close(logits.flatten(), procedure.discriminator(patches).flatten())
    (gradient,) = torch.autograd.grad(logits.sum(), images)
    covered = torch.zeros(BATCH, 1, SIDE, SIDE)
    for image, places in enumerate(offsets.tolist()):
        for top, left in places:
            covered[image, 0, top : top + 4, left : left + 4] = 1
    assert torch.equal(gradient != 0, covered.bool())


def test_convolved_patches_are_those_of_the_paper() -> None:
    procedure = mosaic(patch_mode="conv", patch_size=8)
    images = torch.randn(BATCH, 1, SIDE, SIDE)
    padded = PatchDiscriminator(1, 8, width=4, padded=True)
    padded.load_state_dict(procedure.discriminator.state_dict())
    assert torch.equal(procedure.patch_logits(images), padded(images).flatten(1))


# ---- terms ---------------------------------------------------------------------------------------------


def test_the_discriminators_loss() -> None:
    """As the authors' code has it: sums of binary cross-entropies over the patches, over 2 B."""
    torch.manual_seed(0)
    made, real = (3.0 * torch.randn(5, 7, dtype=torch.float64) for _ in range(2))
    pair = made.requires_grad_(), real.requires_grad_()
    theirs = F.binary_cross_entropy_with_logits(made, torch.zeros_like(made), reduction="sum")
    theirs = (theirs + F.binary_cross_entropy_with_logits(real, torch.ones_like(real), reduction="sum")) / 10
    ours = discriminator_loss(*pair, torch.full((5,), 0.2, dtype=torch.float64))
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, pair), torch.autograd.grad(theirs, pair), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("patch_mode", ["crop", "conv"])
def test_the_generators_loss(patch_mode: str) -> None:
    """Each term, and the gradient of all in the generator, through teacher, student and discriminator."""
    procedure = mosaic(patch_mode=patch_mode)
    generator = procedure.maker.generator
    assert generator is not None
    noise = torch.randn(BATCH, procedure.maker.latent)

    def run() -> Tensor:
        torch.manual_seed(5)  # of the patches
        return generator(noise)

    start = copy.deepcopy(procedure.state_dict())
    made = procedure.judge(run())
    found = procedure.generator_terms(made)
    gradients = torch.autograd.grad(torch.stack(list(found.values())).sum(), list(generator.parameters()))

    procedure.load_state_dict(start)
    images = run()
    t, s = procedure.frozen["teacher"](images), procedure.student.model(images)
    p, mean = t.softmax(1), t.softmax(1).mean(0)
    patches = images
    if patch_mode == "crop":
        patches, _ = random_patches(images, procedure.patch_size, procedure.patches_per_image)
    logits = procedure.discriminator(patches)
    theirs = {
        "adversarial": -F.kl_div(s.log_softmax(1), p, reduction="batchmean"),
        "entropy": -(p * t.log_softmax(1)).sum(1).mean(),
        "balance": 10.0 * (mean * mean.log2()).sum(),
        "local": F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits), reduction="sum") / BATCH,
    }
    assert set(found) == set(theirs)
    for name, term in theirs.items():
        torch.testing.assert_close(found[name], term, msg=lambda text, name=name: f"{name}: {text}")
    others = torch.autograd.grad(torch.stack(list(theirs.values())).sum(), list(generator.parameters()))
    for ours, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-6)


def test_the_students_loss() -> None:
    """KL of made and out-of-domain images alike, a mean over both."""
    procedure = mosaic(padding=0, flip=False)
    given = foreign(1)
    torch.manual_seed(0)
    made = procedure.judge(procedure.maker().images)
    lessons = list(procedure._lessons_of(made, given))
    assert len(lessons) == STEPS
    for number, lesson in enumerate(lessons):
        torch.testing.assert_close(lesson.images[BATCH:], given[number * BATCH : (number + 1) * BATCH])
        with torch.no_grad():
            torch.testing.assert_close(lesson.logits, procedure.frozen["teacher"](lesson.images))
        state = copy.deepcopy(procedure.state_dict())
        ours = procedure.student_loss(lesson.images, lesson.logits, lesson.weight)
        procedure.load_state_dict(state)
        student = procedure.student.model(lesson.images)
        theirs = F.kl_div(student.log_softmax(1), lesson.logits.softmax(1), reduction="batchmean")
        torch.testing.assert_close(ours, theirs)


def test_out_of_domain_images_are_cropped_and_mirrored() -> None:
    """For the student alone, on a black ground; each of its steps has images of its own."""
    procedure = mosaic()
    assert procedure.padding == 2  # as it was given
    given = foreign(1)
    black = -MEAN / STD
    seen = []
    procedure.student.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    discriminated = []
    real = procedure.patch_logits
    procedure.patch_logits = lambda images: (discriminated.append(images), real(images))[1]  # type: ignore[method-assign]
    procedure.iteration(Batch(given), Steps())  # type: ignore[arg-type]
    assert torch.equal(discriminated[1], given[:BATCH])
    steps = [images[BATCH:] for images in seen if len(images) == 2 * BATCH]
    assert len(steps) == STEPS
    for number, images in enumerate(steps):
        theirs = F.pad(given[number * BATCH : (number + 1) * BATCH], (2,) * 4, value=black)
        for crop, whole in zip(images, theirs, strict=True):
            places = [
                part
                for top in range(5)
                for left in range(5)
                for part in (whole[:, top : top + SIDE, left : left + SIDE],)
                for part in (part, part.flip(2))
            ]
            assert any(torch.allclose(crop, part, atol=1e-6) for part in places)
    still = torch.cat([given[i * BATCH : (i + 1) * BATCH] for i in range(STEPS)])
    assert not torch.allclose(torch.cat(steps), still)


def test_what_is_published() -> None:
    """Weights, networks and schedules of the authors' code."""
    ours = {name: option.default for name, option in find("mosaic").options().items()}
    expected = {
        "adversarial": 1.0,
        "adversary": "kl",
        "adversary_temperature": 1.0,
        "entropy": 1.0,
        "balance": pytest.approx(10.0 / math.log(2.0)),
        "local": 1.0,
        "distance": "kl",
        "temperature": 1.0,
        "student_steps": 5,
        "latent": 100,
        "width": 128,
        "first_stage": 2,
        "squash": "sigmoid",
        "patch_mode": "crop",
        "patch_size": 10,
        "generator_learning_rate": 1e-3,
        "generator_betas": (0.5, 0.999),
        "generator_schedule": "cosine",
        "bn_statistics": 0.0,
    }
    assert {name: ours[name] for name in expected} == expected
    procedure = mosaic(width=8, latent=5, first_stage=2, discriminator_width=4)
    generator = procedure.maker.generator
    assert generator is not None
    assert [tuple(p.shape) for p in generator.parameters() if p.dim() > 1] == [
        (16 * 4, 5),
        (8, 16, 3, 3),
        (4, 8, 3, 3),
        (1, 4, 3, 3),
    ]
    parts = procedure.parts()
    assert set(parts) == {"generator", "discriminator", "student"}
    assert parts["generator"].settings == parts["discriminator"].settings
    assert parts["generator"].settings["schedule"] == "cosine"


def test_fewer_places_than_patches() -> None:
    """Each counts for several: the sum is that of as many patches."""
    procedure = mosaic(patch_size=SIDE, patches_per_image=5).eval()
    images = foreign(1)[:BATCH]
    said = procedure.patch_logits(images)
    assert said.shape == (BATCH, 1)
    weight = torch.full((BATCH,), 1 / BATCH)
    torch.testing.assert_close(procedure.fooling(images, weight), -5 * said.sigmoid().log().mean())
    assert mosaic(patch_size=SIDE - 1, patches_per_image=5).patch_logits(images).shape == (BATCH, 4)


def test_a_memory_beside_other_images() -> None:
    """The student sees both; together they count for a half."""
    procedure = mosaic(memory="replay")
    assert procedure.replay is not None
    made = procedure.judge(procedure.maker().images)
    lesson = next(iter(procedure._lessons_of(made, foreign(1))))
    assert len(lesson.images) == 3 * BATCH
    torch.testing.assert_close(lesson.weight[:BATCH].sum(), torch.tensor(0.5))
    assert mosaic(adversarial=0.0, entropy=0.0, balance=0.0).weights["local"] == 1.0  # patches alone


# ---- trainings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("local", [1.0, 0.0])
def test_an_iteration(local: float) -> None:
    procedure, step = mosaic(local=local), Steps()
    found = procedure.iteration(Batch(foreign(1)), step)  # type: ignore[arg-type]
    assert step.updated == {"generator": 1, "student": STEPS, **({"discriminator": 1} if local else {})}
    terms = {"adversarial_loss", "entropy_loss", "balance_loss"} | (
        {"local_loss", "discriminator_loss"} if local else set()
    )
    assert set(found) == {"loss", "generator_loss", *terms}


def test_the_discriminator_learns_on_images_that_the_generator_learns_on() -> None:
    """They are made once."""
    procedure, made = mosaic(), []
    procedure.maker.register_forward_hook(lambda *_: made.append(1))
    procedure.iteration(Batch(foreign(1)), Steps())  # type: ignore[arg-type]
    assert len(made) == 1 + STEPS


@pytest.mark.parametrize("patch_mode", ["crop", "conv"])
def test_steps_compile_into_one_graph(patch_mode: str) -> None:
    """Of discriminator, generator and student: nothing is left to Python, or waits for the device."""
    procedure, given = mosaic(patch_mode=patch_mode), foreign(1)

    def losses(noise: Tensor) -> Tensor:
        generator = procedure.maker.generator
        assert generator is not None
        made = procedure.judge(generator(noise))
        logits = procedure.patch_logits(made.images.detach()), procedure.patch_logits(given[:BATCH])
        found = [discriminator_loss(*logits, shares(made.usable))]
        found += procedure.generator_terms(made).values()
        lessons = list(procedure._lessons_of(made, given))
        found += [procedure.student_loss(x.images, x.logits, x.weight) for x in lessons]
        return torch.stack(found)

    noise, state = torch.randn(BATCH, procedure.maker.latent), copy.deepcopy(procedure.state_dict())
    torch.manual_seed(0)
    eager = losses(noise)
    procedure.load_state_dict(state)
    torch._dynamo.reset()
    torch.manual_seed(0)
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")(noise)
    torch.testing.assert_close(compiled, eager)


def test_killed_and_gone_on_with_equals_not_killed(tmp_path: Path) -> None:
    settings = make_settings(epochs=3, learning_rate=0.02, checkpoint_every=2, ema=0.9)
    fit(mosaic(), Foreign(), settings, tmp_path / "whole", evaluate=evaluated)
    stops = sorted(random.Random(0).sample(range(1, 15), 2))
    for i, stop in enumerate([*stops, None]):  # the weights of seed i are not those of the checkpoint
        there = (tmp_path / "parts" / "checkpoint.pt").exists()
        procedure = mosaic(i if there else 0)
        fit(procedure, Foreign(), settings, tmp_path / "parts", evaluate=evaluated, resume="auto", stop_at=stop)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


def test_in_bfloat16() -> None:
    """The patches of an image are summed in float32."""
    trainer = fit(mosaic(), Foreign(), make_settings(epochs=2, amp="bf16"), evaluate=evaluated)
    history = trainer._state.history  # type: ignore[union-attr]
    assert all(math.isfinite(value) for value in history[-1].values())
    with torch.autocast("cpu", torch.bfloat16):
        assert mosaic().patch_logits(foreign(1)).dtype == torch.float32


@pytest.mark.forks
def test_two_processes_stay_equal(tmp_path: Path) -> None:
    """Of other images and noise each, and the same weights, the discriminator's, too."""
    start_ranks(in_two, tmp_path, make_settings(epochs=2, learning_rate=0.02))
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    own = ("running_", "num_batches", "tally")
    shared = [{k: v for k, v in state.items() if not any(word in k for word in own)} for state in (first, second)]
    assert any(name.startswith("discriminator.") for name in shared[0])
    assert not differences(*shared)


def test_pictures() -> None:
    """What is made beside what is given, and the classes of both; before the first iteration there is nothing beside it."""
    procedure, step = mosaic(), Steps()
    assert set(procedure.pictures(step)) == {"images", "losses"}  # type: ignore[arg-type]
    procedure.iteration(Batch(foreign(1)), step)  # type: ignore[arg-type]
    figures = procedure.eval().pictures(step)  # type: ignore[arg-type]
    assert set(figures) == {"images", "losses", "out-of-domain", "classes"}
    (axes,) = figures["classes"].axes
    made, others = ([bar.get_height() for bar in bars] for bars in axes.containers)  # type: ignore[union-attr,misc]
    assert sum(made) == pytest.approx(100)
    expected = procedure.frozen["teacher"](foreign(1)[:BATCH]).argmax(1).bincount(minlength=CLASSES)
    assert others == pytest.approx((100 * expected / BATCH).tolist())


def test_a_checkpoint_is_of_its_options(tmp_path: Path) -> None:
    settings = make_settings(epochs=2)
    fit(mosaic(), Foreign(), settings, tmp_path, stop_at=8)
    with pytest.raises(ValueError, match="patches_per_image=3"):
        fit(mosaic(patches_per_image=4), Foreign(), settings, tmp_path, resume=True)


# ---- what is wrong -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 9}, "patch_size is 9, must be at most the side of the images, 8"),
        ({"patch_size": 0}, "patch_size is 0, must be"),
        ({"patches_per_image": 0}, "patches_per_image is 0, must be"),
        ({"patch_mode": "crops"}, "patch_mode is 'crops', must be one of crop, conv"),
        ({"local": -1.0}, "local is -1.0, must be"),
        ({"discriminator_width": 0}, "width is 0, must be"),
        ({"padding": -1}, "padding is -1, must be"),
        ({"flip": 2}, "flip is int, must be True or False"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        mosaic(**options)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (None, "batch is NoneType, must be a Batch of 12 out-of-domain images for MosaicKD"),
        (Batch(foreign(0, 11)), "images has shape (11, 1, 8, 8), must be (12, 1, 8, 8): batch_size, 6"),
        (Batch(torch.zeros(12, 1, 8, 7)), "images has shape (12, 1, 8, 7), must be (12, 1, 8, 8)"),
        (Batch(torch.zeros(12, 3, 8, 8)), "images has shape (12, 3, 8, 8), must be (12, 1, 8, 8)"),
    ],
)
def test_wrong_batches(batch: Batch | None, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        mosaic().iteration(batch, Steps())  # type: ignore[arg-type]


def test_an_image_that_is_not_finite_ends_the_training() -> None:
    """One that was given is the user's error; one that was made counts nowhere, as in all methods that make images."""

    class Broken(Foreign):
        def epoch(self, epoch: int, /, start: int = 0) -> Any:
            for batch in super().epoch(epoch, start):
                yield Batch(broken(batch.images, [0], float("nan")))

    with pytest.raises(FloatingPointError):
        fit(mosaic(), Broken(), make_settings(epochs=1))
    procedure = mosaic()
    images = torch.randn(BATCH, 1, SIDE, SIDE)
    made = procedure.judge(broken(images, [1], float("nan")))
    assert all(term.isfinite() for term in procedure.generator_terms(made).values())
    assert made.logits.shape[1] == CLASSES
