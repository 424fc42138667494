"""Alias tables against scipy, numpy and torch: lambda from the IQPR, building from scores, drawing, updating, and samplers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, WeightedRandomSampler

import fastkd
from benchmarks import floors
from benchmarks.case import Case, Contest, Run, Settings, Work, on_threads, relative_error, short_count, thread_counts

QUICK = (10**7,)
FULL = (10**4, 10**5, 10**6, 10**8)
GPU = (10**6, 10**7, 10**8, 10**9)
DRAWS, GPU_DRAWS = 10**6, 2**24
BATCH, BATCHES = 256, 100  # of samplers, which hand out Python's ints
CHANGES, GPU_CHANGES = 256, 10**5  # the losses of a training batch; of an epoch
MULTINOMIAL_ITEMS = 2**24  # torch.multinomial and torch.quantile refuse more
CDF_ITEMS = 10**8  # of a sum in fp64 and what it takes to make it
DRAW_TARGETS = {"scipy DiscreteAliasUrn": 5.0, "numpy choice": 100.0}  # of 1e7, on a CPU
BUILD_TARGETS = {"scipy DiscreteAliasUrn": 2.0}
MULTINOMIAL_TARGETS = {"torch.multinomial": 40.0}
OF_SINGLE_SUMS = (
    0.2  # deviations that the mean of torch.multinomial's draws may be off: it sums up to 2^24 weights in fp32
)
WHY_NOT_FASTER = (
    "A draw has its price where the table is in the caches already (N=1e4 in the full results): random words, two products of "
    "128 bits, the index written; what it takes beyond that is the wait for a cache line at a random place of the table."
)
BYTES_OF_AN_ITEM = 60  # scores, tables, and those of peers in fp64


def cases(settings: Settings) -> Iterator[Case]:
    """All of them for collections of growing size."""
    for items in settings.pick(QUICK, FULL, sorted({min(n, settings.nbytes) for n in GPU})):
        for make in (_iqpr, _build, _draw, _update):
            yield make(settings, items)
    if settings.sizes != "gpu":
        yield _draw(settings, MULTINOMIAL_ITEMS)
        yield _sampler(settings, MULTINOMIAL_ITEMS)
    if settings.sizes == "full":
        yield from on_threads(_build(settings, 10**7), thread_counts())
        yield from on_threads(_draw(settings, 10**7), thread_counts())


def _scores(settings: Settings, items: int) -> Tensor:
    return torch.randn(items, device=settings.device, generator=torch.Generator(settings.device).manual_seed(0))


def _on_cpu(settings: Settings) -> bool:
    return settings.device.type == "cpu"


def _iqpr(settings: Settings, items: int) -> Case:
    def build() -> Work:
        scores = _scores(settings, items)
        ordered = scores.sort().values
        position = torch.tensor([0.25, 0.75], dtype=torch.float64) * (items - 1)
        below = position.long()
        low, high = (ordered[(below + i).clamp(max=items - 1).to(scores.device)].double().cpu() for i in (0, 1))
        truth = math.log(5) / (low + (position - below) * (high - low)).diff()[0]
        del ordered
        quartiles = (0.25, 0.75)
        peers: dict[str, Run] = {
            "torch.quantile": lambda: math.log(5) / torch.quantile(scores, scores.new_tensor(quartiles)).diff()[0]
        }
        if _on_cpu(settings):
            array = scores.numpy()
            peers["numpy quantile"] = lambda: torch.tensor(math.log(5) / np.diff(np.quantile(array, quartiles))[0])
        work = Work(
            lambda: fastkd.ops.alias.inverse_temperature(scores, 5.0),
            peers,
            lambda value: relative_error(value.cpu(), truth),
            1e-5,
            1e-3,
            floor_bytes=floors.alias_quartiles(items, 4),
        )
        if items > MULTINOMIAL_ITEMS:
            work.leave_out("torch.quantile", "refuses more than 2^24 values")
        return work

    return Case(f"alias IQPR N={short_count(items)}", build, 16 * items)


def _build(settings: Settings, items: int) -> Case:
    def build() -> Work:
        scores = _scores(settings, items)
        some = slice(0, 1 << 20)
        truth = scores[some].double().exp()  # relative to one another

        def error(result: Any) -> float:
            if isinstance(result, fastkd.AliasTable):
                share = result.weights()[some].double()
            elif isinstance(result, Tensor):
                share = result[some].diff(prepend=result.new_zeros(1))
            else:  # scipy's urn says nothing of its table
                return drawn_error(torch.from_numpy(result.rvs(DRAWS // 10)))
            return relative_error(share / share.sum(), truth / truth.sum())

        peers: dict[str, Run] = {}
        if items <= CDF_ITEMS:
            peers["softmax and cumsum, fp64"] = lambda: scores.double().softmax(0).cumsum(0)
        if _on_cpu(settings):  # scipy is given ready probabilities; fastkd pays for the exponentials too
            probabilities = scores.double().softmax(0).numpy()
            drawn_error = error_of_draws(scores, torch.from_numpy(probabilities), DRAWS // 10)
            peers["scipy DiscreteAliasUrn"] = lambda: _urn(probabilities)
        return Work(
            lambda: fastkd.AliasTable(scores, 1.0, seed=0),
            peers,
            error,
            1e-6,
            1e-6,
            floor_bytes=floors.alias_build(items, 4),
            targets=BUILD_TARGETS if _on_cpu(settings) and items == 10**7 else {},
            target_percent=50.0 if not _on_cpu(settings) and items == 10**8 else None,
        )

    return Case(f"alias build N={short_count(items)}", build, BYTES_OF_AN_ITEM * items)


def _draw(settings: Settings, items: int) -> Case:
    draws = DRAWS if settings.sizes != "gpu" else min(GPU_DRAWS, max(settings.nbytes, 2**18))

    def build() -> Work:
        scores = _scores(settings, items)
        table = fastkd.AliasTable(scores, 1.0, seed=0)
        p = table.probabilities()
        error = error_of_draws(scores, p, draws)
        peers: dict[str, Run] = {}
        if items <= CDF_ITEMS:
            cdf = scores.double().softmax(0).cumsum(0)
            peers["searchsorted of an fp64 sum"] = lambda: torch.searchsorted(
                cdf, torch.rand(draws, device=cdf.device, dtype=torch.float64)
            ).clamp_(max=items - 1)
        if _on_cpu(settings):
            probabilities = p.numpy()
            urn, random = _urn(probabilities), np.random.default_rng(0)
            peers["scipy DiscreteAliasUrn"] = lambda: torch.from_numpy(urn.rvs(draws))
            peers["numpy choice"] = lambda: torch.from_numpy(random.choice(items, draws, p=probabilities))
        weights = scores.exp()
        peers["torch.multinomial"] = lambda: torch.multinomial(weights, draws, replacement=True)
        if _on_cpu(settings) and items <= MULTINOMIAL_ITEMS:
            sampler = WeightedRandomSampler(weights.double(), draws)
            peers["WeightedRandomSampler"] = lambda: list(sampler)
        rate = None  # wanted, of draws in a second
        if _on_cpu(settings):
            targets = {10**7: DRAW_TARGETS, MULTINOMIAL_ITEMS: MULTINOMIAL_TARGETS}.get(items, {})
        else:
            targets = {"torch.multinomial": 100.0} if items <= MULTINOMIAL_ITEMS else {}
            cache = torch.cuda.get_device_properties(settings.device).L2_cache_size
            rate = 20e9 if 8 * items <= cache else 8e9 if items <= 10**9 else None
        work = Work(
            lambda: table.sample(draws),
            peers,
            error,
            0.0,
            OF_SINGLE_SUMS,
            floor_bytes=floors.alias_sample(draws),
            targets=targets,
            target_ms=None if rate is None else draws / rate * 1e3,
            reason=WHY_NOT_FASTER if _on_cpu(settings) else "",
        )
        if items > MULTINOMIAL_ITEMS:
            work.leave_out("torch.multinomial", "refuses more than 2^24 items")
        return work

    return Case(f"alias draw {short_count(draws)} of N={short_count(items)}", build, BYTES_OF_AN_ITEM * items)


def _sampler(settings: Settings, items: int) -> Case:
    draws = BATCH * BATCHES

    def build() -> Work:
        scores = _scores(settings, items)
        table = fastkd.AliasTable(scores, 1.0, seed=0)
        batches = fastkd.CollectionBatchSampler(table, BATCH, BATCHES)
        one_by_one = BatchSampler(fastkd.CollectionSampler(table, draws), BATCH, drop_last=False)
        peer = BatchSampler(WeightedRandomSampler(scores.exp().double(), draws), BATCH, drop_last=False)
        return Work(
            lambda: list(batches),
            {
                "its tensors": lambda: torch.cat(list(batches.tensors())),
                "CollectionSampler in a BatchSampler": lambda: list(one_by_one),
                "WeightedRandomSampler in a BatchSampler": lambda: list(peer),
            },
            error_of_draws(scores, table.probabilities(), draws),
            0.0,
            OF_SINGLE_SUMS,
            own=("its tensors", "CollectionSampler in a BatchSampler"),
        )

    name = f"alias sampler, {BATCHES} batches of {BATCH} of N={short_count(items)}"
    return Case(name, build, BYTES_OF_AN_ITEM * items)


def _update(settings: Settings, items: int) -> Case:
    changes = min(GPU_CHANGES if settings.sizes == "gpu" else CHANGES, items // 10)

    def build() -> Work:
        scores = _scores(settings, items)
        table = fastkd.AliasTable(scores, 1.0, seed=0)
        indices = torch.randint(items, (changes,), device=settings.device)
        fresh = scores[indices] - 0.5
        changed = scores.clone()
        changed[indices] = fresh
        truth = fresh.double().exp() / changed.double().exp().sum()

        def ours() -> fastkd.AliasTable:
            table.update(indices, fresh)
            return table

        def built_anew() -> fastkd.AliasTable:
            changed[indices] = fresh
            return fastkd.AliasTable(changed, 1.0, seed=0)

        def error(result: fastkd.AliasTable) -> float:
            return relative_error(result.weights()[indices].double() / result.weights().sum(), truth)

        return Work(
            ours,
            {"a table built anew": built_anew},
            error,
            1e-5,
            1e-5,
            floor_bytes=floors.alias_update(items, changes),
            own=("a table built anew",),
        )

    return Case(f"alias update {short_count(changes)} of N={short_count(items)}", build, BYTES_OF_AN_ITEM * items)


def _urn(probabilities: np.ndarray) -> Any:
    from scipy.stats.sampling import DiscreteAliasUrn

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*squared histogram")  # about its own rounding
        return DiscreteAliasUrn(probabilities, random_state=np.random.default_rng(0))


def error_of_draws(scores: Tensor, probabilities: Tensor, draws: int) -> Callable[[Any], float]:
    """0 where the mean score of the draws lies within 6 deviations of what the probabilities say."""
    mean = (probabilities * scores).sum()
    deviation = (probabilities * (scores - mean).square()).sum().sqrt()

    def error(handed_out: Any) -> float:
        indices = torch.as_tensor(handed_out).flatten()
        off = float(((scores[indices].double().mean() - mean) / deviation).abs())
        return 0.0 if off <= 6 / math.sqrt(min(draws, len(indices))) else off

    return error


def test_alias(case: Case, contest: Contest) -> None:
    """Each case."""
    contest(case)
