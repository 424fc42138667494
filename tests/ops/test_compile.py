"""``torch.compile(fullgraph=True)`` through every public function and class, against eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch.utils import _pytree as pytree

import fastkd
from fastkd import functional as F  # noqa: N812
from fastkd.ops.sparse import sample_teacher

STUDENT, TEACHER = torch.randn(2, 8, 41, generator=torch.Generator().manual_seed(0)).unbind()
TARGET = torch.arange(8)
LOG_PROBS, INDICES = torch.log_softmax(TEACHER, -1).topk(5)
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
BYTES = (IMAGES * 50 + 128).clamp(0, 255).to(torch.uint8)
OFFSETS = torch.arange(12).reshape(2, 3, 2) % 9
LOSSES = torch.rand(100, generator=torch.Generator().manual_seed(2))
TABLE = fastkd.AliasTable(STUDENT.flatten(), iqpr=5.0, seed=1)


def _fit_and_predict(values: Tensor) -> tuple[Tensor, ...]:
    mixture = fastkd.TwoGaussianMixture().fit(values)
    return mixture.means_, mixture.variances_, mixture.predict_proba(values)


def _update(scores: Tensor) -> Tensor:
    table = fastkd.AliasTable(scores, 1.0, seed=1)
    table.update(torch.tensor([1]), torch.tensor([0.5]))
    return table.weights()


CASES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "kl_div": (F.kl_div, (STUDENT, TEACHER)),
    "js_div": (F.js_div, (STUDENT, TEACHER)),
    "soft_cross_entropy": (F.soft_cross_entropy, (STUDENT, TEACHER)),
    "kd_loss": (lambda s, t, y: F.kd_loss(s, t, y, return_terms=True), (STUDENT, TEACHER, TARGET)),
    "kl_div of columns": (lambda s, t: F.kl_div(s, t, dim=0), (STUDENT, TEACHER)),
    "KLDivLoss": (fastkd.KLDivLoss(2.0), (STUDENT, TEACHER)),
    "JSDivLoss": (fastkd.JSDivLoss(2.0), (STUDENT, TEACHER)),
    "KDLoss": (fastkd.KDLoss(), (STUDENT, TEACHER, TARGET)),
    "sparse_kl_div": (F.sparse_kl_div, (STUDENT, INDICES, LOG_PROBS)),
    "sparse_js_div": (F.sparse_js_div, (STUDENT, INDICES.int(), LOG_PROBS)),
    "sparse_kd_loss": (lambda *x: F.sparse_kd_loss(*x, return_terms=True), (STUDENT, INDICES, LOG_PROBS, TARGET)),
    "SparseKLDivLoss": (fastkd.SparseKLDivLoss(2.0, tail="drop"), (STUDENT, INDICES, LOG_PROBS)),
    "SparseJSDivLoss": (fastkd.SparseJSDivLoss(2.0), (STUDENT, INDICES, LOG_PROBS)),
    "SparseKDLoss": (fastkd.SparseKDLoss(), (STUDENT, INDICES, LOG_PROBS, TARGET)),
    "sample_teacher": (lambda t: sample_teacher(t, torch.tensor([3]), 9, 2.0), (TEACHER,)),
    "relation_loss": (lambda s, t: F.relation_loss(s, t, return_terms=True), (STUDENT, TEACHER)),
    "RelationLoss": (fastkd.RelationLoss(), (STUDENT, TEACHER[:, :7])),
    "logit_stats": (lambda z: tuple(fastkd.logit_stats(z)), (TEACHER,)),
    "channel_moments": (lambda x: tuple(fastkd.channel_moments(x)), (IMAGES,)),
    "channel_moments of samples": (lambda x: tuple(fastkd.channel_moments(x, per_sample=True)), (IMAGES,)),
    "t1000": (fastkd.scores.t1000, (TEACHER,)),
    "crop_patches": (lambda x, at: fastkd.crop_patches(x, at, 8), (IMAGES, OFFSETS)),
    "select_clean": (fastkd.select_clean, (LOSSES,)),
    "TwoGaussianMixture": (_fit_and_predict, (LOSSES,)),
    "AliasTable.sample": (lambda u: fastkd.AliasTable(u, iqpr=5.0, seed=1).sample(20), (LOSSES,)),
    "AliasTable.sample_at": (lambda _: TABLE.sample_at(1, 2, 20, 3), (LOSSES,)),
    "AliasTable.update": (_update, (LOSSES,)),
    "AliasTable.from_weights": (lambda w: fastkd.AliasTable.from_weights(w, seed=1).probabilities(), (LOSSES,)),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_eager(name: str) -> None:
    function, arguments = CASES[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments)
    ours, expected = pytree.tree_leaves(compiled), pytree.tree_leaves(function(*arguments))
    assert len(ours) == len(expected) > 0
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_random_places_compile() -> None:
    """They take the generator of the compiled program, so they are held against a crop at the places they report."""
    torch._dynamo.reset()
    draw = torch.compile(lambda x: fastkd.random_patches(x, 8, 3), fullgraph=True, backend="aot_eager")
    patches, offsets = draw(IMAGES)
    assert torch.equal(patches, fastkd.crop_patches(IMAGES, offsets, 8))
    augment = torch.compile(
        lambda x: fastkd.random_crop_flip(x, 0, flip_probability=0.0), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(augment(BYTES), BYTES.float() / 255)
    table = fastkd.AliasTable(torch.zeros(2), 1.0, seed=1)
    draw_batch = torch.compile(
        lambda x: fastkd.draw_batch(table, x, 20, padding=0, flip_probability=0.0), fullgraph=True, backend="aot_eager"
    )
    for start in (0, 20):  # the table's own stream goes on
        batch, indices = draw_batch(BYTES)
        assert torch.equal(indices, table.sample_at(1, start, 20))
        torch.testing.assert_close(batch, BYTES[indices].float() / 255)


@pytest.mark.parametrize("name", ["kl_div", "sparse_kl_div", "crop", "logit_stats", "relation_loss", "channel_moments"])
def test_compiled_autograd(name: str) -> None:
    """The backward graph of an eager forward, compiled when it runs."""

    def gradient() -> Tensor:
        x = (IMAGES if name in ("crop", "channel_moments") else STUDENT).clone().requires_grad_()
        if name == "kl_div":
            y: Tensor = F.kl_div(x, TEACHER)
        elif name == "sparse_kl_div":
            y = F.sparse_kl_div(x, INDICES, LOG_PROBS)
        elif name == "relation_loss":
            y = F.relation_loss(x, TEACHER)
        elif name == "channel_moments":
            y = fastkd.channel_moments(x).var
        else:
            y = fastkd.crop_patches(x, OFFSETS, 8) if name == "crop" else fastkd.logit_stats(x).entropy
        y.square().sum().backward()
        assert x.grad is not None
        return x.grad

    expected = gradient()
    torch._dynamo.reset()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        torch.testing.assert_close(gradient(), expected)
