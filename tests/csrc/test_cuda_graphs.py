"""CUDA graphs: every function is captured, forward and backward, and replayed with new inputs and new seeds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cuda_cases import DETERMINED, RANDOM, Case, assert_identical, needs_cuda, parametrized_determined
from torch import Tensor

pytestmark = needs_cuda

DEVICE = "cuda"


def capture(
    run: Callable[[], tuple[Tensor, ...]], generator: torch.Generator | None = None
) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """The graph of ``run`` and the tensors that each replay writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        results = run()
    # as a capture begins, torch writes the generators' seeds on its own stream: late, it would undo those of the first replay
    torch.cuda.synchronize()
    return graph, results


@parametrized_determined
def test_replay_sees_new_inputs(case: Case) -> None:
    static = case.inputs(DEVICE, seed=0)
    graph, results = capture(lambda: case(*static))
    for seed in (1, 2):
        fresh = case.inputs(DEVICE, seed)
        for buffer, value in zip(static, fresh, strict=True):
            buffer.copy_(value)
        graph.replay()
        assert_identical(results, case(*fresh))


def test_rows_of_heads_are_ignored_from_replay_to_replay() -> None:
    """As many as each target says, though the shapes stay."""
    case = next(case for case in DETERMINED if case.name.startswith("linear_kd_loss bias"))
    *sides, target = case.inputs(DEVICE)
    buffer = target.clone()
    graph, results = capture(lambda: case(*sides, buffer))
    for ignored in (0, len(target) // 3, len(target) - 1, len(target)):
        fresh = target.clamp(min=0)
        fresh[:ignored] = -100
        buffer.copy_(fresh)
        graph.replay()
        assert_identical(results, case(*sides, fresh))
    assert not any(value.any() for value in results)  # of no row


@pytest.mark.parametrize("own_generator", [True, False], ids=["registered", "default"])
@pytest.mark.parametrize("case", RANDOM, ids=lambda case: case.name)
def test_seeds_advance_from_replay_to_replay(case: Case, own_generator: bool) -> None:
    generator = torch.Generator(DEVICE) if own_generator else None
    manual_seed = torch.cuda.manual_seed if generator is None else generator.manual_seed
    static = case.inputs(DEVICE)
    graph, results = capture(lambda: case(*static, generator=generator), generator)

    def replays(seed: int) -> list[Tensor]:
        manual_seed(seed)
        drawn = []
        for _ in range(3):
            graph.replay()
            drawn.append(results[0].clone())
        return drawn

    first, again, other = replays(3), replays(3), replays(4)
    assert_identical(tuple(first), tuple(again))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[1], first[2])
    assert not torch.equal(first[0], other[0])
