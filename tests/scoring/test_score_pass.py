"""A teacher's pass over a collection: its file, killed and gone on with, any number of ranks, and what it refuses."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scoring_processes import CHUNK, ITEMS, images, score, score_alone, score_in_ranks, teacher
from torch import nn
from training_processes import PATIENCE, start, start_ranks

from fastkd import AliasTable
from fastkd.data import ArrayCollection, ConcatCollection, FolderCollection
from fastkd.patches import random_crop_flip
from fastkd.scores import LogitScore, OneClassSum, make_scorer, t1000
from fastkd.scoring import open_scores, score_collection
from fastkd.scoring.partial_scores import PartialScores

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread")]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["t1000", "1c-sum"])
def test_scores_are_those_of_the_scorer(name: str, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    scorer = make_scorer(name, teacher())
    collection = ConcatCollection(first=ArrayCollection(images()[:100]), second=ArrayCollection(images()[100:]))
    path = tmp_path / "deep" / "scores.npy"
    found = score_collection(
        scorer,
        collection,
        path,
        name=name,
        mean=0.5,
        std=0.25,
        batch_size=8,
        chunk=16,
        on_progress=lambda *n: told.append(n),
    )
    other = make_scorer(name, teacher())
    other.prepare((3, 8, 8), 0.5, 0.25)
    normalised = random_crop_flip(images(), 0, None, 0.0, 0.5, 0.25)
    torch.testing.assert_close(found.tensor(), torch.cat([other(part) for part in normalised.split(8)]), rtol=0, atol=0)
    assert isinstance(found.array(), np.memmap)
    assert found.score == name
    assert [tuple(source) for source in found.sources] == [("first", 0, 100), ("second", 100, ITEMS)]
    assert names(path.parent) == ["scores.npy", "scores.npy.json"]
    assert told == [(min(n, ITEMS), ITEMS) for n in range(16, ITEMS + 16, 16)]
    assert np.load(path).shape == (ITEMS,)
    again = open_scores(path, collection=collection, teacher=teacher())
    assert torch.equal(again.tensor(), found.tensor())
    table = AliasTable(again.tensor(), iqpr=5.0)  # what it is for
    assert len(table) == ITEMS


def test_what_is_there_is_not_scored_again(tmp_path: Path) -> None:
    path = tmp_path / "scores.npy"
    first = score(path)
    scorer = LogitScore(teacher(), t1000)
    scorer._scores = None  # type: ignore[assignment,method-assign]
    again = score_collection(
        scorer, ArrayCollection(images()), path, name="t1000", mean=0.5, std=0.25, batch_size=8, chunk=CHUNK
    )
    assert again.about == first.about


@pytest.mark.forks
@pytest.mark.parametrize("name", ["t1000", "1c-sum"])
def test_killed_and_gone_on_with_equals_not_killed(name: str, tmp_path: Path) -> None:
    whole = score(tmp_path / "whole.npy", name)
    path = tmp_path / "scores.npy"
    for lived in (8, 40, 100):
        process = start(score_alone, str(path), name, lived)
        process.join(PATIENCE)
        assert process.exitcode == -signal.SIGKILL
        assert not path.exists()
    partial = PartialScores(path, ITEMS, CHUNK)
    assert 0 < partial.done_items() < ITEMS
    with pytest.raises(FileNotFoundError, match=r"there is no .*scores.npy: scoring was interrupted"):
        open_scores(path)
    found = score(path, name)
    assert torch.equal(found.tensor(), whole.tensor())
    assert names(tmp_path) == ["scores.npy", "scores.npy.json", "whole.npy", "whole.npy.json"]


@pytest.mark.forks
@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_gives_the_same_scores(ranks: int, tmp_path: Path) -> None:
    whole = score(tmp_path / "whole.npy", "1c-sum")
    # one process begins, is killed, and others go on
    path = tmp_path / "scores.npy"
    process = start(score_alone, str(path), "1c-sum", 60)
    process.join(PATIENCE)
    assert process.exitcode == -signal.SIGKILL
    start_ranks(score_in_ranks, path, "1c-sum", ranks=ranks)
    found = open_scores(path)
    assert torch.equal(found.tensor(), whole.tensor())
    assert names(tmp_path) == ["scores.npy", "scores.npy.json", "whole.npy", "whole.npy.json"]


def test_a_chunk_that_was_lost_is_scored_again(tmp_path: Path) -> None:
    whole = score(tmp_path / "whole.npy")
    path = tmp_path / "scores.npy"
    collection = ArrayCollection(images())
    scorer = LogitScore(teacher(), t1000)

    def stop(done: int, _: int) -> None:
        if done >= 64:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_collection(
            scorer, collection, path, name="t1000", mean=0.5, std=0.25, batch_size=8, chunk=CHUNK, on_progress=stop
        )
    with path.with_name("scores.npy.chunks").open("r+b") as file:
        file.seek(1)
        file.write(b"\0")  # not on the disk when the machine stopped
    assert PartialScores(path, ITEMS, CHUNK).pending().tolist() == [1, *range(4, 13)]
    assert torch.equal(score(path).tensor(), whole.tensor())


# ---- bad input ---------------------------------------------------------------------------------------


@pytest.fixture
def done(tmp_path: Path) -> Path:
    path = tmp_path / "scores.npy"
    score(path)
    return path


def test_another_collection_teacher_or_score_is_named(done: Path) -> None:
    before = done.read_bytes()
    with pytest.raises(
        ValueError, match=r"scores.npy is of another collection: its collection is [0-9a-f]{12}\.\.\., must be"
    ):
        open_scores(done, collection=ArrayCollection(255 - images()))
    with pytest.raises(ValueError, match="is of another teacher: its teacher is"):
        open_scores(done, teacher=teacher(2))
    with pytest.raises(ValueError, match="is of another score: its score is t1000, must be 1c-sum"):
        score(done, "1c-sum")
    with pytest.raises(ValueError, match="is of another teacher"):
        score(done, seed=2)
    with pytest.raises(ValueError, match=r"is of another mean: its mean is 0.5, must be 0.1"):
        score_collection(
            LogitScore(teacher()), ArrayCollection(images()), done, name="t1000", mean=0.1, std=0.25, batch_size=8
        )
    assert done.read_bytes() == before  # nothing is overwritten


def test_an_interrupted_file_of_something_else_is_named(tmp_path: Path) -> None:
    path = tmp_path / "scores.npy"

    def stop(done: int, _: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_collection(
            LogitScore(teacher()),
            ArrayCollection(images()),
            path,
            name="t1000",
            batch_size=8,
            chunk=16,
            on_progress=stop,
        )
    with pytest.raises(ValueError, match=r"is of another mean: its mean is None, must be 0.5"):
        score(path)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-80]), "is damaged: .*; delete it, and score again"),
        (lambda path: path.write_bytes(b""), "is damaged"),
        (lambda path: np.save(path, np.zeros(3)), r"holds float64 \(3,\), must be float64 \(205,\)"),
        (lambda path: np.save(path, np.zeros(ITEMS, np.float32)), r"holds float32 \(205,\)"),
        (lambda path: path.with_name("scores.npy.json").write_text("{}"), "does not say what scores are of"),
        (lambda path: path.with_name("scores.npy.json").write_text("nothing"), "does not say what scores are of"),
    ],
    ids=["truncated", "empty", "short", "float32", "other", "text"],
)
def test_damaged_files(done: Path, spoil: Callable[[Path], object], said: str) -> None:
    spoil(done)
    with pytest.raises(ValueError, match=said):
        open_scores(done)


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "scores.npy"
    np.save(path, np.arange(3))
    with pytest.raises(
        FileExistsError, match=r"scores.npy is there, but not scores.npy.json, which says what it is of"
    ):
        score(path)
    assert np.load(path).tolist() == [0, 1, 2]
    with pytest.raises(FileNotFoundError, match=r"there is no .*other.npy$"):
        open_scores(tmp_path / "other.npy")
    with pytest.raises(ValueError, match=r"output is .*scores.txt, must be the name of an .npy"):
        score(tmp_path / "scores.txt")


def test_a_score_that_is_no_number_is_named(tmp_path: Path) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(192, 10)

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return self.fc(batch.flatten(1)) / (batch.mean((1, 2, 3), keepdim=True).flatten(1) > 0.3)

    few = images()
    few[37] = 0
    with pytest.raises(ValueError, match="the score of image 37 is nan, must be finite: look at the teacher"):
        score_collection(
            LogitScore(Broken()), ArrayCollection(few), tmp_path / "s.npy", name="t1000", batch_size=8, chunk=16
        )


def test_unreadable_images_are_named_counted_and_never_drawn(tmp_path: Path) -> None:
    Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")  # noqa: N806
    folder = tmp_path / "images"
    folder.mkdir()
    for i, image in enumerate(images()[:40]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:02d}.png")
    for i in (7, 30):
        (folder / f"{i:02d}.png").write_bytes(b"no image")
    arguments = {"name": "t1000", "batch_size": 8, "chunk": 16}
    with pytest.raises(ValueError, match=r"image 7 of the collection, .*07.png, cannot be read"):
        score_collection(LogitScore(teacher()), FolderCollection(folder, (3, 8, 8)), tmp_path / "a.npy", **arguments)
    collection = FolderCollection(folder, (3, 8, 8), unreadable="skip")
    found = score_collection(LogitScore(teacher()), collection, tmp_path / "b.npy", **arguments)
    assert [(item.index, Path(item.name).name) for item in found.unreadable] == [(7, "07.png"), (30, "30.png")]
    scores = found.tensor()
    assert scores[[7, 30]].tolist() == [float("-inf")] * 2
    assert int(scores.isfinite().sum()) == 38
    assert AliasTable(scores, iqpr=5.0).probabilities()[[7, 30]].tolist() == [0.0, 0.0]
    assert json.loads((tmp_path / "b.npy.json").read_text())["complete"]
    shutil.rmtree(folder)


def test_arguments(tmp_path: Path) -> None:
    collection = ArrayCollection(images())
    with pytest.raises(TypeError, match="scorer is function, must be a Scorer"):
        score_collection(t1000, collection, tmp_path / "s.npy", name="t1000")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="collection is Tensor, must be a Collection"):
        score_collection(OneClassSum(teacher()), images(), tmp_path / "s.npy", name="1c-sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size is 0"):
        score_collection(OneClassSum(teacher()), collection, tmp_path / "s.npy", name="1c-sum", batch_size=0)
