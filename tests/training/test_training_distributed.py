"""Two processes over gloo: equal weights, the gradient of the whole batch, exact resume."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_cases import (
    Batches,
    Linear,
    assert_same_end,
    differences,
    make_settings,
    metrics,
    small,
    small_resnet,
    train,
)
from training_processes import (
    CASES,
    PATIENCE,
    errors_in_two,
    gradients_in_two,
    start_ranks,
    static_graphs_in_two,
    train_in_two,
)

from fastkd.training import process_group

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread", "no_figures")]


OWN = {"student_memory", "teacher_memory", "log_scales"}  # what each rank knows of the items that it saw


def load(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    start_ranks(train_in_two, folder)
    return folder


@pytest.mark.forks
@pytest.mark.parametrize("method", CASES)
def test_ranks_stay_equal_and_go_on(method: str, trained: Path) -> None:
    whole, parts = (trained / method / name for name in ("whole", "parts"))
    for folder in (whole, parts):
        for kind in ("rank", "deployed"):
            found = differences(*(load(folder / f"{kind}{rank}.pt") for rank in range(2)))
            assert {name.removeprefix(".method.") for name in found} == (
                OWN if (method, kind) == ("crd", "rank") else set()
            )
    assert_same_end(whole, parts)
    settings = make_settings(**CASES[method])
    assert len(metrics(whole)) == settings.epochs
    make = small_resnet if method == "one" else small
    with pytest.raises(ValueError, match="ranks is 2 there, 1 here"):
        train(method, whole, settings, resume=True, make=make)


@pytest.mark.forks
@pytest.mark.parametrize("accumulate", [1, 3])
def test_gradient_is_that_of_the_whole_batch(accumulate: int, tmp_path: Path) -> None:
    start_ranks(gradients_in_two, tmp_path / "two", accumulate)
    settings = make_settings(epochs=1, momentum=0.0, nesterov=False, weight_decay=0.0, learning_rate=1.0)
    train("hinton", tmp_path / "one", settings, batches=Batches(1, 24), make=Linear)
    ours, theirs = load(tmp_path / "two" / "rank0.pt"), load(tmp_path / "one" / "model.pt")
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=3e-7)
    two, one = metrics(tmp_path / "two")[0], metrics(tmp_path / "one")[0]
    for name in set(one) - {"seconds", "step"}:
        assert two[name] == pytest.approx(one[name], rel=1e-6)


@pytest.mark.forks
def test_networks_that_learn_together_under_a_static_graph(tmp_path: Path) -> None:
    """DistributedDataParallel then looks for the tensors among what they return."""
    start_ranks(static_graphs_in_two, tmp_path)
    for name in ("cohort", "branches"):
        for kind in ("alone", "tapped", "objective"):
            first, second = (load(tmp_path / f"{name}-{kind}{rank}.pt") for rank in range(2))
            assert first.shape[0] == 3
            assert first.abs().sum() > 0
            torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.forks
def test_errors_are_everywhere(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").touch()
    start_ranks(errors_in_two, tmp_path)
    for name, words in (
        ("said", "holds a checkpoint: fit(resume=True) goes on from it"),
        ("full", "No space left on device: 'checkpoint.pt'"),
    ):
        said = [(tmp_path / f"{name}{rank}").read_text() for rank in range(2)]
        assert said[0] == said[1]
        assert words in said[0]


@pytest.mark.forks
def test_group_ends_with_its_block() -> None:
    """In an interpreter that has not imported torch._dynamo before; DistributedDataParallel does."""
    code = """
import weakref, torch, torch.distributed as dist
from fastkd.training import process_group
with process_group("cpu"):
    network = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    network(torch.ones(3, 2)).sum().backward()
    del network
    group = weakref.ref(dist.group.WORLD)
assert group() is None
"""
    one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **one}, check=True, timeout=PATIENCE)


def test_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    with process_group("cpu") as process:
        assert process == (0, 1, torch.device("cpu"))
        assert not torch.distributed.is_initialized()
    monkeypatch.setenv("RANK", "0")
    message = "the environment has RANK but no WORLD_SIZE, LOCAL_RANK: torchrun sets all of them"
    with pytest.raises(ValueError, match=message), process_group("cpu"):
        pass
