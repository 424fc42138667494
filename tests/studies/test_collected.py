"""Distillation on a collection: what it is put together from, what is drawn, its study, and the command for scores."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import several_sets
from torch import Tensor

from fastkd import AliasTable, statistics
from fastkd.__main__ import main
from fastkd.data import ArrayCollection, ImageSet
from fastkd.data.collection import Unreadable
from fastkd.models.resnet import resnet
from fastkd.scoring import open_scores
from fastkd.studies.collected import LONG_RUN, PREDICTION, Collected, CollectionSettings, make_collection
from fastkd.studies.collection.study import ROWS, CollectionStudy
from fastkd.studies.data import DataSettings, prepare

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]

ITEMS = 200


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return several_sets(tmp_path / "data")


def task() -> ImageSet:
    pixels = torch.randint(256, (30, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return ImageSet(pixels, torch.arange(30) % 10, tuple("abcdefghij"), (0.5,) * 3, (0.25,) * 3, flip=True, padding=1)


def collected(
    iqpr: float, scores: Tensor | None, settings: CollectionSettings | None = None, **changes: Any
) -> Collected:
    """By 1C-Sum, the score that is named unless another is."""
    pixels = torch.randint(256, (ITEMS, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    settings = settings or CollectionSettings(collection="here", iqpr=iqpr, draws=600)
    arguments = {"batch_size": 20, "padding": None, "flip": None, "seed": 3, **changes}
    found = {} if scores is None else {settings.score: scores}
    return Collected(settings, ArrayCollection(pixels), found, task(), **arguments)


def test_lambda_is_of_what_is_drawn_from() -> None:
    scores = torch.randn(ITEMS, generator=torch.Generator().manual_seed(4)).double()
    scores[:3] = -math.inf  # could not be read
    made = collected(5.0, scores)
    kept = made.drawn_from
    assert 177 <= int(kept.sum()) <= 180  # of nine tenths, up to three could not be read
    assert not bool(kept[:3].any())
    p = made.batches.table.probabilities()
    assert p[~kept].tolist() == [0.0] * int((~kept).sum())
    # the first and third quartile of those scores, and nothing else, are 5 apart
    low, high = torch.quantile(scores[kept], torch.tensor([0.25, 0.75], dtype=torch.float64))
    slope = made.batches.table.inverse_temperature
    assert (slope * (high - low)).exp().item() == pytest.approx(5.0, rel=1e-12)
    torch.testing.assert_close(p[kept], torch.softmax(slope * scores[kept], 0), rtol=1e-6, atol=1e-12)


def test_the_lowest_share_alone_are_drawn() -> None:
    """A share of those that can be drawn, by the lowest scores."""
    scores = torch.randn(ITEMS, generator=torch.Generator().manual_seed(4)).double()
    scores[:3] = -math.inf  # could not be read
    settings = CollectionSettings(collection="here", score="entropy", lowest_share=0.25, draws=600, held_out=0.0)
    made = collected(1.0, scores, settings)
    kept = made.drawn_from
    assert int(kept.sum()) == round(0.25 * (ITEMS - 3))
    assert not bool(kept[:3].any())
    assert scores[kept].max() < scores[~kept][3:].min()
    drawn = torch.cat([batch.index for batch in made.batches.epoch(0)])
    assert bool(kept[drawn].all())
    torch.testing.assert_close(made.batches.table.probabilities()[kept], torch.full((49,), 1 / 49, dtype=torch.float64))


def test_balanced_draws_are_of_all_classes_alike() -> None:
    """Of those that the teacher predicts, however rare; images of a class are drawn equally often."""
    predictions = torch.tensor([0.0] * 150 + [2.0] * 45 + [5.0] * 5, dtype=torch.float64)
    predictions[:2] = -math.inf  # could not be read
    settings = CollectionSettings(collection="here", balanced=True, draws=600, held_out=0.1)
    pixels = torch.zeros(ITEMS, 3, 8, 8, dtype=torch.uint8)
    given = {PREDICTION: predictions}
    collection = ArrayCollection(pixels)
    collection._missing = {i: Unreadable(i, str(i), "broken") for i in range(2)}
    collection.unreadable = "skip"
    made = Collected(settings, collection, given, task(), batch_size=20, padding=None, flip=None, seed=3)
    p, kept = made.batches.table.probabilities(), made.drawn_from
    assert p[~kept].eq(0).all()
    for label in (0, 2, 5):
        chosen = kept & (predictions == label)
        torch.testing.assert_close(p[chosen], torch.full_like(p[chosen], 1 / 3 / int(chosen.sum())))


def test_some_are_those_that_are_drawn_from() -> None:
    made = collected(1.0, None)
    some = made.some(7)
    there = made.drawn_from.nonzero().flatten()
    chosen = there[[i * len(there) // 7 for i in range(7)]]
    torch.testing.assert_close(some, (made.collection.read(chosen).float() / 255 - 0.5) / 0.25)
    assert len(made.some(1000)) == len(there)


def test_what_is_held_out_is_not_drawn_and_comes_as_it_is() -> None:
    made = collected(1.0, None)
    for batch in made.batches.epoch(0):
        assert bool(made.drawn_from[batch.index].all())
    held_out = torch.cat([batch.index for batch in made.held_out.epoch(0)])
    assert held_out.tolist() == (~made.drawn_from).nonzero().flatten().tolist()
    first = next(iter(made.held_out.epoch(0)))
    pixels = made.collection.read(first.index).float()
    torch.testing.assert_close(first.images, (pixels / 255 - 0.5) / 0.25)
    assert len(made.held_out) == 1
    counts = made.batches.counts
    figures = made.figures(counts)
    drawn = counts[made.drawn_from]
    assert figures["skip_ratio"] == pytest.approx((drawn == 0).double().mean().item())
    # nobody knows what is of the task
    assert set(figures) == {"skip_ratio", "uniformity", "long_run_skip_ratio", "long_run_uniformity"}


@pytest.mark.parametrize("iqpr", [1.0, 25.0])
def test_the_long_run_is_of_so_many_draws_for_each_image(iqpr: float, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(20000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    images = torch.zeros(20000, 1, 1, 1, dtype=torch.uint8)
    small = ImageSet(images[:4], torch.arange(4), tuple("abcd"), (0.5,), (0.25,))
    settings = CollectionSettings(collection="some", iqpr=iqpr, draws=100, held_out=0.1)
    made = Collected(
        settings,
        ArrayCollection(images, name="some"),
        {"1c-sum": scores},
        small,
        batch_size=20,
        padding=0,
        flip=False,
        seed=0,
    )
    nothing = torch.zeros(20000, dtype=torch.int64)
    figures = made.figures(nothing)
    assert figures["skip_ratio"] == 1.0  # of the training
    drawn = made.batches.table.probabilities()[made.drawn_from]
    expected = statistics.expected_skip_ratio(drawn, LONG_RUN * 18000).item()
    assert figures["long_run_skip_ratio"] == pytest.approx(expected, abs=5 * (expected / 18000) ** 0.5 + 1e-4)
    monkeypatch.setattr("fastkd.studies.collected.DRAWS_AT_ONCE", 70_000)
    assert made.figures(nothing) == pytest.approx(figures, rel=0, nan_ok=True)  # the same draws again, some at a time
    assert made.batches.counts.sum() == 0  # and none of the training's


def test_what_cannot_be_read_is_neither_drawn_nor_held_out(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    (tmp_path / "photos").mkdir()
    for i in range(40):
        path = tmp_path / "photos" / f"{i:02d}.png"
        if i % 4:
            image.new("RGB", (8, 8), (i, i, i)).save(path)
        else:
            path.write_bytes(b"no image")
    settings = CollectionSettings(collection=str(tmp_path / "photos"), unreadable="skip", draws=200, held_out=0.5)
    collection = make_collection(settings, DataSettings(), task(), 0)
    made = Collected(settings, collection, {}, task(), batch_size=20, padding=0, flip=False, seed=0)
    seen = [batch.index for source in (made.batches, made.held_out) for batch in source.epoch(0)]
    assert not any(bool((index % 4 == 0).any()) for index in seen)


def test_another_seed_holds_others_out() -> None:
    first, same, other = (collected(1.0, None, seed=seed).drawn_from for seed in (3, 3, 4))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_collections_of_a_text(root: Path) -> None:
    data = DataSettings(data_root=root, train_size=60, shrink=2)
    train, _ = prepare(data, 5)
    settings = CollectionSettings(collection="ori=task,rel=rest:20,mnist:10,far=fashion-mnist")
    found = make_collection(settings, data, train, 5)
    assert [tuple(source) for source in found.sources] == [
        ("ori", 0, 60),
        ("rel", 60, 80),
        ("mnist", 80, 90),
        ("far", 90, 120),
    ]
    assert found.shape == (3, 16, 16)
    assert torch.equal(found.read(torch.arange(60)), train.images)
    whole, _ = prepare(DataSettings(data_root=root, shrink=2), 0)
    both = torch.cat(
        [train.images, make_collection(CollectionSettings(collection="rest"), data, train, 5).read(torch.arange(40))]
    )
    # together they are the training images, each once
    assert sorted(both.flatten(1).sum(1).tolist()) == sorted(whole.images.flatten(1).sum(1).tolist())
    assert settings.relevant == ("ori", "rel")
    alone = CollectionSettings(collection="rel=rest")
    assert make_collection(alone, data, train, 5).sources[0].name == alone.relevant[0] == "rel"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mnist:31", "but mnist has 30 images"),
        ("mnist,mnist", "has mnist twice"),
        ("minst", "collection 'minst' is unknown, did you mean mnist"),
        ("task,", "must be a folder, an .npy or the name of a set"),
        ("tusk", "collection 'tusk' is unknown, did you mean task"),
        ("no/where", "no/where"),
    ],
)
def test_collections_that_are_none(text: str, said: str, root: Path) -> None:
    data = DataSettings(data_root=root, train_size=60)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        make_collection(CollectionSettings(collection=text), data, prepare(data, 0)[0], 0)


def test_settings_that_cannot_be() -> None:
    for changes, said in (
        ({"collection": "a", "iqpr": 0.5}, "iqpr is 0.5, must be 1"),
        ({"collection": "a", "iqpr": math.nan}, "iqpr is nan"),
        ({"collection": "a", "draws": 0}, "draws is 0"),
        ({"collection": "a", "held_out": 1.0}, "held_out is 1.0"),
        ({"iqpr": 5.0}, "collection is empty, must be given where there are scores, an iqpr"),
        ({"balanced": True}, "collection is empty, must be given where"),
        ({"lowest_share": 0.5}, "collection is empty, must be given where"),
        ({"collection": "a", "lowest_share": 0.0}, "lowest_share is 0.0, must be above 0, and at most 1"),
        ({"collection": "a", "lowest_share": 1.5}, "lowest_share is 1.5"),
        ({"collection": "a", "balanced": True, "iqpr": 5.0}, "balanced is True, must be False with an iqpr, 5.0"),
    ):
        with pytest.raises(ValueError, match=said):
            CollectionSettings(**changes)
    data = DataSettings(train_size=0)
    with pytest.raises(ValueError, match="collection is 'task', must not be given: collections says which"):
        CollectionStudy(data=data, collection=CollectionSettings(collection="task"))


# ---- the draws of a million, against what is to be expected --------------------------------------------


@pytest.mark.parametrize("iqpr", [1.0, 5.0, 25.0])
def test_skip_ratio_and_uniformity_are_those_to_be_expected(iqpr: float) -> None:
    items, draws = 1_000_000, 2_000_000
    scores = torch.randn(items, generator=torch.Generator().manual_seed(0))
    table = AliasTable(scores, iqpr=iqpr, seed=1)
    counts = statistics.draw_counts(table.sample(draws), items)
    q = table.probabilities().numpy()
    # the numbers of draws of an item are nearly Poisson's, and independent
    rates = draws * q
    skipped = np.exp(draws * np.log1p(-q))
    deviation = math.sqrt((skipped * (1 - skipped)).sum()) / items
    found = statistics.skip_ratio(counts).item()
    assert found == pytest.approx(
        statistics.expected_skip_ratio(table.probabilities(), draws).item(), abs=5 * deviation
    )
    assert found == pytest.approx(skipped.mean(), abs=5 * deviation)
    # E[-c/n ln(c/n)] of each item, summed over c
    top = int(rates.max() + 12 * math.sqrt(rates.max()) + 20)
    terms, probability = np.zeros(items), np.exp(-rates)
    for c in range(1, top):
        probability = probability * rates / c
        terms += probability * (-(c / draws) * math.log(c / draws))
        if c > 60:
            break
    rest = rates > 25  # beyond the sum: their counts are nearly their rates
    terms[rest] = -(q[rest]) * np.log(q[rest])
    expected = terms.sum() / math.log(items * (1 - skipped.mean()))
    assert statistics.uniformity(counts).item() == pytest.approx(expected, abs=5e-4)


# ---- commands ----------------------------------------------------------------------------------------

TINY = ["--train-size", "40", "--test-size", "10", "--batch-size", "10", "--teacher", "resnet8", "--student", "resnet8"]
TINY += ["--shrink", "4", "--teacher-epochs", "1", "--device", "cpu"]


def test_the_study_and_its_tables(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    command = ["study", "collection", *TINY, "--data-root", str(root), "--irrelevant", "10", "--relevant", "20"]
    command += ["--epochs", "10", "--evaluate-every", "1", "--draws", "20", "--seeds", "1", "--output", str(output)]
    command += ["--ways", "fixed-linear-1", "t1000-5", "vanilla-5", "--collections", "rel+irrel", "ori"]
    assert main(command) == 0
    capsys.readouterr()
    assert {path.name for path in output.iterdir()} == {
        "table.md",
        "results.json",
        "accuracy.png",
        "course.png",
        "runs",
    }
    table = (output / "table.md").read_text()
    for heading in ("## rel+irrel", "## ori", "## skip ratio, %", "## uniformity, %", "## skip ratio of the training"):
        assert heading in table
    assert "| t1000-5 |" in table
    assert "91.46 ± 0.27" in table  # the paper's
    assert str(tmp_path) not in table
    document = json.loads((output / "results.json").read_text())
    assert set(document["figures"]["test_accuracy_at_10"]) != set()
    assert document["figures"]["long_run_irrelevant_proportion"].keys() == {"rel+irrel"}
    assert 0 <= document["figures"]["skip_ratio"]["ori"]["fixed-linear-1"]["0"] <= 1
    runs = sorted(path.name for path in (output / "runs").rglob("*.npy"))
    assert len(runs) == 4  # of each score for each collection, by one teacher
    before = (output / "results.json").read_bytes()
    assert main(command) == 0
    assert (output / "results.json").read_bytes() == before


def test_rows_are_the_papers_ways() -> None:
    assert len(ROWS) == 11
    assert ROWS["fixed-linear-5"].options == {"project": True}
    assert ROWS["t1000-25"].score == "t1000"
    assert "t1000-1" not in ROWS


def test_distill_on_a_collection_that_was_scored(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "teacher.pt"
    torch.save(resnet(8, seed=1).state_dict(), weights)
    common = ["--data-root", str(root), "--teacher", "resnet8", "--device", "cpu"]
    scores = tmp_path / "scores.npy"
    command = [
        "score",
        *common,
        "--collection",
        "near=cifar10,mnist",
        "--weights",
        str(weights),
        "--output",
        str(scores),
    ]
    assert main([*command, "--score", "t1000"]) == 0
    shown = capsys.readouterr().out
    assert "near" in shown
    assert "third quartile" in shown
    found = open_scores(scores)
    assert len(found.array()) == 130
    assert [tuple(source) for source in found.sources] == [("near", 0, 100), ("mnist", 100, 130)]
    assert main([*command, "--score", "entropy"]) == 2
    assert "is of another score: its score is t1000, must be entropy" in capsys.readouterr().err

    distill = ["distill", *TINY, "--data-root", str(root), "--method", "fixed-linear", "--epochs", "2", "--draws", "20"]
    distill += ["--collection", "mnist", "--iqpr", "5", "--score", "t1000", "--output", str(tmp_path / "student")]
    assert main([*distill, "--schedule", "plateau"]) == 0
    figures = json.loads((tmp_path / "student" / "result.json").read_text())["figures"]
    assert {"validation_loss", "skip_ratio", "uniformity", "test_accuracy_at_50"} <= set(figures)
    wrong = [*distill, "--scores", str(scores), "--output", str(tmp_path / "other")]
    assert main(wrong) == 2
    assert "scores.npy is of another collection" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--method hinton --collection mnist", "method 'hinton' learns from labels, must be another with a collection"),
        ("--method fixed-linear --collection mnist:5000", "mnist has 30 images"),
        (
            "--method fixed-linear --collection mnist:10",
            "collection has 9 images to draw from, must have at least as many",
        ),
        (
            "--method mosaic --patch-size 4 --collection mnist:9 --held-out 0",
            "collection has 9 images to draw from, must have at least as",
        ),
        (
            "--method mosaic --patch-size 9 --collection mnist",
            "patch_size is 9, must be at most the side of the images, 8",
        ),
        ("--method mosaic --patch-size 4", "collection is empty, must be the out-of-domain images that 'mosaic' needs"),
        ("--method ood-kd --collection others", "classes is (), must be some of the 10, for images of the others"),
        ("--method ood-kd --collection others --classes 0 12", "classes is (0, 12), must be below 10"),
        (
            "--method ood-kd --collection mnist --classes 3 3",
            "classes is (3, 3), must be two or more different numbers",
        ),
        ("--method hinton --collection mnist --balanced", "method 'hinton' learns from labels"),
        (
            "--method mosaic --patch-size 4 --collection mnist --schedule plateau",
            "schedule is 'plateau', must be another for 'mosaic', which has no loss of images that are held out",
        ),
        ("--method fixed-linear --schedule plateau", "schedule is 'plateau', must be another without images held out"),
        ("--method fixed-linear --iqpr 5", "collection is empty"),
        ("--method vanilla --collection nothing/here", "nothing/here"),
    ],
)
def test_what_distill_refuses(
    options: str, said: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    command = ["distill", *TINY, "--data-root", str(root), "--epochs", "1", "--output", str(output), *options.split()]
    assert main(command) == 2
    assert said in capsys.readouterr().err
    assert not output.exists()  # before a teacher was trained


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", "--weights is missing"),
        ("--weights here.pt --output scores.txt", "must end with .npy"),
        ("--weights here.pt --batch-size 0", "--batch-size is 0"),
        ("--weights here.pt --mean 0.5", "--mean and --std must be given together"),
        ("--weights here.pt --workers -1", "--workers is -1"),
        ("--weights here.pt --teacher resnet9", "teacher 'resnet9'"),
        ("--weights here.pt", "there are no weights here.pt"),
        ("--weights here.pt --score t100", "--score"),
    ],
)
def test_what_score_refuses(options: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "--collection", "mnist", *options.split()]) == 2
    assert said in capsys.readouterr().err
