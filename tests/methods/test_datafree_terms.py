"""The terms of a generator's loss against formulas written another way, with gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from scipy.spatial.distance import jensenshannon
from torch import Tensor, nn

from fastkd.functional import ChannelMoments, channel_moments, logit_stats
from fastkd.methods.datafree import terms
from fastkd.methods.datafree.contrast import instance_discrimination
from fastkd.methods.datafree.replay import gaussian_divergence

pytestmark = pytest.mark.no_kernels
ROWS, CLASSES = 7, 5


def logits(seed: int, scale: float = 3.0) -> Tensor:
    made = torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (scale * made).requires_grad_()


def weights() -> Tensor:
    """Of four samples; the others are left out."""
    return terms.shares(torch.tensor([True, False, True, True, False, True, False])).double()


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(1)


def by_hand(kind: str, s: Tensor, t: Tensor, w: Tensor, temperature: float) -> Tensor:
    p, q = ((x / temperature).softmax(1) for x in (t, s))
    if kind == "kl":
        return temperature**2 * (w * kl(p, q)).sum()
    if kind == "l1":
        chosen = w > 0
        return F.l1_loss(s[chosen], t[chosen])
    if kind == "js":
        m = (p + q) / 2
        return (w * (kl(p, m) + kl(q, m)) / 2).sum() / math.log(2)
    chosen = w > 0  # as published: of the selected samples, by torch's KLDivLoss and its mean over all numbers
    p, q = ((x[chosen] / 3.0).softmax(1) for x in (t, s))
    m = (0.5 * (p + q)).clamp(0.01, 0.99)
    both = [nn.KLDivLoss(reduction="none")(x.clamp(0.01, 0.99).log(), m).mean() for x in (p, q)]
    return (0.5 * both[0] + 0.5 * both[1]).clamp(0.0, 1.0)


@pytest.mark.parametrize("kind", ["kl", "l1", "js", "js-published"])
def test_divergences_and_their_gradients_in_both_networks(kind: terms.Divergence) -> None:
    s, t, w = logits(0), logits(1), weights()
    ours = terms.divergence(kind, s, t, w, 2.0)
    theirs = by_hand(kind, s, t, w, 2.0)
    torch.testing.assert_close(ours, theirs)
    assert ours.item() > 0
    pairs = zip(torch.autograd.grad(ours, (s, t)), torch.autograd.grad(theirs, (s, t)), strict=True)
    for mine, other in pairs:
        torch.testing.assert_close(mine, other)
        assert mine[w == 0].eq(0).all()
        assert mine[w > 0].ne(0).any()


def test_js_is_that_of_scipy_and_at_most_one() -> None:
    s, t = logits(2), logits(3)
    w = torch.full((ROWS,), 1 / ROWS, dtype=torch.float64)
    squares = jensenshannon(s.detach().softmax(1).T, t.detach().softmax(1).T, base=2) ** 2
    assert terms.divergence("js", s, t, w).item() == pytest.approx(squares.mean())
    apart = torch.full((1, 2), -1e3), torch.tensor([[1e3, -1e3]])
    far = apart[0].clone()
    far[0, 1] = 1e3
    assert float(terms.divergence("js", far, apart[1], torch.ones(1))) == pytest.approx(1.0)


def test_published_js_has_no_gradient_with_many_classes() -> None:
    """Why it is not the default: predictions that are not sharp make it negative, and the clamp 0."""
    noise = torch.Generator().manual_seed(0)
    s, t = (torch.randn(64, 100, generator=noise).requires_grad_() for _ in range(2))
    w = torch.full((64,), 1 / 64)
    published = terms.divergence("js-published", s, t, w)
    (gradient,) = torch.autograd.grad(published, s)
    assert published.item() == 0.0
    assert gradient.eq(0).all()
    (gradient,) = torch.autograd.grad(terms.divergence("js", s, t, w), s)
    assert gradient.ne(0).any()


def prior(t: Tensor, w: Tensor) -> Tensor:
    return terms.class_prior(logit_stats(t), t, None, w)


def prior_of_labels(t: Tensor, w: Tensor) -> Tensor:
    return terms.class_prior(logit_stats(t), t, torch.arange(ROWS) % CLASSES, w).double()


def cross_entropy(t: Tensor, target: Tensor, w: Tensor) -> Tensor:
    return (-(t - t.exp().sum(1, keepdim=True).log()).gather(1, target[:, None]).squeeze(1) * w).sum()


def mean_entropy(p: Tensor, w: Tensor) -> Tensor:
    return -(w * (p * p.log()).sum(1)).sum()


def of_mean(p: Tensor, w: Tensor) -> Tensor:
    mean = (w[:, None] * p).sum(0)
    return (mean * mean.log()).sum()


TEACHER_TERMS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "class_prior": (prior, lambda t, w: cross_entropy(t, t.argmax(1), w)),
    "class_prior_of_labels": (prior_of_labels, lambda t, w: cross_entropy(t, torch.arange(ROWS) % CLASSES, w)),
    "label_entropy": (
        lambda t, w: terms.label_entropy(logit_stats(t), w),
        lambda t, w: mean_entropy(t.softmax(1), w),
    ),
    "balance": (lambda t, w: terms.balance(t, w.float()).double(), lambda t, w: of_mean(t.softmax(1), w)),
    "activation": (
        lambda t, w: terms.mean_activation(t, w.float()).double(),
        lambda t, w: (w * t.abs().sum(1) / CLASSES).sum(),
    ),
}


@pytest.mark.parametrize("name", TEACHER_TERMS)
def test_terms_of_the_teacher(name: str) -> None:
    ours, theirs = TEACHER_TERMS[name]
    t, w = logits(4), weights()
    torch.testing.assert_close(ours(t, w), theirs(t, w), rtol=1e-5, atol=1e-6)
    (mine,), (other,) = (torch.autograd.grad(term(t, w), t) for term in (ours, theirs))
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_balance_is_lowest_where_all_classes_are_as_likely() -> None:
    w = torch.full((CLASSES,), 1 / CLASSES)
    assert float(terms.balance(1e3 * torch.eye(CLASSES), w)) == pytest.approx(-math.log(CLASSES))
    one = torch.zeros(CLASSES, CLASSES)
    one[:, 2] = 1e3
    one.requires_grad_()
    loss = terms.balance(one, w)
    assert loss.item() == pytest.approx(0.0)
    assert torch.autograd.grad(loss, one)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_balance_in_autocast_is_of_32_bits(dtype: torch.dtype) -> None:
    t, w = logits(5).float(), weights().float()
    with torch.autocast("cpu", dtype):
        found = terms.balance(t, w)
    assert torch.equal(found, terms.balance(t, w))


def test_bn_statistics() -> None:
    maps = [torch.randn(4, channels, 6, 6, dtype=torch.float64, requires_grad=True) for channels in (3, 8)]
    norms = [nn.BatchNorm2d(m.shape[1], dtype=torch.float64) for m in maps]
    for i, norm in enumerate(norms):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.add_(i + 0.3)
        norm.running_var.mul_(2.5)
    moments: list[ChannelMoments] = [channel_moments(m) for m in maps]
    ours = terms.bn_statistics(moments, [(n.running_mean, n.running_var) for n in norms])  # type: ignore[misc]
    theirs = torch.zeros((), dtype=torch.float64)
    for m, norm in zip(maps, norms, strict=True):
        rows = m.permute(1, 0, 2, 3).reshape(m.shape[1], -1)
        theirs = (
            theirs + (norm.running_mean - rows.mean(1)).norm() + (norm.running_var - rows.var(1, correction=0)).norm()
        )
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-6)
    pairs = zip(torch.autograd.grad(ours, maps), torch.autograd.grad(theirs, maps), strict=True)
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-8)


def test_total_variation_and_norm() -> None:
    images = torch.randn(3, 2, 5, 6, requires_grad=True)
    total = torch.zeros(())
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        squares = torch.zeros(())
        for y in range(5 - down):
            for x in range(max(0, -right), 6 - max(0, right)):
                squares = squares + (images[:, :, y, x] - images[:, :, y + down, x + right]).square().sum()
        total = total + squares.sqrt()
    ours = terms.total_variation(images)
    torch.testing.assert_close(ours, total)
    torch.testing.assert_close(*(torch.autograd.grad(t, images)[0] for t in (ours, total)))
    torch.testing.assert_close(terms.l2_norm(images), images.square().sum().sqrt())


def test_norms_of_nothing_have_a_gradient() -> None:
    """Of images that are all of one colour, as those of a generator that has collapsed."""
    images = torch.zeros(2, 1, 4, 4, requires_grad=True)
    (terms.total_variation(images) + terms.l2_norm(images)).backward()
    assert images.grad is not None
    assert images.grad.eq(0).all()


@pytest.mark.parametrize("negatives", [0, 4])
def test_contrast(negatives: int) -> None:
    made = [F.normalize(torch.randn(n, 6, dtype=torch.float64), dim=1) for n in (5, 5, negatives)]
    views, others, bank = made
    rows = []
    for i in range(5):
        same = (views[i] @ others[i] / 0.2).exp()
        rest = [(views[i] @ other / 0.2).exp() for j, other in enumerate(others) if j != i]
        rest += [(views[i] @ other / 0.2).exp() for other in bank]
        rows.append(-(same / (same + sum(rest))).log())
    torch.testing.assert_close(instance_discrimination(views, others, bank, 0.2), torch.stack(rows).mean())


def test_gaussian_divergence() -> None:
    mean, log_variance = torch.randn(3, 4), torch.randn(3, 4)
    made = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    theirs = torch.distributions.kl_divergence(made, torch.distributions.Normal(0.0, 1.0)).sum(1).mean()
    torch.testing.assert_close(gaussian_divergence(mean, log_variance), theirs)


def test_shares() -> None:
    assert terms.shares(torch.tensor([True, False, True, True])).tolist() == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])
    assert terms.shares(torch.tensor([False, False])).tolist() == [0.0, 0.0]
