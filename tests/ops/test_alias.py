"""The alias table: exact against the integer reference, distributed as it says, the same for any threads and calls."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from alias_cases import lambda_of, stream_of
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from fastkd import AliasTable
from fastkd.ops import alias as ops
from fastkd.reference import alias as reference

INFINITY = math.inf


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _scores(kind: str, n: int, generator: torch.Generator) -> Tensor:
    u = torch.randn(n, generator=generator)
    if kind == "constant":
        return torch.zeros(n)
    if kind == "steep":
        return u * 30
    if kind == "masked":
        return torch.where(torch.arange(n) % 3 == 0, u, -INFINITY)
    if kind == "one":
        return torch.where(torch.arange(n) == n // 2, 40.0, u)
    return u


@pytest.mark.cuda_kernels
@pytest.mark.parametrize("kind", ["normal", "constant", "steep", "masked", "one"])
@pytest.mark.parametrize("n", [1, 2, 3, 41, 4095, 4096, 4097, 9000])
def test_table_equals_the_integer_reference(
    device: torch.device, kind: str, n: int, generator: torch.Generator
) -> None:
    scores = _scores(kind, n, generator)
    table = ops.build(scores.to(device), lambda_of(1.3, device))
    for ours, expected in zip(table[:3], reference.build(scores.numpy(), 1.3), strict=True):
        np.testing.assert_array_equal(ours.cpu().numpy(), expected)
    weights, exponent = reference.weights(scores.numpy(), 1.3)
    assert ops.weights(table).tolist() == weights
    assert table.scale.tolist()[2:] == [exponent, sum(weights)]
    assert sum(weights) < 2**52


@pytest.mark.cuda_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype_is_the_fp64_table_of_its_values(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> None:
    scores = torch.randn(5001, generator=generator).to(dtype).to(device)
    for part in (scores[:-1], scores[1:]):  # the second one does not begin at 16 bytes
        ours, expected = ops.build(part, lambda_of(2.0, device)), ops.build(part.double(), lambda_of(2.0, device))
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.cuda_kernels
def test_draws_equal_the_reference(device: torch.device, generator: torch.Generator) -> None:
    scores = torch.randn(300, generator=generator)
    table = ops.build(scores.to(device), lambda_of(1.0, device))
    seed, start = -(2**62) - 12345, 2**40
    draws = ops.sample(table, stream_of(seed, start, device), 40)
    expected = [reference.sample(scores.numpy(), 1.0, seed % 2**64, start + i) for i in range(40)]
    assert draws.tolist() == expected


@pytest.mark.cuda_kernels
@pytest.mark.parametrize("n", [1, 10, 10**3, 10**6])
def test_total_variation_to_the_softmax(device: torch.device, backend: str, n: int, generator: torch.Generator) -> None:
    if backend.startswith("emulated"):
        n = min(n, 10**4)
    for scale in (0.0, 1.0, 10.0, 1000.0):
        scores = (torch.randn(n, generator=generator).double() * scale).to(device)
        p = AliasTable(scores, 1.0).probabilities()
        assert 0.5 * (p - torch.softmax(scores, 0)).abs().sum() < 2e-9


@pytest.mark.parametrize(("n", "draws"), [(10, 10**6), (10**3, 10**6), (10**6, 2 * 10**7)])
def test_draws_follow_the_table(n: int, draws: int, generator: torch.Generator) -> None:
    table = AliasTable(torch.rand(n, generator=generator) * 2, 1.0, seed=1)
    counts = torch.bincount(table.sample(draws), minlength=n)
    expected = table.probabilities() * draws
    assert expected.min() > 5
    assert stats.chisquare(counts.numpy(), expected.numpy()).pvalue > 1e-3


def test_half_of_the_draws_fall_into_the_upper_half_at_two_to_the_25() -> None:
    # pytorch#43115: torch.multinomial's fp32 sums give none of them
    n, draws = 2**25, 10**6
    upper = AliasTable(torch.zeros(n), 1.0, seed=3).sample(draws) >= n // 2
    assert abs(upper.double().mean() - 0.5) < 5 * 0.5 / math.sqrt(draws)


def test_more_than_two_to_the_24_items_are_all_reached() -> None:
    n = 2**24 + 5
    draws = AliasTable(torch.zeros(n), 1.0, seed=3).sample(4 * 10**6)
    assert draws.max() > 2**24 - 64
    assert (draws % 2).double().mean().sub(0.5).abs() < 5 * 0.5 / 2000  # odd items: none beyond 2^24 in fp32


@pytest.mark.cuda_kernels
def test_items_of_weight_zero_never_come_out(device: torch.device, generator: torch.Generator) -> None:
    n = 20_000
    scores = torch.where(torch.rand(n, generator=generator) < 0.7, -INFINITY, 0.0).to(device)
    scores[4096:8192] = -INFINITY  # a whole block
    table = AliasTable(scores, 1.0, seed=0)
    drawn = table.sample(10**5)
    assert torch.isfinite(scores[drawn]).all()
    assert (table.weights()[torch.isinf(scores)] == 0).all()


@pytest.mark.cuda_kernels
@pytest.mark.usefixtures("threads")
def test_draws_do_not_depend_on_threads_or_calls(
    device: torch.device, backend: str, generator: torch.Generator
) -> None:
    scores = torch.randn(5000 if backend.startswith("emulated") else 50_000, generator=generator).to(device)
    n = 6003 if backend.startswith("emulated") else 100_003
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(AliasTable(scores, iqpr=5.0, seed=7).sample(n))
    table = AliasTable(scores, iqpr=5.0, seed=7)
    pieces = [table.sample(k) for k in (1, 127, 128, 129, 0, 5000)]
    pieces.append(table.sample(n - sum(len(p) for p in pieces)))
    results.append(torch.cat(pieces))
    results.append(AliasTable(scores, iqpr=5.0).sample_at(7, 0, n))
    assert all(torch.equal(results[0], r) for r in results[1:])
    strided = torch.stack([AliasTable(scores, iqpr=5.0).sample_at(7, r, n // 3, 3) for r in range(3)], 1)
    assert torch.equal(strided.flatten(), results[0][: n // 3 * 3])


def test_instruction_sets_agree(device: torch.device, generator: torch.Generator) -> None:
    scores = torch.randn(30_000, generator=generator) * 3
    table = AliasTable(scores, iqpr=9.0, seed=11)
    digest = int((table.sample(10_000) * torch.arange(1, 10_001)).sum()), int(table.state_dict()["total_weight"])
    assert digest == DIGESTS.setdefault("draws", digest)


DIGESTS: dict[str, tuple[int, int]] = {}


def test_generator_gives_the_seed(generator: torch.Generator) -> None:
    table = AliasTable(torch.randn(1000, generator=generator), 1.0, seed=5)
    first = table.sample(10, generator=torch.Generator().manual_seed(1))
    again = table.sample(10, generator=torch.Generator().manual_seed(1))
    other = table.sample(10, generator=torch.Generator().manual_seed(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert table.state_dict()["next_index"] == 0


# ---- lambda from the IQPR -----------------------------------------------------------------------


@pytest.mark.cuda_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 41, 1271, 300_001])
def test_inverse_temperature_from_quartiles(
    device: torch.device, backend: str, n: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    if backend.startswith("emulated"):
        n = min(n, 20_001)  # three times the elements that all threads take in one turn
    scores = (torch.randn(n, generator=generator) * 1e-3 - 2).to(dtype)
    if n > 4:
        scores[1] = -INFINITY
    ours = ops.inverse_temperature(scores.to(device), 5.0)
    assert ours.item() == pytest.approx(reference.inverse_temperature(scores.double().numpy(), 5.0), rel=1e-12)


@pytest.mark.cuda_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quartiles_of_scores_of_all_magnitudes(
    device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Digits of the four ranks part in the first pass, in the last, and where one has many items."""
    for n in (7, 1000, 5001):
        exponents = torch.randint(-30, 30, (n,), generator=generator)
        scores = (torch.randn(n, generator=generator).sign() * 2.0**exponents).to(dtype)
        for u in (scores, scores.round(), torch.arange(n) // 7 * 1e-3 + 1, -scores.abs()):
            u = u.to(dtype)
            expected = reference.inverse_temperature(u.double().numpy(), 3.0)
            assert ops.inverse_temperature(u.to(device), 3.0).item() == pytest.approx(expected, rel=1e-12)


def test_iqpr_is_the_ratio_of_the_quartiles_probabilities() -> None:
    scores = torch.arange(101.0)
    table = AliasTable(scores, iqpr=7.0)
    p = table.probabilities()
    assert (p[75] / p[25]).item() == pytest.approx(7.0, rel=1e-8)
    assert torch.equal(AliasTable(scores, iqpr=1.0).weights(), AliasTable(torch.zeros(101), 1.0).weights())


def test_equal_quartiles_are_uniform() -> None:
    scores = torch.zeros(100)
    scores[:3] = 5
    table = AliasTable(scores, iqpr=5.0)
    assert table.inverse_temperature == 0
    assert table.weights().unique().numel() == 1


# ---- the other contracts ------------------------------------------------------------------------


def test_from_weights(generator: torch.Generator) -> None:
    weights = torch.rand(1000, generator=generator)
    weights[::4] = 0
    p = AliasTable.from_weights(weights).probabilities()
    torch.testing.assert_close(p, weights.double() / weights.double().sum(), rtol=2e-9, atol=0)


def test_table_takes_eight_bytes_an_item() -> None:
    table = AliasTable(torch.zeros(10 * 4096), 1.0)
    assert table.nbytes <= 8.01 * len(table)


def test_more_draws_than_memory() -> None:
    table = AliasTable(torch.zeros(5))
    message = r"fastkd: a new tensor has shape \(288230376151711744,\) and dtype int64, must be one that the CPU has the memory"
    with pytest.raises(RuntimeError, match=message):
        table.sample(2**58)


def test_state_dict_continues_the_stream(generator: torch.Generator) -> None:
    scores = torch.randn(1000, generator=generator)
    table = AliasTable(scores, iqpr=5.0, seed=3)
    table.sample(100)
    state = table.state_dict()
    expected = table.sample(50)
    resumed = AliasTable(scores, iqpr=5.0)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.sample(50), expected)
    with pytest.raises(ValueError, match=r"state\['total_weight'\].*rebuild the table"):
        AliasTable(scores + torch.rand(1000, generator=generator), state["inverse_temperature"]).load_state_dict(state)


def test_moved_table_goes_on_alike(generator: torch.Generator) -> None:
    table = AliasTable(torch.randn(1000, generator=generator), iqpr=5.0, seed=3)
    table.sample(7)
    moved = table.to("cpu")
    assert torch.equal(moved.sample(20), table.sample(20))
    assert moved.state_dict() == table.state_dict()


def test_a_table_made_in_inference_mode_is_drawn_from_outside(generator: torch.Generator) -> None:
    scores = torch.randn(1000, generator=generator)
    with torch.inference_mode():
        table = AliasTable(scores, 1.0, seed=3)
        moved = table.to("cpu")
    expected = AliasTable(scores, 1.0, seed=3)
    assert torch.equal(table.sample(20), expected.sample(20))
    assert torch.equal(moved.sample(20), table.sample_at(3, 0, 20))
    moved.load_state_dict(table.state_dict())
    assert torch.equal(moved.sample(20), expected.sample(20))


@pytest.mark.cuda_kernels
def test_opcheck(device: torch.device, generator: torch.Generator) -> None:
    scores = torch.randn(5000, generator=generator).to(device)
    table = ops.build(scores, lambda_of(1.0, device))
    op = torch.ops.fastkd
    torch.library.opcheck(op.alias_inverse_temperature.default, (scores, 5.0))
    torch.library.opcheck(op.alias_build.default, (scores, lambda_of(1.0, device)))
    changes = torch.tensor([1, 4999], device=device), torch.tensor([0.0, 1.0], device=device)
    torch.library.opcheck(op.alias_update_.default, (*table, *changes))
    torch.library.opcheck(op.alias_sample.default, (*table, stream_of(1, 0, device), 10, 0, 1))
    torch.library.opcheck(op.alias_weights.default, table[:2])


@pytest.mark.compiles
def test_compiles_into_one_graph(generator: torch.Generator) -> None:
    scores = torch.randn(5000, generator=generator)
    table = AliasTable(scores, iqpr=5.0, seed=4)
    expected = [table.sample(100), table.sample(100)]
    table = AliasTable(scores, iqpr=5.0, seed=4)
    draw = torch.compile(lambda: table.sample(100), fullgraph=True)
    assert torch.equal(draw(), expected[0])
    assert torch.equal(draw(), expected[1])
    expected_probabilities = AliasTable(scores, 1.0).probabilities()
    for make in (lambda u: AliasTable(u, 1.0), lambda u: AliasTable.from_weights(u.double().exp())):
        probabilities = torch.compile(lambda u, make=make: make(u).probabilities(), fullgraph=True)
        torch.testing.assert_close(probabilities(scores), expected_probabilities, rtol=1e-8, atol=0)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: AliasTable([1.0]), TypeError, "scores is list, must be a tensor"),
        (lambda: AliasTable(torch.zeros(0)), RuntimeError, "scores has shape \\(0,\\), must hold at least one item"),
        (lambda: AliasTable(torch.zeros(2, 2)), RuntimeError, "scores has shape \\(2, 2\\), must have 1 dim"),
        (lambda: AliasTable(torch.zeros(3).long()), TypeError, "scores has dtype torch.int64, must be float32"),
        (lambda: AliasTable(torch.tensor([0.0, math.nan])), RuntimeError, "scores holds NaN or \\+inf"),
        (lambda: AliasTable(torch.tensor([0.0, INFINITY])), RuntimeError, "scores holds NaN or \\+inf"),
        (lambda: AliasTable(torch.full((3,), -INFINITY)), RuntimeError, "scores are all -inf"),
        (lambda: AliasTable(torch.full((3,), -INFINITY), iqpr=5.0), RuntimeError, "scores are all -inf"),
        (lambda: AliasTable(torch.zeros(3), -1.0), RuntimeError, "inverse_temperature is -1, must be finite and at"),
        (lambda: AliasTable(torch.zeros(3), math.nan), RuntimeError, "inverse_temperature is -?nan"),
        (lambda: AliasTable(torch.zeros(3), torch.zeros(2)), RuntimeError, "inverse_temperature has shape \\(2,\\)"),
        (lambda: AliasTable(torch.zeros(3), 1.0, iqpr=5.0), ValueError, "given one at a time"),
        (lambda: AliasTable(torch.zeros(3), iqpr=0.5), RuntimeError, "iqpr is 0.5, must be finite and at least 1"),
        (lambda: AliasTable(torch.zeros(3), iqpr=INFINITY), RuntimeError, "iqpr is inf"),
        (lambda: AliasTable(torch.zeros(3)).sample(-1), ValueError, "n is -1, must be at least 0"),
        (lambda: AliasTable(torch.zeros(3)).sample_at(0, 0, 5, 0), ValueError, "stride is 0"),
        (lambda: AliasTable.from_weights(torch.tensor([1.0, -1.0])), ValueError, "weights must be finite and at least"),
        (lambda: AliasTable.from_weights(torch.zeros(2)), ValueError, "not all 0"),
        (lambda: AliasTable.from_weights([1.0]), TypeError, "weights is list"),
        (
            lambda: AliasTable(torch.zeros(3)).update(torch.tensor([0.0]), torch.zeros(1)),
            TypeError,
            "indices has dtype torch.float32, must be torch.int64",
        ),
        (
            lambda: AliasTable(torch.zeros(3)).update(torch.tensor([0, 1]), torch.zeros(1)),
            RuntimeError,
            "scores has shape \\(1,\\), must be \\(2,\\)",
        ),
        (
            lambda: torch.ops.fastkd.alias_update_(
                *ops.build(torch.zeros(3), lambda_of(1.0))[:3],
                torch.zeros(1).double().expand(4),
                torch.tensor([0]),
                torch.zeros(1),
            ),
            RuntimeError,
            "scale must be contiguous",
        ),
        (
            lambda: torch.ops.fastkd.alias_sample(
                torch.zeros(3).long(), torch.zeros(2).long(), *[torch.zeros(2).long()] * 3, 1, 0, 1
            ),
            RuntimeError,
            "block_weight has shape \\(2,\\), must be \\(1,\\)",
        ),
    ],
)
def test_errors(make: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()  # type: ignore[operator]


@settings(max_examples=60)
@given(
    scores=st.lists(st.floats(width=32) | st.sampled_from([-INFINITY, 3e38, -3e38, 1e-45, 0.0, -0.0]), max_size=40),
    inverse_temperature=st.floats(0, 1e308) | st.sampled_from([0.0, 1.0, 1e300, math.nan, -1.0]),
)
def test_any_scores_give_a_table_or_an_error(scores: list[float], inverse_temperature: float) -> None:
    u = torch.tensor(scores, dtype=torch.float32)
    valid = len(scores) > 0 and not (u.isnan() | (u == INFINITY)).any() and (u > -INFINITY).any()
    try:
        table = ops.build(u, lambda_of(inverse_temperature))
    except RuntimeError as error:
        assert "fastkd: " in str(error)  # noqa: PT017
        return
    assert valid
    weights = ops.weights(table)
    assert 0 < weights.sum() < 2**52
    draws = ops.sample(table, torch.tensor([1, 2]), 200)
    assert (weights[draws] > 0).all()


@pytest.mark.cuda_kernels
@settings(max_examples=20)
@given(words=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=20, max_size=20), count=st.integers(-2, 300))
def test_a_corrupt_table_never_crashes(device: torch.device, words: list[int], count: int) -> None:
    values = torch.tensor(words, device=device)
    table = ops.Table(
        values[:8].clone(), values[8:9].clone(), values[9:11].reshape(1, 2).clone(), values[12:16].double()
    )
    for call in (
        lambda: ops.sample(table, values[16:18].clone(), count),
        lambda: ops.weights(table),
        lambda: ops.update(table, torch.tensor([3], device=device), torch.tensor([0.0], device=device)),
    ):
        try:
            call()
        except RuntimeError as error:
            assert "fastkd: " in str(error)  # noqa: PT017
