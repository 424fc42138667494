"""The guide: its method, its procedure and its study are run as they stand there, as a stranger would."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastkd.__main__ import main
from fastkd.data import NoBatches
from fastkd.methods import registry
from fastkd.models.convnet import ConvNet
from fastkd.studies import study
from fastkd.training import read_metrics

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]

GUIDE = (Path(__file__).parents[2] / "docs" / "procedures.md").read_text()
TINY = ["--data", "digits", "--train-size", "100", "--test-size", "40", "--batch-size", "20", "--teacher", "resnet8"]
TINY += ["--epochs", "2", "--learning-rate", "0.02", "--device", "cpu"]


FILES = {
    "cosine": "class Cosine",
    "adversary": "class Adversary",
    "temperatures": "(Study)",
    "confident": "class Confident",
    "reweighted": "class Reweighted",
}
# imports that the text has said before
HEAD = {
    "confident": """
import torch.nn.functional as F
from fastkd.functional import kl_div
from fastkd.methods import Loss, Method
from fastkd.methods.registry import register
@register("confident", family="response")
""",
    "reweighted": """
import torch
import torch.nn.functional as F
from fastkd.methods import Part, Procedure
from fastkd.methods.registry import register
""",
}


def block(words: str) -> str:
    (found,) = (text for text in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL) if words in text)
    return str(found)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The guide's files by the names of what they register."""
    paths = {}
    for name, words in FILES.items():
        path = tmp_path / f"{name}.py"
        path.write_text(HEAD.get(name, "") + block(words))
        paths[name] = str(path)
    yield paths
    for name in paths:
        registry._entries.pop(name, None)
        study._studies.pop(name, None)
        sys.modules.pop(f"fastkd_plugin_{name}", None)


def test_a_procedure_takes_less_than_fifty_lines() -> None:
    assert len(block("class Adversary").splitlines()) < 50
    example = Path(__file__).parents[2] / "examples" / "adversarial.py"
    assert len(example.read_text().splitlines()) <= 80


@pytest.mark.parametrize("name", [name for name in FILES if name != "temperatures"])
def test_method_and_procedure(
    name: str, files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["methods", "--plugin", files[name]]) == 0
    assert f" {name} " in capsys.readouterr().out
    made = tmp_path / "made"
    assert main(["distill", *TINY, "--plugin", files[name], "--method", name, "--output", str(made)]) == 0
    first, last = read_metrics(made / "metrics.jsonl")
    assert last["loss"] < first["loss"]
    of_the_method = {"cosine": "cosine_loss", "adversary": "generator_learning_rate", "confident": "sure_loss"}
    assert of_the_method.get(name, "spread") in last


def test_study(files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["study", "temperatures", "--plugin", files["temperatures"], *TINY, "--temperatures", "1", "4"]
    assert main([*command, "--seeds", "1", "--output", str(tmp_path / "made")]) == 0
    table = (tmp_path / "made" / "table.md").read_text()
    assert "## noise-0.4" in table
    document = json.loads((tmp_path / "made" / "results.json").read_text())
    assert {column: list(rows) for column, rows in document["accuracies"].items()} == {
        "clean": ["1", "4"],
        "noise-0.4": ["1", "4"],
    }
    assert str(tmp_path) not in document["command"]
    capsys.readouterr()


def test_without_the_command_line(files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    registry.load_plugin(files["adversary"])
    images = torch.randn(4, 1, 8, 8)
    names = {
        "Adversary": registry.find("adversary").kind,
        "student": ConvNet((4, 8), seed=0),
        "teacher": ConvNet((4, 8), seed=1),
        "images": images,
        "device": "cpu",
        "test_images": images,
        "test_target": torch.arange(4),
    }
    text = block("trainer.fit").replace("epochs=20", "epochs=2").replace("NoBatches(100)", "NoBatches(3)")
    exec(compile(text, "guide", "exec"), names)
    assert names["network"] is names["trainer"].deployed  # type: ignore[attr-defined]
    assert (tmp_path / "run" / "model.pt").is_file()
    assert len(NoBatches(3)) == 3
