"""The study of MosaicKD: its grid, the paper's figures, and its command, at a tiny scale."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from image_files import several_sets

from fastkd.__main__ import main
from fastkd.methods import registry
from fastkd.studies.collected import CollectionSettings
from fastkd.studies.data import DataSettings, check, others, prepare
from fastkd.studies.mosaic import MosaicStudy, published
from fastkd.studies.mosaic.study import DOMAINS, PATCHES, ROWS
from fastkd.studies.study import Accuracies, find

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread", "no_figures")]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return several_sets(tmp_path / "data")


# ---- classes of a set --------------------------------------------------------------------------------


def test_a_task_of_some_classes(root: Path) -> None:
    """They are numbered anew, in their order; images of the others are a collection."""
    whole, _ = prepare(DataSettings(data_root=root), 0)
    settings = DataSettings(data_root=root, classes=(7, 2))
    train, test = prepare(settings, 0)
    assert train.class_names == (whole.class_names[7], whole.class_names[2])
    assert len(train) == int(((whole.target == 7) | (whole.target == 2)).sum())
    assert train.images[train.target == 0].flatten(1).sum() == whole.images[whole.target == 7].flatten(1).sum()
    assert set(test.target.tolist()) <= {0, 1}
    left = others(settings)
    assert len(left) == len(whole) - len(train)
    assert left.long().sum() + train.images.long().sum() == whole.images.long().sum()
    assert others(DataSettings(data_root=root, classes=(7, 2), shrink=2)).shape[2:] == (16, 16)


def test_classes_that_are_mistaken_for_others_in_such_a_task(root: Path) -> None:
    """By their numbers in the task: 9 for 1, 2 for 0, 4 for 7, and 3 and 5 for each other; only where both are in it."""
    settings = DataSettings(data_root=root, classes=(3, 9, 5, 2, 1))
    clean, _ = prepare(settings, 0)
    noisy, _ = prepare(replace(settings, label_noise=0.5, noise="asymmetric"), 0)
    changed = {(int(a), int(b)) for a, b in zip(clean.target, noisy.target, strict=True) if a != b}
    assert changed == {(0, 2), (2, 0), (1, 4)}


def test_what_is_known_of_such_a_task() -> None:
    outline = check(DataSettings(classes=(2, 3, 4), train_size=1500))
    assert (outline.num_classes, outline.train_size, outline.test_size) == (3, 1500, None)
    with pytest.raises(ValueError, match="train_size is 1501, must be a multiple of the 3 classes"):
        check(DataSettings(classes=(2, 3, 4), train_size=1501))


# ---- the grid ----------------------------------------------------------------------------------------


def test_the_grid(tmp_path: Path) -> None:
    study = MosaicStudy(data=DataSettings(classes=(2, 3, 4), shrink=2), method_options=("width=16", "mosaic.local=0.5"))
    assert find("mosaic") is MosaicStudy
    assert set(study.methods) == {"kd", "balanced", "fitnet", "rkd", "crd", "sskd", "mosaic"}
    rows = [row for row in ROWS if row != "patches-1"]  # which would be of half a pixel
    assert set(rows) <= set(study.row_names())
    assert "patches-1" not in study.row_names()
    assert "patches-1" in MosaicStudy().row_names()
    runs = study.grid(rows, study.domains, 2)
    assert len({run.folder(tmp_path) for run in runs}) == len(runs) == len(rows) * 4 * 2
    assert len({run.distillation.of_teacher().digest() for run in runs}) == 2  # of a seed
    by_cell = {(run.row, run.column): run.distillation for run in runs if run.seed == 0}
    kd = by_cell["kd", "others"]
    assert (kd.method, kd.collection.collection, kd.options) == ("ood-kd", "others:20000", {})
    assert not kd.collection.looked_at
    assert by_cell["kd", "uncertain"].collection.looked_at == ("entropy",)
    assert by_cell["kd", "uncertain"].collection.lowest_share == 0.5
    assert by_cell["balanced", "others"].collection.looked_at == ("prediction",)
    assert by_cell["mosaic", "quickdraw"].options == {"width": 16, "local": 0.5, "patch_size": 5}
    said = replace(study, method_options=("patch_size=3",))
    assert said.distillation("mosaic", "others", 0).options["patch_size"] == 3
    assert said.distillation("patches-8", "others", 0).options["patch_size"] == 4
    assert by_cell["patches-8", "quickdraw"].options == {"width": 16, "patch_size": 4}  # of images half as large
    assert by_cell["patches-2", "quickdraw"].options["patch_size"] == 1
    assert by_cell["no-patches", "quickdraw"].options == {"width": 16, "local": 0.0, "patch_size": 5}
    dafl = by_cell["dafl", "others"]  # without data: as many updates of the student
    assert (dafl.iterations, dafl.collection) == (50000 // 256, CollectionSettings())
    assert by_cell["zskt", "others"].iterations == round(50000 // 256 / 7)
    assert MosaicStudy(images=0).distillation("kd", "task", 0).collection.collection == "task"
    assert MosaicStudy().distillation("kd", "task", 0).collection.collection == "task"
    for row in ROWS.values():
        assert set(row.options) <= set(registry.find(row.method).options())
    assert {"fixed-linear", "hinton"}.isdisjoint(study.row_names())
    assert {"cmi", "ta-dfkd"} <= set(study.row_names())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"images": -1}, "images is -1, must be 0"),
        ({"uncertain_share": 1.0}, "uncertain_share is 1.0, must be above 0 and below 1"),
        ({"method_options": ("width",)}, "method_options has 'width', must be NAME=VALUE or ROW.NAME=VALUE"),
        ({"collection": CollectionSettings(collection="mnist")}, "collection is 'mnist', must not be given: domains"),
        ({"collection": CollectionSettings("mnist", balanced=True)}, "collection is 'mnist', must not be given"),
        ({"collection": CollectionSettings(score="entropy")}, "score is 'entropy', must not be given"),
        ({"iterations": 5}, "iterations is 5, must not be given: draws says how many"),
    ],
)
def test_what_the_study_refuses(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MosaicStudy(**changes)  # type: ignore[arg-type]


def test_the_tasks_own_set_is_no_other_domain() -> None:
    with pytest.raises(ValueError, match="domains has 'cifar10', must be others: it is the task's own data set"):
        MosaicStudy().grid(["kd"], ["cifar10"], 1)
    with pytest.raises(
        ValueError, match="domains has 'uncertain', must be others: the task has all classes of its data"
    ):
        MosaicStudy(data=DataSettings(data="mnist")).grid(["kd"], ["uncertain"], 1)
    digits = MosaicStudy(data=DataSettings(data="mnist"))
    assert digits.column_names() == ("task", "cifar10", "fashion-mnist", "quickdraw")


# ---- the paper's figures -----------------------------------------------------------------------------


def test_published_figures() -> None:
    where, rows = MosaicStudy().published("others")
    assert "CIFAR-10" in where
    assert (rows["kd"].mean, rows["mosaic"].mean, rows["dafl"].mean) == (47.47, 61.01, 20.88)
    assert rows["patches-8"].mean == rows["mosaic"].mean  # the same training, in two tables
    assert MosaicStudy().published("fashion-mnist")[1]["mosaic"].mean == 31.87
    assert MosaicStudy().published("task")[1]["kd"].mean == 64.06
    best = {name: max(sizes, key=lambda size: sizes[size]) for name, sizes in published.ABLATION.items()}
    assert best == {"cifar-10": 18, "places365": 8, "svhn": 4}
    for sizes in (*published.ABLATION.values(), *published.FRECHET_DISTANCE.values()):
        assert tuple(sizes) == published.SIZES == tuple(PATCHES.values())
    assert set(published.SEGMENTATION) <= set(ROWS)
    assert {domain.published for domain in DOMAINS.values()} <= {*published.ACCURACY}
    for rows in published.ACCURACY.values():
        assert set(rows) <= set(ROWS)


def test_the_figure_of_the_patches() -> None:
    """Ours and the paper's; of one size there is none."""
    accuracies: Accuracies = {
        "others": {"patches-2": {0: 0.5, 1: 0.6}, "patches-8": {0: 0.7}, "kd": {0: 0.4}},
        "quickdraw": {"patches-8": {0: 0.3}},
        "mnist": {"kd": {0: 0.2}},
    }
    distances: Accuracies = {"others": {"patches-2": {0: 3.0, 1: 5.0}, "patches-8": {0: 9.0}}}
    (figure,) = MosaicStudy().pictures(accuracies, {"patch_frechet_distance": distances}).values()
    left, right = figure.axes
    curves = {line.get_label(): line for line in left.lines if not str(line.get_label()).startswith("_")}
    assert set(curves) == {"others", "quickdraw", "others: the paper's, CIFAR-10", "quickdraw: the paper's, SVHN"}
    assert list(curves["others"].get_xdata()) == [2, 8]
    assert list(curves["others"].get_ydata()) == pytest.approx([55, 70])
    assert list(curves["others: the paper's, CIFAR-10"].get_ydata())[3] == 61.01
    assert list(right.lines[0].get_ydata()) == pytest.approx([4, 9])
    assert MosaicStudy().pictures({"others": {"patches-2": {0: 0.5}}}, {}) == {}


# ---- the command -------------------------------------------------------------------------------------

TINY = ["study", "mosaic", "--train-size", "20", "--test-size", "4", "--batch-size", "4", "--teacher", "resnet8"]
TINY += [
    "--student",
    "resnet8",
    "--shrink",
    "4",
    "--teacher-epochs",
    "1",
    "--epochs",
    "2",
    "--draws",
    "8",
    "--device",
    "cpu",
]
TINY += ["--classes", "2", "5", "--images", "12", "--method-options", "width=4", "latent=4", "discriminator_width=4"]


def test_the_command(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    options = ["student_steps=2", "patches_per_image=2", "patch_size=3", "negatives=5"]
    command = [*TINY, *options, "--data-root", str(root), "--seeds", "1", "--output", str(output)]
    rows = ["dafl", "kd", "balanced", "crd", "mosaic", "patches-32"]
    command += ["--methods", *rows, "--domains", "uncertain", "mnist"]
    assert main(command) == 0, capsys.readouterr()
    capsys.readouterr()
    made = {"table.md", "results.json", "accuracy.png", "course.png", "runs"}
    assert {path.name for path in output.iterdir()} == made
    table = (output / "table.md").read_text()
    for said in ("## uncertain", "## mnist", "## Frechet distance of patches", "| 36.54 |", "resnet8"):
        assert said in table
    assert str(tmp_path) not in table
    document = json.loads((output / "results.json").read_text())
    assert set(document["accuracies"]["mnist"]) == set(rows)
    figures = document["figures"]
    assert set(figures["collection_frechet_distance"]["mnist"]) == set(rows) - {"dafl"}
    assert set(figures["patch_frechet_distance"]["mnist"]) == {"mosaic", "patches-32"}
    assert set(figures["frechet_distance"]["mnist"]) == {"dafl", "mosaic", "patches-32"}
    far, near = (figures["collection_frechet_distance"][domain]["kd"]["0"] for domain in ("mnist", "uncertain"))
    assert far != near
    names = {path.name.split("-")[0] for path in (output / "runs").rglob("*.npy")}
    assert names == {"entropy", "prediction"}
    before = (output / "results.json").read_bytes()
    assert main(command) == 0
    assert (output / "results.json").read_bytes() == before


def test_the_command_on_dense_networks(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The mean IoU stands where the accuracy does, beside the paper's of NYUv2."""
    output = tmp_path / "out"
    command = ["study", "mosaic", "--data", "scenes", "--classes", "--train-size", "24", "--test-size", "8"]
    command += [
        "--batch-size",
        "6",
        "--teacher",
        "segmenter-4-4",
        "--student",
        "segmenter-2-4",
        "--teacher-epochs",
        "1",
    ]
    command += ["--epochs", "2", "--draws", "12", "--images", "12", "--seeds", "1", "--methods", "kd", "mosaic"]
    command += ["--domains", "mnist", "--data-root", str(root), "--output", str(output), "--device", "cpu"]
    command += ["--method-options", "width=4", "latent=4", "discriminator_width=4", "student_steps=1"]
    assert main(command) == 0, capsys.readouterr()
    made = {"table.md", "results.json", "mean-iou.png", "course.png", "runs"}
    assert {path.name for path in output.iterdir()} == made
    document = json.loads((output / "results.json").read_text())
    assert document["measure"] == "mean IoU"
    (folder,) = (output / "runs" / "mnist").glob("kd-*")
    figures = json.loads((folder / "result.json").read_text())["figures"]
    iou = figures["test_mean_iou"]
    assert iou < figures["test_accuracy"]  # most pixels are of the background
    assert document["accuracies"]["mnist"]["kd"]["0"] == iou == figures["test_mean_iou_at_100"]
    assert document["figures"]["test_accuracy"]["mnist"]["kd"]["0"] == figures["test_accuracy"]
    assert document["teachers"]["mnist"]["segmenter-4-4"]["0"] == figures["teacher_mean_iou"]
    table = (output / "table.md").read_text()
    assert f"| kd | {100 * iou:.2f} |  | 1 | 40.60 |" in table
    for said in (
        "| method | test mean IoU, % |",
        "| published: NYUv2, images of ImageNet |",
        "## accuracy of the pixels",
    ):
        assert said in table
    assert "CIFAR" not in table


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--methods hinton", "method 'hinton' is unknown"),
        ("--domains svhn", "domain 'svhn' is unknown"),
        ("--balanced", "collection is empty, must be given where"),
        ("--iqpr 5", "iqpr"),
        ("--method-options mosaic.patch=3", "mosaic's option 'patch' is unknown"),
        ("--method-options dafl.patches=3", "dafl's option 'patches' is unknown"),
        ("--method-options mosaik.width=3", "row 'mosaik' is unknown, did you mean mosaic"),
        ("--method-options widht=3", "option of the methods 'widht' is unknown, did you mean width"),
        ("--method-options no-patches.local=2", "must not have local, by which no-patches is what it is"),
        ("--images 3", "collection has 3 images to draw from, must have at least as many as a batch, 4"),
        (
            "--method-options patch_size=9 --methods mosaic",
            "patch_size is 9, must be at most the side of the images, 8",
        ),
    ],
)
def test_what_the_command_refuses(
    options: str, said: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*TINY, "--data-root", str(root), "--domains", "others", "--methods", "kd", "mosaic"]
    assert main([*command, "--output", str(tmp_path / "out"), *options.split()]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
