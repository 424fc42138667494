"""The guide to distillation from out-of-domain images: its block is run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datafree_cases import teacher
from training_cases import Batches, small

from fastkd.methods.registry import find, names

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]

GUIDE = (Path(__file__).parents[2] / "docs" / "mosaic.md").read_text()


def test_the_block() -> None:
    images, target, _ = Batches(batch=32).of(0)
    pixels = torch.randint(256, (50, 1, 8, 8), dtype=torch.uint8)
    given: dict[str, Any] = {"student": small(0), "teacher": teacher(), "images": images[:4], "pixels": pixels}
    given |= {"torch": torch, "test_images": images, "test_target": target}
    (block,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    exec(compile(block, "docs/mosaic.md", "exec"), given)
    assert given["made"].shape == (64, 1, 8, 8)
    assert len(given["trainer"]._state.history) == 2
    assert given["network"] is given["student"]


def test_all_methods_are_there() -> None:
    ours = [name for name in names() if find(name).family == "out-of-domain"]
    assert set(ours) == {"mosaic", "ood-kd", "ood-fitnet", "ood-rkd", "ood-crd", "ood-sskd"}
    for name in ours:
        assert name in GUIDE
