"""Distillation without data, and MosaicKD, of dense networks: each pixel is a row, against formulas of flattened pixels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from datafree_cases import Steps, broken
from torch import Tensor, nn

from fastkd._seeding import seeded
from fastkd.data import NoBatches
from fastkd.functional import logit_stats
from fastkd.methods.datafree import DataFree, Judged, terms
from fastkd.methods.datafree.judged import own_losses
from fastkd.methods.mosaic import Mosaic, discriminator_loss
from fastkd.methods.registry import Given, create_procedure
from fastkd.models.segmenter import Segmenter
from fastkd.selection import select_clean
from fastkd.training import Trainer, TrainingSettings

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread", "no_figures")]

BATCH, CLASSES, SIDES = 5, 4, (6, 8)
PIXELS = math.prod(SIDES)
QUICK: dict[str, Any] = {"latent": 6, "width": 4}
PATCHES: dict[str, Any] = {"patch_mode": "conv", "patch_size": 4, "discriminator_width": 4, "student_steps": 2}


def logits(seed: int, scale: float = 2.0) -> Tensor:
    """As networks put them out, ``[B, K, H, W]``."""
    made = torch.randn(BATCH, CLASSES, *SIDES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (scale * made).float().requires_grad_()


def rows(maps: Tensor) -> Tensor:
    """Of each pixel, ``[B H W, K]``."""
    return torch.stack([maps[b, :, y, x] for b in range(len(maps)) for y in range(SIDES[0]) for x in range(SIDES[1])])


class Says(nn.Module):
    """Logits that do not depend on the images."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.maps = nn.Parameter(logits(seed).detach())

    def forward(self, images: Tensor) -> Tensor:
        return self.maps[: len(images)] + 0.0 * images.sum((1, 2, 3), keepdim=True)


def procedure_of(method: str, student: nn.Module, teacher: nn.Module, **options: Any) -> DataFree:
    images = torch.randn(2, 1, *SIDES, generator=torch.Generator().manual_seed(9))
    given = Given(student, teacher, images, BATCH, mean=(0.4,), std=(0.3,), padding=0, flip=False)
    with seeded(0):
        made = create_procedure(method, given, **{**QUICK, **(PATCHES if method == "mosaic" else {}), **options})
    assert isinstance(made, DataFree)
    return made


def segmenters(method: str = "ta-dfkd", **options: Any) -> DataFree:
    student, teacher = (Segmenter((4, width), classes=CLASSES, seed=width) for width in (4, 6))
    return procedure_of(method, student, teacher, **options)


def judged(procedure: DataFree, teacher_logits: Tensor, usable: Tensor | None = None) -> Judged:
    """Images that are made, of which the teacher says this, ``[B, K, H, W]``."""
    images = procedure.maker().images.detach()
    seen = procedure.teacher.look(images)
    said = teacher_logits.movedim(1, -1)
    usable = torch.ones(BATCH, dtype=torch.bool) if usable is None else usable
    return Judged(images, said, usable, None, seen, logit_stats(said))


# ---- terms, with the share of each image -----------------------------------------------------------------


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(1)


def divergence_by_hand(kind: str, s: Tensor, t: Tensor, w: Tensor, temperature: float) -> Tensor:
    p, q = ((x / temperature).softmax(1) for x in (t, s))
    if kind == "kl":
        return temperature**2 * (w * kl(p, q)).sum()
    if kind == "l1":
        return (w * (s - t).abs().mean(1)).sum()
    m = (p + q) / 2
    return (w * (kl(p, m) + kl(q, m)) / 2).sum() / math.log(2)


def of_mean(t: Tensor, w: Tensor) -> Tensor:
    mean = (w[:, None] * t.softmax(1)).sum(0)
    return (mean * mean.log()).sum()


def entropy(t: Tensor) -> Tensor:
    return -(t.softmax(1) * t.log_softmax(1)).sum(1)


TEACHERS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "class_prior": (
        lambda t, w: terms.class_prior(logit_stats(t), t, None, w),
        lambda t, w: (w * F.cross_entropy(t, t.argmax(1), reduction="none")).sum(),
    ),
    "entropy": (lambda t, w: terms.label_entropy(logit_stats(t), w), lambda t, w: (w * entropy(t)).sum()),
    "balance": (terms.balance, of_mean),
}


def same(ours: Tensor, theirs: Tensor, *maps: Tensor, left_out: Tensor) -> None:
    """In value and gradient, which is 0 in all pixels of images that are left out, bool ``[B]``."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for map_, mine, other in zip(
        maps, *(torch.autograd.grad(x, maps, retain_graph=True) for x in (ours, theirs)), strict=True
    ):
        assert map_.shape == (BATCH, CLASSES, *SIDES)
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-7)
        assert mine[left_out].eq(0).all()
        assert mine[~left_out].ne(0).flatten(1).any(1).all()


@pytest.mark.parametrize("left_out", [[], [0, 3]], ids=["all", "some"])
@pytest.mark.parametrize("kind", ["kl", "l1", "js"])
def test_divergences_are_means_over_the_pixels(kind: terms.Divergence, left_out: list[int]) -> None:
    s, t = logits(0), logits(1)
    counted = torch.ones(BATCH, dtype=torch.bool)
    counted[left_out] = False
    ours = terms.divergence(kind, s.movedim(1, -1), t.movedim(1, -1), terms.shares(counted), 2.0)
    of_pixels = (counted.float() / (counted.sum() * PIXELS)).repeat_interleave(PIXELS)
    same(ours, divergence_by_hand(kind, rows(s), rows(t), of_pixels, 2.0), s, t, left_out=~counted)


@pytest.mark.parametrize("left_out", [[], [0, 3]], ids=["all", "some"])
@pytest.mark.parametrize("name", TEACHERS)
def test_terms_of_the_teacher_are_means_over_the_pixels(name: str, left_out: list[int]) -> None:
    ours, theirs = TEACHERS[name]
    t, counted = logits(2), torch.ones(BATCH, dtype=torch.bool)
    counted[left_out] = False
    of_pixels = (counted.float() / (counted.sum() * PIXELS)).repeat_interleave(PIXELS)
    same(ours(t.movedim(1, -1), terms.shares(counted)), theirs(rows(t), of_pixels), t, left_out=~counted)


# ---- of a procedure ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ta-dfkd", "mosaic"])
def test_the_students_loss_is_the_mean_over_all_pixels(method: str) -> None:
    student, t = Says(3), logits(4).detach()
    procedure = procedure_of(method, student, Says(4), distance="kl", temperature=3.0, bn_statistics=0.0)
    images = procedure.maker().images.detach()
    ours = procedure.student_loss(images, t.movedim(1, -1), torch.full((BATCH,), 1 / BATCH))
    s = rows(student.maps)
    theirs = 9.0 * F.kl_div((s / 3).log_softmax(1), (rows(t) / 3).softmax(1), reduction="batchmean")
    same(ours, theirs, student.maps, left_out=torch.zeros(BATCH, dtype=torch.bool))
    torch.testing.assert_close(procedure.teacher(images), t.movedim(1, -1))


@pytest.mark.parametrize("agreed", [False, True])
def test_the_terms_of_a_generator(agreed: bool) -> None:
    """Agreed only: the pixels in whose class both agree keep their share of all pixels."""
    weights = {"adversarial": 1.3, "class_prior": 0.7, "entropy": 0.4, "balance": 5.0}
    options = {"adversary": "kl", "agreed_only": agreed, "activation": 0.0, "share_images": False}
    student, t = Says(5), logits(6)
    procedure = procedure_of("dafl", student, Says(6), **weights, **options)
    found = procedure.generator_terms(judged(procedure, t))
    s, flat = rows(student.maps), rows(t)
    share = torch.full((len(flat),), 1 / len(flat))
    counted = share * (s.argmax(1) == flat.argmax(1)) if agreed else share
    by_hand = {
        "adversarial": -1.3 * divergence_by_hand("kl", s, flat, counted, 1.0),
        "class_prior": 0.7 * F.cross_entropy(flat, flat.argmax(1)),
        "entropy": 0.4 * entropy(flat).mean(),
        "balance": 5.0 * of_mean(flat, share),
    }
    assert set(found) == set(by_hand)
    none = torch.zeros(BATCH, dtype=torch.bool)
    for name, term in by_hand.items():
        same(found[name], term, *([student.maps] if name == "adversarial" else []), t, left_out=none)


def test_the_patches_of_mosaic() -> None:
    """Eq. 3: a sum over the patches, the mean over the images, of those images that count."""
    procedure = procedure_of("mosaic", Says(7), Says(8), local=0.5)
    assert isinstance(procedure, Mosaic)
    procedure.eval()  # the discriminator's batch norms, too: patches of one image are not those of the others
    usable = torch.tensor([True, True, False, True, False])
    made = judged(procedure, logits(8), usable)
    said = procedure.discriminator(made.images).flatten(1)
    assert said.shape[1] == procedure.patch_logits(made.images).shape[1] > 1
    expected = -sum(said[i].sigmoid().log().sum() for i in (0, 1, 3)) / 3
    found = procedure.generator_terms(made)
    assert set(found) == {"adversarial", "entropy", "balance", "local"}
    torch.testing.assert_close(found["local"], 0.5 * expected)
    real = torch.randn_like(said)
    by_hand = -((1 - said.sigmoid()).log().sum() + real.sigmoid().log().sum()) / (2 * BATCH)
    torch.testing.assert_close(discriminator_loss(said, real, torch.full((BATCH,), 1 / BATCH)), by_hand)


@pytest.mark.parametrize("method", ["ta-dfkd", "dfq", "mosaic"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_image_that_is_not_finite_counts_in_no_pixel(method: str, value: float) -> None:
    procedure = segmenters(method)
    procedure.maker.register_forward_hook(lambda _, __, made: made._replace(images=broken(made.images, [0, 3], value)))
    if method != "mosaic":  # whose discriminator sees each image
        found = procedure.iteration(None, Steps())  # type: ignore[arg-type]
        assert all(term.isfinite() for term in found.values())
    made = procedure.judge(procedure.maker().images)
    assert all(term.isfinite() for term in procedure.generator_terms(made).values())
    assert made.usable.tolist() == [i not in (0, 3) for i in range(BATCH)]
    assert not made.logits[[0, 3]].any()
    assert own_losses([made])[0].isfinite().tolist() == made.usable.tolist()


def test_a_pixel_that_is_not_finite_leaves_its_image_out() -> None:
    procedure = procedure_of("dafl", Says(1), Says(2), activation=0.0)
    with torch.no_grad():
        procedure.frozen["teacher"].maps[2, 1, 3, 3] = torch.nan  # type: ignore[operator]
    made = procedure.judge(procedure.maker().images)
    assert made.usable.tolist() == [True, True, False, True, True]
    kept = rows(procedure.frozen["teacher"].maps)[torch.arange(BATCH).repeat_interleave(PIXELS) != 2]  # type: ignore[arg-type]
    share = torch.full((len(kept),), 1 / len(kept))
    found = procedure.generator_terms(made)
    torch.testing.assert_close(found["class_prior"], F.cross_entropy(kept, kept.argmax(1)))
    torch.testing.assert_close(found["balance"], procedure.weights["balance"] * of_mean(kept, share))


def test_images_are_selected_by_the_mean_of_their_pixels() -> None:
    procedure = segmenters("ta-dfkd")
    batches = [procedure.judge(*procedure.maker()) for _ in range(procedure.lessons.rounds)]
    losses = own_losses(batches)
    for batch, found in zip(batches, losses, strict=True):
        own = F.cross_entropy(batch.logits.flatten(0, 2), batch.logits.argmax(-1).flatten(), reduction="none")
        torch.testing.assert_close(found, own.view(BATCH, PIXELS).mean(1))
    assert torch.equal(procedure.lessons.mask(batches), torch.stack([select_clean(found)[0] for found in losses]))
    for lesson in procedure.lessons(batches):
        with torch.no_grad():
            torch.testing.assert_close(procedure.teacher(lesson.images), lesson.logits)


@pytest.mark.parametrize("method", ["cmi", "pre-dfkd"])
def test_memories_of_maps(method: str) -> None:
    """The bank keeps the teacher's logits of each pixel; the memory that replays learns them."""
    few = {"generator_steps": 2, "student_steps": 2, "capacity": 8} if method == "cmi" else {"activation": 0.0}
    procedure = segmenters(method, ask_classes=False, **few)
    for _ in range(2):
        found = procedure.iteration(None, Steps())  # type: ignore[arg-type]
        assert all(term.isfinite() for term in found.values())
    if procedure.bank is not None:
        drawn = procedure.bank.draw(4)
        assert drawn["logits"].shape == (4, *SIDES, CLASSES)
        with torch.no_grad():
            torch.testing.assert_close(procedure.teacher(drawn["images"]), drawn["logits"])


@pytest.mark.parametrize("method", ["ta-dfkd", "mosaic"])
def test_pictures(method: str) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    procedure = segmenters(method)
    assert set(procedure.pictures(Steps())) == {"images", "losses"}  # type: ignore[arg-type]
    assert procedure.samples(7).shape == (7, 1, *SIDES)


def test_a_student_comes_near_the_teacher() -> None:
    procedure = segmenters("dfad", student_steps=3, distance="kl", generator_learning_rate=1e-3)
    images = torch.randn(64, 1, *SIDES, generator=torch.Generator().manual_seed(3))

    def apart(network: nn.Module) -> dict[str, float]:
        network.eval()
        with torch.no_grad():
            pair = [rows(one(images[:BATCH])) for one in (network, procedure.frozen["teacher"])]
        return {"test_loss": F.kl_div(pair[0].log_softmax(1), pair[1].softmax(1), reduction="batchmean").item()}

    before = apart(procedure.network())["test_loss"]
    settings = TrainingSettings(epochs=3, optimizer="adam", learning_rate=0.01, weight_decay=0.0)
    history = Trainer(procedure, NoBatches(15), settings, evaluate=apart, show="off").fit()
    assert history[-1]["test_loss"] < before / 3


@pytest.mark.parametrize(
    ("student", "options", "message"),
    [
        ((4, 4), {"ask_classes": True}, "ask_classes is True, must be False for dense networks"),
        ((4, 4), {"activation": 0.1}, "activation is asked of a Segmenter .* no linear layer, must be 0 for it"),
        (None, {}, r"student has logits of shape \(2, 4\), must be that of the teacher's, \(2, 4, 6, 8\)"),
    ],
    ids=["ask_classes", "activation", "a classifier"],
)
def test_what_dense_networks_are_not_asked(
    student: tuple[int, ...] | None, options: dict[str, Any], message: str
) -> None:
    teacher = Segmenter((4, 4), classes=CLASSES)
    other = (
        nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, CLASSES))
        if student is None
        else Segmenter(student, classes=CLASSES)
    )
    with pytest.raises(ValueError, match=f"fastkd: .*{message}"):
        DataFree(other, teacher, torch.randn(2, 1, *SIDES), BATCH, adversarial=1.0, **QUICK, **options)
    linear = nn.Sequential(nn.Conv2d(1, CLASSES, 1))
    with pytest.raises(
        ValueError, match=r"fastkd: contrast is asked of a Sequential .* no linear layer, must be 0 for it"
    ):
        DataFree(Segmenter((4, 4), classes=CLASSES), linear, torch.randn(2, 1, *SIDES), BATCH, contrast=1.0, **QUICK)
