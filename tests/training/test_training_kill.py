"""A process that is killed, whenever that is, leaves a checkpoint that is whole, and the training comes to the same."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
from training_cases import assert_same_end, train
from training_processes import KILLED, PATIENCE, POINTS, kill_itself, start, train_slowly

from fastkd._threads import one_thread
from fastkd.training import checkpoint

pytestmark = [pytest.mark.no_kernels, pytest.mark.forks, pytest.mark.usefixtures("one_thread", "no_figures")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    with one_thread():
        train("bss", folder, KILLED)
    return folder


def test_killed_at_any_moment(whole: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    path = tmp_path / "checkpoint.pt"
    kills = 0
    for seed in range(6):
        process = start(train_slowly, tmp_path, seed if path.exists() else 0)
        since = path.stat().st_mtime_ns if path.exists() else 0
        while process.is_alive() and not (path.exists() and path.stat().st_mtime_ns > since):
            time.sleep(0.002)
        time.sleep(0.15 * draw.random())
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        checkpoint.read(path)
    assert kills >= 3  # six steps each or so, of 48
    train("bss", tmp_path, KILLED, seed=9, resume=True)
    assert_same_end(whole, tmp_path)


@pytest.mark.parametrize("point", POINTS)
def test_killed_while_a_checkpoint_is_written(point: str, whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    for seed, times in enumerate((1, 3, 2)):
        process = start(kill_itself, tmp_path, seed if path.exists() else 0, point, times)
        process.join(PATIENCE)
        assert process.exitcode == -signal.SIGKILL
        if path.exists():
            checkpoint.read(path)
    train("bss", tmp_path, KILLED, seed=9, resume=True)
    assert_same_end(whole, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "checkpoint.pt",
        "curves.png",
        "metrics.jsonl",
        "model.pt",
    ]
