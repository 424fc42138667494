"""Samplers under Accelerate, Lightning, torchdata and plain torchrun, in two processes: each epoch is drawn once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import framework_processes as work
import pytest
from framework_processes import BATCHES, EPOCH, KINDS
from training_processes import start_ranks

pytestmark = [pytest.mark.no_kernels, pytest.mark.forks]

by_kind = pytest.mark.parametrize("kind", KINDS)


def needs(package: str) -> None:
    pytest.importorskip(package, reason=f'{package} is not installed: pip install "fastkd[frameworks]"')


def results(folder: Path, *calls: tuple[Callable[..., Any], tuple[Any, ...]]) -> list[list[Any]]:
    """What the ranks return, call by call."""
    start_ranks(work.run, folder, calls)
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    return [list(values) for values in zip(*ranks, strict=True)]


def assert_drawn_once(ranks: list[list[list[int]]], epochs: int = 2) -> None:
    """Of each epoch, every rank has its share, and together they have all."""
    expected = work.make_table().sample_at(5, 0, EPOCH * epochs).split(EPOCH)
    assert [len(rank) for rank in ranks] == [epochs] * 2
    for *shares, whole in zip(*ranks, expected, strict=True):
        assert [len(share) for share in shares] == [EPOCH // 2] * 2
        assert sorted(chain(*shares)) == sorted(whole.tolist())


@by_kind
def test_torchrun(tmp_path: Path, kind: str) -> None:
    [ranks] = results(tmp_path, (work.plain, (kind,)))
    for loader in zip(*ranks, strict=True):
        assert_drawn_once(list(loader))


ACCELERATE: list[tuple[Any, ...]] = [  # options, workers, arguments of the sampler
    ({},),
    ({}, 2),
    ({"even_batches": False},),
    ({"split_batches": True},),
    ({"dispatch_batches": True},),
    ({"dispatch_batches": True, "split_batches": True},),
    ({"use_seedable_sampler": False},),
    ({"use_stateful_dataloader": True},),
]


@by_kind
def test_accelerate(tmp_path: Path, kind: str) -> None:
    needs("accelerate")
    needs("torchdata")
    for case, ranks in zip(
        ACCELERATE, results(tmp_path, *((work.accelerated, (kind, *case)) for case in ACCELERATE)), strict=True
    ):
        assert_drawn_once([rank["epochs"] for rank in ranks])
        split = case[0].get("split_batches", False)
        assert [rank["length"] for rank in ranks] == [2 * BATCHES if split else BATCHES] * 2, case


@by_kind
def test_accelerate_and_samplers_that_were_given_ranks(tmp_path: Path, kind: str) -> None:
    needs("accelerate")
    alone = ({}, 0, {"rank": 0, "world_size": 1})
    said, ranks = results(tmp_path, (work.divided_twice, (kind,)), (work.accelerated, (kind, *alone)))
    for rank in range(2):
        expected = (
            f"fastkd: rank is {rank} and world_size is 2, but accelerate's BatchSamplerShard divides the draws among "
            "2 processes once more; must be left out, or be rank=0, world_size=1"
        )
        assert said[rank] == [expected] * 2
    if kind == "items":
        assert_drawn_once([rank["epochs"] for rank in ranks])
    else:  # num_batches are those of all ranks, then
        assert sorted(chain(*(rank["epochs"][0] for rank in ranks))) == sorted(
            work.make_table().sample_at(5, 0, EPOCH // 2).tolist()
        )


@by_kind
def test_accelerate_goes_on_from_a_state(tmp_path: Path, kind: str) -> None:
    needs("accelerate")
    cases = [{}, {"split_batches": True}]
    for ranks in results(tmp_path, *((work.accelerated_resume, (kind, case)) for case in cases)):
        assert_drawn_once([rank["epochs"] for rank in ranks], epochs=3)


@by_kind
def test_accelerate_beside_a_loader_that_is_not_prepared(tmp_path: Path, kind: str) -> None:
    needs("accelerate")
    [ranks] = results(tmp_path, (work.beside, (kind,)))
    assert_drawn_once([rank["epochs"] for rank in ranks])


@by_kind
def test_lightning(tmp_path: Path, kind: str) -> None:
    needs("lightning")
    own = {"use_distributed_sampler": False}
    cases = [(kind, options, hook) for options in ({}, own) for hook in (False, True)]
    for case, ranks in zip(cases, results(tmp_path, *((work.fitted, case) for case in cases)), strict=True):
        if case[:2] == ("batches", {}):  # it can wrap no batch sampler
            assert all("set `Trainer(use_distributed_sampler=False)`" in rank["said"] for rank in ranks), case
            continue
        assert_drawn_once([rank["epochs"] for rank in ranks])
        assert [rank["length"] for rank in ranks] == [BATCHES] * 2, case


@by_kind
@pytest.mark.parametrize("workers", [0, 2])
def test_stateful_data_loader(tmp_path: Path, kind: str, workers: int) -> None:
    needs("torchdata")
    places = [(0, 1), (2, 1), (BATCHES, 1), (4, 3)]  # batches done, batches between snapshots
    for ranks in results(tmp_path, *((work.stateful, (kind, workers, *place)) for place in places)):
        assert_drawn_once(ranks, epochs=3)


DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "samplers.md"
PACKAGES = {
    "torchrun": "torch",
    "Accelerate": "accelerate",
    "Lightning": "lightning",
    "StatefulDataLoader": "torchdata",
}


@pytest.mark.parametrize("heading", PACKAGES)
def test_recipes(tmp_path: Path, heading: str) -> None:
    """Three lines each, as they stand in the document."""
    needs(PACKAGES[heading])
    section = DOCUMENT.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    recipes = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert recipes
    for place, recipe in enumerate(recipes):
        assert recipe.count("\n") == 3
        folder = tmp_path / str(place)
        folder.mkdir()
        [ranks] = results(folder, (work.followed, (recipe,)))
        assert_drawn_once(ranks)
