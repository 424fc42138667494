"""The study of noisy labels: its grid, the paper's figures, what is said of wrong labels, and its command, at a tiny scale."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import several_sets

from fastkd import noise
from fastkd.__main__ import main
from fastkd.methods import Baseline, CrossValidation, Objective, registry
from fastkd.models.convnet import ConvNet
from fastkd.models.resnet import resnet
from fastkd.studies.data import DataSettings, prepare, wrong_labels
from fastkd.studies.detection import LABELS, PROBABILITIES, WRONG, detection, find_wrong, probabilities_of
from fastkd.studies.noise import SETTINGS, Noise
from fastkd.studies.noise.study import METHODS, WRONG_PERCENT
from fastkd.studies.study import find

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread", "no_figures")]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return several_sets(tmp_path / "data")


# ---- the grid ----------------------------------------------------------------------------------------


def test_rows_and_columns() -> None:
    study = Noise()
    assert find("noise") is Noise
    assert set(METHODS) <= set(study.row_names())
    assert all(registry.find(name).needs == ("labels",) for name in study.row_names())
    assert {registry.find(name).family for name in METHODS} == {"response", "noisy labels"}
    run = study.distillation("bldr", "instance-0.4", 3)
    assert (run.data.noise, run.data.label_noise, run.training.seed) == ("instance", 0.4, 3)
    assert study.distillation("sop", "clean", 0).data == study.data


def test_options_of_a_row() -> None:
    study = Noise(method_options=("bldr.balance=1.0", "consistency=0.5"))
    assert study.distillation("bldr", "clean", 0).options == {"balance": 1.0, "consistency": 0.5}
    assert study.distillation("sop", "clean", 0).options == {"consistency": 0.5}
    assert study.distillation("baseline", "clean", 0).options == {}
    study = Noise(method_options=("elr+.memory=0.9", "cross-validation.folds=2"))
    assert study.distillation("elr+", "clean", 0).options == {"memory": 0.9}
    assert study.distillation("cross-validation", "clean", 0).options == {"folds": 2}
    with pytest.raises(ValueError, match="row 'bldt' is unknown, did you mean bldr"):
        Noise(method_options=("bldt.balance=1",)).grid(["bldr"], ["clean"], 1)


def test_learning_rate_of_a_row() -> None:
    study = Noise(learning_rates=("cores=0.01", "elr+=2e-2"))
    rates = {row: study.distillation(row, "clean", 0).training.learning_rate for row in ("cores", "elr+", "sop")}
    assert rates == {"cores": 0.01, "elr+": 0.02, "sop": study.training.learning_rate}


def test_labels_of_people_need_their_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="label_file is None, must be the file of the labels"):
        Noise().grid(["bldr"], ["file-worse"], 1)
    file = tmp_path / "CIFAR-10_human.pt"
    study = Noise(data=DataSettings(noise="file", label_file=file))
    run = study.distillation("bldr", "file-worse", 0)
    assert (run.data.noise, run.data.label_file, run.data.label_key) == ("file", file, "worse")
    assert study.distillation("bldr", "symmetric-0.2", 0).data.label_file is None


def test_published_figures() -> None:
    where, rows = Noise().published("instance-0.4")
    assert where == "CIFAR-10N worse, 40 % wrong, ResNet-34"
    assert (rows["bldr"].mean, rows["sop"].mean, rows["elr+"].std) == (94.53, 93.24, 1.60)
    assert Noise().published("symmetric-0.4") == ("", {})
    assert Noise().published("file-noisy")[1]["dividemix"].mean == 71.13
    assert set(WRONG_PERCENT) == {setting.published for setting in SETTINGS.values()} - {""}
    found = {figure.name: figure.published for figure in Noise().figures_shown()}
    assert found["noise_f1"]["file-worse"]["bldr"].mean == 95.29
    assert found["noise_recall"]["instance-0.2"]["bldr"].mean == 93.74
    for setting in SETTINGS.values():
        assert set(Noise().published(setting.name)[1]) <= set(METHODS)


# ---- what is said of wrong labels --------------------------------------------------------------------


def test_detection_of_plain_training(root: Path) -> None:
    """By a mixture of the losses of what is kept; in evaluation mode, on images as they are."""
    settings = DataSettings(data="mnist", data_root=root, label_noise=0.5)
    train, _ = prepare(settings, 0)
    wrong = wrong_labels(settings, 0)
    objective = Objective(Baseline(), resnet(8, in_channels=1, num_classes=10, seed=0))
    found = probabilities_of(objective, objective.network(), train)
    assert objective.training
    network = objective.student.model.eval()
    torch.testing.assert_close(found, network(train.normalised()).softmax(1))
    figures = detection(objective, found, train.target, wrong)
    theirs = noise.measure(noise.find(train.target, found).noisy, wrong)
    assert figures["noise_f1"] == pytest.approx(theirs.f1.item(), nan_ok=True)
    assert figures["mixture_f1"] == figures["noise_f1"]
    assert 0.0 <= figures["noise_auc"] <= 1.0


def test_detection_of_cross_validation_is_cleanlabs() -> None:
    """The rule of confident learning, and cleanlab's default beside it."""
    cleanlab = pytest.importorskip("cleanlab", reason="cleanlab is not installed")
    torch.manual_seed(0)
    truth = torch.arange(400) % 4
    wrong = torch.rand(400) < 0.3
    labels = torch.where(wrong, (truth + 1) % 4, truth)
    probabilities = (torch.eye(4)[truth] * 2 + torch.randn(400, 4)).softmax(1)
    networks = {seed: ConvNet((2, 2), classes=4, seed=seed) for seed in range(3)}
    procedure = CrossValidation(networks[0], 400, 4, networks.__getitem__)
    figures = detection(procedure, probabilities, labels, wrong)
    find_issues = cleanlab.filter.find_label_issues
    for rule in noise.RULES:
        found = noise.measure(noise.find(labels, probabilities, rule=rule).noisy, wrong)
        assert figures[f"{rule}_f1"] == pytest.approx(found.f1.item())
    for name, how in (("noise_f1", {"filter_by": "confident_learning"}), ("cleanlab_f1", {})):
        issues = torch.from_numpy(find_issues(labels.numpy(), probabilities.double().numpy(), n_jobs=1, **how))
        assert figures[name] == pytest.approx(noise.measure(issues, wrong).f1.item())
    assert find_wrong(procedure, probabilities, labels).rule == "confident"


# ---- the commands ------------------------------------------------------------------------------------

TINY = ["--train-size", "20", "--test-size", "4", "--batch-size", "4", "--student", "resnet8", "--shrink", "4"]
TINY += ["--epochs", "2", "--device", "cpu"]


def test_the_command(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    command = ["study", "noise", *TINY, "--data-root", str(root), "--seeds", "1", "--output", str(output)]
    command += ["--methods", "baseline", "bldr", "cross-validation", "--settings", "symmetric-0.4", "instance-0.4"]
    assert main([*command, "--method-options", "bldr.balance=1.0"]) == 0, capsys.readouterr()
    assert {path.name for path in output.iterdir()} == {
        "table.md",
        "results.json",
        "accuracy.png",
        "course.png",
        "runs",
    }
    table = (output / "table.md").read_text()
    assert table.startswith("resnet8 on cifar10: 20 training images\n")
    for said in (
        "## symmetric-0.4",
        "## wrong labels found by the method's own rule: F1, %",
        "| published: CIFAR-10N worse, 40 % wrong",
        "95.29",
    ):
        assert said in table
    assert "| the teacher" not in table
    document = json.loads((output / "results.json").read_text())
    assert set(document["accuracies"]["instance-0.4"]) == {"baseline", "bldr", "cross-validation"}
    assert {"noise_auc", "peak_accuracy", "test_accuracy_at_100"} <= set(document["figures"])
    (folder,) = (output / "runs" / "symmetric-0.4").glob("bldr-*")
    run = json.loads((folder / "result.json").read_text())
    assert run["settings"]["options"] == {"balance": 1.0}
    probabilities, labels = np.load(folder / PROBABILITIES), np.load(folder / LABELS)
    assert probabilities.shape == (20, 10)
    settings = DataSettings(data_root=root, train_size=20, test_size=4, shrink=4, label_noise=0.4)
    assert np.array_equal(labels, prepare(settings, 0)[0].target.numpy())
    truth = prepare(replace(settings, label_noise=0.0), 0)[0].target.numpy()
    assert np.array_equal(np.load(folder / WRONG), labels != truth)
    before = (output / "results.json").read_bytes()
    assert main([*command, "--method-options", "bldr.balance=1.0"]) == 0
    assert (output / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--methods hinton", "method 'hinton' is unknown"),
        ("--settings symmetric-0.3", "setting 'symmetric-0.3' is unknown"),
        ("--settings file-aggre", "label_file is None"),
        ("--label-noise 0.2", "--settings symmetric-0.2"),
        ("--method-options sop.balanse=3", "sop's option 'balanse' is unknown, did you mean balance"),
        ("--method-options balance", "method_options has 'balance', must be NAME=VALUE"),
        ("--learning-rates sopp=0.1", "row 'sopp' is unknown, did you mean sop"),
        ("--learning-rates sop", "learning_rates has 'sop', must be ROW=NUMBER"),
        ("--learning-rates sop=-1", "learning_rate is -1"),
    ],
)
def test_what_the_command_refuses(
    options: str, said: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["study", "noise", *TINY, "--data-root", str(root), "--methods", "sop", "--settings", "clean"]
    assert main([*command, "--output", str(tmp_path / "out"), *options.split()]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_detect_noise_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the set's images with labels of a file; the set's own are the truth."""
    settings = DataSettings(data="digits")
    truth = prepare(settings, 0)[0].target
    labels = prepare(replace(settings, label_noise=0.3), 0)[0].target
    np.save(tmp_path / "labels.npy", labels.numpy())
    output = tmp_path / "out"
    command = ["detect-noise", "--data", "digits", "--student", "resnet8", "--epochs", "2", "--method", "sop"]
    given = ["--labels", str(tmp_path / "labels.npy"), "--output", str(output)]
    assert main([*command, *given]) == 0, capsys.readouterr()
    report = json.loads((output / "report.json").read_text())
    assert (report["rule"], report["samples"]) == ("mixture", len(labels))
    wrong = report["truth"]["true_positives"] + report["truth"]["false_negatives"]
    assert wrong == int((labels != truth).sum())
    assert report["truth"]["f1"] > 0.5
    (training,) = output.glob("training-*")
    probabilities = np.load(training / PROBABILITIES)
    assert np.array_equal(np.load(output / "noisy.npy"), noise.find(labels, probabilities).noisy.numpy())
    assert np.array_equal(np.load(training / LABELS), labels.numpy())
    own = [*command, "--epochs", "1", "--rule", "disagreement", "--output", str(output)]
    assert main(own) == 2
    assert main([*own, "--overwrite"]) == 0
    report = json.loads((output / "report.json").read_text())
    assert report["rule"] == "disagreement"
    assert "truth" not in report
    (other,) = set(output.glob("training-*")) - {training}
    assert np.array_equal(np.load(other / LABELS), truth.numpy())
    assert not (other / WRONG).exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", "one of --values, what a network said, and --data, images to train one on, must be given"),
        ("--data mnist --values p.npy", "one of --values"),
        ("--data mnist --truth y.npy", "--truth must not be given with --data"),
        ("--data mnist --kind losses", "rule is 'probability', must be 'mixture' with losses"),
        ("--data mnist --kind logits", "--kind is logits, must be probabilities with --data"),
        ("--data mnist --method hinton", "--method is hinton, must be one for noisy labels, as bldr or dividemix"),
        ("--data mnits", "data name 'mnits' is unknown, did you mean mnist"),
        ("--data mnist --epochs 0", "epochs is 0, must be 1 or more"),
        ("--data mnist --labels nowhere.npy", "there is no label file nowhere.npy"),
        ("--values p.npy", "--labels is missing"),
        ("--values p.npy --labels y.npy --method sop", "--method must not be given with --values: nothing is trained"),
        ("--data mnist --label-key worst", "--label-key is worst, must be given with --labels"),
        ("--data scenes", "method 'bldr' is for classifiers, must be another where each pixel has a class"),
    ],
)
def test_what_detect_noise_refuses(
    options: str, said: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--data-root", str(root)] if "--data " in options else []
    command = ["detect-noise", *options.split(), *where, "--output", str(tmp_path / "out")]
    assert main(command) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "out" / "report.json").exists()
