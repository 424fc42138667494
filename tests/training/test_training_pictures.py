"""Pictures of a training: when they are drawn, what of the training notices (nothing), and whose files are whose."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from refusals import refuses
from torch import Tensor
from training_cases import BATCHES, Batches, InterruptionError, assert_same_end, make_settings, metrics
from training_processes import Seen, draw_in_two, start_ranks

from fastkd._figures import canvas
from fastkd.methods import Step
from fastkd.training import Trainer, TrainingSettings

pytestmark = [pytest.mark.no_kernels, pytest.mark.usefixtures("one_thread", "no_figures")]


class Painter(Seen):
    """A learner of batch norm, whose iterations draw from all generators, and so do its pictures."""

    def __init__(self, seed: int = 0, names: tuple[str, ...] = ("made",)) -> None:
        super().__init__(seed)
        self.names = names
        self.drawn: list[dict[str, Any]] = []

    def iteration(self, batch: Any, step: Step) -> dict[str, Tensor]:
        noise = torch.randn_like(batch.images) + float(np.random.normal()) + random.random()  # noqa: NPY002
        batch.images.add_(0.1 * noise)
        return super().iteration(batch, step)

    def pictures(self, step: Step) -> Mapping[str, Any]:
        noise = torch.randn(8, 1, 8, 8) + float(np.random.normal()) + random.random()  # noqa: NPY002
        logits = self.learner(noise)
        modes = {module.training for module in self.modules()}
        self.drawn.append({"epoch": step.epoch, "noise": noise, "modes": modes, "grad": logits.requires_grad})
        figure = canvas(1.0, 1.0)
        figure.add_subplot().imshow(noise[0, 0].numpy())
        return dict.fromkeys(self.names, figure)


def fit(
    folder: Path | None, procedure: Seen | None = None, settings: TrainingSettings | None = None, **how: Any
) -> Any:
    """To its end, or to the step ``stop_at``; returns the procedure."""
    procedure = procedure or Painter()
    stop = how.pop("stop_at", None)
    to_fit = {name: how.pop(name) for name in ("resume", "overwrite") if name in how}

    def on_step(step: int) -> None:
        if step == stop:
            raise InterruptionError

    options = {"show": "off", "on_step": on_step, "pictures_every": 1, **how}
    try:
        Trainer(procedure, Batches(), settings or make_settings(), folder=folder, **options).fit(**to_fit)
    except InterruptionError:
        assert stop is not None
    return procedure


def pictures(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "pictures").iterdir())


@pytest.mark.parametrize(
    ("every", "epochs", "expected"),
    [(0, 3, []), (1, 3, [1, 2, 3]), (2, 5, [2, 4, 5]), (3, 3, [3]), (50, 3, [3]), (np.int64(2), 2, [2])],
)
def test_after_which_epochs(every: int, epochs: int, expected: list[int], tmp_path: Path) -> None:
    painter = fit(tmp_path, Painter(names=("made", "a-b.c_2")), make_settings(epochs=epochs), pictures_every=every)
    assert [seen["epoch"] + 1 for seen in painter.drawn] == expected
    if not every:
        assert not (tmp_path / "pictures").exists()
        return
    names = [f"{name}-{epoch:04}.png" for name in ("a-b.c_2", "made") for epoch in expected]
    assert pictures(tmp_path) == names
    assert all(imread(tmp_path / "pictures" / name).shape == (130, 130, 4) for name in names)


@pytest.mark.parametrize("settings", [{}, {"amp": "bf16", "ema": 0.9}])
def test_the_training_does_not_notice(settings: dict[str, Any], tmp_path: Path) -> None:
    """Batch norm's statistics, random generators and modes are as before: the same bits come of it."""
    fit(tmp_path / "without", settings=make_settings(**settings), pictures_every=0)
    painter = fit(tmp_path / "with", settings=make_settings(**settings))
    assert_same_end(tmp_path / "without", tmp_path / "with")
    assert len(painter.drawn) == 3
    for seen in painter.drawn:
        assert seen["modes"] == {False}
        assert not seen["grad"]
        assert torch.equal(seen["noise"], painter.drawn[0]["noise"])


def test_a_resume_may_draw_at_other_times(tmp_path: Path) -> None:
    fit(tmp_path / "whole", pictures_every=0)
    fit(tmp_path / "parts", pictures_every=1, stop_at=BATCHES + 3)
    fit(tmp_path / "parts", pictures_every=0, stop_at=2 * BATCHES - 1, resume=True)
    fit(tmp_path / "parts", pictures_every=2, resume=True)
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    assert pictures(tmp_path / "parts") == [f"made-{epoch:04}.png" for epoch in (1, 2, 3)]


def test_after_an_interruption_none_is_missing(tmp_path: Path) -> None:
    """Between the picture and the checkpoint: the epoch is done again, and its picture becomes the same."""

    def fail(_: object) -> None:
        raise InterruptionError

    fit(tmp_path, on_epoch=fail, stop_at=-1)
    before = (tmp_path / "pictures" / "made-0001.png").read_bytes()
    (tmp_path / "pictures" / "made-0001.png").unlink()
    fit(tmp_path, resume=True)
    assert (tmp_path / "pictures" / "made-0001.png").read_bytes() == before
    assert pictures(tmp_path) == [f"made-{epoch:04}.png" for epoch in (1, 2, 3)]


def test_a_procedure_that_has_none_to_show(tmp_path: Path) -> None:
    fit(tmp_path, Seen(0))
    assert not (tmp_path / "pictures").exists()


def test_no_update_in_there(tmp_path: Path) -> None:
    class Updating(Painter):
        def pictures(self, step: Step) -> Mapping[str, Any]:
            step.update(self.learner(torch.zeros(2, 1, 8, 8)).sum())
            return {}

    with pytest.raises(ValueError, match="the loss of an update of learner is without a gradient"):
        fit(tmp_path, Updating())


def test_a_training_anew_takes_the_old_ones_away(tmp_path: Path) -> None:
    fit(tmp_path, Painter(names=("made", "rejected")), make_settings(epochs=5))
    others = {"made-0003.png": b"of another", "notes.txt": b"", "holiday-2019.png": b"\x89PNG", "made-1.png": b""}
    for name, content in others.items():
        (tmp_path / "pictures" / name).write_bytes(content)
    (tmp_path / "pictures" / "more-0001.png").mkdir()
    partial = tmp_path / "pictures" / ".made-0009.png.7.0a.partial"
    partial.touch()
    fit(tmp_path, settings=make_settings(epochs=1), overwrite=True)
    assert pictures(tmp_path) == sorted({*others, "more-0001.png", "made-0001.png"})
    assert {name: (tmp_path / "pictures" / name).read_bytes() for name in others} == others


def test_no_empty_folder_is_left(tmp_path: Path) -> None:
    fit(tmp_path)
    fit(tmp_path, settings=make_settings(epochs=1), overwrite=True, pictures_every=0)
    assert not (tmp_path / "pictures").exists()


def test_a_linked_folder(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "pictures").symlink_to(tmp_path / "elsewhere")
    fit(tmp_path / "run")
    fit(tmp_path / "run", settings=make_settings(epochs=1), overwrite=True)
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["made-0001.png"]


def test_a_file_where_their_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "pictures").write_text("kept")
    with pytest.raises(NotADirectoryError, match="pictures is a file, must be a folder for pictures, or not there"):
        fit(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]
    fit(tmp_path, pictures_every=0)
    assert (tmp_path / "pictures").read_text() == "kept"


def test_whole_or_not_at_all(tmp_path: Path) -> None:
    class Torn(Painter):
        def pictures(self, step: Step) -> Mapping[str, Any]:
            figure = canvas(1.0, 1.0)

            def half(file: Any, **_: Any) -> None:
                file.write(b"half")
                raise InterruptionError

            figure.savefig = half  # type: ignore[method-assign]
            return {"made": figure}

    fit(tmp_path, Torn(), stop_at=-1)
    assert pictures(tmp_path) == []


@pytest.mark.parametrize("name", ["", "../made", "a/b", "a b", ".made", "-made", 3, None])
def test_names_that_no_file_has(name: Any, tmp_path: Path) -> None:
    refuses("Painter.pictures returned the name", lambda: fit(tmp_path, Painter(names=(name,))))
    assert not (tmp_path / "pictures").exists()


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "Wrong.pictures returned NoneType, must be a dict of figures by name"),
        ([], "Wrong.pictures returned list, must be a dict"),
        ({"made": 3}, "Wrong.pictures returned made of type int, must be a matplotlib.figure.Figure"),
    ],
)
def test_what_is_no_figure(returned: Any, message: str, tmp_path: Path) -> None:
    class Wrong(Painter):
        def pictures(self, step: Step) -> Any:
            return returned

    refuses(message, lambda: fit(tmp_path, Wrong()))


def test_what_a_trainer_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (-1, 1.0, "1", None, True):
        refuses("pictures_every is", lambda v=value: fit(tmp_path, pictures_every=v))
    refuses("pictures_every is 2 and folder None, must be a folder to draw into", lambda: fit(None, pictures_every=2))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match="fastkd: pictures_every is 1, which needs matplotlib: pip install"):
        fit(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_tensorboard_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By a stand-in for its writer."""
    calls: list[tuple[Any, ...]] = []

    class SummaryWriter:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def __getattr__(self, name: str) -> Any:
            return lambda *arguments, **more: calls.append((name, *arguments, more))

    stand_in = ModuleType("torch.utils.tensorboard")
    stand_in.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorboard", ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    fit(tmp_path, tensorboard=True, pictures_every=2)
    figures = [(call[1], call[3], call[4]) for call in calls if call[0] == "add_figure"]
    steps = [int(line["step"]) for line in metrics(tmp_path)[1:]]
    assert figures == [("pictures/made", step, {"close": False}) for step in steps]


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    fit(tmp_path, settings=make_settings(epochs=1), tensorboard=True)
    assert any(b"pictures/made" in path.read_bytes() for path in tmp_path.glob("events*"))


def test_pyplot_knows_nothing_of_them(tmp_path: Path) -> None:
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    fit(tmp_path, settings=make_settings(epochs=1))
    assert pyplot.get_fignums() == before


@pytest.mark.forks
def test_the_first_rank_draws(tmp_path: Path) -> None:
    start_ranks(draw_in_two, tmp_path)
    assert pictures(tmp_path / "run") == ["rank0-0002.png", "rank0-0003.png"]
    assert (tmp_path / "refused0").read_text() == (tmp_path / "refused1").read_text()
