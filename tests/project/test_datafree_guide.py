"""The guide to distillation without data: its blocks are run as they stand there; its table is that of the registry."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datafree_cases import METHODS, teacher
from training_cases import Batches, small

from fastkd.methods import registry
from fastkd.methods.registry import Given, create_procedure, find

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]

GUIDE = (Path(__file__).parents[2] / "docs" / "datafree.md").read_text()


def test_the_blocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))  # what is registered here goes with the test
    images, target, _ = Batches(batch=32).of(0)
    network = teacher()
    names: dict[str, Any] = {
        "student": small(0),
        "teacher": network,
        "images": images[:4],
        "test_images": images,
        "test_target": target,
    }
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, "docs/datafree.md", "exec"), names)
    assert names["pictures"].shape == (64, 1, 8, 8)
    assert 0.0 <= float(names["distance"]) < float("inf")
    assert find("confident").summary.startswith("Hard images of the teacher's statistics, selected")
    assert find("sharp").options()["margin"].default == 0.1
    given = Given(small(0), network, images[:4], 12)
    for name in ("confident", "sharp"):
        procedure = create_procedure(name, given, width=4, latent=4)
        terms = procedure.generator_terms(procedure.judge(*procedure.maker()))  # type: ignore[operator,attr-defined]
        assert all(torch.isfinite(term) for term in terms.values())


def test_the_table_has_every_method() -> None:
    rows = re.findall(r"^\| ([a-z-]+) \| .* \| (\S.*) \| (.*) \| (.*) \| (.*) \|$", GUIDE, re.MULTILINE)
    assert [row[0] for row in rows if row[0] != "name"] == list(METHODS)[: len(rows) - 1]
    for name, _, _, _, paper in rows:
        if name != "name":
            assert find(name).paper.startswith(paper.split(",")[0].split(" et al.")[0])
