"""The guide to noisy labels: its blocks are run as they stand there; its tables are those of the registry and of the rules."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from noisy_cases import BATCH, ITEMS, Noisy
from training_cases import CLASSES, small_resnet

from fastkd import noise
from fastkd.methods import registry

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]

GUIDE = (Path(__file__).parents[2] / "docs" / "noisy-labels.md").read_text()


def test_the_blocks() -> None:
    data = Noisy()
    pixels = (255 * data.images.sigmoid()).to(torch.uint8)
    names: dict[str, Any] = {
        "student": small_resnet(0),
        "pixels": torch.cat([pixels, pixels]),
        "labels": torch.cat([data.target, data.target]),
        "class_names": [str(i) for i in range(CLASSES)],
        "test_images": data.images,
        "test_target": data.truth,
    }
    train, loop, find = (
        compile(block, "docs/noisy-labels.md", "exec") for block in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    )
    exec(train, names)
    with torch.no_grad():
        names["probabilities"] = names["network"](names["train"].normalised()).softmax(1)
    exec(find, names)
    assert len(names["found"].noisy) == 2 * ITEMS
    assert len(names["suspects"]) == names["found"].count
    student = small_resnet(0)
    index = torch.arange(BATCH)
    names |= {"torch": torch, "student": student, "num_classes": CLASSES, "labels": data.target}
    names |= {"loader": 3 * [(data.images[:BATCH], data.target[:BATCH], index)]}
    names |= {"optimizer": torch.optim.SGD(student.parameters(), lr=0.01)}
    exec(loop, names)
    assert names["samples"].written[:BATCH].all()
    assert not names["samples"].written[BATCH:].any()


def test_the_tables() -> None:
    """Every method with its paper, networks and views; every rule."""
    rows = re.findall(r"^\| ([a-z+-]+) \| .* \| (\d.*) \| (\d) \| (.*) \|$", GUIDE, re.MULTILINE)
    named = [name for name in registry.names() if registry.find(name).family == "noisy labels"]
    assert sorted(row[0] for row in rows) == sorted(named)
    for name, _, views, paper in rows:
        entry = registry.find(name)
        assert entry.paper == paper
        assert getattr(entry.kind, "views", None) == int(views)
    rules = re.findall(r"^\| (\w+) \| [^|]* \| [^|]*\|$", GUIDE, re.MULTILINE)
    assert [rule for rule in rules if rule != "rule"] == list(noise.RULES)
