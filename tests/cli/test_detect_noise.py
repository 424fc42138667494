"""``fastkd detect-noise``: what it reads, writes, shows, and refuses in one line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastkd import noise
from fastkd.__main__ import main

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]

N, K = 60, 3


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with values, labels and the truth in it."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    true = generator.integers(0, K, N)
    labels = true.copy()
    labels[:15] = (true[:15] + 1) % K
    logits = generator.normal(size=(N, K)) + 3 * np.eye(K)[true]
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for name, array in (
        ("p", p),
        ("logits", logits.astype(np.float32)),
        ("losses", -np.log(p[np.arange(N), labels])),
        ("y", labels),
        ("true", true),
        ("wrong", labels != true),
    ):
        np.save(f"{name}.npy", array)
    Path("y.txt").write_text("\n".join(map(str, labels)) + "\n\n")
    Path("y.csv").write_text("\r\n".join(map(str, labels)))
    Path("y.json").write_text(json.dumps(labels.tolist()))
    return tmp_path


def command(*arguments: str, values: str = "p.npy", labels: str = "y.npy") -> list[str]:
    return ["detect-noise", "--values", values, "--labels", labels, "--output", "out", *arguments]


def written(name: str = "out") -> set[str]:
    return {path.name for path in Path(name).iterdir()}


def test_what_is_written_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command("--rule", "confident", "--truth", "true.npy")) == 0
    shown = capsys.readouterr().out
    assert written() == {"labels.csv", "noisy.npy", "report.json", "histogram.png", "sweep.png"}
    labels, p = np.load("y.npy"), np.load("p.npy")
    found = noise.find(labels, p, rule="confident")
    assert np.array_equal(np.load("out/noisy.npy"), found.noisy.numpy())
    with Path("out/labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == list(range(N))
    assert [int(row["label"]) for row in rows] == labels.tolist()
    assert [int(row["suggested"]) for row in rows] == p.argmax(1).tolist()
    assert [row["noisy"] for row in rows] == [str(int(flag)) for flag in found.noisy]
    assert [float(row["score"]) for row in rows] == pytest.approx(found.score.tolist(), rel=1e-5)
    report = json.loads(Path("out/report.json").read_text())
    assert report["rule"] == "confident"
    assert report["threshold"] is None
    assert (report["samples"], report["noisy"]) == (N, found.count)
    assert sum(row["labels"] for row in report["classes"]) == N
    assert sum(row["noisy"] for row in report["classes"]) == found.count
    measured = noise.measure(found.noisy, np.load("wrong.npy"))
    assert report["truth"]["f1"] == pytest.approx(float(measured.f1))
    assert report["truth"]["true_positives"] == int(measured.true_positives)
    assert f"{found.count} of {N}" in shown
    assert f"{100 * float(measured.recall):.2f} %" in shown
    worst = [line.split() for line in shown.splitlines() if line.split()[-1:] in (["wrong"], ["right"])]
    assert [int(line[0]) for line in worst] == found.ranked()[:10].tolist()
    assert "15 of 60 (25.00 %)" in shown  # that are truly wrong


def test_without_the_truth(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command()) == 0
    assert written() == {"labels.csv", "noisy.npy", "report.json", "histogram.png"}
    report = json.loads(Path("out/report.json").read_text())
    assert "truth" not in report
    assert report["threshold"] == 0.5
    assert report["status"] in (["CONVERGED"], ["MAX_ITER"])
    assert "recall" not in capsys.readouterr().out


@pytest.mark.parametrize("labels", ["y.npy", "y.txt", "y.csv", "y.json"])
@pytest.mark.parametrize("truth", ["true.npy", "wrong.npy"])
def test_files_of_labels(labels: str, truth: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command("--truth", truth, labels=labels)) == 0
    assert np.array_equal(np.load("out/noisy.npy"), noise.find(np.load("y.npy"), np.load("p.npy")).noisy.numpy())
    assert json.loads(Path("out/report.json").read_text())["truth"]["recall"] > 0.5
    capsys.readouterr()


@pytest.mark.parametrize("kind", ["probabilities", "logits", "losses"])
@pytest.mark.parametrize("options", [[], ["--by-class"], ["--threshold", "0.2"]])
def test_kinds(kind: str, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    file = "p.npy" if kind == "probabilities" else f"{kind}.npy"
    assert main(command("--kind", kind, *options, values=file)) == 0
    found = noise.find(
        np.load("y.npy"),
        by_class="--by-class" in options,
        threshold=0.2 if "0.2" in options else None,
        **{kind: np.load(file)},
    )
    assert np.array_equal(np.load("out/noisy.npy"), found.noisy.numpy())
    with Path("out/labels.csv").open(newline="") as rows:
        assert ("" in {row["suggested"] for row in csv.DictReader(rows)}) == (kind == "losses")
    capsys.readouterr()


def test_options_of_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("options.toml").write_text('rule = "probability"\nthreshold = 0.1\n')
    assert main(command("--config", "options.toml")) == 0
    assert "rule probability, threshold 0.1" in capsys.readouterr().out


def test_nothing_is_replaced_unless_it_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command("--truth", "true.npy")) == 0
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    assert main(command("--rule", "confident")) == 2
    assert "--output out holds labels.csv already: --overwrite replaces it" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before
    Path("out/mine.txt").touch()
    assert main(command("--rule", "confident", "--overwrite")) == 0
    assert written() == {"labels.csv", "noisy.npy", "report.json", "histogram.png", "mine.txt"}  # no old sweep.png
    assert json.loads(Path("out/report.json").read_text())["rule"] == "confident"
    capsys.readouterr()


def test_of_what_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Equal losses, no samples, nothing wrong, NaN, many classes."""
    np.save("losses.npy", np.full(N, 0.5))
    np.save("none.npy", np.zeros((0, K)))
    np.save("labels-of-none.npy", np.zeros(0, dtype=np.int64))
    assert main(command("--kind", "losses", "--truth", "y.npy", values="losses.npy")) == 0
    shown = capsys.readouterr().out
    assert "0 of 60 (0.00 %) labels are probably wrong" in shown
    assert "all losses are equal" in shown
    truth = json.loads(Path("out/report.json").read_text())["truth"]
    assert (truth["recall"], truth["roc_auc"], truth["best_threshold"]) == (None, None, None)
    assert main(command("--overwrite", values="none.npy", labels="labels-of-none.npy")) == 0
    assert "0 of 0 labels" in capsys.readouterr().out
    p = np.load("p.npy")
    p[3] = np.nan
    np.save("p.npy", p)
    assert main(command("--overwrite", "--rule", "disagreement")) == 0
    assert Path("out/labels.csv").read_text().splitlines()[4].split(",")[2:] == ["", "0", "1"]
    capsys.readouterr()
    many = torch.randn(300, 50, generator=torch.Generator().manual_seed(0)).numpy()
    np.save("many.npy", many)
    np.save("labels.npy", (np.arange(300) % 50).astype(np.uint8))
    assert main(command("--overwrite", "--kind", "logits", "--by-class", values="many.npy", labels="labels.npy")) == 0
    assert "the 20 of 50 classes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--values nowhere.npy", "--values nowhere.npy cannot be read: No such file or directory"),
        ("--values y.txt", "--values is y.txt, must end with .npy"),
        ("--values text.npy", "--values text.npy is no .npy of numbers"),
        ("--values pickle.npy", "--values pickle.npy is no .npy of numbers"),
        ("--values cut.npy", "--values cut.npy is no .npy of numbers"),
        ("--values folder.npy", "--values folder.npy cannot be read: Is a directory"),
        ("--values logits.npy", "must be in [0, 1]: logits and log-probabilities must be given as logits"),
        ("--values p.npy --kind logits", "logits has only rows in [0, 1] that sum to 1"),
        ("--values losses.npy", "probabilities has shape (60,), must be [N, K]"),
        ("--labels nowhere.txt", "there is no label file nowhere.txt"),
        ("--labels y.gz", "--labels is y.gz, must end with .npy or .pt or .json or .csv or .txt"),
        ("--labels losses.npy", "losses.npy has float64 (60,), must have integers [N]"),
        ("--labels wrong.npy", "wrong.npy has bool (60,), must have integers [N]"),
        ("--labels p.npy", "p.npy has float64 (60, 3), must have integers [N]"),
        ("--labels table.npy", "table.npy has int64 (60, 1), must have integers [N]"),
        ("--labels words.txt", "words.txt has 'cat' as its label 2, must have one integer a line"),
        ("--labels gap.csv", "gap.csv has '' as its label 2, must have one integer a line"),
        ("--labels huge.txt", "huge.txt has 99999999999999999999, must have integers of 64 bits"),
        ("--labels items.json", "items.json has True of bool, must have integers"),
        ("--labels object.json", "object.json is empty, must have labels"),
        ("--labels words.json", "words.json is broken: no JSON"),
        ("--labels binary.txt", "binary.txt is broken: it is no text"),
        ("--labels few.npy", "labels has shape (2,), must be (60,), one for each of the probabilities"),
        ("--labels unlabelled.npy", "unlabelled.npy has -1 as its least, must have labels of 0 or more"),
        ("--truth few.npy", "--truth few.npy has 2 labels, must have as many as --labels, 60"),
        ("--truth unlabelled.npy", "unlabelled.npy has -1 as its least, must have labels of 0 or more"),
        ("--truth y.gz", "--truth is y.gz, must end with"),
        ("--truth losses.npy", "losses.npy has float64 (60,), must have integers [N]"),
    ],
)
def test_files_that_cannot_be_used(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("text.npy").write_text("0.5\n")
    Path("folder.npy").mkdir()
    np.save("pickle.npy", np.array([{}], dtype=object), allow_pickle=True)
    Path("cut.npy").write_bytes(Path("p.npy").read_bytes()[:300])
    np.save("table.npy", np.load("y.npy")[:, None])
    np.save("few.npy", np.array([0, 1]))
    np.save("unlabelled.npy", np.full(N, -1))
    Path("words.txt").write_text("0\ncat\n")
    Path("gap.csv").write_text("0\n\n1\n")
    Path("huge.txt").write_text("99999999999999999999\n")
    Path("items.json").write_text("[0, true]")
    Path("object.json").write_text("{}")
    Path("words.json").write_text("[0, cat]")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    before = sorted(Path().rglob("*"))
    assert main([*command(), *arguments.split()]) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.err.startswith("fastkd detect-noise: ")
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    assert sorted(Path().rglob("*")) == before
