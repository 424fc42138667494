"""The folder of a training: whose files are in it, who writes there, and what is left behind."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from training_cases import Batches, InterruptionError, make_objective, make_settings, metrics, train
from training_processes import read_in_two, start, start_ranks, train_slowly

from fastkd import _files
from fastkd._files import remove_partial, write_whole
from fastkd.training import Trainer, folder

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread", "no_figures")]

SETTINGS = make_settings(epochs=1, checkpoint_every=0)


def trainer_in(where: Path, **options: Any) -> Trainer:
    return Trainer(make_objective("hinton"), Batches(), SETTINGS, folder=where, show="off", **options)


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    said = str(error.value)
    assert said.startswith("fastkd: ")
    assert "\n" not in said
    return said


@pytest.mark.parametrize("resume", [False, "auto"])
@pytest.mark.parametrize("names", [("model.pt",), ("metrics.jsonl",), ("model.pt", "metrics.jsonl")])
def test_files_of_others_are_not_deleted(names: tuple[str, ...], resume: Any, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_text("of another")
    with pytest.raises(FileExistsError) as error:
        trainer_in(tmp_path).fit(resume=resume)
    assert f"{tmp_path} holds {' and '.join(names)} but no checkpoint" in one_line(error)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(names, "of another")
    trainer_in(tmp_path).fit(overwrite=True)
    assert len(metrics(tmp_path)) == 1


def test_interrupted_before_the_first_checkpoint(tmp_path: Path) -> None:
    """Whenever that is, the training is no other's: there is no line of metrics without a checkpoint."""

    def fail(_: object) -> None:
        raise InterruptionError

    for options in ({"on_step": fail}, {"on_epoch": fail}):
        with pytest.raises(InterruptionError):
            trainer_in(tmp_path, **options).fit(resume="auto")
    trainer_in(tmp_path).fit()
    assert len(metrics(tmp_path)) == 1


def test_files_where_folders_should_be_and_back(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    for where in (file, file / "below"):
        for how in ({}, {"resume": "auto"}, {"overwrite": True}):
            with pytest.raises(NotADirectoryError, match=re.escape(f"fastkd: folder is {where}, ")) as error:
                trainer_in(where).fit(**how)
            one_line(error)
    with pytest.raises(NotADirectoryError, match="fastkd: folder is "):
        trainer_in(file).fit(resume=True)
    assert file.read_text() == "kept"
    (tmp_path / "run" / "checkpoint.pt").mkdir(parents=True)
    for how in ({}, {"resume": "auto"}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(IsADirectoryError) as error:
            trainer_in(tmp_path / "run").fit(**how)
        assert f"{tmp_path / 'run' / 'checkpoint.pt'} is a folder, must be a file" in one_line(error)


def test_two_trainings_in_one_folder(tmp_path: Path) -> None:
    said: list[str] = []

    def second(step: int) -> None:
        for how in ({}, {"resume": "auto"}, {"overwrite": True}):
            with pytest.raises(RuntimeError) as error:
                trainer_in(tmp_path).fit(**how)
            said.append(one_line(error))

    trainer_in(tmp_path, on_step=second).fit()
    assert set(said) == {f"fastkd: folder is {tmp_path}, in which another training runs, must be a folder of its own"}
    trainer_in(tmp_path).fit(resume=True)  # released


@pytest.mark.forks
def test_a_kill_releases_the_folder_though_a_worker_lives_on(tmp_path: Path) -> None:
    process = start(train_slowly, tmp_path, 0, 0.5)
    while not (tmp_path / "checkpoint.pt").exists():
        time.sleep(0.002)
    with pytest.raises(RuntimeError, match="another training runs"), folder.locked(tmp_path, make=False):
        pass
    process.kill()
    process.join()
    with folder.locked(tmp_path, make=False):
        child = os.fork()
        if child == 0:
            time.sleep(20)
            os._exit(0)
    try:
        time.sleep(0.1)
        with folder.locked(tmp_path, make=False):
            pass
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(folder.fcntl, "flock", no_locks)
    trainer_in(tmp_path).fit()
    monkeypatch.setattr(folder, "fcntl", None)
    trainer_in(tmp_path).fit(resume=True)


def test_a_trainer_trains_once(tmp_path: Path) -> None:
    for where in (None, tmp_path):
        trainer = Trainer(make_objective("hinton"), Batches(), SETTINGS, folder=where, show="off")
        trainer.fit()
        with pytest.raises(RuntimeError, match="is called again, and the weights are trained already") as error:
            trainer.fit(overwrite=where is not None)
        one_line(error)
    assert (tmp_path / "checkpoint.pt").exists()
    assert len(trainer.fit(resume=True)) == 1


def test_written_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    write_whole(path, lambda file: file.write(b"old"))

    def fails(file: BinaryIO) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, fails)

    def refuses(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_files.os, "fsync", refuses)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, lambda file: file.write(b"new"))
    assert [file.name for file in tmp_path.iterdir()] == ["x"]
    assert path.read_bytes() == b"old"
    (tmp_path / "y").touch()
    assert path.stat().st_mode == (tmp_path / "y").stat().st_mode


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    path = tmp_path / "x"

    def outer(file: BinaryIO) -> None:
        file.write(b"outer, ")
        write_whole(path, lambda other: other.write(b"inner"))
        file.write(b"whole")

    write_whole(path, outer)
    assert path.read_bytes() == b"outer, whole"


def test_what_a_kill_left_is_removed(tmp_path: Path) -> None:
    names = [".checkpoint.pt.partial", ".checkpoint.pt.7.0a.partial", ".model.pt.7.0a.partial"]
    for name in [*names, ".other.pt.7.0a.partial"]:
        (tmp_path / name).touch()
    remove_partial(tmp_path / "model.pt")
    assert not (tmp_path / names[2]).exists()
    train("hinton", tmp_path, SETTINGS)
    assert [path.name for path in tmp_path.glob(".*")] == [".other.pt.7.0a.partial"]


def test_weights_and_curves_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train("hinton", tmp_path, SETTINGS)
    before = (tmp_path / "model.pt").read_bytes()
    save = torch.save

    def half(value: Any, file: Any) -> None:
        file.write(b"half")
        raise InterruptionError

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(InterruptionError):
        trainer_in(tmp_path).fit(resume=True)
    monkeypatch.setattr(torch, "save", save)
    assert (tmp_path / "model.pt").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.forks
def test_all_ranks_find_the_weights(tmp_path: Path) -> None:
    start_ranks(read_in_two, tmp_path)
    assert (tmp_path / "read1").exists()
