"""What the tests of sharded tables run in processes of their own, and the collections that they draw from."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fastkd
from fastkd import AliasTable, ShardedAliasTable
from fastkd.training import process_group

ITEMS, DRAWS = 5 * 4096 + 123, 400
SEED = 11
DOCUMENT = Path(__file__).parents[1] / "docs" / "scale.md"
WARNED = ".*too few for exact probabilities"


def normal(seed: int, items: int = ITEMS) -> Tensor:
    return torch.randn(items, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def one_end(seed: int) -> Tensor:
    """All weight in the first block: on rank 0 of several."""
    scores = normal(seed)
    scores[4096:] -= 200.0
    return scores


def half(seed: int) -> Tensor:
    """The second half, and with it some ranks, has nothing to be drawn."""
    scores = normal(seed)
    scores[2 * 4096 :] = -math.inf
    return scores


# scores of all, how tables of them are made, and then the changes that they meet
Case = tuple[Tensor, dict[str, Any], list[tuple[Tensor, Tensor]]]
FEW = torch.tensor([3, 4096, 3, ITEMS - 1, 9000, 4096])  # two of them twice
CASES: dict[str, Case] = {
    "plain": (normal(0), {}, [(FEW, normal(1, 6))]),
    "lambda": (normal(2), {"inverse_temperature": 7.5}, [(FEW, torch.full((6,), -math.inf))]),
    "uniform": (normal(3)[:8192], {"inverse_temperature": 0.0}, []),
    "iqpr": (normal(4), {"iqpr": 5.0}, []),
    "half precision": (normal(5).half(), {"iqpr": 25.0}, [(FEW, normal(6, 6).half())]),
    "steep": (1e3 * normal(7), {"inverse_temperature": torch.tensor(0.5)}, []),
    "coincident quartiles": (torch.arange(ITEMS).eq(5).float(), {"iqpr": 3.0}, []),
    "one end": (one_end(8), {}, [(FEW[:1], torch.tensor([math.nan])), (FEW[:2], torch.tensor([1.0, -math.inf]))]),
    "half": (half(9), {"iqpr": 2.0}, [(torch.tensor([20000]), torch.tensor([2.0]))]),
    # what is far above all others divides their weights; then it goes, and little is left
    "far above": (normal(10), {}, [(FEW[4:], torch.tensor([30.0, 14.0])), (FEW[4:], normal(11, 2))]),
    "further above": (normal(14), {"inverse_temperature": 5.0}, [(FEW[4:], torch.tensor([12.0, 12.0]))]),
    "one item": (normal(12)[:1], {}, []),
    "few": (normal(13)[:4097], {}, [(torch.tensor([0, 4096]), torch.tensor([3.0, 2.0]))]),
}


def to_bits(value: float) -> int:
    return int(torch.tensor(value, dtype=torch.float64).view(torch.int64))


def follow(table: Any, changes: list[tuple[Tensor, Tensor]], offset: int = 0, items: int = ITEMS) -> dict[str, Any]:
    """What a table draws, before and after each change of those of its items."""
    said: dict[str, Any] = {"lambda": to_bits(float(table.inverse_temperature)), "steps": [], "states": []}
    for change in [None, *changes]:
        refused = False
        if change is not None:
            indices, scores = change
            own = (indices >= offset) & (indices < offset + items)
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", WARNED)
                    table.update(indices[own], scores[own])
            except (ValueError, RuntimeError):
                refused = True
        said["steps"].append((table.weights(), table.sample(DRAWS // world_size()), refused))
        said["states"].append(table.state_dict())
    return said


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def own_shard(scores: Tensor, rank: int) -> Tensor:
    start, stop = ShardedAliasTable.shard(len(scores), rank, world_size())
    return scores[start:stop]


def tables_in_ranks(rank: int, folder: Path) -> None:
    """Each case on this rank; and a table that goes on where one of another number of ranks stopped."""
    torch.set_num_threads(1)
    with process_group("cpu") as process:
        for name, (scores, options, changes) in CASES.items():
            own = own_shard(scores, rank)
            table = ShardedAliasTable(own, seed=SEED, **options)
            assert len(table) == len(scores)
            assert table.nbytes == 8 * len(own) + 24 * -(-len(scores) // 4096)
            said = follow(table, changes, table.offset, len(own))
            torch.save(said, folder / f"{name}{rank}.pt")
        _owners(rank, folder)
        _resumed(rank, folder)
        _refused(rank, process.world_size, folder)
        _in_a_group(rank, process.world_size)
        _recipe(rank, process.world_size, folder)


def _owners(rank: int, folder: Path) -> None:
    """Draws by who owns them, and what they loaded by who drew it."""
    scores = CASES["plain"][0]
    table = ShardedAliasTable(own_shard(scores, rank), seed=SEED)
    draws = table.owned(7, 1001, seed=-3)
    images = torch.stack([scores.float(), -scores.float()], 1)[:, None]  # of items of all ranks; a rank loads its own
    loaded = draws.gather(images[table.offset :][: len(scores)][draws.items])
    empty = table.owned(0, 0).gather(torch.empty(0, 3, dtype=torch.bool))
    assert empty.shape == (0, 3)
    nothing = table.owned(0, 64)
    assert nothing.gather(torch.empty(len(nothing.items), 0)).shape[1:] == (0,)
    torch.save((draws.positions, draws.items + table.offset, loaded, draws.rows_sent), folder / f"owners{rank}.pt")


def _resumed(rank: int, folder: Path) -> None:
    state = torch.load(folder / "state.pt")
    table = ShardedAliasTable(own_shard(CASES["plain"][0], rank), seed=0)
    table.load_state_dict(state)
    torch.save(table.sample(DRAWS // world_size()), folder / f"resumed{rank}.pt")


def _refused(rank: int, ranks: int, folder: Path) -> None:
    """What is wrong on the last rank, or on all: what each of them is told."""
    last = rank == ranks - 1
    good = normal(0, 4096)
    calls: dict[str, Callable[[], Any]] = {
        "nan": lambda: ShardedAliasTable(good.where(good > 0, math.nan) if last else good),
        "dtype": lambda: ShardedAliasTable(good.long() if last else good),
        "shape": lambda: ShardedAliasTable(good[None] if last else good),
        "lambda": lambda: ShardedAliasTable(good, -1.0 if last else 1.0),
        "large": lambda: ShardedAliasTable(good, 1.7e308),
        "iqpr": lambda: ShardedAliasTable(good, iqpr=0.5 if last else 2.0),
        "both": lambda: ShardedAliasTable(good, 1.0, iqpr=2.0),
        "all": lambda: ShardedAliasTable(torch.full((4096,), -math.inf), iqpr=3.0),
        "none": lambda: ShardedAliasTable(torch.empty(0)),
    }
    if ranks > 1:
        calls |= {
            "seed": lambda: ShardedAliasTable(good, seed=rank),
            "another lambda": lambda: ShardedAliasTable(good, 1.0 + rank),
            "cut": lambda: ShardedAliasTable(good[: 4000 if rank == 0 else 4096]),
        }
    table = ShardedAliasTable(good, seed=0)
    before = table.weights()
    state = table.state_dict()
    draws = table.owned(0, 8)
    first = torch.tensor([table.offset])
    calls |= {
        "update of another": lambda: table.update(first + (4096 if last else 0), torch.ones(1)),
        "update nan": lambda: table.update(first, torch.tensor([math.nan if last else 1.0])),
        "update shape": lambda: table.update(first, torch.ones(2)),
        "update dtype": lambda: table.update(first.int() if last else first, torch.ones(1)),
        "update too far": lambda: table.update(first, torch.tensor([1e9 if last else 1.0])),
        "update of all": lambda: table.update(first + torch.arange(4096), torch.full((4096,), -math.inf)),
        "n": lambda: table.sample(-1 if last else 4),
        "n of no kind": lambda: table.sample("four" if last else 4),
        "rows": lambda: draws.gather(torch.zeros(len(draws.items) + last)),
        "no rows": lambda: draws.gather(3 if last else torch.zeros(len(draws.items))),
        "state": lambda: table.load_state_dict({**state, "total_weight": 5} if last else state),
        "state of other blocks": lambda: table.load_state_dict({**state, "block_weights": "0" * 32}),
        "no state": lambda: table.load_state_dict({} if last else state),
        "owned": lambda: table.owned(2**63 - 4, 5),
    }
    if ranks > 1:
        calls |= {
            "another n": lambda: table.sample(4 + rank),
            "other rows": lambda: draws.gather(torch.zeros(len(draws.items), 1 + rank)),
            "other draws": lambda: table.owned(rank, 8).gather(torch.zeros(len(table.owned(rank, 8).items))),
            "another state": lambda: table.load_state_dict({**state, "next_index": rank}),
        }
    said: dict[str, tuple[str, str]] = {}
    for name, call in calls.items():
        try:
            call()
        except (TypeError, ValueError, RuntimeError) as error:
            said[name] = (type(error).__name__, str(error))
        else:
            said[name] = ("", "nothing was raised")
    assert torch.equal(table.weights(), before)
    assert table.state_dict() == state
    torch.save(said, folder / f"refused{rank}.pt")


def _in_a_group(rank: int, ranks: int) -> None:
    """A table of some of the ranks; the others are no part of it."""
    if ranks < 4:
        return
    group = dist.new_group([1, 3])
    scores = normal(0, 8192)
    if rank in (1, 3):
        table = ShardedAliasTable(scores[rank // 2 * 4096 :][:4096], seed=SEED, group=group)
        expected = AliasTable(scores, seed=SEED).sample(20)
        assert torch.equal(table.sample(10), expected[rank // 2 :: 2])
    else:
        with pytest.raises((TypeError, ValueError), match="group"):
            ShardedAliasTable(scores[:4096], group=group)


def _recipe(rank: int, ranks: int, folder: Path) -> None:
    """That of docs/scale.md, of images that are their own numbers."""
    (text,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    names: dict[str, Any] = {"fastkd": fastkd, "numpy": np, "torch": torch, "steps": 3}
    images = torch.arange(ITEMS)[:, None]
    names |= {"items": ITEMS, "rank": rank, "world_size": ranks, "path": folder / "scores.npy", "images": images}
    exec(text, names)
    torch.save(names["batch"], folder / f"recipe{rank}.pt")
