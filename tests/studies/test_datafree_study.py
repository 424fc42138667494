"""The study of data-free distillation: its grid, the paper's figures, its tables and its command, at a tiny scale."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.image import imread

from fastkd.__main__ import main
from fastkd.methods import registry
from fastkd.studies import report
from fastkd.studies.data import DataSettings
from fastkd.studies.datafree import DataFree, published
from fastkd.studies.datafree.study import ROWS, TEACHERS
from fastkd.studies.study import Accuracies, find
from fastkd.studies.zoo import Zoo

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread", "no_figures")]

PLUGIN = Path(__file__).parents[2] / "examples" / "adversarial.py"
ABOUT = {"what": "resnet8 from resnet14", "command": "fastkd study datafree"}


@pytest.fixture
def adversarial() -> Iterator[None]:
    """A method of a plugin, without images."""
    registry.load_plugin(PLUGIN)
    yield
    registry._entries.pop("adversarial")
    sys.modules.pop(f"fastkd_plugin_{PLUGIN.stem}")


# ---- the grid ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("adversarial")
def test_the_grid(tmp_path: Path) -> None:
    study = DataFree()
    assert find("datafree") is DataFree
    runs = study.grid(study.methods, study.teachers, 2)
    assert len(runs) == len({run.folder(tmp_path) for run in runs}) == 11 * 5 * 2
    for run in runs:
        own = run.distillation
        assert (own.training.seed, own.teacher_seed) == (run.seed, int(run.column.removeprefix("T")) - 1)
        assert own.method == (run.row if run.row not in ("baseline", "no-prior") else "ta-dfkd")
    assert len({run.distillation.of_teacher().digest() for run in runs}) == 5
    # a method of a plugin, too, if it needs nothing but a teacher
    assert set(study.row_names()) >= {*ROWS, "adversarial"}
    assert not set(study.row_names()) & {"hinton", "vanilla", "dml"}
    assert study.distillation("adversarial", "T2", 0).options == {}
    with pytest.raises(ValueError, match="method 'hinton' is unknown"):
        study.grid(["hinton"], ["T1"], 1)
    with pytest.raises(ValueError, match="teacher 'T6' is unknown, must be one of T1, T2"):
        study.grid(["adversarial"], ["T6"], 1)


def test_the_ablation() -> None:
    rows = {row: DataFree().distillation(row, "T1", 0) for row in ("baseline", "no-prior", "ta-dfkd")}
    assert {row.method for row in rows.values()} == {"ta-dfkd"}
    assert rows["baseline"].options == {"class_prior": 1.0, "select": False}
    assert rows["no-prior"].options == {"class_prior": 0.0, "select": False}
    assert rows["ta-dfkd"].options == {}
    for row in ROWS.values():
        assert set(row.options) <= set(registry.find(row.method).options())


def test_options_of_the_methods_and_as_many_updates_of_each() -> None:
    said = ("cmi.generator_steps=50", "width=16", "generator_steps=3", "ta-dfkd.select=False", "zskt.squash=sigmoid")
    study = DataFree(method_options=said, student_updates=300)
    runs = {row: study.distillation(row, "T1", 0) for row in ROWS}
    assert runs["cmi"].options == {"width": 16, "generator_steps": 50}
    assert runs["dafl"].options == {"width": 16, "generator_steps": 3}
    assert runs["zskt"].options["squash"] == "sigmoid"
    assert runs["ta-dfkd"].options["select"] is False
    assert runs["baseline"].options == {"width": 16, "generator_steps": 3, "class_prior": 1.0, "select": False}
    assert {row: run.iterations for row, run in runs.items() if row in ("dafl", "dfad", "ta-dfkd", "cmi", "zskt")} == {
        "dafl": 300,
        "dfad": 60,
        "ta-dfkd": 30,
        "cmi": 6,
        "zskt": 43,
    }
    assert DataFree().distillation("dafl", "T1", 0).iterations == 36
    with pytest.raises(ValueError, match=r"cmi's option 'widht' is unknown, did you mean width\?"):
        DataFree(method_options=("cmi.widht=3",)).grid(["dafl"], ["T1"], 1)
    with pytest.raises(ValueError, match=r"method_options has 'width', must be NAME=VALUE or ROW.NAME=VALUE"):
        DataFree(method_options=("width",))
    with pytest.raises(ValueError, match="student_updates is -1, must be 0"):
        DataFree(student_updates=-1)


def test_the_teacher_learns_otherwise_than_the_student() -> None:
    own = DataFree().distillation("ta-dfkd", "T3", 1)
    assert (own.teacher, own.student, own.batch_size, own.iterations) == ("cifar-resnet34", "cifar-resnet18", 1024, 36)
    assert (own.training.epochs, own.training.learning_rate, own.training.seed) == (200, 0.01, 1)
    teacher = own.of_teacher()
    assert (teacher.student, teacher.batch_size) == ("cifar-resnet34", 128)
    assert teacher.training == replace(own.training, learning_rate=0.1, seed=2)
    fewer = DataFree(training=replace(DataFree().training, epochs=3)).distillation("ta-dfkd", "T3", 1)
    assert fewer.of_teacher() == teacher


def test_what_the_grid_sets_is_not_given() -> None:
    with pytest.raises(ValueError, match="teacher_seed is 3, must not be given: teachers says which"):
        DataFree(teacher_seed=3)


# ---- the paper's figures -----------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["cifar10", "cifar100"])
def test_published_figures_are_those_of_one_another(data: str) -> None:
    """The paper's differences are those of its accuracies, but for the last digit."""
    assert list(published.TEACHERS[data]) == list(TEACHERS)
    methods = {"dafl", "dfad", "cmi", "pre-dfkd", "ta-dfkd"}
    for teacher, accuracy in published.TEACHERS[data].items():
        tables = [table[data][teacher] for table in (published.CONVERGING, published.GAP, published.INSTABILITY)]
        converging, gap, instability = ({row: theirs.mean for row, theirs in table.items()} for table in tables)
        peak = {row: theirs.mean for row, theirs in published.PEAK[data][teacher].items()}
        assert set(converging) == set(gap) == set(instability) == methods
        assert set(peak) == methods | {"baseline", "no-prior"} <= set(ROWS)
        assert gap == pytest.approx({row: accuracy - peak[row] for row in methods}, abs=0.011)
        assert instability == pytest.approx({row: peak[row] - converging[row] for row in methods}, abs=0.011)


def test_published_figures_of_the_text() -> None:
    assert published.PEAK["cifar10"]["T1"]["ta-dfkd"].mean == 94.43
    assert published.CONVERGING["cifar10"]["T3"]["dafl"].mean == 68.87  # "a catastrophic failure"
    assert published.INSTABILITY["cifar10"]["T3"]["dafl"].mean == 19.21
    assert published.PEAK["cifar100"]["T4"]["cmi"].mean == 77.00
    assert published.GAP["cifar100"]["T3"]["ta-dfkd"].mean == -0.01  # better than its teacher
    assert published.PEAK["cifar10"]["T5"]["no-prior"].mean == 90.55
    shown = {figure.name: figure for figure in DataFree().figures_shown()}
    assert shown["teacher_gap"].heading.endswith("teachers of 95.46, 93.46, 92.01, 94.43, 91.36 %")
    assert shown["peak_accuracy"].published is published.PEAK["cifar10"]
    other = {figure.name: figure for figure in DataFree(data=DataSettings(data="CIFAR100")).figures_shown()}
    assert other["instability"].published is published.INSTABILITY["cifar100"]
    none = DataFree(data=DataSettings(data="digits")).figures_shown()
    assert all(figure.published == {} and "published" not in figure.heading for figure in none)


# ---- the report --------------------------------------------------------------------------------------

ACCURACIES: Accuracies = {
    "T1": {"dafl": {0: 0.80, 1: 0.90}, "ta-dfkd": {0: 0.93, 1: 0.94}},
    "T2": {"dafl": {0: 0.60}, "ta-dfkd": {0: 0.92}},
}
GAPS: Accuracies = {
    "T1": {"dafl": {0: 0.15, 1: 0.05}, "ta-dfkd": {0: 0.02, 1: 0.01}},
    "T2": {"dafl": {0: 0.34}, "ta-dfkd": {0: -0.005}},
}


def test_the_spread_over_the_teachers(tmp_path: Path) -> None:
    teachers: Accuracies = {"T1": {"resnet14": {0: 0.95}}, "T2": {"resnet14": {1: 0.94}}}
    files = report.save(tmp_path, DataFree(), ACCURACIES, teachers, ABOUT, {"teacher_gap": GAPS, "loss": GAPS})
    assert [path.name for path in files] == ["table.md", "accuracy.png", "results.json", "spread.png"]
    table = (tmp_path / "table.md").read_text()
    head = "| method | mean | deviation | lowest | highest | teachers | runs |"
    # means of T1 and T2: 85 and 60; their mean and deviation; the lowest and highest run
    assert f"### test accuracy, %\n\n{head}\n" in table
    assert "\n| dafl | 72.50 | 17.68 | 60.00 | 90.00 | 2 | 3 |\n" in table
    assert "\n| ta-dfkd | 92.75 | 1.06 | 92.00 | 94.00 | 2 | 3 |\n" in table
    assert f"### gap of the peak accuracy to the teacher, %\n\n{head} published |\n" in table
    # published: of the same teachers, 3.39 and 5.03, 1.03 and 1.31
    assert "\n| dafl | 22.00 | 16.97 | 5.00 | 34.00 | 2 | 3 | 4.21 ± 1.16 |\n" in table
    assert "\n| ta-dfkd | 0.50 | 1.41 | -0.50 | 2.00 | 2 | 3 | 1.17 ± 0.20 |\n" in table
    assert table.index("## Over the teachers") > table.index("## T2")
    assert "| the teacher, resnet14 | 95.00 | 94.00 |" in table
    assert list(json.loads((tmp_path / "results.json").read_text())["figures"]) == ["teacher_gap"]
    picture = imread(tmp_path / "spread.png")
    assert min(picture.shape[:2]) > 300
    assert len(set(map(tuple, picture.reshape(-1, picture.shape[2])[::97].tolist()))) > 8


def test_the_box_plot_shows_every_run() -> None:
    study = DataFree()
    assert study.spread is not None
    (axes,) = report.spread_figure(study, study.spread, GAPS).axes
    dots = [line for line in axes.lines if line.get_label() in GAPS]
    assert [line.get_label() for line in dots] == ["T1", "T2"]
    assert sorted(float(y) for line in dots for y in line.get_ydata()) == pytest.approx([-0.5, 1, 2, 5, 15, 34])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["dafl", "ta-dfkd"]


@pytest.mark.parametrize("columns", [("T1",), ("T1", "T2")])
def test_spread_of_a_part(columns: tuple[str, ...]) -> None:
    """One teacher has no deviation, and what was not computed no table."""
    accuracies = {column: ACCURACIES[column] for column in columns}
    table = report.markdown(DataFree(), accuracies, {}, ABOUT)
    assert ("| dafl | 85.00 |  | 80.00 | 90.00 | 1 | 2 |" in table) == (len(columns) == 1)
    assert "gap" not in table
    assert "to the baseline" not in table  # which was not run
    with_baseline = {column: {**rows, "baseline": {0: 0.5}} for column, rows in accuracies.items()}
    assert "to the baseline" in report.markdown(DataFree(), with_baseline, {}, ABOUT)
    assert "Over the" not in report.markdown(Zoo(), {"clean": {"baseline": {0: 0.5}}}, {}, ABOUT)


# ---- the command -------------------------------------------------------------------------------------

TINY = ["study", "datafree", "--plugin", str(PLUGIN), "--data", "digits", "--train-size", "100", "--test-size", "40"]
TINY += ["--teacher", "resnet8", "--student", "resnet8", "--epochs", "2", "--batch-size", "8"]
TINY += ["--teacher-epochs", "1", "--teacher-batch-size", "50", "--iterations", "1", "--methods", "adversarial"]
TINY += ["--device", "cpu"]


@pytest.mark.usefixtures("adversarial")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*TINY, "--methods", "dafl", "--teachers", "T1", "T3", "--seeds", "2", "--output", str(tmp_path)]
    assert main(command) == 0
    capsys.readouterr()
    made = {"table.md", "results.json", "accuracy.png", "course.png", "spread.png", "runs"}
    assert {path.name for path in tmp_path.iterdir()} == made
    seeds = [
        json.loads(path.read_text())["settings"]["training"]["seed"]
        for path in (tmp_path / "runs" / "teachers").glob("*/result.json")
    ]
    assert sorted(seeds) == [0, 2]  # of T1 and T3, each trained once for both students
    table = (tmp_path / "table.md").read_text()
    for heading in ("## T1", "## T3", "## Over the teachers", "## peak accuracy, %", "## gap of the peak", "## instab"):
        assert heading in table
    assert "--teachers T1 T3" in table
    assert str(tmp_path) not in table
    document = json.loads((tmp_path / "results.json").read_text())
    figures = document["figures"]
    assert list(document["teachers"]["T3"]["resnet8"]) == ["2"]  # it is one, whatever the students' seeds
    for column in ("T1", "T3"):
        (teacher,) = document["teachers"][column]["resnet8"].values()
        for seed in ("0", "1"):
            peak = figures["peak_accuracy"][column]["dafl"][seed]
            assert figures["teacher_gap"][column]["dafl"][seed] == teacher - peak
            assert figures["test_accuracy_at_100"][column]["dafl"][seed] <= peak


@pytest.mark.usefixtures("adversarial")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--teacher-seed 1", "teacher_seed is 1, must not be given: teachers says which"),
        ("--teachers T1 T9", "teacher 'T9' is unknown"),
        ("--teachers", "teachers is empty"),
        ("--methods hinton", "method 'hinton' is unknown"),
        ("--teacher-batch-size 101", "teacher_batch_size is 101, must be at most the 100 images"),
        ("--collection mnist", "method 'adversarial' makes its own images"),
    ],
)
def test_what_the_command_refuses(options: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, *options.split(), "--output", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
