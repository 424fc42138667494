"""Language models in two processes over gloo: DDP, FSDP2, counts over the ranks."""

from __future__ import annotations

from typing import Any

import language_models as cases
import language_processes as work
import pytest
import torch
from torch import Tensor
from training_processes import start_ranks

pytestmark = [pytest.mark.no_kernels, pytest.mark.forks]
for package in ("accelerate", "datasets", "transformers", "trl"):
    pytest.importorskip(package, reason=f'{package} is not installed: pip install "fastkd[language]"')

from language_trainers import Rows, assert_same_training, batch  # noqa: E402

from fastkd.functional import js_div  # noqa: E402
from fastkd.integrations.transformers import distillation_loss  # noqa: E402

CALLS: dict[str, Any] = {
    **{f"heads of TRL, {patched}": (work.sharded_heads_of_trl, (patched,)) for patched in (False, True)},
    **{f"sharded, {apart}": (work.sharded_models, (apart,)) for apart in (False, True)},
    **{
        f"{kind}, {patched}": (work.distilled_by_trl, (kind, patched))
        for kind in ("distillation", "gkd", "gold")
        for patched in (False, True)
    },
    "transformers": (work.trained_by_transformers, ()),
    "accelerate": (work.accelerated, ()),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What each call returns on each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    start_ranks(work.run, folder, CALLS)
    results = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(work.RANKS)]
    return {name: [result[name] for result in results] for name in CALLS}


def assert_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


def test_heads_that_are_sharded(ranks: dict[str, list[Any]]) -> None:
    """Values as TRL has them, and gradients that are the mean over the ranks, where TRL's are of one rank each."""
    (head, teacher), (hidden, given), mask = work.heads_and_hidden()
    truth = js_div(head(hidden), teacher(given), target=torch.where(mask, 0, -100))
    truth.backward()
    theirs, ours = (ranks[f"heads of TRL, {patched}"] for patched in (False, True))
    for their, our in zip(theirs, ours, strict=True):
        for name in ("loss", "entropy", "count"):
            torch.testing.assert_close(our[name], their[name], rtol=1e-5, atol=0.0)
        assert_gradients({"weight": our["weight"], "bias": our["bias"]}, cases.gradients(head))
    torch.testing.assert_close((ours[0]["loss"] + ours[1]["loss"]) / 2, truth.detach())


@pytest.mark.parametrize("apart", [False, True], ids=["head with the rest", "head apart"])
def test_models_that_are_sharded(ranks: dict[str, list[Any]], apart: bool) -> None:
    model, inputs = cases.model(0), batch(4)
    truth = distillation_loss(model, cases.model(1, 24), inputs, temperature=2.0, alpha=0.7)
    truth.backward()
    results = ranks[f"sharded, {apart}"]
    torch.testing.assert_close((results[0]["loss"] + results[1]["loss"]) / 2, truth.detach())
    for result in results:
        assert_gradients(result["gradients"], cases.gradients(model))


@pytest.mark.parametrize("kind", ["distillation", "gkd", "gold"])
def test_trainers_of_trl(ranks: dict[str, list[Any]], kind: str) -> None:
    for theirs, ours in zip(ranks[f"{kind}, False"], ranks[f"{kind}, True"], strict=True):
        assert_same_training(theirs, ours)


@pytest.mark.parametrize("name", ["transformers", "accelerate"])
def test_a_step_of_all_ranks_and_batches(ranks: dict[str, list[Any]], name: str) -> None:
    """Is that of one batch of all rows in one process; and so is the loss that is shown."""
    model = cases.model(0)
    inputs = torch.utils.data.default_collate(list(Rows(8)))
    truth = distillation_loss(model, cases.model(1, 24), inputs, temperature=2.0, alpha=0.6)
    truth.backward()
    for result in ranks[name]:
        assert_gradients(result["gradients"], cases.gradients(model))
        for loss in ("loss", "eval_loss"):
            assert float(result.get(loss, truth.detach())) == pytest.approx(truth.item(), rel=1e-5)
