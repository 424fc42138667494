"""The guide to collections: its blocks are run as they stand there, one after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fastkd

pytestmark = [pytest.mark.no_kernels, pytest.mark.forks, pytest.mark.usefixtures("one_thread")]

GUIDE = (Path(__file__).parents[2] / "docs" / "collections.md").read_text()


class Images(Dataset[Any]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, i: int) -> tuple[Any, int]:
        return Image.new("L", (20, 20), i), i


def test_the_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)  # of the networks
    random = np.random.default_rng(0)
    np.save("faces.npy", random.integers(0, 256, (30, 3, 32, 32), np.uint8))
    for i in range(12):
        path = Path("photos", f"{i:02d}.png")
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 40, 3), np.uint8)).save(path)
    path.write_bytes(b"no image")
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(3072, n), nn.ReLU(), nn.Linear(n, 10)) for n in (9, 6)]
    names = {
        "torch": torch,
        "DataLoader": DataLoader,
        "digits_28x28": random.integers(0, 256, (20, 28, 28), np.uint8),
        "dataset": Images(),
        "index": torch.tensor([40, 3, 3]),
        "teacher": networks[0],
        "student": networks[1],
        "criterion": fastkd.KLDivLoss(2.0),
        "mean": 0.5,
        "std": 0.25,
        "weights": torch.rand(10),
    }
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    assert len(blocks) == 7
    for block in blocks:
        exec(compile(block, "docs/collections.md", "exec"), names)
    printed = capsys.readouterr().out
    assert printed.startswith("(Unreadable(index=41, ")
    assert "\n41 11.png " in printed
    assert isinstance(names["network"][3], nn.Linear)  # type: ignore[index]
    assert "SourceStatistics(items=12, draws=" in printed
    assert names["images"].shape == (3, 3, 32, 32)  # type: ignore[attr-defined]
    assert names["scores"][41] == -torch.inf  # type: ignore[index]
    state = torch.load("source.pt", weights_only=True)
    assert {"table", "scores", "epoch"} <= set(state["table"])
    assert state["counts"].sum() == 2 * 10 * 64
    assert len(names["loader"]) == 16  # type: ignore[arg-type]
