"""The alias table against scipy, numpy and torch: building from scores, and drawing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import fastkd
from benchmarks import floors
from benchmarks.gpu import Contenders, LazyCase, Settings, relative_error
from benchmarks.harness import Case

DRAWS = 1_000_000


def cases() -> Iterator[Case]:
    """N = 1e7 for scipy and numpy, 2^24 for torch.multinomial, which refuses more."""
    from scipy.stats.sampling import DiscreteAliasUrn

    warnings.filterwarnings("ignore", message=".*squared histogram")  # scipy's, about its own rounding

    n = 10_000_000
    scores = torch.randn(n)
    table = fastkd.AliasTable(scores, 1.0, seed=0)
    probabilities = table.probabilities().numpy()
    urn = DiscreteAliasUrn(probabilities, random_state=np.random.default_rng(0))
    # scipy is given ready probabilities; fastkd pays for the exponentials too
    yield Case(
        "alias build N=1e7",
        lambda: fastkd.AliasTable(scores, 1.0, seed=0),
        {"scipy DiscreteAliasUrn": lambda: DiscreteAliasUrn(probabilities)},
        {"scipy DiscreteAliasUrn": 2.0},
        5,
    )
    generator = np.random.default_rng(0)
    share = 10  # numpy draws a tenth of them
    yield Case(
        f"alias draw {DRAWS:.0e} of N=1e7",
        lambda: table.sample(DRAWS),
        {
            "scipy DiscreteAliasUrn": lambda: urn.rvs(DRAWS),
            "numpy choice": lambda: generator.choice(n, DRAWS // share, p=probabilities),
        },
        {"scipy DiscreteAliasUrn": 5.0, "numpy choice": 100.0},
        9,
        {"numpy choice": share},
    )
    n = 2**24
    weights = torch.rand(n)
    table = fastkd.AliasTable.from_weights(weights, seed=0)
    yield Case(
        f"alias draw {DRAWS:.0e} of N=2^24",
        lambda: table.sample(DRAWS),
        {"torch.multinomial": lambda: torch.multinomial(weights, DRAWS, replacement=True)},
        {"torch.multinomial": 40.0},
        5,
    )


GPU_ITEMS = (10**6, 10**7, 10**8, 10**9)
GPU_DRAWS = 2**24
GPU_CHANGES = 10**5
MULTINOMIAL_ITEMS = 2**24  # it refuses more
CDF_ITEMS = 10**8  # of a sum in fp64 and what it takes to make it


def gpu_cases(settings: Settings) -> Iterator[LazyCase]:
    """Lambda from the IQPR, the table, draws and updates, of 1e6 to 1e9 items as far as memory allows."""
    sizes = sorted({min(items, settings.nbytes) for items in GPU_ITEMS})
    for items in sizes:
        for make in (_iqpr, _build, _draw, _update):
            yield make(settings, items)


def _scores(settings: Settings, items: int) -> Tensor:
    return torch.randn(items, device=settings.device, generator=torch.Generator(settings.device).manual_seed(0))


def _iqpr(settings: Settings, items: int) -> LazyCase:
    def build() -> Case:
        scores = _scores(settings, items)
        ordered = scores.sort().values  # torch.quantile refuses more than 16 M elements
        position = torch.tensor([0.25, 0.75], dtype=torch.float64) * (items - 1)
        below = position.long()
        low, high = (ordered[(below + i).clamp(max=items - 1).to(scores.device)].double().cpu() for i in (0, 1))
        truth = math.log(5) / (low + (position - below) * (high - low)).diff()[0]
        del ordered

        contenders = Contenders(
            lambda: fastkd.ops.alias.inverse_temperature(scores, 5.0),
            {"torch.quantile": lambda: math.log(5) / torch.quantile(scores, scores.new_tensor([0.25, 0.75])).diff()[0]},
            lambda value: relative_error(value.cpu(), truth),
            5 / math.sqrt(items),
            5 / math.sqrt(items),
        )
        return contenders.case(
            f"alias IQPR N={items}", settings, rounds=15, floor_bytes=floors.alias_quartiles(items, 4)
        )

    return LazyCase(f"alias IQPR N={items}", build)


def _build(settings: Settings, items: int) -> LazyCase:
    def build() -> Case:
        scores = _scores(settings, items)
        truth = scores[: 1 << 20].double().exp()  # relative to one another

        def error(result: fastkd.AliasTable | Tensor) -> float:
            if isinstance(result, Tensor):
                share = result[: 1 << 20].diff(prepend=result.new_zeros(1))
            else:
                share = result.weights()[: 1 << 20].double()
            return relative_error(share / share.sum(), truth / truth.sum())

        peers = {"softmax and cumsum, fp64": lambda: scores.double().softmax(0).cumsum(0)} if items <= CDF_ITEMS else {}
        contenders = Contenders(lambda: fastkd.AliasTable(scores, 1.0, seed=0), peers, error, 1e-6, 1e-6)
        return contenders.case(f"alias build N={items}", settings, rounds=15, floor_bytes=floors.alias_build(items, 4))

    return LazyCase(f"alias build N={items}", build)


def _draw(settings: Settings, items: int) -> LazyCase:
    draws = min(GPU_DRAWS, max(settings.nbytes, 2**18))

    def build() -> Case:
        scores = _scores(settings, items)
        table = fastkd.AliasTable(scores, 1.0, seed=0)
        top_in_cache = items <= 10**9
        peers = {}
        if items <= CDF_ITEMS:
            cdf = scores.double().softmax(0).cumsum(0)
            peers["searchsorted of an fp64 sum"] = lambda: torch.searchsorted(
                cdf, torch.rand(draws, device=cdf.device, dtype=torch.float64)
            ).clamp_(max=items - 1)
        if items <= MULTINOMIAL_ITEMS:
            weights = scores.exp()
            peers["torch.multinomial"] = lambda: torch.multinomial(weights, draws, replacement=True)

        p = table.probabilities()
        mean = (p * scores).sum()
        deviation = (p * (scores - mean).square()).sum().sqrt()
        del p

        def error(indices: Tensor) -> float:
            """Of the mean score of the draws, in deviations."""
            return float(((scores[indices].double().mean() - mean) / deviation).abs())

        tolerance = 6 / math.sqrt(draws)
        floor = floors.alias_sample(draws, top_in_cache=top_in_cache)
        contenders = Contenders(lambda: table.sample(draws), peers, error, tolerance, tolerance)
        return contenders.case(f"alias draw N={items}", settings, rounds=15, floor_bytes=floor)

    return LazyCase(f"alias draw N={items}", build)


def _update(settings: Settings, items: int) -> LazyCase:
    changes = min(GPU_CHANGES, items // 10)

    def build() -> Case:
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

        contenders = Contenders(ours, {"a table built anew": built_anew}, error, 1e-5, 1e-5)
        floor = floors.alias_update(items, changes)
        return contenders.case(f"alias update N={items}", settings, rounds=15, floor_bytes=floor)

    return LazyCase(f"alias update N={items}", build)
