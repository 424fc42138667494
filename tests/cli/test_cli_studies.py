"""``fastkd distill`` and ``fastkd study``: options, files of options, and what they say when something is wrong."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from training_processes import PATIENCE

from fastkd.__main__ import main
from fastkd.cli._config import expand
from fastkd.cli._errors import UsageError
from fastkd.cli.study import commands, options_of

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]

TINY = ["--data", "digits", "--train-size", "100", "--test-size", "40", "--batch-size", "50"]
TINY += ["--teacher", "resnet8", "--epochs", "1", "--learning-rate", "0.02", "--device", "cpu"]


def test_distill(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "made"
    assert main(["distill", *TINY, "--method", "at", "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    result = json.loads((output / "result.json").read_text())
    (student,) = (line.split() for line in shown.splitlines() if line.startswith("student"))
    assert student == ["student", "resnet8", "at", f"{100 * result['test_accuracy']:.2f}", "%"]
    assert result["settings"]["method"] == "at"
    assert main(["distill", *TINY, "--method", "sp", "--output", str(output)]) == 2
    assert "is of other settings; choose another folder, or delete it" in capsys.readouterr().err


DENSE = ["--data", "scenes", "--train-size", "24", "--test-size", "8", "--batch-size", "6", "--epochs", "1"]
DENSE += ["--teacher", "segmenter-6-8-8", "--student", "segmenter-4-6", "--device", "cpu"]


@pytest.mark.parametrize("method", ["hinton", "baseline"])
def test_distill_of_dense_networks(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the mean IoU beside the accuracy of pixels; nothing needs to be said of crops and flips."""
    assert main(["distill", *DENSE, "--method", method, "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    figures = result["figures"]
    rows = [["student", "segmenter-4-6", method, figures["test_accuracy"], figures["test_mean_iou"]]]
    if method == "hinton":
        teacher = result["teacher_accuracy"], figures["teacher_mean_iou"]
        rows.insert(0, ["teacher", "segmenter-6-8-8", "labels", *teacher])
    head, *lines = (
        line.split() for line in shown[shown.index("network") : shown.index("results")].splitlines() if line
    )
    assert " ".join(head) == "network learned by pixel accuracy mean IoU"
    assert lines == [[*row[:3], f"{100 * row[3]:.2f}", "%", f"{100 * row[4]:.2f}", "%"] for row in rows]


def test_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["study", "zoo", *TINY, "--methods", "baseline", "hinton", "--settings", "clean", "noise-0.4"]
    assert main([*command, "--seeds", "1", "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "noise-0.4" in shown
    table = (tmp_path / "table.md").read_text()
    # the command in the table is the one to say again, without the folders of this machine
    assert (
        "`fastkd study zoo --teacher resnet8 --batch-size 50 --data digits --train-size 100 --test-size 40 --epochs 1 "
        "--learning-rate 0.02 --methods baseline hinton --settings clean noise-0.4 --seeds 1`" in table
    )
    assert str(tmp_path) not in table + (tmp_path / "results.json").read_text()
    made = {"table.md", "results.json", "accuracy.png", "course.png", "runs"}
    assert {path.name for path in tmp_path.iterdir()} == made
    assert main([*command, "--seeds", "1", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "table.md").read_text() == table
    # one more method joins what is there; one that fails is named, and the rest is there
    capsys.readouterr()
    more = ["study", "zoo", *TINY, "--methods", "sp", "--settings", "clean", "--seeds", "1", "--output", str(tmp_path)]
    assert main(more) == 0
    table = (tmp_path / "table.md").read_text()
    assert [f"| {name} | " in table for name in ("baseline", "hinton", "sp", "at")] == [True, True, True, False]


def test_a_study_of_which_a_part_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["study", "zoo", *TINY, "--teacher", "wrn-10-2", "--shrink", "2", "--methods", "baseline", "fsp"]
    assert main([*command, "--settings", "clean", "--seeds", "1", "--output", str(tmp_path)]) == 1
    assert "failed: clean fsp 0: fastkd: the student's layer" in capsys.readouterr().out
    assert "| baseline | " in (tmp_path / "table.md").read_text()


@pytest.mark.forks
def test_processes_end_with_the_one_that_is_killed(tmp_path: Path) -> None:
    """And what they had done is found by the next call."""
    command = [sys.executable, "-m", "fastkd", "study", "zoo", *TINY, "--epochs", "1000", "--methods", "baseline"]
    command += ["--settings", "clean", "--seeds", "2", "--jobs", "2", "--output", str(tmp_path)]
    study = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        until(lambda: len(list(tmp_path.rglob("metrics.jsonl"))) == 2)
        study.kill()
        study.wait()
        until(lambda: not in_session(study.pid))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(study.pid, signal.SIGKILL)
    assert all((path.parent / "checkpoint.pt").exists() for path in tmp_path.rglob("metrics.jsonl") if path.read_text())


@pytest.mark.forks
def test_distill_in_two_processes(tmp_path: Path) -> None:
    """The second one finds the teacher that the first one wrote; the result is written once, and read by the next call."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastkd"]
    command += ["distill", *TINY, "--method", "fsp", "--output", str(tmp_path)]
    for _ in range(2):
        subprocess.run(command, check=True, timeout=300, capture_output=True, text=True)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["teacher_accuracy"] is not None
    (teacher,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert (teacher / "model.pt").is_file()


def until(true: Callable[[], bool]) -> None:
    for _ in range(PATIENCE * 20):
        if true():
            return
        time.sleep(0.05)
    pytest.fail(f"nothing has happened in {PATIENCE} s")


def in_session(leader: int) -> bool:
    """Whether a process of this session still runs."""
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True


def test_command_of_all_options_in_other_than_default_is_complete() -> None:
    make = commands()["zoo"]
    options = options_of(make(seeds=5, flip=False, methods=("at",)), make())
    assert options == ["--no-flip", "--methods", "at", "--seeds", "5"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distill", "--method", "hintn"], "fastkd distill: method 'hintn' is unknown, did you mean hinton"),
        (["distill", *TINY, "--student", "resnet7"], "fastkd distill: student 'resnet7' is unknown"),
        (["distill", *TINY, "--train-size", "7"], "train_size is 7, must be a multiple of the 10 classes"),
        (["distill", *TINY, "--teacher-weights", "nowhere.pt"], "there are no weights nowhere.pt"),
        (["distill", "--data", "cifar10", "--data-root", "nowhere"], "CIFAR10 is not there, looked for nowhere"),
        (["distill", "--data", "cifer10"], "'cifer10' is unknown, did you mean cifar10"),
        (["study", "zoo", "--methods", "rkd"], "method 'rkd' is unknown, did you mean rkd-d"),
        (["study", "zoo", "--settings", "noise-0.3"], "setting 'noise-0.3' is unknown, did you mean noise-0"),
        (["study", "zoo", "--seeds", "0"], "--seeds is 0, must be 1 or more"),
        (["study", "zoo", "--label-noise", "0.4"], "--label-noise has no effect here: --settings noise-0.4"),
        (["study", "zoo", "--seed", "4"], "--seed has no effect here: --seeds says how many"),
        (["distill", "--epochs", "0"], "fastkd distill: epochs is 0, must be 1 or more"),
        (["distill", "--label-noise", "1.5"], "fastkd distill: label_noise is 1.5, must be from 0 to below 1"),
        (["distill", "--batch-size", "1"], "fastkd distill: batch_size is 1, must be 2 or more"),
        (["distill", *TINY, "--threads", "-1"], "fastkd distill: --threads is -1, must be 0"),
        (["distill", *TINY, "--method", "fsp", "--teacher", "wrn-10-2"], "FSP needs equal numbers of channels"),
        (["study", "zoo", "--methods"], "fastkd study: methods is empty, must be one name or more"),
        (["study", "zoo", "--epochs", "0"], "fastkd study: epochs is 0, must be 1 or more"),
        (["distill", "--config", "nowhere.toml"], "--config nowhere.toml cannot be read: No such file"),
        (["distill", "--config"], "--config needs a file"),
    ],
)
def test_what_is_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = [] if arguments[-1] == "--config" else ["--output", str(tmp_path)]
    assert main([*arguments, *output]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.rglob("result*.json"))


def test_an_unknown_option_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["distill", "--epochz", "3"])
    assert ended.value.code == 2
    assert "--epochs INT" in capsys.readouterr().err


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    for command, options in (
        (
            ["distill"],
            ("--method", "--teacher", "--epochs", "--amp", "--label-noise", "--imbalance", "--ema", "--output"),
        ),
        (["study", "zoo"], ("--methods", "--settings", "--seeds", "--jobs", "--epochs", "--train-size")),
    ):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--help"])
        assert ended.value.code == 0
        shown = capsys.readouterr().out
        assert all(option in shown for option in options)


TOML = """
method = "at"
flip = false
[training]
epochs = 3
milestones = [0.5, 0.75]
"""
YAML = """
method: at
flip: false
training:
  epochs: 3
  milestones: [0.5, 0.75]
"""
OPTIONS = ["--method", "at", "--no-flip", "--epochs", "3", "--milestones", "0.5", "0.75"]


@pytest.mark.parametrize(("name", "text"), [("a.toml", TOML), ("a.yaml", YAML), ("a.yml", YAML)])
def test_options_from_a_file(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    file = str(tmp_path / name)
    assert expand(["distill", "--config", file, "--epochs", "7"]) == ["distill", *OPTIONS, "--epochs", "7"]
    assert expand(["study", "zoo", "--epochs", "7", f"--config={file}"]) == ["study", "zoo", *OPTIONS, "--epochs", "7"]
    assert expand(["info"]) == ["info"]


def test_the_command_line_comes_before_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('method = "fsp"\nbatch_size = 25\n')
    output = tmp_path / "made"
    assert (
        main(["distill", *TINY, "--config", str(tmp_path / "a.toml"), "--method", "baseline", "--output", str(output)])
        == 0
    )
    settings = json.loads((output / "result.json").read_text())["settings"]
    assert settings["method"] == "baseline"
    assert settings["batch_size"] == 50


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "method = ", "a.toml is not TOML: "),
        ("a.yaml", "[1, 2]", "a.yaml is not YAML: it is no mapping of names to values"),
        ("a.yaml", "a: {b", "a.yaml is not YAML: "),
        ("a.json", "{}", r"a.json, must be a name that ends in .toml, .yaml or .yml"),
    ],
)
def test_files_of_options_that_are_none(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=message):
        expand(["distill", "--config", str(tmp_path / name)])


def test_an_unknown_option_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.toml").write_text("epoch = 3\n")
    with pytest.raises(SystemExit):
        main(["distill", "--config", str(tmp_path / "a.toml")])
    captured = capsys.readouterr()
    assert "--epochs INT" in captured.out + captured.err
