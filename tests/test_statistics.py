"""Statistics of draws, on the device: against loops, at their ends, compiled, and without a copy to the host."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd
from fastkd import AliasTable, statistics

N = 40
SYNCHRONISES = ("_local_scalar_dense", "nonzero", "masked_select", "unique")


class NoSynchronisation(TorchDispatchMode):
    """An error where an operator would wait for a GPU, or copy from it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert not name.startswith(SYNCHRONISES), name
        assert name != "_to_copy" or "device" not in (kwargs or {}), "copied to another device"
        if name == "index":
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "indexed by a mask"
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=[0, 1, 2])
def draws(request: pytest.FixtureRequest) -> torch.Tensor:
    """Indices with repetitions; some items never come."""
    generator = torch.Generator().manual_seed(request.param)
    weights = torch.rand(N, generator=generator) ** 4
    return torch.multinomial(weights, 60, replacement=True, generator=generator)


RELEVANT = torch.arange(N) % 3 == 0


def test_against_loops(draws: torch.Tensor) -> None:
    seen = Counter(draws.tolist())
    counts = statistics.draw_counts(draws, N)
    assert counts.tolist() == [seen[i] for i in range(N)]
    assert statistics.skip_ratio(counts).item() == pytest.approx(sum(i not in seen for i in range(N)) / N)
    shares = [times / 60 for times in seen.values()]
    entropy = -sum(share * math.log(share) for share in shares)
    assert statistics.uniformity(counts).item() == pytest.approx(entropy / math.log(len(seen)), rel=1e-14)
    expected = sum((1 - seen[i] / 60) ** 100 for i in range(N)) / N
    assert statistics.expected_skip_ratio(counts / 60, 100).item() == pytest.approx(expected, rel=1e-5)
    irrelevant = sum(not RELEVANT[i] for i in seen) / len(seen)
    assert statistics.irrelevant_proportion(counts, RELEVANT).item() == pytest.approx(irrelevant)
    relevant = sum(bool(RELEVANT[i]) for i in draws) / 60
    assert statistics.relevant_draws(counts, RELEVANT).item() == pytest.approx(relevant)
    assert statistics.effective_sample_size(counts).item() == pytest.approx(1 / sum(share**2 for share in shares))


def test_counts_add_up(draws: torch.Tensor) -> None:
    total = torch.zeros(N, dtype=torch.int64)
    for part in (draws[:7], draws[7:7], draws[7:].reshape(1, -1)):
        assert statistics.draw_counts(part, out=total) is total
    assert torch.equal(total, torch.bincount(draws, minlength=N))


def test_indices_outside_are_not_counted() -> None:
    indices = torch.tensor([-(2**63), -1, 0, 2, 3, 2**62])
    assert statistics.draw_counts(indices, 3).tolist() == [1, 0, 1]
    assert statistics.draw_counts(indices, 0).tolist() == []


def test_ends() -> None:
    nothing, equal = torch.zeros(N, dtype=torch.int64), torch.full((N,), 7)
    single = torch.zeros(N, dtype=torch.int64)
    single[3] = 9
    assert statistics.skip_ratio(nothing) == 1
    assert statistics.skip_ratio(equal) == 0
    assert statistics.uniformity(equal).item() == pytest.approx(1.0)
    assert all(statistics.uniformity(equal[:n]) <= 1 for n in range(1, 30))
    assert statistics.uniformity(single) == 1
    assert statistics.effective_sample_size(equal).item() == pytest.approx(N)
    assert statistics.effective_sample_size(single) == 1
    certain = torch.tensor([1.0, 0.0])
    assert statistics.expected_skip_ratio(certain, 0) == 1
    assert statistics.expected_skip_ratio(certain, 5) == 0.5
    assert statistics.expected_skip_ratio(certain, torch.tensor(5)) == 0.5
    for undefined in (
        statistics.uniformity(nothing),
        statistics.irrelevant_proportion(nothing, RELEVANT),
        statistics.relevant_draws(nothing, RELEVANT),
        statistics.effective_sample_size(nothing),
        statistics.underflow_ratio(torch.full((3,), -math.inf), nothing[:3]),
    ):
        assert undefined.isnan()


@pytest.mark.parametrize("scale", [1e-320, 1e-200, 1.0, 2.0**51, 1e300])
def test_effective_sample_size_of_any_scale(scale: float) -> None:
    weights = torch.tensor([4.0, 2.0, 2.0, 0.0], dtype=torch.float64) * scale
    assert statistics.effective_sample_size(weights).item() == pytest.approx(
        64 / 24, rel=1e-2 if scale < 1e-300 else 1e-14
    )


def test_of_a_table(generator: torch.Generator) -> None:
    scores = torch.randn(5000, generator=generator, dtype=torch.float64)
    scores[:3] = torch.tensor([-math.inf, -50.0, 0.0])
    table = AliasTable(scores, 1.0, seed=1)
    p = torch.softmax(scores, 0)
    assert table.effective_sample_size().item() == pytest.approx(1 / (p * p).sum().item(), rel=1e-8)
    assert table.underflowed(scores).nonzero().flatten().tolist() == [1]
    assert statistics.underflow_ratio(scores, table.weights()).item() == pytest.approx(1 / 4999)


COUNTS, INDICES = torch.arange(N) % 4, torch.arange(N) % 7
SCORES, TABLE = torch.linspace(0, 3, N), AliasTable(torch.linspace(0, 3, N), 1.0, seed=1)
CALLS: dict[str, Callable[[], torch.Tensor]] = {
    "draw_counts": lambda: statistics.draw_counts(INDICES, N),
    "draw_counts out": lambda: statistics.draw_counts(INDICES, out=torch.zeros(N, dtype=torch.int64)),
    "skip_ratio": lambda: statistics.skip_ratio(COUNTS),
    "expected_skip_ratio": lambda: statistics.expected_skip_ratio(COUNTS / COUNTS.sum(), COUNTS.sum()),
    "uniformity": lambda: statistics.uniformity(COUNTS),
    "irrelevant_proportion": lambda: statistics.irrelevant_proportion(COUNTS, RELEVANT),
    "relevant_draws": lambda: statistics.relevant_draws(COUNTS, RELEVANT),
    "effective_sample_size": lambda: statistics.effective_sample_size(COUNTS),
    "underflowed": lambda: statistics.underflowed(SCORES, COUNTS),
    "underflow_ratio": lambda: statistics.underflow_ratio(SCORES, COUNTS),
    "table.effective_sample_size": TABLE.effective_sample_size,
    "table.underflowed": lambda: TABLE.underflowed(SCORES),
}


@pytest.mark.parametrize("name", CALLS)
def test_nothing_waits_and_everything_compiles(name: str) -> None:
    torch._dynamo.reset()
    expected = CALLS[name]()
    if expected.dim() == 0:
        assert expected.dtype == torch.float64
    with NoSynchronisation():
        CALLS[name]()
    compiled = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(compiled, expected)


def test_all_are_tested() -> None:
    assert set(statistics.__all__) <= {name.split()[0] for name in CALLS}
    assert fastkd.statistics is statistics


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: statistics.draw_counts([1], 3), TypeError, "indices is list, must be an int64 tensor"),
        (lambda: statistics.draw_counts(torch.zeros(1), 3), TypeError, "indices has dtype torch.float32, must be"),
        (lambda: statistics.draw_counts(INDICES), ValueError, "items and out are neither given, must be one of them"),
        (lambda: statistics.draw_counts(INDICES, 3, out=COUNTS), ValueError, "items and out are both given"),
        (lambda: statistics.draw_counts(INDICES, -1), ValueError, "items is -1, must be at least 0"),
        (lambda: statistics.draw_counts(INDICES, out=[0]), TypeError, "out is list, must be an int64 tensor"),
        (lambda: statistics.draw_counts(INDICES, out=torch.zeros(3)), TypeError, "out has dtype torch.float32"),
        (
            lambda: statistics.draw_counts(INDICES, out=COUNTS[None]),
            ValueError,
            "out has shape \\(1, 40\\) on cpu, must",
        ),
    ],
)
def test_errors(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
