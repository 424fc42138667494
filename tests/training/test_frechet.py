"""The Frechet distance of features: scipy's formula, closed forms, few rows, and what it refuses."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import scipy.linalg
import torch
from refusals import refuses
from torch import Tensor, nn
from training_cases import BATCHES, CLASSES, Batches, Linear, small, small_resnet

from fastkd.models.heads import linear_head
from fastkd.training import frechet_distance, latents

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]


def rows(seed: int, n: int, d: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Of a Gaussian of the seed's own."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return (torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + seed).to(dtype)


def by_scipy(features: Tensor, others: Tensor) -> float:
    """As the paper has it."""
    features, others = features.double(), others.double()
    one, other = (torch.atleast_2d(torch.cov(x.T)).numpy() for x in (features, others))
    root = scipy.linalg.sqrtm(one @ other).real
    return float((features.mean(0) - others.mean(0)).square().sum()) + float((one + other - 2 * root).trace())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "m", "d"), [(40, 60, 1), (300, 200, 7), (60, 600, 41)])
def test_against_scipy(n: int, m: int, d: int, dtype: torch.dtype) -> None:
    features, others = rows(0, n, d, dtype), rows(1, m, d, dtype)
    found = frechet_distance(features, others)
    assert found.dtype == torch.float64
    assert found.shape == ()
    assert found.item() == pytest.approx(by_scipy(features, others), rel=1e-9)
    assert frechet_distance(others, features).item() == pytest.approx(found.item(), rel=1e-12)


@pytest.mark.parametrize(("n", "d"), [(2, 1), (2, 50), (20, 50), (400, 50)])
def test_of_a_set_and_its_shift(n: int, d: int) -> None:
    features = rows(3, n, d)
    spread = features.var(0).sum().item()
    assert frechet_distance(features, features).item() <= 1e-12 * spread
    assert frechet_distance(features, features.flip(0)).item() <= 1e-12 * spread
    shift = torch.linspace(-1.0, 2.0, d, dtype=torch.float64)
    assert frechet_distance(features, features + shift).item() == pytest.approx(shift.square().sum().item(), rel=1e-9)


def test_of_one_dimension() -> None:
    """``(m_1 - m_2)^2 + (s_1 - s_2)^2``."""
    features, others = rows(0, 30, 1), 3.0 * rows(1, 50, 1) + 2.0
    expected = (features.mean() - others.mean()) ** 2 + (features.std() - others.std()) ** 2
    assert frechet_distance(features, others).item() == pytest.approx(expected.item(), rel=1e-12)


def test_of_a_stretched_set() -> None:
    """``tr S (1 - a)^2`` of centred rows and a times them, also where there are fewer than dimensions."""
    for n in (5, 30, 200):
        features = rows(2, n, 30)
        features = features - features.mean(0)
        expected = features.var(0).sum().item() * 0.25
        assert frechet_distance(features, 1.5 * features).item() == pytest.approx(expected, rel=1e-9)


def test_singular_covariances() -> None:
    """By the singular values of the product of the centred rows, whose squares are the eigenvalues; scipy's root is none."""
    for n, m, d in ((5, 9, 64), (9, 5, 64), (40, 200, 64), (2, 2, 3)):
        features, others = rows(0, n, d), rows(1, m, d)
        one, other = ((x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (features, others))
        shared = torch.linalg.svdvals(one @ other.T).sum()
        expected = (features.mean(0) - others.mean(0)).square().sum() + one.square().sum() + other.square().sum()
        assert frechet_distance(features, others).item() == pytest.approx((expected - 2 * shared).item(), rel=1e-9)
    constant = torch.ones(4, 3)
    assert frechet_distance(constant, constant).item() == 0.0
    assert frechet_distance(constant, 2 * constant).item() == pytest.approx(3.0)
    assert frechet_distance(0 * constant, 0 * constant).item() == 0.0


@pytest.mark.parametrize("scale", [5e-324, 1e-300, 1e-150, 1e150, 1e300])
def test_finite_features_make_no_nan(scale: float) -> None:
    features, others = rows(0, 9, 20) * scale, rows(1, 12, 20) * scale
    for a, b in ((features, others), (others, features), (features, features)):
        assert frechet_distance(a, b).item() >= 0.0
    largest = torch.full((3, 2), torch.finfo(torch.float64).max, dtype=torch.float64)
    assert frechet_distance(largest, largest).item() == 0.0
    assert frechet_distance(largest, -largest).item() == math.inf


def test_it_is_a_number_to_look_at() -> None:
    features = rows(0, 9, 4).requires_grad_()
    assert not frechet_distance(features, rows(1, 9, 4)).requires_grad


GOOD = torch.zeros(4, 3)


@pytest.mark.parametrize("name", ["features", "others"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[1.0], [2.0]], "is list, must be a tensor"),
        (None, "is NoneType, must be a tensor"),
        (torch.zeros(4, 3, dtype=torch.int64), "has dtype torch.int64, must be"),
        (torch.zeros(4, 3, dtype=torch.complex64), "has dtype torch.complex64, must be"),
        (torch.zeros(3), r"has shape \(3,\), must be \[N, d\]"),
        (torch.zeros(4, 3, 1), r"has shape \(4, 3, 1\), must be \[N, d\]"),
        (torch.zeros(1, 3), r"has shape \(1, 3\), must be \[N, d\] of two rows or more"),
        (torch.zeros(0, 3), r"has shape \(0, 3\)"),
        (torch.zeros(4, 0), r"has shape \(4, 0\)"),
        (torch.tensor([[0.0, 1.0, math.nan]] * 4), "holds 4 values that are not finite"),
        (torch.tensor([[0.0, 1.0, 2.0]] * 3 + [[math.inf] * 3]), "holds 3 values that are not finite"),
    ],
)
def test_what_it_refuses(name: str, given: Any, message: str) -> None:
    refuses(f"{name} {message}", lambda: frechet_distance(**{"features": GOOD, "others": GOOD, name: given}))


def test_sets_that_do_not_fit() -> None:
    refuses(
        "others has 2 features a row, must have as many as features, 3", lambda: frechet_distance(GOOD, GOOD[:, 1:])
    )
    refuses("others is on meta, must be with features on cpu", lambda: frechet_distance(GOOD, GOOD.to("meta")))


# ---- what a network sees -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [small, small_resnet, Linear])
def test_latents_are_what_the_head_takes(make: Any) -> None:
    network = make(0).train()
    images = Batches(batch=10).of(0)[0]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = latents(network, images, batch_size=4)
    assert all(module.training for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not found.requires_grad
    layer = linear_head(network, images).layer
    assert found.shape == (10, layer.in_features)
    torch.testing.assert_close(layer(found), network.eval()(images))
    torch.testing.assert_close(latents(network, images), found)
    assert layer.out_features == CLASSES


def test_of_networks_that_return_more_than_logits() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = small(0)

        def forward(self, images: Tensor) -> Any:
            return SimpleNamespace(logits=self.network(images))

    images = Batches(batch=5).of(0)[0]
    torch.testing.assert_close(latents(Wrapped(), images), latents(small(0), images))


def test_together() -> None:
    """Images of other batches of a source are nearer than noise is."""
    network, source = small(0), Batches(batch=64)
    images, others = source.of(0)[0], source.of(BATCHES)[0]
    noise = 3.0 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    near, far = (frechet_distance(latents(network, images), latents(network, x)) for x in (others, noise))
    assert near < 0.2 * far


def test_what_latents_refuse() -> None:
    images = torch.zeros(2, 1, 8, 8)
    refuses("network is", lambda: latents(3, images))  # type: ignore[arg-type]
    refuses("images is", lambda: latents(small(0), None))  # type: ignore[arg-type]
    refuses(r"images has shape \(0, 1, 8, 8\), must be one image", lambda: latents(small(0), images[:0]))
    refuses("batch_size is 0", lambda: latents(small(0), images, batch_size=0))
    refuses("the logits of Sequential come out of none", lambda: latents(nn.Sequential(nn.Flatten()), images))
