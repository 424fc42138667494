"""Distillations and the zoo's grid, end to end at a tiny scale, and their reports."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from fastkd import build_info
from fastkd._figures import canvas
from fastkd.data import registry as data_sets
from fastkd.methods import Objective, Step
from fastkd.methods import registry as methods
from fastkd.studies import distillation, report
from fastkd.studies import study as study_frame
from fastkd.studies.data import DataSettings, prepare
from fastkd.studies.result import Result
from fastkd.studies.settings import Distillation, Networks
from fastkd.studies.study import Accuracies, Run, known, run_all
from fastkd.studies.zoo import Zoo, published
from fastkd.training import Process, TrainingSettings

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]

ROOT = Path(__file__).parents[2]
HERE = Process(0, 1, torch.device("cpu"))
TINY = Networks(
    teacher="resnet8",
    student="resnet8",
    batch_size=50,
    data=DataSettings(data="digits", train_size=100, test_size=40),
    training=TrainingSettings(epochs=2, learning_rate=0.02),
)


STUDY = Zoo(**{f.name: getattr(TINY, f.name) for f in fields(Networks)})


def of(method: str, **settings: object) -> Distillation:
    common = {name: getattr(TINY, name) for name in ("teacher", "student", "batch_size", "data", "training")}
    return Distillation(**{**common, **settings}, method=method)  # type: ignore[arg-type]


def test_a_distillation_and_what_it_leaves(tmp_path: Path) -> None:
    settings = of("hinton")
    result = distillation.run(settings, tmp_path, HERE, show="off")
    assert 0.0 <= result.accuracy <= 1.0
    assert result.teacher_accuracy is not None
    document = json.loads((tmp_path / "result.json").read_text())
    assert document["test_accuracy"] == result.accuracy == document["figures"]["test_accuracy"]
    assert document["figures"]["kd_loss"] == result.figures["kd_loss"] > 0
    assert document["settings"]["method"] == "hinton"
    assert (document["fastkd"], document["torch"]) == (build_info()["version"], torch.__version__)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert lines[-1]["test_accuracy"] == result.accuracy
    (teacher,) = (path for path in tmp_path.iterdir() if path.is_dir())
    # read, not run again, and by what is written, the student as it was deployed
    (tmp_path / "checkpoint.pt").unlink()
    assert distillation.run(settings, tmp_path, HERE, show="off") == result
    assert not (tmp_path / "checkpoint.pt").exists()
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert state["conv1.weight"].shape == (16, 1, 3, 3)
    # the teacher of a file is the one that was trained
    again = replace(settings, teacher_weights=teacher / "model.pt")
    assert distillation.run(again, tmp_path / "again", HERE, show="off") == result


def test_other_settings_do_not_pass_for_these(tmp_path: Path) -> None:
    distillation.run(of("baseline"), tmp_path, HERE, show="off")
    with pytest.raises(ValueError, match=r"result.json is of other settings; choose another folder, or delete it"):
        distillation.run(of("baseline", batch_size=25), tmp_path, HERE, show="off")
    digests = {
        of("baseline").digest(),
        of("at").digest(),
        of("at", flip=False).digest(),
        of("at", options={"kd_weight": 1.0}).digest(),
    }
    assert len(digests) == 4
    training = replace(TINY.training, checkpoint_every=7)
    assert of("at", training=training).digest() == of("at").digest()
    assert of("baseline", teacher="resnet14").digest() == of("baseline").digest()
    elsewhere = replace(TINY.data, data_root=Path("elsewhere"))
    assert of("at", data=elsewhere).digest() == of("at").digest()


def test_pictures_are_of_the_student_and_change_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []

    def pictures(self: Objective, step: Step) -> dict[str, Figure]:
        drawn.append(type(self.method).__name__)
        return {"made": canvas(1.0, 1.0)}

    monkeypatch.setattr(Objective, "pictures", pictures)
    settings = of("hinton")
    expected = distillation.run(settings, tmp_path / "without", HERE, show="off")
    assert distillation.run(settings, tmp_path / "with", HERE, show="off", pictures_every=1) == expected
    assert drawn == ["Hinton"] * TINY.training.epochs
    assert [path.name for path in tmp_path.rglob("made-*.png")] != []
    without, with_ = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("without", "with"))
    assert without["digest"] == with_["digest"] == settings.digest()
    assert "pictures_every" not in settings.description()
    with pytest.raises(ValueError, match="pictures_every is -1, must be at least 0"):
        distillation.run(settings, tmp_path / "with", HERE, pictures_every=-1)


@pytest.mark.parametrize(
    "change", [{"data": replace(TINY.data, label_noise=0.4)}, {"teacher": "resnet14"}, {"padding": 0}], ids=str
)
def test_an_interrupted_one_goes_on_with_the_same_only(
    change: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(distillation, "write_result", interrupted)  # all but this is there
        with pytest.raises(KeyboardInterrupt):
            distillation.run(of("baseline"), tmp_path / "baseline", HERE, show="off")
    if "teacher" in change:  # which the baseline does not have
        distillation.run(of("baseline", **change), tmp_path / "baseline", HERE, show="off")
        return
    with pytest.raises(ValueError, match="is of another training: description"):
        distillation.run(of("baseline", **change), tmp_path / "baseline", HERE, show="off")
    assert not (tmp_path / "baseline" / "result.json").exists()


def test_a_result_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"digest": ')
    with pytest.raises(ValueError, match="is no result of a distillation; delete it to run it again"):
        distillation.run(of("baseline"), tmp_path, HERE, show="off")


def test_the_given_teacher_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"weights of the user's")
    with pytest.raises(ValueError, match="must not lie in the folder that is written to"):
        distillation.run(of("hinton", teacher_weights=tmp_path / "model.pt"), tmp_path, HERE, show="off")
    assert (tmp_path / "model.pt").read_bytes() == b"weights of the user's"


def test_what_does_not_fit_is_known_before_the_teacher_is_trained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="FSP needs equal numbers of channels"):
        distillation.run(of("fsp", teacher="wrn-10-2"), tmp_path, HERE, show="off")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", [name for name in methods.names() if "labels" in methods.find(name).needs])
def test_every_method_from_a_shared_teacher(
    method: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """The teachers' folder is shared: it is trained by the first test that needs it."""
    teachers = tmp_path_factory.getbasetemp() / "teachers"
    result = distillation.run(of(method), tmp_path, HERE, teachers=teachers, show="off")
    assert (result.teacher_accuracy is None) == (not methods.find(method).needs_teacher)
    assert not any(path.is_dir() for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "hintn"}, "method 'hintn' is unknown, did you mean hinton"),
        ({"student": "resnet9"}, "student 'resnet9' is unknown, did you mean resnet8"),
        ({"teacher": "wrn-17-2"}, "teacher 'wrn-17-2' is unknown, did you mean wrn-"),
        (
            {"method": "dml", "options": {"feature_weight": 2.0}},
            "dml's option 'feature_weight' is unknown, must be one of",
        ),
        ({"teacher_weights": Path("nowhere.pt")}, "there are no weights nowhere.pt"),
        ({"batch_size": 101}, "batch_size is 101, must be at most the 100 images"),
        ({"data": DataSettings(data="digit")}, "name 'digit' is unknown, did you mean digits"),
        (
            {"data": DataSettings(data="digits", train_size=15)},
            "train_size is 15, must be a multiple of the 10 classes",
        ),
        ({"data": DataSettings(data="digits", test_size=10_000)}, "test_size is 10000, must be at most the"),
        ({"data": DataSettings(data="digits", shrink=9)}, "shrink is 9, must be at most the side of the images"),
    ],
)
def test_what_is_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        distillation.run(of(**{"method": "hinton", **change}), tmp_path, HERE, show="off")
    assert not (tmp_path / "result.json").exists()


def test_weights_of_another_network(tmp_path: Path) -> None:
    torch.save({"model": {"weight": torch.zeros(2)}}, tmp_path / "other.pt")
    (tmp_path / "damaged.pt").write_bytes(b"no weights")
    for name, message in (("other", "are not of this ResNet"), ("damaged", "cannot be read")):
        with pytest.raises(ValueError, match=message):
            distillation.run(of("hinton", teacher_weights=tmp_path / f"{name}.pt"), tmp_path / "run", HERE, show="off")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_noise": 1.0}, "label_noise is 1.0, must be from 0 to below 1"),
        ({"train_size": -1}, r"train_size is -1, must be 0 \(all\) or more"),
        ({"shrink": 0}, "shrink is 0, must be 1 or more"),
        ({"imbalance": -0.5}, "imbalance is -0.5"),
        ({"imbalance": 1e-300}, "imbalance is 1e-300, must be 0 .off. or from 0.01 to 100"),
        ({"imbalance_ratio": 0.5}, "imbalance_ratio is 0.5, must be 1 or more"),
    ],
)
def test_data_settings_out_of_range(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataSettings(**change)  # type: ignore[arg-type]


def test_data_of_an_experiment() -> None:
    train, _ = data_sets.load("digits")
    settings = DataSettings(data="digits", train_size=200, test_size=50, shrink=2)
    part, few = prepare(settings, 0)
    assert part.images.shape == (200, 1, 4, 4)
    assert few.images.shape == (50, 1, 4, 4)
    assert part.padding == -(-train.padding // 2)
    assert torch.bincount(part.target).tolist() == [20] * 10
    whole, _ = prepare(replace(settings, train_size=0, test_size=0), 0)
    mean = train.images[7, 0, 2:4, 4:6].float().mean()
    assert abs(int(whole.images[7, 0, 1, 2]) - mean) <= 0.5
    assert len(set(few.target.tolist())) == 10  # not the first ones, which may be of one class
    other, same = prepare(settings, 1)
    assert not torch.equal(part.images, other.images)
    assert torch.equal(few.images, same.images)

    noisy, _ = prepare(replace(settings, label_noise=0.4), 0)
    assert (noisy.target != part.target).sum() == 80
    assert torch.equal(noisy.images, part.images)
    shifted, _ = prepare(replace(settings, label_noise=0.4, noise="asymmetric"), 0)
    changed = shifted.target != part.target
    assert changed.sum() == 80
    assert torch.equal(shifted.target[changed], (part.target[changed] + 1) % 10)

    unequal, _ = prepare(replace(settings, imbalance=1.0, imbalance_ratio=10.0), 0)
    counts = sorted(torch.bincount(unequal.target).tolist())
    assert (counts[0], counts[-1]) == (2, 20)
    assert len(set(counts)) > 4


def test_the_grid(tmp_path: Path) -> None:
    runs = STUDY.grid(["hinton", "dml"], ["clean", "noise-0.4", "imbalance-0.2"], 2)
    assert len(runs) == 12
    assert len({run.folder(tmp_path) for run in runs}) == 12
    for run in runs:
        own = run.distillation
        assert (own.method, own.training.seed) == (run.row, run.seed)
        assert own.data.label_noise == (0.4 if run.column == "noise-0.4" else 0.0)
        assert own.data.imbalance == (0.2 if run.column == "imbalance-0.2" else 0.0)
    with pytest.raises(ValueError, match="method 'hint' is unknown, did you mean hinton"):
        STUDY.grid(["hint"], ["clean"], 1)
    with pytest.raises(ValueError, match=r"setting 'noise-0.5' is unknown, did you mean noise-0\.[246]"):
        STUDY.grid(["hinton"], ["noise-0.5"], 1)


def test_a_study_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def done(methods: list[str], seeds: int) -> list[tuple[Run, Result | Exception]]:
        runs = STUDY.grid(methods, ["clean"], seeds)
        return list(run_all(runs, tmp_path, HERE.device, 1))

    (first,) = done(["baseline"], 1)
    more = done(["baseline", "hinton"], 2)
    assert more[0] == first  # there already
    assert {(run.row, run.seed) for run, _ in more} == {(m, s) for m in ("baseline", "hinton") for s in (0, 1)}
    assert len(list((tmp_path / "teachers").iterdir())) == 2
    monkeypatch.setattr(study_frame, "_run", pytest.fail)  # nothing is run any more
    assert sorted(map(repr, done(["baseline", "hinton"], 2))) == sorted(map(repr, more))


@pytest.mark.forks
def test_processes_side_by_side(tmp_path: Path) -> None:
    runs = STUDY.grid(["baseline", "hinton"], ["clean"], 1)
    results = [
        {run.row: result for run, result in run_all(runs, tmp_path / str(jobs), HERE.device, jobs)} for jobs in (1, 2)
    ]
    assert results[0] == results[1]
    assert all(isinstance(result, Result) for result in results[0].values())


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.forks)])
def test_a_run_that_fails_keeps_no_other_from_running(jobs: int, tmp_path: Path) -> None:
    # whose maps FSP cannot compare with the student's
    base = replace(STUDY, teacher="wrn-10-2", data=replace(TINY.data, shrink=2))
    runs = base.grid(["fsp", "baseline"], ["clean"], 1)
    results = {run.row: result for run, result in run_all(runs, tmp_path, HERE.device, jobs)}
    assert isinstance(results["baseline"], Result)
    assert "FSP needs equal numbers of channels" in str(results["fsp"])
    assert [run.row for run, _ in known(runs, tmp_path)] == ["baseline"]


def test_the_report(tmp_path: Path) -> None:
    accuracies: Accuracies = {
        "clean": {"baseline": {0: 0.80, 1: 0.82}, "hinton": {0: 0.83, 1: 0.83}},
        "noise-0.4": {"baseline": {0: 0.5}, "dml": {0: 0.6}},
    }
    teachers: Accuracies = {"clean": {"resnet26": {0: 0.9, 1: 0.9}}}
    about = {"what": "resnet8 from resnet26", "command": "fastkd study zoo", "student": "resnet8", "data": "cifar10"}
    files = report.save(tmp_path / "made", Zoo(), accuracies, teachers, about)
    table = (tmp_path / "made" / "table.md").read_text()
    assert "| baseline | 81.00 ± 1.41 |  | 2 | 87.64 ± 0.25 |" in table
    assert "| hinton | 83.00 ± 0.00 | +2.00 ± 1.00 | 2 | 88.80 ± 0.16 |" in table
    assert "| dml | 60.00 | +10.00 | 1 | 76.33 ± 0.32 |" in table
    assert "| the teacher, resnet26 | 90.00 ± 0.00 | | 2 | |" in table
    assert "| published: CIFAR-10, resnet8 |" in table
    assert "| published: CIFAR-10, wrn-16-2 |" in table
    assert table.index("baseline") < table.index("hinton")
    assert "| hinton | 83.00 ± 0.00 |  |\n| dml |  | 60.00 |\n| the teacher, resnet26 | 90.00 ± 0.00 |  |" in table
    picture = imread(tmp_path / "made" / "accuracy.png")
    assert min(picture.shape[:2]) > 300
    assert len(set(map(tuple, picture.reshape(-1, picture.shape[2])[::97].tolist()))) > 10
    assert json.loads((tmp_path / "made" / "results.json").read_text())["accuracies"]["clean"]["baseline"]["0"] == 0.8
    assert all(path.is_file() for path in files)


def test_published_figures() -> None:
    """Those of the paper's text that the issue of methods is judged by, and that no cell is missing."""
    for table in (published.CLEAN, published.CLEAN_CIFAR100, published.LABEL_NOISE, published.CLASS_IMBALANCE):
        assert all(len(methods) == 12 for methods in table.values())
    noisy = published.LABEL_NOISE[0.4]
    assert [round(noisy[name].mean, 1) for name in ("hinton", "fitnet", "fsp", "dml", "baseline")] == [
        76.3,
        76.7,
        76.5,
        76.3,
        64.5,
    ]
    assert Zoo().published("noise-0.4") == ("CIFAR-10, wrn-16-2", noisy)
    assert Zoo(student="resnet14").published("clean")[1]["sp"] == (92.34, 0.19)
    assert Zoo(student="wrn-40-2", data=DataSettings(data="cifar100")).published("clean")[1]["one"] == (76.89, 0.27)
    assert Zoo(student="mobilenet", data=DataSettings(data="mnist")).published("clean")[1] == {}


RESULTS = ROOT / "results"
IN_README = "fashion-mnist-noise", "cifar10", "mnist"


@pytest.mark.parametrize(
    "folder", sorted(path.parent for path in RESULTS.glob("*/*/results.json")), ids=lambda path: path.name
)
def test_documents_show_the_committed_results(folder: Path) -> None:
    document = json.loads((folder / "results.json").read_text())
    table = (folder / "table.md").read_text()
    study = study_frame.find(folder.parent.name)(student=document["student"], data=DataSettings(data=document["data"]))
    figures = document.get("figures")
    assert table == report.markdown(study, document["accuracies"], document["teachers"], document, figures)
    assert document["command"] in table
    shown = report.as_markdown(report.overview(study, document["accuracies"], document["teachers"]))
    for place in (folder.parent, *([ROOT] if folder.name in IN_README else [])):
        readme = (place / "README.md").read_text()
        assert document["command"] in readme
        assert shown in readme
