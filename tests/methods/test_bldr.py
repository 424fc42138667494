"""BLDR: its losses against independent formulas, the correction of labels, the weights of samples, its network."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from noisy_cases import BATCH, ITEMS, Noisy, make
from torch import Tensor
from training_cases import CLASSES, evaluated, fit, make_settings, small

from fastkd.methods import BLDR
from fastkd.methods.noisy.over_parameters import corrected_losses
from fastkd.methods.noisy.two_heads import SelfDistilled
from fastkd.models.resnet import resnet

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread", "no_figures")]


def bldr(seed: int = 0, **options: Any) -> BLDR:
    procedure = make("bldr", seed, **options)
    assert isinstance(procedure, BLDR)
    return procedure


# ---- terms ---------------------------------------------------------------------------------------------


def one_sample(z: Tensor, label: int, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As the authors' code has it: cross-entropy, squared error and the corrected prediction of one sample."""
    p = z.exp() / z.exp().sum()
    y = torch.eye(len(z), dtype=z.dtype)[label]
    a = torch.clamp(u**2 * y, 0, 1 - 1e-4)
    b = torch.clamp(v**2 * (1 - y), 0, 1 - 1e-4)
    q = torch.clamp(p + a - b.detach(), min=1e-4)
    q = torch.clamp(q / q.sum(), 1e-4, 1.0)
    hard = torch.eye(len(z), dtype=z.dtype)[int(z.argmax())]
    return -torch.log(q[label]), ((hard + a.detach() - b - y) ** 2).sum(), q


@pytest.mark.parametrize("weighted", [False, True])
def test_corrected_losses(weighted: bool) -> None:
    """Values, and gradients in the logits, in u, which learns from the cross-entropy, and v, which learns from the error."""
    torch.manual_seed(0)
    z = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    u = (0.7 * torch.rand(6, 1, dtype=torch.float64)).requires_grad_()
    v = (0.7 * torch.rand(6, 5, dtype=torch.float64)).requires_grad_()
    target, weight = torch.randint(5, (6,)), torch.rand(6, dtype=torch.float64)
    ours = corrected_losses(z, target, u, v, weight if weighted else None)
    parts = [one_sample(z[i], int(target[i]), u[i], v[i]) for i in range(6)]
    rows, errors, predictions = (torch.stack(part) for part in zip(*parts, strict=True))
    average = predictions.mean(0)
    theirs = ((rows * weight if weighted else rows).mean(), errors.sum() / 6, -(average.log() / 5).sum())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
        for x, y in zip(
            *(torch.autograd.grad(t, (z, u, v), retain_graph=True, allow_unused=True) for t in (a, b)), strict=True
        ):
            zero = torch.zeros(())
            torch.testing.assert_close(zero if x is None else x, zero if y is None else y)


def test_u_and_v_move_by_gradient_descent() -> None:
    """Rows of the batch by their rates, others not at all."""
    procedure = bldr()
    before = {name: procedure.known[name].clone() for name in "uv"}
    index, target = torch.tensor([4, 9]), torch.tensor([1, 3])
    rows = procedure.correction.rows(index)
    z = torch.randn(2, CLASSES)

    def loss(u: Tensor, v: Tensor) -> Tensor:
        cross_entropy, squared, _ = corrected_losses(z, target, 0.3 + u, 0.5 + v)
        return cross_entropy + 3 * squared

    procedure.correction.step(index, rows, loss(*rows), batches_per_step=4)
    for name, rate, gradient in zip("uv", (10.0, 10.0), torch.autograd.grad(loss(*rows), rows), strict=True):
        expected = before[name].clone()
        expected[index] -= rate / 4 * gradient
        torch.testing.assert_close(procedure.known[name], expected)
        assert not torch.equal(expected, before[name])


def test_losses_of_an_iteration() -> None:
    """All of it, and its gradient in all weights, u and v, as the paper and the authors' code have it."""
    procedure = bldr(agreement=0.3, hint=1e-3, ratio=0.4).double()
    network, batch = procedure.student, Noisy().batch(torch.arange(10, 10 + BATCH))
    target, index = batch.target, batch.index
    assert target is not None
    assert index is not None
    with torch.no_grad():
        procedure.known["weight"].uniform_()
        procedure.known["u"].uniform_(0.1, 0.5)
        procedure.known["v"].uniform_(0.1, 0.5)
    views = [view.double() for view in (batch.images, *batch.views)]
    twin = copy.deepcopy(procedure)
    u, v = (twin.known[name][index].requires_grad_() for name in "uv")
    weight = twin.known["weight"][index]
    heads = twin.student(torch.cat(views))
    n = BATCH

    def of_positive(z: Tensor) -> Tensor:
        rows, errors, predictions = zip(*(one_sample(z[i], int(target[i]), u[i], v[i]) for i in range(n)), strict=True)
        average = torch.stack(predictions).mean(0)
        loss = (weight * torch.stack(rows)).mean() + 50 * 0.4**2 * torch.stack(errors).sum() / n
        return loss - 0.1 * (average.log() / CLASSES).sum() + 0.9 * of_views(z)

    def of_views(z: Tensor) -> Tensor:
        return F.kl_div(z[n:].log_softmax(1), z[:n].softmax(1).detach(), reduction="batchmean")

    def of_negative(z: Tensor) -> Tensor:
        p = z[:n].softmax(1)
        left = torch.ones_like(p).scatter_(1, target[:, None], 0).scatter_(1, p.argmax(1, keepdim=True), 0)
        loss = -(weight * (left * torch.log(1 - p)).sum(1)).mean()
        return loss - 0.1 * (p.mean(0).log() / CLASSES).sum() + 0.9 * of_views(z)

    both = (((heads.positive + heads.negative) / 2)[:n] / 3).softmax(1).detach()
    last = heads.latents[:n].detach()
    loss = of_negative(heads.negative) + of_positive(heads.positive)
    for z, found in zip(heads.middle, heads.middle_latents, strict=True):
        response = -9 * (both * (z[:n] / 3).log_softmax(1)).sum(1).mean()
        different = (found[:n] - last) ** 2 * ((found[:n] > 0) | (last > 0))
        loss = loss + of_positive(z) + 0.1 * response + 1e-3 * different.sum()
    p, q = heads.positive[:n].log_softmax(1), heads.negative[:n].log_softmax(1)
    loss = loss + 0.3 * (p.exp() * (p - q)).sum(1).mean()

    found_loss: list[Tensor] = []

    class Step:
        batches_per_step, epoch, epochs = 1, 0, 10

        def update(self, loss: Tensor) -> None:
            found_loss.append(loss)
            self.gradients = torch.autograd.grad(loss, list(network.parameters()))

    step = Step()
    before = {name: procedure.known[name].clone() for name in "uv"}
    terms = procedure.iteration(
        type(batch)(views[0], target, index, (views[1],)),  # type: ignore[arg-type]
        step,  # type: ignore[arg-type]
    )
    torch.testing.assert_close(found_loss[0], loss)
    torch.testing.assert_close(sum(value for name, value in terms.items() if name.endswith("_loss")), loss)
    expected = torch.autograd.grad(loss, [*twin.student.parameters(), u, v])
    for ours, theirs in zip(step.gradients, expected, strict=False):
        torch.testing.assert_close(ours, theirs)
    for name, gradient in zip("uv", expected[-2:], strict=True):
        torch.testing.assert_close(procedure.known[name][index], before[name][index] - 10 * gradient)
    given = heads.negative[:n].softmax(1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(procedure.known["probability"][index], given.detach())


# ---- weights of samples --------------------------------------------------------------------------------


def test_weights_of_samples() -> None:
    """From the lowest to the highest probability, and the share of those below 0.3."""
    procedure = bldr()
    found = torch.rand(ITEMS, generator=torch.Generator().manual_seed(3))
    procedure.known["probability"].copy_(found)
    procedure.reweight()
    torch.testing.assert_close(procedure.known["weight"], (found - found.min()) / (found.max() - found.min()))
    assert procedure.ratio.item() == pytest.approx((found < 0.3).sum().item() / ITEMS)


def test_samples_that_were_not_seen_say_nothing() -> None:
    """They count, as in the warm-up, and the others as without them."""
    procedure = bldr()
    found = 0.05 + 0.2 * torch.rand(ITEMS, generator=torch.Generator().manual_seed(3))
    procedure.known.write(torch.arange(1, ITEMS), probability=found[1:])
    procedure.reweight()
    least, most = found[1:].min(), found[1:].max()
    torch.testing.assert_close(procedure.known["weight"][1:], (found[1:] - least) / (most - least))
    assert procedure.known["weight"][0].item() == 1.0
    assert procedure.ratio.item() == 1.0
    fresh = bldr()
    fresh.reweight()
    assert fresh.known["weight"].eq(1).all()


def test_samples_that_are_all_alike_all_count() -> None:
    procedure = bldr()
    procedure.known["probability"].fill_(0.25)
    procedure.reweight()
    assert procedure.known["weight"].eq(1).all()
    assert procedure.ratio.item() == 1.0


def test_weights_begin_after_the_warmup() -> None:
    trainer = fit(bldr(warmup_share=0.5), Noisy(), make_settings(epochs=4), evaluate=evaluated)
    weights = [line["weight"] for line in trainer._state.history]  # type: ignore[union-attr]
    assert weights[:2] == [1.0, 1.0]
    assert max(weights[2:]) < 1.0


# ---- the network ---------------------------------------------------------------------------------------


def test_two_heads_and_a_middle() -> None:
    """Of a network of four stages: three classifiers in the middle, whose latent vectors are as long as the last ones."""
    network = resnet(8, in_channels=1, num_classes=CLASSES, seed=0)
    images = Noisy().images[:5]
    whole = SelfDistilled(network, images).eval()
    heads = whole(images)
    torch.testing.assert_close(heads.positive, network.eval()(images))
    assert len(heads.middle) == 2
    assert {z.shape for z in (heads.negative, *heads.middle)} == {(5, CLASSES)}
    assert {x.shape for x in heads.middle_latents} == {heads.latents.shape}
    assert not torch.equal(heads.positive, heads.negative)
    both = (heads.positive.softmax(1) + heads.negative.softmax(1)) / 2
    torch.testing.assert_close(whole.heads(images).softmax(1), both)
    assert sum(p.numel() for p in whole.heads.parameters()) < sum(p.numel() for p in whole.parameters())


def test_without_a_middle_any_network_does() -> None:
    procedure = bldr(network=small, middle=False)
    trainer = fit(procedure, Noisy(), make_settings(epochs=2), evaluate=evaluated)
    assert set(trainer.deployed(Noisy().images[:2]).shape) == {2, CLASSES}
    assert "middle_loss" not in trainer._state.history[0]  # type: ignore[union-attr]


def test_the_deployed_average_is_that_of_both_heads() -> None:
    trainer = fit(bldr(), Noisy(), make_settings(epochs=2, ema=0.9), evaluate=evaluated)
    assert trainer._state is not None
    network = trainer._state.network()
    images = Noisy().images[:7]
    with torch.no_grad():
        heads = network(images)
        both = (heads.positive.softmax(1) + heads.negative.softmax(1)) / 2
        torch.testing.assert_close(trainer.deployed(images).exp(), both)
        found = trainer.procedure.probabilities(network, images, torch.arange(7))  # type: ignore[operator]
    torch.testing.assert_close(found, heads.negative.softmax(1))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"warmup_share": 1.5}, "warmup_share is 1.5, must be"),
        ({"doubt": -0.1}, "doubt is -0.1"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"learning_rate_v": -1.0}, "learning_rate_v is -1.0"),
        ({"hint": float("nan")}, "hint is nan"),
        ({"middle": 2}, "middle is int, must be True or False"),
        ({"network": small}, "layers are not known"),
    ],
)
def test_wrong_options(options: dict[str, Any], error: str) -> None:
    with pytest.raises((ValueError, TypeError), match=error):
        bldr(**options)
