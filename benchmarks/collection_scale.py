"""From a file of scores to batches of indices, for collections of a million to a hundred million images, on the CPU.

``python -m benchmarks.collection_scale --items 1e6 1e7 1e8``. For each number of items: the table's memory, the file
to a table, draws, draws in batches of 256, each beside what else does it; and the same table over gloo processes. Every row is
printed and written to ``results/<machine>-collection-scale.json`` when it is there; rows of other numbers of items stay there.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import queue
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, WeightedRandomSampler

import fastkd
from benchmarks.case import Run, short_count
from benchmarks.clock import WallClock
from benchmarks.machine import free_memory, machine, peak_memory
from benchmarks.measure import Budget, first_line, take_turns
from benchmarks.results_file import RESULTS, ResultsFile, name_of
from benchmarks.table import three_digits
from fastkd.ops import alias_shard
from fastkd.ops.alias import BLOCK_SIZE as BLOCK

BATCH = 256
BYTES_OF_AN_ITEM = 48  # of memory: scores, weights, probabilities, sums and a table at the same time
WRITTEN = 10**6  # scores at a time
PATIENCE = 600  # seconds for the processes of a sharded table

Row = dict[str, Any]
Tell = Callable[[Row], None]


class Indices(Dataset[int]):
    """Items that are their own indices: what is measured is who draws them, not who loads them."""

    def __init__(self, items: int) -> None:
        self.items = items

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, index: int) -> int:
        return index


def write_scores(path: Path, items: int) -> None:
    """Normal scores, float64, as ``numpy.save`` would write them, a million at a time."""
    file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float64, shape=(items,))
    random = np.random.default_rng(0)
    for start in range(0, items, WRITTEN):
        file[start : start + WRITTEN] = random.standard_normal(min(WRITTEN, items - start))
    file.flush()


def read_scores(path: Path, start: int = 0, stop: int | None = None) -> Tensor:
    """A part of the file, in the pages of the file."""
    return torch.from_numpy(np.load(path, mmap_mode="c")[start:stop])


def measured(contenders: dict[str, Run], seconds: float) -> dict[str, float | str]:
    """The median time of each, in turns; or why one cannot."""
    found: dict[str, float | str] = {}
    able: dict[str, Run] = {}
    for name, run in contenders.items():
        try:
            run()
        except (RuntimeError, MemoryError, ValueError) as error:
            found[name] = first_line(error)
        else:
            able[name] = run
    times: dict[str, list[float]] = {name: [] for name in able}
    take_turns(
        able, WallClock(), Budget(seconds, least=5, least_slow=3, most=101), lambda name, t: times[name].append(t)
    )
    return {name: found[name] if name in found else statistics.median(times[name]) for name in contenders}


def build_rows(path: Path, items: int, seconds: float, tell: Tell) -> None:
    """The file to something that can be drawn from."""
    contenders: dict[str, Run] = {
        "AliasTable": lambda: fastkd.AliasTable(read_scores(path), 1.0, seed=0),
        "AliasTable, lambda from the IQPR": lambda: fastkd.AliasTable(read_scores(path), iqpr=5.0, seed=0),
        "ShardedAliasTable, one rank": lambda: fastkd.ShardedAliasTable(read_scores(path), 1.0, seed=0),
        "numpy: exp, divided by its sum": lambda: _probabilities(path),
        "torch: softmax and cumsum": lambda: read_scores(path).softmax(0).cumsum(0),
    }
    for name, median in measured(contenders, seconds).items():
        tell(_row("score file to table", items, name, median, {"items_per_second": items}))


def memory_row(path: Path, items: int, tell: Tell) -> fastkd.AliasTable:
    """What building takes at its peak, and what stays."""
    kept: list[fastkd.AliasTable] = []

    def build() -> None:
        kept.append(fastkd.AliasTable(read_scores(path), 1.0, seed=0))

    peak_memory(lambda: None, torch.device("cpu"))  # which gives back what others have freed
    before = _anonymous_bytes()
    peak = peak_memory(build, torch.device("cpu"))
    grown = _anonymous_bytes() - before
    tell(
        {
            "row": "memory",
            "items": items,
            "contender": "AliasTable",
            "table_bytes": kept[0].nbytes,
            "table_bytes_per_item": round(kept[0].nbytes / items, 3),
            "peak_rss_growth_bytes": peak,
            "peak_rss_growth_per_item": None if peak is None else round(peak / items, 2),
            "of_which_pages_of_the_file": 8 * items,
            "anonymous_growth_bytes": grown,
        }
    )
    return kept[0]


def draw_rows(path: Path, table: fastkd.AliasTable, draws: int, seconds: float, tell: Tell) -> None:
    """Draws in one call."""
    items = len(table)
    sharded = fastkd.ShardedAliasTable(read_scores(path), 1.0, seed=0)
    contenders: dict[str, Run] = {
        "AliasTable.sample": lambda: table.sample(draws),
        "ShardedAliasTable.sample, one rank": lambda: sharded.sample(draws),
    }
    if items * BYTES_OF_AN_ITEM <= free_memory(torch.device("cpu")):
        probabilities, random = _probabilities(path), np.random.default_rng(0)
        weights = torch.from_numpy(probabilities)
        contenders["numpy choice"] = lambda: random.choice(items, draws, p=probabilities)
        contenders["torch.multinomial"] = lambda: torch.multinomial(weights, draws, replacement=True)
    for name, median in measured(contenders, seconds).items():
        tell(_row(f"{short_count(draws)} draws", items, name, median, {"draws_per_second": draws}))


def batch_rows(path: Path, table: fastkd.AliasTable, batches: int, seconds: float, tell: Tell) -> None:
    """An epoch of batches of indices, as tensors of 256."""
    items, draws = len(table), BATCH * batches
    sampler = fastkd.CollectionBatchSampler(table, BATCH, batches, seed=0)
    ours = DataLoader(Indices(items), batch_sampler=sampler)
    one_by_one = DataLoader(Indices(items), BATCH, sampler=fastkd.CollectionSampler(table, draws, seed=0))
    contenders: dict[str, Run] = {
        "CollectionBatchSampler.tensors": lambda: list(sampler.tensors()),
        "DataLoader, CollectionBatchSampler": lambda: list(ours),
        "DataLoader, CollectionSampler": lambda: list(one_by_one),
    }
    if items * BYTES_OF_AN_ITEM <= free_memory(torch.device("cpu")):
        probabilities, random = _probabilities(path), np.random.default_rng(0)
        weights = torch.from_numpy(probabilities)
        peer = WeightedRandomSampler(weights, draws, replacement=True)  # type: ignore[arg-type]
        loader = DataLoader(Indices(items), BATCH, sampler=peer)
        batched = BatchSampler(peer, BATCH, drop_last=False)
        contenders["DataLoader, WeightedRandomSampler"] = lambda: list(loader)
        contenders["WeightedRandomSampler in a BatchSampler, as tensors"] = lambda: [torch.tensor(b) for b in batched]
        contenders["numpy choice of an epoch, split"] = lambda: torch.from_numpy(
            random.choice(items, draws, p=probabilities)
        ).split(BATCH)
        contenders["numpy choice of each batch (4 timed)"] = lambda: [
            torch.from_numpy(random.choice(items, BATCH, p=probabilities)) for _ in range(4)
        ]
    for name, median in measured(contenders, seconds).items():
        if "4 timed" in name and isinstance(median, float):
            median *= batches / 4
        numbers = {"draws_per_second": draws, "batches_per_second": batches}
        tell(_row(f"{batches} batches of {BATCH}", items, name, median, numbers))


def sharded_row(path: Path, items: int, ranks: int, draws: int, tell: Tell) -> None:
    """The same table over so many gloo processes of one thread on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [
        context.Process(target=_as_rank, args=(rank, ranks, port, path, items, draws, answers)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        told = _told(answers, processes)
    finally:
        for process in processes:
            process.join(PATIENCE / 10)
            process.kill()
    build, draw, both = (max(rank[key] for rank in told) for key in ("build", "draw", "gather"))
    tell(
        {
            "row": f"sharded over {ranks} processes",
            "items": items,
            "contender": "ShardedAliasTable",
            "ms": round(build * 1e3, 2),
            "items_per_second": round(items / build),
            "bytes_of_a_rank": max(rank["nbytes"] for rank in told),
            "owners_of_draws_per_second": round(draws / draw),
            "sampled_draws_per_second": round(draws / both),
            "rows_sent_per_draw": round(sum(rank["sent"] for rank in told) / draws, 4),
            "index_bytes_sent_per_draw": round(8 * sum(rank["sent"] for rank in told) / draws, 3),
        }
    )


def plan_rows(items: int, ranks: int, batch: int, seconds: float, tell: Tell) -> None:
    """What a rank of very many does, with tables of the size that those of so many items have, of random weights."""
    blocks = -(-items // BLOCK)
    weights = torch.randint(1 << 20, 1 << 22, (blocks,), generator=torch.Generator().manual_seed(0))
    top = alias_shard.top_of(weights)
    own, total = blocks // ranks, int(weights.sum())
    bins = torch.randint(1 << 32, (own * BLOCK,), generator=torch.Generator().manual_seed(1))
    draws = batch * ranks
    contenders: dict[str, Run] = {
        f"the table over {blocks} blocks": lambda: alias_shard.top_of(weights),
        f"owners of {draws} draws": lambda: alias_shard.draw(
            bins, (0, own), weights, top, total, items, 0, 0, draws, (0, ranks)
        ),
    }
    numbers = {
        "blocks": blocks,
        "bytes_of_the_table_over_blocks": 24 * blocks,
        "bytes_of_a_rank": 8 * own * BLOCK + 24 * blocks,
    }
    for name, median in measured(contenders, seconds).items():
        tell(_row(f"one rank of {ranks}, {batch} draws each", items, name, median, {}) | numbers)


def _told(answers: Any, processes: list[Any]) -> list[dict[str, Any]]:
    """What each process says, or an error once one has ended without a word."""
    told: list[dict[str, Any]] = []
    until = time.monotonic() + PATIENCE
    while len(told) < len(processes):
        try:
            told.append(answers.get(timeout=1.0))
        except queue.Empty:
            codes = [process.exitcode for process in processes]
            if any(codes) or time.monotonic() > until:
                raise RuntimeError(f"exit codes of the ranks: {codes}; None has not ended") from None
    return told


def _as_rank(rank: int, ranks: int, port: int, path: Path, items: int, draws: int, answers: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    start, stop = fastkd.ShardedAliasTable.shard(items, rank, ranks)
    said: dict[str, Any] = {}
    said["build"], table = _timed(lambda: fastkd.ShardedAliasTable(read_scores(path, start, stop), 1.0, seed=0))
    rounds = [_timed(lambda: table.owned(0, draws)) for _ in range(3)]
    said["draw"] = statistics.median(seconds for seconds, _ in rounds)
    said["gather"] = statistics.median(_timed(lambda: table.sample(draws // ranks))[0] for _ in range(3))
    said["nbytes"], said["sent"] = table.nbytes, rounds[0][1].rows_sent
    answers.put(said)
    dist.barrier()
    dist.destroy_process_group()


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    if dist.is_initialized():
        dist.barrier()
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def _probabilities(path: Path) -> Any:
    weights = np.exp(np.load(path, mmap_mode="r"))
    weights /= weights.sum()
    return weights


def _row(what: str, items: int, name: str, median: float | str, of: dict[str, int]) -> Row:
    row: Row = {"row": what, "items": items, "contender": name}
    if isinstance(median, str):
        return row | {"reason": median}
    return (
        row
        | {"ms": round(median * 1e3, 4)}
        | {
            key: round(count / median) if count >= 100 * median else round(count / median, 2)
            for key, count in of.items()
        }
    )


def _anonymous_bytes() -> int:
    """What this process holds that is no file's."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon:"))
    except (OSError, StopIteration):
        return 0


def _show(row: Row) -> None:
    numbers = {k: v for k, v in row.items() if k not in ("row", "items", "contender", "reason")}
    said = row.get("reason") or ", ".join(
        f"{key} {three_digits(value) if isinstance(value, float) else value}" for key, value in numbers.items()
    )
    print(f"{short_count(row['items']):>5}  {row['row']:26}  {row['contender']:44}  {said}", flush=True)


def _count(text: str) -> int:
    value = float(text)
    if not 1 <= value <= 1e10 or value != math.floor(value):
        raise argparse.ArgumentTypeError(f"{text} is no number of items from 1 to 1e10")
    return int(value)


def main() -> None:
    """Measures, prints and writes row after row."""
    parser = argparse.ArgumentParser(prog="benchmarks.collection_scale", description=__doc__)
    parser.add_argument(
        "--items", type=_count, nargs="*", default=[10**6], help="of the collections, as 1e6 1e7 1e8 (default 1e6)"
    )
    parser.add_argument("--draws", type=_count, default=10**6, help="in one call (default 1e6)")
    parser.add_argument("--batches", type=_count, default=400, help="of an epoch, of 256 (default %(default)s)")
    parser.add_argument(
        "--ranks", type=int, nargs="*", default=[2, 4], help="processes of sharded tables (default 2 4)"
    )
    parser.add_argument(
        "--plan",
        type=_count,
        nargs=2,
        metavar=("ITEMS", "RANKS"),
        help="and what one rank of so many does, as 1e9 1000",
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="for each contender (default %(default)g)")
    parser.add_argument("--threads", type=int, help="of this process (default torch's); the ranks have one each")
    parser.add_argument("--folder", type=Path, help="where the score files are for the time being; 8 bytes an item")
    parser.add_argument("--output", type=Path, help="JSON; default benchmarks/results/<machine>-collection-scale.json")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    found = machine(torch.device("cpu"))
    found["cores"], found["memory_gb"] = os.cpu_count(), round(free_memory(torch.device("cpu")) / 1e9, 1)
    output = ResultsFile(options.output or RESULTS / f"{name_of(found)}-collection-scale.json")
    for items in options.items:
        rows: list[Row] = []

        def tell(row: Row, items: int = items, rows: list[Row] = rows) -> None:
            rows.append(row)
            _show(row)
            others = [other for other in output.read().get("rows", []) if other["items"] != items]
            every = sorted([*others, *rows], key=lambda other: other["items"])
            output.update(machine=found, command="python -m benchmarks.collection_scale", rows=every)

        folder = Path(tempfile.mkdtemp(prefix="collection-scale-", dir=options.folder))
        try:
            path = folder / "scores.npy"
            write_scores(path, items)
            table = memory_row(path, items, tell)
            build_rows(path, items, options.seconds, tell)
            draw_rows(path, table, options.draws, options.seconds, tell)
            batch_rows(path, table, options.batches, options.seconds, tell)
            del table
            for ranks in options.ranks:
                sharded_row(path, items, ranks, options.draws, tell)
        finally:
            shutil.rmtree(folder)
    if options.plan:
        items, ranks = options.plan
        planned: list[Row] = []

        def plan(row: Row) -> None:
            planned.append(row)
            _show(row)
            output.update(machine=found, plan=planned)

        plan_rows(items, ranks, BATCH, options.seconds, plan)
    print(f"\nwritten to {output.path}")


if __name__ == "__main__":
    main()
