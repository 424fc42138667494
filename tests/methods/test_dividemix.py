"""DivideMix: losses and labels against independent formulas, mixtures against loops over others', and samples of all kinds."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from mixmatch_cases import cut_mixmatch, mixing, sharp
from noisy_cases import BATCH, ITEMS, Caught, Noisy, assert_gradients, make
from sklearn.mixture import GaussianMixture
from test_procedures import fit
from torch import Tensor, nn
from training_cases import CLASSES, evaluated, make_settings, small_resnet

from fastkd.data import Batch
from fastkd.methods import DivideMix
from fastkd.methods.noisy.dividemix import negative_entropy
from fastkd.methods.noisy.ensemble import Ensemble
from fastkd.methods.registry import Given, create_procedure, find
from fastkd.selection import TwoGaussianMixture

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread", "no_figures")]


def dividemix(seed: int = 0, **options: Any) -> DivideMix:
    made = make("dividemix", seed, **options)
    assert isinstance(made, DivideMix)
    return made


def first_batch(dtype: torch.dtype = torch.float64) -> Batch:
    batch = next(Noisy().epoch(0))
    return Batch(batch.images.to(dtype), batch.target, batch.index, tuple(view.to(dtype) for view in batch.views))


# ---- one iteration -------------------------------------------------------------------------------------


def test_labels() -> None:
    """Co-refinement and co-guessing, rows cut out."""
    torch.manual_seed(0)
    own, other = (torch.randn(8, CLASSES, dtype=torch.float64).softmax(1) for _ in range(2))
    target, clean = torch.arange(8) % CLASSES, torch.tensor([0.9, 0.1, 0.51, 0.5, 1.0, 0.0, 0.7, 0.3]).double()
    labels, labelled = dividemix(temperature=0.3).labels(target, clean, own, (own + other) / 2)
    rows = clean > 0.5
    assert labelled.tolist() == rows.tolist()
    y, w = F.one_hot(target, CLASSES), clean[:, None]
    torch.testing.assert_close(labels[rows], sharp(w * y + (1 - w) * own, 0.3)[rows])
    torch.testing.assert_close(labels[~rows], sharp((own + other) / 2, 0.3)[~rows])


@pytest.mark.parametrize("kind", ["some", "all", "none"])
def test_the_losses_of_both_networks(kind: str) -> None:
    """And their gradients, from the views on, as the authors' code has them, each network by the other's selection."""
    procedure = dividemix(lambda_u=30.0, alpha=2.0, prior=0.7, temperature=0.4, threshold=0.6).double()
    low, high = {"some": (0.2, 1.0), "all": (0.7, 1.0), "none": (0.0, 0.5)}[kind]
    torch.manual_seed(0)
    procedure.known["clean"].uniform_(low, high)
    batch = first_batch()
    step = Caught(procedure, epoch=3, iteration=2)  # of 8 epochs: 2 of warm-up, 4 of ramp
    twin = copy.deepcopy(procedure)
    torch.manual_seed(9)
    found = procedure.iteration(batch, step)  # type: ignore[arg-type]
    assert step.parts == [("student",), ("peer",)]

    views, networks = [batch.images, *batch.views], [twin.student, twin.peer]
    y = F.one_hot(batch.target, CLASSES).double()
    with torch.no_grad():  # all views at once, as their batch norm sees them
        logits = [network(torch.cat(views)).chunk(2) for network in networks]
    p = [(a.softmax(1) + b.softmax(1)) / 2 for a, b in logits]
    weight = 30.0 * (1 + 2 / 4) / 4
    draws = two_mixings(9, 2 * BATCH, 2.0)
    losses = []
    for i, network in enumerate(networks):
        w = twin.known["clean"][batch.index, 1 - i][:, None]
        labelled = w[:, 0] > 0.6
        assert {"all": labelled.all(), "none": not labelled.any(), "some": len(labelled.unique()) == 2}[kind]
        labels = torch.empty_like(y)
        labels[labelled] = sharp(w * y + (1 - w) * p[i], 0.4)[labelled]
        labels[~labelled] = sharp((p[0] + p[1]) / 2, 0.4)[~labelled]
        mixed, log_p, mixed_labels, squared = cut_mixmatch(network, views, labels, labelled, *draws[i])
        mean = mixed.softmax(1).mean(0)
        penalty = (0.25 * (0.25 / mean).log()).sum()
        loss = 0.7 * penalty
        if kind != "none":
            loss = loss - (mixed_labels * log_p).sum(1).mean()
        if kind != "all":
            loss = loss + weight * squared
        torch.testing.assert_close(step.losses[i], loss)
        assert_gradients(step.gradients[i], loss, network)
        losses.append(loss.detach())
    torch.testing.assert_close(found["loss"], torch.stack(losses).mean())
    terms = ("labelled_loss", "unlabelled_loss", "prior_loss")
    torch.testing.assert_close(torch.stack([found[name] for name in terms]).sum(), found["loss"])


def two_mixings(seed: int, rows: int, alpha: float) -> list[tuple[Tensor, float]]:
    """Of both networks, one after the other."""
    first = mixing(seed, rows, alpha)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    torch.set_rng_state(state)
    order = torch.randperm(rows)
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    return [first, (order, max(share, 1 - share))]


def test_losses_are_those_of_the_guesses() -> None:
    """The mean over both views, of each network, before its step; of these samples alone."""
    procedure, batch = dividemix().double(), first_batch()
    twin = copy.deepcopy(procedure)
    procedure.iteration(batch, Caught(procedure, epoch=2))  # type: ignore[arg-type]
    for i, network in enumerate((twin.student, twin.peer)):
        logits = network(torch.cat([batch.images, *batch.views])).chunk(2)
        theirs = sum(F.cross_entropy(view, batch.target, reduction="none") for view in logits) / 2
        torch.testing.assert_close(procedure.known["loss"][batch.index, i], theirs.detach())
    others = torch.ones(ITEMS).index_fill(0, batch.index, 0).bool()
    assert procedure.known["loss"][others].isinf().all()
    assert (procedure.known["target"][others] == CLASSES).all()
    assert torch.equal(procedure.known["target"][batch.index], batch.target.double())


@pytest.mark.parametrize("penalty", [0.0, 1.5])
def test_the_warm_up(penalty: float) -> None:
    procedure, batch = dividemix(penalty=penalty).double(), first_batch()
    twin, step = copy.deepcopy(procedure), Caught(procedure, epoch=1)
    procedure.iteration(batch, step)  # type: ignore[arg-type]
    assert step.parts == [("student",), ("peer",)]
    for i, network in enumerate((twin.student, twin.peer)):
        logits = network(batch.images)
        rows = F.cross_entropy(logits, batch.target, reduction="none")
        loss = rows.mean() + penalty * (logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
        torch.testing.assert_close(step.losses[i], loss)
        torch.testing.assert_close(procedure.known["loss"][batch.index, i], rows.detach())
        assert_gradients(step.gradients[i], loss, network)


def test_the_penalty_is_lowest_for_a_uniform_prediction() -> None:
    assert negative_entropy(torch.zeros(3, 8)).item() == pytest.approx(-math.log(8))
    assert negative_entropy(torch.tensor([[500.0, 0.0]])).item() == 0.0


def test_each_network_runs_once_for_the_guesses_of_both() -> None:
    procedure, seen = dividemix(), []
    for name in ("student", "peer"):
        network = getattr(procedure, name)
        network.register_forward_hook(lambda _, i, o, name=name: seen.append((name, len(i[0]), o.requires_grad)))
    procedure.iteration(first_batch(torch.float32), Caught(procedure, epoch=2))  # type: ignore[arg-type]
    guesses = [(name, 2 * BATCH, False) for name in ("student", "peer")]
    assert seen == [*guesses, *((name, rows, True) for name, rows, _ in guesses)]


# ---- mixtures ------------------------------------------------------------------------------------------


def with_losses(items: int = 400, *, hard: float = 0.0, **options: Any) -> DivideMix:
    """Of two kinds of samples, which lie apart by other amounts in each network; of one class all are higher by ``hard``."""
    procedure = dividemix(items=items, **options)
    generator = np.random.default_rng(0)
    target = torch.from_numpy(generator.integers(0, CLASSES, items))
    wrong = torch.from_numpy(generator.random(items) < 0.35)
    base = torch.from_numpy(generator.gamma(2.0, 0.25, (items, 2)))
    higher = hard * (target[:, None] == CLASSES - 1)
    procedure.known["loss"].copy_(torch.tensor([1.0, 2.0]) * (base + 2.5 * wrong[:, None] + higher))
    procedure.known["target"].copy_(target)
    return procedure


def problems(procedure: DivideMix) -> list[tuple[Tensor, int]]:
    """Rows and network of each mixture."""
    target = procedure.known["target"]
    rows = [target == k for k in range(CLASSES)] if procedure.by_class else [torch.ones_like(target).bool()]
    return [(chosen.nonzero()[:, 0], network) for network in range(2) for chosen in rows]


@pytest.mark.parametrize("by_class", [False, True])
def test_the_mixtures_are_those_of_a_loop(by_class: bool) -> None:
    """Exactly, over our own for one problem."""
    procedure = with_losses(by_class=by_class)
    procedure.divide()
    for rows, network in problems(procedure):
        losses = procedure.known["loss"][rows, network]
        one = TwoGaussianMixture(normalize=True).fit(losses).predict_proba(losses)[:, 0]
        assert torch.equal(procedure.known["clean"][rows, network], one)


@pytest.mark.parametrize("by_class", [False, True])
def test_the_mixtures_are_those_of_scikit_learn(by_class: bool) -> None:
    procedure = with_losses(by_class=by_class)
    procedure.divide()
    for rows, network in problems(procedure):
        losses = procedure.known["loss"][rows, network].double().numpy()
        column = ((losses - losses.min()) / (losses.max() - losses.min()))[:, None]
        theirs = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=0).fit(column)
        posterior = theirs.predict_proba(column)[:, theirs.means_.argmin()]
        ours = procedure.known["clean"][rows, network].numpy()
        # a random start, and few iterations: a sample in between may go to the other side
        assert ((ours > 0.5) == (posterior > 0.5)).mean() >= 0.98
        assert np.abs(ours - posterior).mean() < 0.01
        assert 0.4 < (ours > 0.5).mean() < 0.9


def test_the_mixtures_of_a_class_are_told_by_its_losses_alone() -> None:
    """Where one class is harder, of all samples its own would not be selected."""
    apart, together = (with_losses(hard=2.0, by_class=by_class) for by_class in (True, False))
    hard = apart.known["target"] == CLASSES - 1
    for procedure in (apart, together):
        procedure.divide()
    shares = [(p.known["clean"][hard] > 0.5).float().mean().item() for p in (apart, together)]
    assert shares[0] > shares[1] + 0.1


@pytest.mark.parametrize("by_class", [False, True])
def test_losses_that_no_mixture_has(by_class: bool) -> None:
    """Equal, few, not finite, of a class without samples: never an error, nor NaN."""
    procedure = with_losses(by_class=by_class)
    known = procedure.known
    known["target"].copy_(torch.where(known["target"] == 2, 1.0, known["target"]))  # no sample of class 2
    known["loss"][5] = torch.nan
    known["loss"][6, 1] = torch.inf
    known["target"][7], known["loss"][7] = CLASSES, torch.inf  # never seen
    procedure.divide()
    assert known["clean"].isfinite().all()
    assert known["clean"][5].tolist() == [0.0, 0.0]
    assert known["clean"][7].tolist() == [0.0, 0.0]
    assert known["clean"][6, 1].item() == 0.0
    assert ((known["clean"] > 0.5).float().mean() > 0.3).all()

    known["loss"].fill_(0.7)
    procedure.divide()
    assert known["clean"].eq(1.0).all()
    known["loss"].fill_(torch.nan)
    procedure.divide()
    assert known["clean"].eq(0.0).all()


def test_a_threshold_above_which_nothing_is() -> None:
    """All samples are unlabelled then, in a training, too."""
    procedure = dividemix(threshold=1.0)
    history = fit(procedure, Noisy(), make_settings(epochs=3))._state.history  # type: ignore[union-attr]
    assert history[-1]["labelled"] == history[-1]["labelled_loss"] == 0.0
    assert history[-1]["unlabelled_loss"] > 0.0


def test_without_a_warm_up_all_labels_are_taken_at_first() -> None:
    procedure = dividemix(warmup_share=0.0)
    history = fit(procedure, Noisy(), make_settings(epochs=2))._state.history  # type: ignore[union-attr]
    assert history[0]["labelled"] == 1.0
    assert 0.0 < history[1]["labelled"] < 1.0


def test_mixtures_by_class_in_a_training() -> None:
    procedure = dividemix(by_class=True)
    history = fit(procedure, Noisy(), make_settings(epochs=3))._state.history  # type: ignore[union-attr]
    clean = procedure.known["clean"].clone()
    assert history[-1]["clean"] == pytest.approx((clean > 0.5).float().mean().item())
    for rows, network in problems(procedure):
        losses = procedure.known["loss"][rows, network]
        one = TwoGaussianMixture(normalize=True).fit(losses).predict_proba(losses)[:, 0]
        assert torch.equal(clean[rows, network], one)


# ---- what is kept --------------------------------------------------------------------------------------


def test_both_networks_are_kept() -> None:
    procedure = dividemix()
    trainer = fit(procedure, Noisy(), make_settings(epochs=3, ema=0.8), evaluate=evaluated)
    kept = trainer.deployed
    assert isinstance(kept, Ensemble)
    assert len(kept.networks) == 2
    images = Noisy().images
    with torch.no_grad():
        plain = (procedure.student(images) + procedure.peer(images)) / 2
        torch.testing.assert_close(procedure.network().eval()(images), plain)
        assert not torch.allclose(kept(images), plain)  # which is the average
        index = torch.arange(ITEMS)
        torch.testing.assert_close(procedure.probabilities(kept, images, index), kept(images).softmax(1))
    assert not torch.allclose(procedure.student(images), procedure.peer(images))


def test_what_is_published() -> None:
    """Numbers of the authors' code, of 300 epochs."""
    ours = {name: option.default for name, option in find("dividemix").options().items()}
    assert ours == {
        "warmup_share": 10 / 300,
        "penalty": 0.0,
        "threshold": 0.5,
        "by_class": False,
        "temperature": 0.5,
        "alpha": 4.0,
        "lambda_u": 25.0,
        "ramp_share": 16 / 300,
        "prior": 1.0,
    }
    assert all(option.help for option in find("dividemix").options().values())
    assert (DivideMix.rule, DivideMix.views, DivideMix.strong_views) == ("mixture", 2, 0)


# ---- what is wrong -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_share": 1.5}, "warmup_share is 1.5, must be"),
        ({"penalty": -1.0}, "penalty is -1.0, must be"),
        ({"threshold": -0.1}, "threshold is -0.1, must be"),
        ({"by_class": 1}, "by_class is int, must be True or False"),
        ({"temperature": 0.0}, "temperature is 0.0, must be positive"),
        ({"alpha": -1.0}, "alpha is -1.0, must be"),
        ({"lambda_u": math.nan}, "lambda_u is nan, must be"),
        ({"ramp_share": 2.0}, "ramp_share is 2.0, must be"),
        ({"prior": "1"}, "prior is"),
        ({"lambda": 1.0}, "lambda"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        dividemix(**options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (None, "make_student is None, must be given for DivideMix"),
        (lambda seed: seed, "make_student(1) is int, must be a torch.nn.Module"),
    ],
)
def test_a_second_network_is_needed(make: Any, message: str) -> None:
    given = Given(small_resnet(0), items=ITEMS, num_classes=CLASSES, make_student=make)
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        create_procedure("dividemix", given)


def test_the_second_network_is_another_one() -> None:
    network: nn.Module = small_resnet(0)
    given = Given(network, items=ITEMS, num_classes=CLASSES, make_student=lambda seed: network)
    with pytest.raises(ValueError, match="parts 'student' and 'peer' share parameters"):
        fit(create_procedure("dividemix", given), Noisy(), make_settings(epochs=1))
