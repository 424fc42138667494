"""Methods of others: one file, registered, listed, run from the command line, and resumed; as a plugin or an entry point."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from training_processes import PATIENCE

from fastkd.__main__ import main
from fastkd.methods import Hinton, Method, Procedure, registry
from fastkd.methods.registry import Given, create, create_procedure, find, load_plugin, names, register
from fastkd.models.convnet import ConvNet

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]

EXAMPLE = Path(__file__).parents[2] / "examples" / "adversarial.py"
TINY = ["--data", "digits", "--train-size", "100", "--test-size", "40", "--batch-size", "20", "--teacher", "resnet8"]
TINY += ["--epochs", "2", "--learning-rate", "0.02", "--device", "cpu"]
MINE = '''
"""A method and a procedure of somebody else's."""

from dataclasses import dataclass

import torch

from fastkd.functional import kl_div, logit_stats
from fastkd.methods import Part, Procedure, WeightedMethod
from fastkd.methods.registry import register


@register("confident", family="response", paper="somebody, 2026")
class Confident(WeightedMethod):
    """Hinton, where the teacher is sure.

    Args:
        threshold: the least share of the teacher's first class.
    """

    def __init__(self, temperature: float = 4.0, *, threshold: float = 0.5) -> None:
        super().__init__(0.1, 0.9, 0.0, temperature)
        self.threshold = threshold

    def forward(self, student, teacher, target, progress=0.0):
        loss = super().forward(student, teacher, target, progress)
        stats = logit_stats(teacher.logits)
        sure = ((stats.max - stats.logsumexp).exp() > self.threshold).float()
        return loss.with_term("sure_loss", kl_div(student.logits, teacher.logits, self.temperature, weight=sure))


@register("noise", family="data-free", needs=("teacher",), trains="student")
class OnNoise(Procedure):
    """A student that agrees with the teacher on noise."""

    def __init__(self, student, teacher, images, batch_size=16, *, strength: float = 1.0) -> None:
        super().__init__()
        self.student, self.shape, self.strength = student, (batch_size, *images.shape[1:]), strength
        self.freeze("teacher", teacher)

    def parts(self):
        return {"student": Part(self.student, optimizer="adamw", learning_rate=1e-3)}

    def network(self):
        return self.student

    def iteration(self, batch, step):
        noise = self.strength * torch.randn(self.shape)
        loss = kl_div(self.student(noise), self.frozen["teacher"](noise))
        step.update(loss, "student")
        return {"loss": loss}
'''


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    yield path
    for name in ("confident", "noise"):
        registry._entries.pop(name, None)
    sys.modules.pop("fastkd_plugin_mine", None)


def test_listed_with_its_options(plugin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    listed = capsys.readouterr().out
    assert all(f" {name} " in listed for name in names())
    assert "confident" not in listed
    assert main(["methods", "--plugin", str(plugin)]) == 0
    assert {"confident", "noise"} <= set(capsys.readouterr().out.split())
    assert main(["methods", "confident"]) == 0
    said = capsys.readouterr().out
    assert "Hinton, where the teacher is sure." in said
    assert "--threshold" in said
    assert "0.5" in said
    assert "the least share of the teacher's first class." in " ".join(said.split())
    assert main(["methods", "confidnt"]) == 2
    assert "method 'confidnt' is unknown, did you mean confident" in capsys.readouterr().err


@pytest.mark.parametrize(("method", "option"), [("confident", "--threshold"), ("noise", "--strength")])
def test_run_from_the_command_line(
    method: str, option: str, plugin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["distill", *TINY, "--plugin", str(plugin), "--method", method, option, "0.7"]
    assert main([*command, "--output", str(tmp_path / "made")]) == 0
    assert f"student resnet8  {method}" in capsys.readouterr().out
    document = json.loads((tmp_path / "made" / "result.json").read_text())
    assert document["settings"]["options"] == {option[2:]: 0.7}
    lines = [json.loads(line) for line in (tmp_path / "made" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10]
    assert ("accuracy" in lines[0]) == (method == "confident")
    # another file of the name is another method: its results do not pass for these
    plugin.write_text(MINE.replace("> self.threshold", ">= self.threshold"))
    assert main([*command, "--output", str(tmp_path / "made")]) == 2
    assert "is of other settings" in capsys.readouterr().err


@pytest.mark.forks
def test_goes_on_after_a_kill(plugin: Path, tmp_path: Path) -> None:
    """In a process of its own, as a user would start it."""
    command = [sys.executable, "-m", "fastkd", "distill", *TINY, "--plugin", str(plugin), "--method", "noise"]
    command += ["--iterations", "7", "--checkpoint-every", "1", "--output"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True, timeout=PATIENCE)
    code = """
import os, signal, sys
from fastkd.__main__ import main
from fastkd.training import trainer
save, left = trainer.Trainer._save, [12]  # the teacher's ten steps, then the student's
def counted(self, state):
    save(self, state)
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
trainer.Trainer._save = counted
main(sys.argv[1:])
"""
    killed = subprocess.run(
        [sys.executable, "-c", code, *command[3:], str(tmp_path / "parts")], capture_output=True, timeout=PATIENCE
    )
    assert killed.returncode == -9, killed.stderr.decode()
    assert not (tmp_path / "parts" / "result.json").exists()
    subprocess.run([*command, str(tmp_path / "parts")], check=True, capture_output=True, timeout=PATIENCE)
    whole, parts = (torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_options_in_a_file_and_their_help(plugin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.toml").write_text(f'method = "noise"\nplugin = "{plugin}"\nstrength = 0.5\n')
    assert main(["distill", *TINY, "--config", str(tmp_path / "a.toml"), "--output", str(tmp_path / "made")]) == 0
    options = json.loads((tmp_path / "made" / "result.json").read_text())["settings"]["options"]
    assert options == {"strength": 0.5}
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["distill", "--plugin", str(plugin), "--method", "confident", "--help"])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--threshold" in said
    assert "The least share of the teacher's first class. (default: 0.5)" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plugin", "nowhere.py"], "plugin is nowhere.py, must be a Python file"),
        (["--plugin", "broken.py"], "plugin broken.py cannot be imported: ZeroDivisionError: division by zero"),
        (["--plugin", "wrong.py"], "<class 'int'> cannot be registered, must be a subclass of Method or Procedure"),
        (["--plugin", "taken.py"], "name 'hinton' is taken by fastkd.methods.response.Hinton"),
        (["--plugin", "clash.py", "--method", "clash"], "have names of the command's own: epochs"),
        (["--plugin", "far.py", "--method", "far"], "method 'far' needs collection, which no option gives yet"),
        (["--method", "at", "--attention", "3"], "unrecognized options: --attention"),
        (["--method", "at", "--feature-weigth", "3"], "perhaps you meant: --feature-weight"),
        (["--method", "at", "--feature-weight", "-3"], "feature_weight is -3.0, must be finite and not negative"),
    ],
)
def test_what_is_refused(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    head = "from fastkd.methods import Hinton\nfrom fastkd.methods.registry import register\n"
    for name, text in {
        "broken": "1 / 0\n",
        "wrong": f"{head}register('wrong', family='none')(int)\n",
        "taken": f"{head}@register('hinton', family='response')\nclass Other(Hinton):\n    pass\n",
        "clash": f"{head}@register('clash', family='x')\nclass C(Hinton):\n    def __init__(self, epochs: int = 1): pass\n",
        "far": f"{head}@register('far', family='x', needs=('collection', 'teacher'))\nclass F(Hinton):\n    pass\n",
    }.items():
        Path(f"{name}.py").write_text(text)
    try:
        status = main(["distill", *TINY, *arguments, "--output", "made"])
    except SystemExit as ended:
        status = int(ended.code or 0)
    said = capsys.readouterr().err
    assert status == 2
    assert message in said
    assert said.count("\n") == 1
    assert not Path("made").exists()
    for name in ("clash", "far"):
        registry._entries.pop(name, None)


def test_an_entry_point(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a package of somebody else's declares it."""

    def entry_points(group: str) -> list[importlib.metadata.EntryPoint]:
        assert group == "fastkd.methods"
        return [importlib.metadata.EntryPoint("mine", "mine", group)]

    monkeypatch.syspath_prepend(str(plugin.parent))
    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    monkeypatch.setattr(registry, "_loaded", set())
    assert "confident" in names()
    assert find("confident").paper == "somebody, 2026"
    monkeypatch.setattr(registry, "_loaded", set())
    monkeypatch.setattr(
        importlib.metadata,
        "entry_points",
        lambda group: [importlib.metadata.EntryPoint("gone", "nowhere_at_all", group)],
    )
    with pytest.raises(ImportError, match=r"the methods of gone \(nowhere_at_all\) cannot be imported"):
        find("hinton")
    sys.modules.pop("mine", None)


def test_registering() -> None:
    with pytest.raises(ValueError, match="needs 'label' is unknown, did you mean labels"):
        register("x", family="response", needs=("label",))
    with pytest.raises(ValueError, match=r"must have a teacher where Baseline.needs_teacher says so, False"):
        register("x", family="response")(registry.find("baseline").kind)
    assert register("hinton", family="response", paper="Hinton et al., 2015")(Hinton) is Hinton  # again
    families = [find(name).family for name in names()]
    assert families == sorted(families, key=[*registry.FAMILIES, *families].index)
    for name in names():
        entry = find(name)
        assert entry.summary
        assert entry.trains
        assert issubclass(entry.kind, (Method, Procedure))
        assert all(option.help for option in entry.options().values()), name


def test_made_for_what_is_given() -> None:
    load_plugin(EXAMPLE)
    load_plugin(EXAMPLE)  # once
    try:
        networks = [ConvNet((4, 8), seed=seed) for seed in range(2)]
        given = Given(*networks, torch.zeros(2, 1, 8, 8), batch_size=9)
        procedure = create_procedure("adversarial", given, latent=4)
        assert (procedure.batch_size, procedure.latent) == (9, 4)  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match="adversarial is a procedure, not a Method: create_procedure makes it"):
            create("adversarial", *networks, torch.zeros(2, 1, 8, 8))
        with pytest.raises(ValueError, match="teacher is None, must be given for Adversarial"):
            create_procedure("adversarial", Given(networks[0], images=torch.zeros(2, 1, 8, 8)))
        with pytest.raises(ValueError, match="make_student is None, must be a function that makes networks"):
            create_procedure("dml", Given(networks[0]))
    finally:
        registry._entries.pop("adversarial", None)
        sys.modules.pop("fastkd_plugin_adversarial", None)
