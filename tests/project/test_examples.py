"""The examples run, and do what they say."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from fastkd.methods import Hinton, Objective
from fastkd.models.convnet import ConvNet
from fastkd.training import read_metrics

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_own_loop(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    accuracies = load("own_loop").main(epochs=3)
    assert accuracies["teacher"] > 0.9
    assert accuracies["student"] > 0.7
    assert "attention_loss" in capsys.readouterr().out


class StandIn(nn.Module):
    """As much of a LightningModule as the example calls."""

    def __init__(self) -> None:
        super().__init__()
        self.current_epoch = 3
        self.trainer = type("Trainer", (), {"max_epochs": 6})()
        self.logged: dict[str, Any] = {}

    def log_dict(self, values: dict[str, Any]) -> None:
        self.logged |= values

    def log(self, name: str, value: Any, prog_bar: bool = False) -> None:
        self.logged[name] = value


def test_lightning_module_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = ModuleType("lightning")
    stand_in.LightningModule = StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lightning", stand_in)
    example = load("lightning_module")
    module = example.Distillation(Objective(Hinton(), ConvNet((4, 8), seed=1), ConvNet((8, 8), seed=0)))
    seen: list[float] = []
    step = Hinton.step
    monkeypatch.setattr(
        Hinton, "step", lambda self, *inputs: (seen.append(inputs[-1]), step(self, *inputs))[1]
    )  # its progress
    optimizer = module.configure_optimizers()
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(module.objective.parameters()))
    train, test = example.loaders()
    losses = []
    for i, batch in enumerate(train):
        loss = module.training_step(batch, i)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert set(seen) == {0.5}
    assert module.logged.keys() == {"loss", "task_loss", "kd_loss", "accuracy"}
    assert not any(value.requires_grad for value in module.logged.values())
    module.validation_step(next(iter(test)), 0)
    assert 0 <= module.logged["test_accuracy"] <= 1


def test_lightning_module_with_lightning() -> None:
    pytest.importorskip("lightning", reason="Lightning is not installed")
    load("lightning_module").main(epochs=1)


def test_lightning_module_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(SystemExit, match="this example needs Lightning: pip install lightning"):
        load("lightning_module")


@pytest.mark.forks
def test_ddp_under_torchrun(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(EXAMPLES / "ddp.py"), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 12/12: step 132") == 1  # rank 0 alone shows
    assert f"2 processes; weights, metrics and curves are in {tmp_path}" in done.stdout
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["test_accuracy"] > 0.8
    assert (tmp_path / "curves.png").stat().st_size > 10_000
