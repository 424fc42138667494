"""Mathematical claims of docstrings that no other test would find false, one test a claim: of losses, patches, references.

The rest are in the tests of the primitives: truth, ends, infinities and reductions of the divergences in test_divergence and
test_losses, relations in test_relation, EM in test_gmm, draws and tables in test_alias and test_samplers, places in
test_crop_offsets, statistics in test_statistics, formulas of the papers in test_methods, test_online and test_bss.
"""

from __future__ import annotations

import inspect
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import fastkd
from fastkd import functional
from fastkd.ops.crop import crop_offsets
from fastkd.reference import alias as plain_alias
from fastkd.reference import crop as plain_crop
from fastkd.reference import divergence as plain
from fastkd.reference import relation as plain_relation

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]


@pytest.fixture
def pair(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Logits of a student and a teacher."""
    student, teacher = (3 * torch.randn(6, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(loss, of)[0]


# ---- fastkd.functional ---------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [functional.kl_div, functional.js_div, functional.soft_cross_entropy])
def test_gradients_keep_their_size_as_t_grows(loss: Any, pair: tuple[Tensor, Tensor]) -> None:
    """By T^2: to a limit that is not 0; of forward KL it is that of ``|s - t|^2 / 2K`` of centred logits."""
    student, teacher = pair
    sizes = [gradient(loss(student, teacher, t), student).norm().item() for t in (1e3, 1e4)]
    assert sizes[0] > 0.01
    assert sizes[1] == pytest.approx(sizes[0], rel=1e-2)
    centred = [x - x.mean(1, keepdim=True) for x in (student, teacher)]
    if loss is functional.kl_div:
        limit = (centred[0] - centred[1]).detach() / (9 * len(student))
        torch.testing.assert_close(gradient(loss(student, teacher, 1e5), student), limit, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_cross_entropy_is_forward_kl_plus_the_teachers_entropy(
    temperature: float, pair: tuple[Tensor, Tensor]
) -> None:
    student, teacher = pair
    entropy = temperature**2 * fastkd.logit_stats(teacher, temperature).entropy.mean()
    soft, kl = (f(student, teacher, temperature) for f in (functional.soft_cross_entropy, functional.kl_div))
    torch.testing.assert_close(soft, kl + entropy)
    torch.testing.assert_close(gradient(soft, student), gradient(kl, student))


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_js_div_at_its_ends_is_kl_by_convention(beta: float, pair: tuple[Tensor, Tensor]) -> None:
    student, teacher = pair
    direction = "reverse" if beta else "forward"
    torch.testing.assert_close(
        functional.js_div(student, teacher, 2.0, beta=beta),
        functional.kl_div(student, teacher, 2.0, direction=direction),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("of", [functional.js_div, "reference"])
@pytest.mark.parametrize("end", ["forward", "reverse"])
def test_generalised_jensen_shannon_tends_to_0_and_its_slope_to_kl(
    end: Any, of: Any, pair: tuple[Tensor, Tensor]
) -> None:
    """So KL is no limit of the divergence; of the divergence over beta, or over 1 - beta, it is."""
    student, teacher = (x.detach() for x in pair)
    kl = functional.kl_div(student, teacher, direction=end).item()

    def js(beta: float) -> float:
        if of == "reference":
            return plain.divergence(student, teacher, kind="jensen_shannon", beta=beta).item()
        return functional.js_div(student, teacher, beta=beta).item()

    at = {share: js(share if end == "forward" else 1 - share) for share in (1e-2, 1e-4, 1e-6)}
    assert at[1e-2] > at[1e-4] > at[1e-6] > 0
    assert at[1e-6] < 1e-4 * kl
    assert at[1e-6] / 1e-6 == pytest.approx(kl, rel=1e-2)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 4.0])
def test_jensen_shannon_is_at_most_ln_2(temperature: float, pair: tuple[Tensor, Tensor]) -> None:
    student, teacher = (x.detach() for x in pair)
    rows = functional.js_div(student, teacher, temperature, reduction="none") / temperature**2
    assert (rows <= math.log(2) * (1 + 1e-12)).all()
    apart = torch.eye(2, dtype=torch.float64)[:1] * 1e4
    assert functional.js_div(apart, apart.flip(1)).item() == pytest.approx(math.log(2), rel=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.2, 0.5])
def test_jensen_shannon_is_symmetric(beta: float, pair: tuple[Tensor, Tensor]) -> None:
    """Where beta is 0.5; any other is that of 1 - beta with the sides in turn."""
    student, teacher = pair
    one, other = (
        functional.js_div(student, teacher, 2.0, beta=beta),
        functional.js_div(teacher, student, 2.0, beta=1 - beta),
    )
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("dtype", "smallest"), [(torch.float32, -126), (torch.float64, -1022)])
def test_probabilities_below_the_smallest_normal_number_count_as_0(dtype: torch.dtype, smallest: int) -> None:
    """``p log p`` of a class that the student masks: inf where p counts."""
    for exponent, counts in ((smallest + 2, True), (smallest - 2, False)):
        teacher = torch.tensor([[0.0, exponent * math.log(2)]], dtype=dtype)
        student = torch.tensor([[0.0, -math.inf]], dtype=dtype)
        assert functional.kl_div(student, teacher).isinf() == counts


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_gradient_of_an_infinite_divergence_points_back(temperature: float) -> None:
    student = torch.tensor([[0.0, 1.0, -math.inf]], requires_grad=True)
    teacher = torch.tensor([[0.5, 0.0, 2.0]])
    loss = functional.kl_div(student, teacher, temperature)
    p, q = (x.detach().div(temperature).softmax(1) for x in (teacher, student))
    assert loss.isinf()
    torch.testing.assert_close(gradient(loss, student), temperature * (q - p))


def test_mean_is_torchs_and_batchmean_the_mathematical_one(pair: tuple[Tensor, Tensor]) -> None:
    student, teacher = pair
    log_q, p = student.log_softmax(1), teacher.softmax(1)
    for reduction in ("mean", "batchmean", "sum"):
        theirs = F.kl_div(log_q, p, reduction=reduction)
        torch.testing.assert_close(functional.kl_div(student, teacher, reduction=reduction), theirs)  # type: ignore[arg-type]
    target = torch.tensor([-100, 0, 0, -100, 0, 0])
    for reduction, share in (("batchmean", 4), ("mean", 4 * 9)):
        rows = functional.kl_div(student, teacher, target=target, reduction="none")
        ours = functional.kl_div(student, teacher, target=target, reduction=reduction)  # type: ignore[arg-type]
        torch.testing.assert_close(ours, rows.sum() / share)
        weight = torch.tensor([1.0, 0.0, 2.0, 5.0, 1.0, 1.0], dtype=torch.float64)
        ours = functional.kl_div(student, teacher, target=target, weight=weight, reduction=reduction)  # type: ignore[arg-type]
        torch.testing.assert_close(ours, (rows * weight).sum() / share)  # weights do not change the count


def test_logit_stats_give_the_cross_entropy_and_the_probability_of_the_prediction(pair: tuple[Tensor, Tensor]) -> None:
    _, logits = pair
    stats = fastkd.logit_stats(logits)
    predicted = logits.argmax(1)
    torch.testing.assert_close(stats.logsumexp - stats.max, F.cross_entropy(logits, predicted, reduction="none"))
    torch.testing.assert_close((stats.max - stats.logsumexp).exp(), logits.softmax(1).amax(1))
    p = logits.softmax(1)
    torch.testing.assert_close(stats.entropy, -(p * p.log()).sum(1))  # nats


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_losses_of_16_bits_are_float32(dtype: torch.dtype, pair: tuple[Tensor, Tensor]) -> None:
    student, teacher = (logits.detach().to(dtype) for logits in pair)
    losses = [f(student, teacher) for f in (functional.kl_div, functional.js_div, functional.soft_cross_entropy)]
    losses += [functional.kd_loss(student, teacher, torch.arange(6)), functional.relation_loss(student, teacher)]
    stats = functional.logit_stats(student)
    assert stats.argmax.dtype == torch.int64
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert {t.dtype for t in (*losses, stats.max, stats.mean, stats.logsumexp, stats.entropy)} == {wanted}


def test_the_task_loss_is_0_where_alpha_is_1(pair: tuple[Tensor, Tensor]) -> None:
    loss, terms = functional.kd_loss(*pair, torch.arange(6), 3.0, 1.0, return_terms=True)
    assert terms["cross_entropy"] == 0
    torch.testing.assert_close(loss, functional.kl_div(*pair, 3.0))


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (fastkd.KLDivLoss, functional.kl_div),
        (fastkd.JSDivLoss, functional.js_div),
        (fastkd.KDLoss, functional.kd_loss),
        (fastkd.RelationLoss, functional.relation_loss),
    ],
)
def test_modules_have_the_defaults_of_their_functions(module: Any, function: Any) -> None:
    theirs = inspect.signature(function).parameters
    for name, argument in inspect.signature(module).parameters.items():
        assert argument.default == theirs[name].default, name


def test_relations_of_two_points_are_constant_and_of_one_there_are_none(generator: torch.Generator) -> None:
    ours, theirs = (torch.randn(2, 4, generator=generator).requires_grad_() for _ in range(2))
    loss, terms = functional.relation_loss(ours, theirs, return_terms=True)
    assert terms["angle_loss"] == 0
    assert terms["distance_loss"].abs() < 1e-12  # either distance is its own mean
    loss, terms = functional.relation_loss(ours[:1], theirs[:1], return_terms=True)
    assert loss == 0
    assert gradient(loss, ours).abs().sum() == 0


def test_points_count_as_1e_6_apart_in_distances_and_coincide_in_angles_at_1e_12() -> None:
    def points(gap: float) -> Tensor:  # two of them, at right angles to the plane of the others
        plane = [[0.0, 0.0, -gap / 2], [0.0, 0.0, gap / 2], [0.0, 1.0, 0.0], [2.0, 1.0, 0.0]]
        return torch.tensor(plane, dtype=torch.float64)

    def change(name: str, a: float, b: float) -> float:
        terms = [functional.relation_loss(points(gap), points(1.0), return_terms=True)[1][name] for gap in (a, b)]
        return (terms[0] - terms[1]).abs().item()

    assert change("distance_loss", 0.0, 1e-6) < 1e-12
    assert change("distance_loss", 1e-6, 1e-5) > 1e-8
    assert change("angle_loss", 0.0, 0.9e-12) == pytest.approx(0.0, abs=1e-12)
    assert change("angle_loss", 0.9e-12, 1.1e-12) > 1e-3
    assert change("angle_loss", 1.1e-12, 1e-6) < 1e-5  # a direction at once
    close = points(0.9e-12).requires_grad_()
    coincident = gradient(functional.relation_loss(close, points(1.0), 0.0, 50.0), close)
    assert coincident.abs().max() < 1e3  # through the pair it would be 1e12


# ---- fastkd.patches, fastkd.reference ------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_normalisation_is_in_float64_and_rounded_once_or_by_way_of_float32(dtype: torch.dtype) -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    exact = torch.tensor([(Fraction(x, 255) - Fraction(0.3)) / Fraction(0.7) for x in range(256)], dtype=torch.float64)
    expected = exact.float().to(dtype) if dtype.itemsize == 2 else exact.to(dtype)
    ours = fastkd.random_crop_flip(images, 0, None, 0.0, 0.3, 0.7, dtype).flatten()
    torch.testing.assert_close(ours, expected, rtol=4e-16 if dtype == torch.float64 else 0, atol=1e-16)


def test_padding_is_black_before_normalisation_not_the_mean() -> None:
    white = torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)
    out = fastkd.random_crop_flip(white, 4, 10, 0.0, 0.5, 0.25)
    assert out.unique().tolist() == [-2.0, 2.0]
    assert (out == 2.0).sum() == 4


@pytest.mark.parametrize("seed", [0, 5, 2**62])
def test_places_are_48_bits_and_flips_are_exact_to_2_to_the_minus_32(seed: int) -> None:
    y, x, flip, rest = plain_crop.philox(seed, 2, 0)
    words = [y << 16 | rest >> 16, x << 16 | rest & 0xFFFF]

    def drawn(count: int, probability: float) -> tuple[list[int], bool]:
        ranges = (0, count), (0, count)
        offsets, flips = crop_offsets(torch.tensor([seed]), 1, 1, *ranges, probability)
        return offsets.flatten().tolist(), bool(flips)

    assert drawn(2**48, flip / 2**32) == (words, False)
    assert drawn(1000, (flip + 1) / 2**32) == ([word * 1000 >> 48 for word in words], True)


def test_references_are_differentiable_again(pair: tuple[Tensor, Tensor]) -> None:
    x, y = (logits[:3].detach().requires_grad_() for logits in pair)
    for kind in ("forward", "reverse", "jensen_shannon", "soft_cross_entropy"):
        assert torch.autograd.gradgradcheck(
            lambda s, t, k=kind: plain.divergence(s, t, kind=k, temperature=2.0), (x, y)
        )
    assert torch.autograd.gradgradcheck(lambda s, t: plain_relation.relation_loss(s, t, 1.0, 1.0), (x, y))
    images = torch.rand(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([[[-1, 1], [0, 0]]])
    assert torch.autograd.gradgradcheck(lambda i: plain_crop.crop(i, offsets, (2, 2)).pow(3).sum(), images)


def test_forms_of_crop_give_the_same_patches(generator: torch.Generator) -> None:
    images = torch.randn(2, 3, 7, 9, generator=generator)
    offsets = torch.tensor([[[0, 0], [3, 4], [1, 2]], [[4, 5], [2, 0], [4, 1]]])
    expected = plain_crop.crop(images, offsets, (3, 4))
    for form in (plain_crop.crop_by_index, plain_crop.crop_by_grid_sample):
        assert torch.equal(form(images, offsets, (3, 4)), expected)


def test_the_reference_philox_is_that_of_its_authors() -> None:
    """Known answers of Random123, which take (counter, key) as here (index, stream, seed)."""
    assert [f"{w:08x}" for w in plain_alias.philox(0, 0, 0)] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    assert list(plain_alias.philox(5, 2, 7)) == plain_crop.philox(5, 2, 7)


def test_the_alias_reference_rounds_halves_to_even() -> None:
    half = math.ldexp(1, -46)
    assert plain_alias.exp2_fixed(-half, 0.0, 1.0) == plain_alias.exp2_fixed(0.0, 0.0, 1.0)
    assert plain_alias.exp2_fixed(-3 * half, 0.0, 1.0) == plain_alias.exp2_fixed(-4 * half, 0.0, 1.0)
