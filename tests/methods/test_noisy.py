"""What the methods for noisy labels have in common: terms, state of samples, what they refuse, resume, processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from noisy_cases import BATCH, ITEMS, Caught, Noisy, caught, in_two, make, whole_and_in_parts
from test_methods_registry import NoWaiting
from torch import Tensor
from training_cases import CLASSES, Linear, differences, evaluated, fit, make_settings, small_resnet
from training_processes import start_ranks

from fastkd.data import Batch
from fastkd.methods import Baseline, NoisyLabels, Objective, Procedure, registry
from fastkd.methods.noisy import terms
from fastkd.methods.noisy.samples import Samples
from fastkd.training import process_group

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread", "no_figures")]
METHODS = [name for name in registry.names() if registry.find(name).family == "noisy labels"]


def logits(*shape: int, scale: float = 2.0) -> Tensor:
    return (scale * torch.randn(*shape, dtype=torch.float64)).requires_grad_()


def same(ours: Tensor, theirs: Tensor, *inputs: Tensor) -> None:
    """Values and gradients."""
    torch.testing.assert_close(ours, theirs)
    for pair in zip(*(torch.autograd.grad(x, inputs, retain_graph=True) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(*pair)


# ---- terms ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("correct", [True, False])
def test_negative_learning(correct: bool) -> None:
    """Sample by sample and class by class."""
    torch.manual_seed(0)
    z, target, weight = logits(7, 5), torch.randint(5, (7,)), torch.rand(7, dtype=torch.float64)
    rows = []
    for i in range(7):
        p = z[i].exp() / z[i].exp().sum()
        left_out = {int(target[i]), int(z[i].argmax()) if correct else -1}
        rows.append(-weight[i] * sum(torch.log(1 - p[k]) for k in range(5) if k not in left_out))
    same(terms.negative_learning(z, target, weight, correct=correct), torch.stack(rows).mean(), z)  # type: ignore[arg-type]


def test_negative_learning_of_a_sure_prediction_is_finite() -> None:
    z = torch.tensor([[0.0, 200.0, -200.0]], requires_grad=True)
    loss = terms.negative_learning(z, torch.tensor([0]))
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss.item() == pytest.approx(0.0)
    assert gradient.isfinite().all()


def test_balance_is_lowest_where_all_classes_are_alike() -> None:
    torch.manual_seed(0)
    z = logits(6, 4)
    p = z.softmax(1)
    same(terms.balance(p), -sum(p[:, k].mean().log() for k in range(4)) / 4, z)  # type: ignore[arg-type]
    assert terms.balance(torch.eye(4)).item() == pytest.approx(math.log(4))


def test_consistency() -> None:
    torch.manual_seed(0)
    z, other = logits(6, 4), logits(6, 4)
    theirs = F.kl_div(other.log_softmax(1), z.detach().softmax(1), reduction="batchmean")
    ours = terms.consistency(z, other)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(x, other)[0] for x in (ours, theirs)))
    assert not torch.autograd.grad(terms.consistency(z, other), z, allow_unused=True)[0]


def test_soft_label_loss_of_labels_with_zeros() -> None:
    torch.manual_seed(0)
    z = logits(6, 4)
    labels = torch.rand(6, 4, dtype=torch.float64).softmax(1)
    labels[0] = torch.eye(4, dtype=torch.float64)[2]
    same(terms.soft_label_loss(z, labels).sum(), -(labels * z.log_softmax(1)).sum(), z)


def test_sharpened_and_weighted_mean() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    torch.testing.assert_close(terms.sharpened(p, 0.5), p**2 / (0.25 + 0.09 + 0.04))
    rows, weight = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 0.0, 0.5])
    assert terms.weighted_mean(rows, weight).item() == pytest.approx(2.0)
    assert terms.weighted_mean(rows, torch.zeros(3)).item() == 0.0


def test_small_alphas_are_refused() -> None:
    """With them torch's Beta draws halves, not ends."""
    assert terms.check_mixing("alpha", 0) == 0.0
    assert terms.check_mixing("alpha", 0.01) == 0.01
    with pytest.raises(ValueError, match=r"alpha is 0.001, must be 0 \(images are not mixed\) or 0.01 or more"):
        make("dividemix", alpha=1e-3)


def test_mixup() -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(6, 1, 2, 2), torch.eye(6)
    mixed = terms.mixup(images, labels, 1.0)
    assert 0.5 <= mixed.share < 1.0
    for i, j in enumerate(mixed.order.tolist()):
        torch.testing.assert_close(mixed.images[i], mixed.share * images[i] + (1 - mixed.share) * images[j])
        torch.testing.assert_close(mixed.labels[i], mixed.share * labels[i] + (1 - mixed.share) * labels[j])
    assert torch.equal(terms.mixup(images, labels, 0.0).images, images)


# ---- state of samples ----------------------------------------------------------------------------------


def test_samples_are_written_by_index() -> None:
    samples = Samples(5, a=torch.ones(()), b=torch.tensor([1.0, 2.0]))
    samples.write(torch.tensor([3, 0]), a=torch.tensor([7.0, 8.0]), b=torch.tensor([[1.0, 1.0], [3.0, 3.0]]))
    assert samples["a"].tolist() == [8, 1, 1, 7, 1]
    assert samples["b"].tolist() == [[3, 3], [1, 2], [1, 2], [1, 1], [1, 2]]
    samples.share()
    assert samples["a"].tolist() == [8, 1, 1, 7, 1]


def share_in_two(rank: int, folder: Path) -> None:
    with process_group("cpu"):
        samples = Samples(5, a=torch.zeros(()), b=torch.zeros(2))
        index = torch.tensor([[0, 2], [3, 2]][rank])
        samples.write(index, a=torch.tensor([1.0, 2.0]) + 10 * rank, b=torch.full((2, 2), float(rank)))
        samples.share()
        samples.share()  # nothing has been written since
        assert not samples.written.any()
        torch.save([samples["a"], samples["b"]], folder / f"{rank}.pt")
        assert dist.get_world_size() == 2


@pytest.mark.forks
def test_samples_of_two_processes(tmp_path: Path) -> None:
    """Rows that one has written, that both have, and that nobody has."""
    start_ranks(share_in_two, tmp_path)
    for rank in range(2):
        a, b = torch.load(tmp_path / f"{rank}.pt")
        assert a.tolist() == [1, 0, 7, 11, 0]
        assert b.tolist() == [[0, 0], [0, 0], [0.5, 0.5], [1, 1], [0, 0]]


def test_a_sample_that_is_not_finite_is_shared(tmp_path: Path) -> None:
    """By the process that has it: one that has not would make it of all others."""
    start_ranks(share_infinite, tmp_path)
    for rank in range(2):
        rows = torch.load(tmp_path / f"rows{rank}.pt", weights_only=True)
        assert rows.tolist() == [1.0, 2.0, torch.inf]


def share_infinite(rank: int, folder: Path) -> None:
    with process_group("cpu"):
        samples = Samples(3, loss=torch.tensor(torch.inf))
        samples.write(torch.tensor([rank]), loss=torch.tensor([1.0 + rank]))
        samples.share()
        torch.save(samples["loss"], folder / f"rows{rank}.pt")


# ---- all methods ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_killed_and_gone_on_with_equals_not_killed(method: str, tmp_path: Path) -> None:
    state = whole_and_in_parts(method, tmp_path)
    known = state["networks"].get("known")
    assert known is None or known["written"].shape == (ITEMS,)


@pytest.mark.forks
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_stay_equal(method: str, tmp_path: Path) -> None:
    """Weights, and after each epoch what is known of every sample."""
    start_ranks(in_two, tmp_path, method, make_settings(epochs=2, learning_rate=0.02), {})
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    own = ("running_", "num_batches")  # batch norm's
    shared = [{k: v for k, v in state.items() if not any(word in k for word in own)} for state in (first, second)]
    assert not differences(*shared)


@pytest.mark.parametrize("method", METHODS)
def test_in_bfloat16(method: str) -> None:
    trainer = fit(make(method), Noisy(), make_settings(epochs=2, amp="bf16"), evaluate=evaluated)
    history = trainer._state.history  # type: ignore[union-attr]
    assert all(math.isfinite(value) for value in history[-1].values())


@pytest.mark.parametrize("method", METHODS)
def test_probabilities_of_samples(method: str) -> None:
    """In evaluation mode they are of each sample by itself, and sum to 1."""
    procedure = make(method).eval()
    batch = Noisy().batch(torch.arange(ITEMS))
    assert batch.index is not None
    with torch.no_grad():
        whole = procedure.probabilities(procedure.network(), batch.images, batch.index)
        part = procedure.probabilities(procedure.network(), batch.images[7:9], batch.index[7:9])
    torch.testing.assert_close(whole.sum(1), torch.ones(ITEMS))
    torch.testing.assert_close(part, whole[7:9])
    assert whole.shape == (ITEMS, CLASSES)


@pytest.mark.parametrize(("method", "name"), [("bldr", "probabilities"), ("dividemix", "losses")])
def test_pictures(method: str, name: str) -> None:
    """Before the training, when all samples are alike, and after it."""
    procedure = make(method)
    step = Caught(procedure)
    assert set(procedure.pictures(step)) == {name}  # type: ignore[arg-type]
    fit(procedure, Noisy(), make_settings(epochs=2))
    (axes,) = procedure.pictures(step)[name].axes  # type: ignore[arg-type]
    assert sum(bar.get_height() > 0 for bar in axes.patches) > 5  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_is_of_its_options(method: str, tmp_path: Path) -> None:
    options = registry.find(method).options().values()
    option = next(o for o in options if type(o.default) in (int, float) and o.default)
    change = {option.name: 2 if isinstance(option.default, int) else 0.9 * option.default}
    settings = make_settings(epochs=2)
    fit(make(method), Noisy(), settings, tmp_path, stop_at=8)
    other = make(method, **change)
    with pytest.raises(ValueError, match="procedure"):
        fit(other, Noisy(), settings, tmp_path, resume=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("epoch", [0, 2, 3, 9])
def test_nothing_waits_for_the_device(method: str, epoch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels on a CPU are looked at, and the share of a mixture is drawn there."""
    checked = NoisyLabels.checked(make(method), next(Noisy().epoch(0)))
    monkeypatch.setattr(NoisyLabels, "checked", lambda *_: checked)
    monkeypatch.setattr("fastkd._checks.readable", lambda tensor: False)
    shares = {"alpha", "late_alpha", "mixup_alpha"} & set(registry.find(method).options())
    procedure = make(method, **dict.fromkeys(shares, 0.0))
    step = Caught(procedure, epoch=epoch)
    with NoWaiting():
        procedure.iteration(next(Noisy().epoch(0)), step)
        procedure.after_epoch(step)


@pytest.mark.parametrize("method", METHODS)
def test_networks_that_are_compiled(method: str) -> None:
    """They learn the same."""
    states = []
    for compiled in (False, True):
        procedure = make(method)
        torch._dynamo.reset()
        for network in procedure.networks().values() if compiled else ():
            network.compile(backend="aot_eager", fullgraph=True)
        fit(procedure, Noisy(), make_settings(epochs=2))
        states.append(procedure.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value)


LEARNING: dict[str, dict[str, Any]] = {
    "dividemix": {"warmup_share": 0.15, "lambda_u": 5.0, "ramp_share": 0.1},
    "pes": {"warmup_share": 0.1, "refine_share": 0.05, "ramp_share": 0.1},
}


def learnt(procedure: Procedure) -> float:
    """Accuracy on other images, of a training in which 40 % of the labels are wrong."""
    trainer = fit(procedure, Noisy(480, size=24, noise=1.2), make_settings(epochs=15, learning_rate=0.02))
    test = Noisy(512, noise=1.2, seed=6)
    with torch.no_grad():
        return (trainer.deployed.eval()(test.images).argmax(1) == test.truth).double().mean().item()


@pytest.mark.parametrize("method", LEARNING)
def test_it_learns_on_wrong_labels(method: str) -> None:
    """Well above cross-entropy, which learns them by heart."""
    plain = learnt(Objective(Baseline(), small_resnet(0), None))
    assert 0.6 < plain < 0.85
    assert learnt(make(method, items=480, **LEARNING[method])) > plain + 0.12


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"target": None}, "target is None"),
        ({"index": None}, "index is None"),
        (
            {"target": torch.full((BATCH,), CLASSES)},
            f"target holds {CLASSES} to {CLASSES}, must be in \\[0, {CLASSES}\\)",
        ),
        ({"target": torch.full((BATCH,), -100)}, "target holds -100 to -100"),
        ({"target": torch.zeros(BATCH)}, "target is torch.float32"),
        ({"index": torch.full((BATCH,), ITEMS)}, f"index holds {ITEMS} to {ITEMS}, must be in \\[0, {ITEMS}\\)"),
    ],
)
def test_wrong_batches(method: str, change: dict[str, Any], error: str) -> None:
    good = Noisy().batch(torch.arange(BATCH))
    batch = Batch(**{"images": good.images, "target": good.target, "index": good.index, "views": good.views, **change})
    procedure = make(method)
    with pytest.raises(ValueError, match=error):
        procedure.iteration(batch, Caught(procedure))


def test_too_few_views() -> None:
    batch = Noisy(views=1).batch(torch.arange(BATCH))
    with pytest.raises(
        ValueError, match=r"has 1 view of its images, must have 2 for BLDR, as ImageBatches\(\.\.\., views=2"
    ):
        caught(make("bldr"), batch)
    with pytest.raises(TypeError, match="batch is NoneType, must be a Batch for SOP"):
        caught(make("sop"), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS)
def test_one_batch_of_one_class(method: str) -> None:
    """Classes without samples are no reason to fail."""
    good = Noisy()
    good.target = torch.full((ITEMS,), 2)
    trainer = fit(make(method), good, make_settings(epochs=3), evaluate=evaluated)
    assert all(math.isfinite(value) for value in trainer._state.history[-1].values())  # type: ignore[union-attr]


@pytest.mark.forks
@pytest.mark.parametrize("method", ["sop", "cores"])
def test_two_processes_are_as_one_with_batches_twice_as_large(method: str, tmp_path: Path) -> None:
    """Where nothing is computed of a whole batch: gradients are means over the processes, and u and v move by as much."""
    options: dict[str, Any] = {
        "consistency": 0.0,
        **({"balance": 0.0} if method == "sop" else {"sieve_share": 1.0, "second_share": 1.0}),
    }
    settings = make_settings(epochs=3, learning_rate=0.02)
    start_ranks(in_two, tmp_path, method, settings, {"network": Linear, **options})
    one = make(method, network=Linear, **options)
    fit(one, Noisy(size=2 * BATCH), settings)
    two = torch.load(tmp_path / "rank0.pt", weights_only=True)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-7)
