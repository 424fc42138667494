"""The training loop."""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from os import PathLike
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from fastkd._checks import check_callable, check_choice, check_flag
from fastkd._files import write_whole
from fastkd.data.batch import as_batches, images_of, on_device
from fastkd.data.source import BatchSource, check_source
from fastkd.methods import Procedure
from fastkd.models.modes import evaluating
from fastkd.training import checkpoint, distributed, folder, progress, randomness
from fastkd.training.metrics import EpochMetrics, MetricsFile, Recorder, Running, TensorBoard, check_finite, check_terms
from fastkd.training.pictures import Pictures, check_pictures_every
from fastkd.training.settings import TrainingSettings, plain_value
from fastkd.training.state import TrainingState

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Trainer"]

_DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """Trains a :class:`fastkd.methods.Procedure`, and goes on bit for bit where it was interrupted.

    >>> objective = Objective(method, student, teacher).to("cuda")
    >>> trainer = Trainer(objective, batches, TrainingSettings(epochs=200), evaluate=evaluator(*test), folder=Path("run"))
    >>> history = trainer.fit()
    >>> network = trainer.deployed

    Networks of the same weights, trained with the same settings on the same batches, become the same; on CUDA as far as
    torch's kernels are deterministic (``torch.use_deterministic_algorithms``), and with more than two ranks up to the order
    of the sums over them. No step waits for the device: losses are read when they are shown, and after each epoch.

    Under ``torchrun`` (:func:`fastkd.training.process_group`) each rank trains on its own batches, rank 0 writes and shows.

    Args:
        procedure: on the device to train on; its weights are where the training begins. A method of :mod:`fastkd.methods`
            with its networks is an :class:`fastkd.methods.Objective`.
        batches: of this rank; see :class:`fastkd.data.BatchSource`.
        settings: how.
        validate: batches that are not trained on, the same on all ranks: after each epoch the procedure's ``validation`` runs
            on them, and the means of its terms are logged. The schedule "plateau" follows its ``loss``.
        evaluate: results by name of a network, images to logits, as of :func:`fastkd.training.evaluator`. Called on all
            ranks, those of rank 0 count.
        folder: for ``checkpoint.pt``, ``metrics.jsonl``, ``model.pt`` (the weights of :attr:`deployed`, at the end) and
            ``curves.png`` (where matplotlib is installed), and a folder ``pictures``. None: nothing is written.
        on_step: called with the number of steps done after each one, before a checkpoint.
        on_epoch: called with the line of metrics after each epoch, before the checkpoint.
        show: ``bar``, ``lines`` (one an epoch), ``off``, or ``auto``: a bar on a terminal, else lines.
        console: rich's, to show on.
        description: what the training is of that the settings do not say, by name: the data, its augmentation, the
            teacher's weights. Kept in the checkpoint; a resume with another one is refused.
        tensorboard: write for TensorBoard into the folder, too.
        pictures_every: epochs after which the figures of ``procedure.pictures`` are drawn, by rank 0, into the folder as
            ``pictures/<name>-<epoch>.png``, and for TensorBoard; after the last epoch, too. They change nothing that is
            learnt, and a resume may have another number. 0: none are drawn.
        find_unused_parameters: with several processes, for networks that do not use all of their parameters in each step
            (DistributedDataParallel's option of the name). All methods of :mod:`fastkd.methods` do.

    Raises:
        TypeError: arguments of other types.
        ValueError: no batches, another word for ``show``, a negative number, or TensorBoard or pictures without a folder.
        ModuleNotFoundError: what shows, TensorBoard or matplotlib for pictures, is asked for and not installed.
    """

    def __init__(
        self,
        procedure: Procedure,
        batches: BatchSource,
        settings: TrainingSettings,
        *,
        validate: BatchSource | None = None,
        evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
        folder: str | Path | None = None,
        description: Mapping[str, str | int | float] | None = None,
        on_step: Callable[[int], None] | None = None,
        on_epoch: Callable[[EpochMetrics], None] | None = None,
        show: progress.Show = "auto",
        console: Console | None = None,
        tensorboard: bool = False,
        pictures_every: int = 0,
        find_unused_parameters: bool = False,
    ) -> None:
        _check_type("procedure", procedure, Procedure, "a Procedure, as an Objective is")
        _check_type("settings", settings, TrainingSettings, "TrainingSettings")
        _check_type("folder", folder, (str, PathLike, NoneType), "a path or None")
        _check_type("description", description, (Mapping, NoneType), "a dict or None")
        check_source("batches", batches)
        if validate is not None:
            check_source("validate", validate)
        for name, function in (("evaluate", evaluate), ("on_step", on_step), ("on_epoch", on_epoch)):
            check_callable(name, function)
        check_choice("show", show, get_args(progress.Show))
        if console is not None and not callable(getattr(console, "print", None)):
            raise TypeError(f"fastkd: console is {type(console).__name__}, must be a rich.console.Console or None")
        tensorboard = check_flag("tensorboard", tensorboard)
        find_unused_parameters = check_flag("find_unused_parameters", find_unused_parameters)
        if tensorboard and folder is None:
            raise ValueError("fastkd: tensorboard is True and folder None, must be a folder to write into")
        pictures_every = check_pictures_every(pictures_every)
        if pictures_every and folder is None:
            raise ValueError(
                f"fastkd: pictures_every is {pictures_every} and folder None, must be a folder to draw into"
            )
        self.procedure = procedure
        self.batches = batches
        self.settings = settings
        self.description = {
            str(name): plain_value(f"description[{name!r}]", value) for name, value in (description or {}).items()
        }
        self.folder = None if folder is None else Path(folder)
        self._validate, self._evaluate = validate, evaluate
        self._on_step, self._on_epoch = on_step, on_epoch
        self._show, self._console = show, console
        self._tensorboard = TensorBoard(self.folder) if tensorboard and self.folder is not None else None
        self._pictures: Pictures | None = None
        if pictures_every and self.folder is not None:
            self._pictures = Pictures(self.folder, pictures_every)
        self._find_unused_parameters = find_unused_parameters
        self._state: TrainingState | None = None

    @property
    def network(self) -> nn.Module:
        """What the training is for, as the procedure has it: the averaged one where ``settings.ema`` says so."""
        return self.procedure.network() if self._state is None else self._state.network()

    @property
    def deployed(self) -> nn.Module:
        """What is kept of it: a network, images to logits."""
        return self.procedure.deployed(self.network)

    def fit(self, *, resume: bool | Literal["auto"] = False, overwrite: bool = False) -> list[EpochMetrics]:
        """Trains to the end; the networks are then in evaluation mode. Once: a second call is for a resume only, as the
        weights are not those of the beginning any more.

        Args:
            resume: go on from the folder's checkpoint; ``"auto"``: if there is one.
            overwrite: begin anew, and take away the files of another training in the folder.

        Returns:
            One mapping for each epoch, those before a resume included: epoch, step, learning_rate (of its last step), loss
            and each of its terms and accuracy (means over the epoch, of what was trained on), what ``evaluate`` returned,
            and seconds since the training began.

        Raises:
            TypeError: resume or overwrite is neither True nor False.
            FileExistsError: the folder holds a checkpoint, and neither ``resume`` nor ``overwrite`` is said; or it holds
                ``model.pt`` or ``metrics.jsonl`` without a checkpoint, and ``overwrite`` is not said.
            NotADirectoryError, IsADirectoryError: a file is where the folder, or a folder where a file of it should be.
            RuntimeError: another training runs in the folder; or this trainer has trained before, and there is nothing to
                resume from.
            FileNotFoundError: there is no checkpoint to resume from.
            FloatingPointError: the loss is no number any more.
            ValueError: resume is another word than ``"auto"``, the checkpoint is damaged or of another training (nothing is
                changed then), or ``batches.epoch`` gave more or fewer batches than ``len(batches)``.
        """
        if not isinstance(resume, str):
            resume = check_flag("resume", resume)
        elif resume != "auto":
            raise ValueError(f"fastkd: resume is {resume!r}, must be True, False or 'auto'")
        overwrite = check_flag("overwrite", overwrite)
        state = TrainingState(
            self.procedure,
            self.settings,
            self.batches,
            about=self.description,
            find_unused_parameters=self._find_unused_parameters,
        )
        if self._validate is None and any(part.plateau is not None for part in state.parts.values()):
            raise ValueError("fastkd: validate is None, must be batches to validate on for the schedule 'plateau'")
        with closing(state), ExitStack() as lock:
            found = distributed.on_first_rank(lambda: self._find(state, lock, resume, overwrite))
            self._state = state
            return self._fit(state, found)

    def _fit(self, state: TrainingState, found: dict[str, Any] | None) -> list[EpochMetrics]:
        settings = self.settings
        first = distributed.rank() == 0
        recorders = self._recorders() if first else []
        show: progress.Show = self._show if first else "off"
        display = progress.make_display(show, settings.epochs, len(self.batches), self._console)
        with display, _steps_may_be_left_out(), randomness.everything_seeded(settings.seed, distributed.rank()):
            if found is not None:
                state.load_state_dict(found)
            for recorder in recorders:
                recorder.begin(state.history)
            try:
                while state.epoch < settings.epochs:
                    line = self._epoch(state, display)
                    self._draw(state)
                    display.epoch(line)
                    if self._on_epoch is not None:
                        self._on_epoch(line)
                    self._save(state)
                    for recorder in recorders:  # what is there belongs to the checkpoint: no line without one
                        recorder.add(line)
            finally:
                for recorder in recorders:
                    recorder.close()
        self.procedure.eval()
        state.deployed().eval()
        if (into := self.folder) is not None:
            distributed.on_first_rank(lambda: self._finish(state, into))  # who returns finds the files
        return state.history

    def _epoch(self, state: TrainingState, display: progress.Display) -> EpochMetrics:
        """The batches of an epoch that are not done yet; and its line of metrics."""
        began = time.monotonic() - state.seconds
        state.procedure.train()
        rates = state.learning_rates()
        for batch in self._batches_left(state):
            if state.batch == len(self.batches):
                raise ValueError(
                    f"fastkd: batches.epoch({state.epoch}) gives more than len(batches), {state.batch}, batches"
                )
            if state.batch + 1 == len(self.batches):
                rates = state.learning_rates()  # of the last step
            self._iteration(state, batch)
            if display.due():
                display.show(state.epoch, state.batch, self._read(state))
            if self._on_step is not None:
                self._on_step(state.step)
            if self._checkpoint_is_due(state):
                self._read(state)  # no checkpoint of a training that failed
                state.seconds = time.monotonic() - began
                self._save(state)
        if state.batch != len(self.batches):
            raise ValueError(
                f"fastkd: batches.epoch({state.epoch}) gave {state.batch} batches, must be len(batches), {len(self.batches)}"
            )
        line = {"epoch": state.epoch + 1, "step": state.step, **rates, **self._read(state, all_ranks=True)}
        line |= self._results("after_epoch", state.procedure.after_epoch(state.updates), line)
        state.share_statistics()
        line |= self._validated(state, line)
        line |= self._evaluated(state, line)
        state.seconds = time.monotonic() - began
        line["seconds"] = state.seconds
        state.end_epoch(line)
        return line

    def _batches_left(self, state: TrainingState) -> Iterator[Any]:
        """Those of the epoch; before its first one the procedure prepares it."""
        if state.batch == 0:
            state.restore_randomness()
            with state.updates.begin_iteration(state.epoch, 0), self._autocast(state):
                state.procedure.before_epoch(state.updates)
        batches = iter(self.batches.epoch(state.epoch, start=state.batch))
        state.restore_randomness()
        return batches

    def _iteration(self, state: TrainingState, given: Any) -> None:
        batch = on_device(as_batches(given), state.device)
        with state.updates.begin_iteration(state.epoch, state.batch), self._autocast(state):
            terms = check_terms(state.procedure, state.procedure.iteration(batch, state.updates))
        state.updates.end_iteration()
        state.batch += 1
        state.take_average()
        state.running.add(terms, images_of(batch))

    def _autocast(self, state: TrainingState) -> torch.autocast:
        amp = self.settings.amp
        return torch.autocast(state.device.type, _DTYPES[amp], enabled=amp != "off")

    def _read(self, state: TrainingState, *, all_ranks: bool = False) -> EpochMetrics:
        means = state.running.read(all_ranks=all_ranks)
        check_finite(means, state.step)
        return means

    @torch.no_grad()
    def _validated(self, state: TrainingState, line: EpochMetrics) -> EpochMetrics:
        """Means over the batches that are not trained on; and the learning rates that follow from their loss."""
        if self._validate is None:
            return {}
        running = Running(state.device)
        with evaluating(self.procedure), self._autocast(state):
            for given in self._validate.epoch(0):
                batch = on_device(as_batches(given), state.device)
                running.add(
                    check_terms(state.procedure, state.procedure.validation(batch, state.updates)), images_of(batch)
                )
        results = {f"validation_{name}": mean for name, mean in running.read().items()}
        found = self._results("validation", results, line)
        for part in state.parts.values():
            if part.plateau is not None:
                part.plateau.step(found["validation_loss"])
        return found

    def _evaluated(self, state: TrainingState, line: EpochMetrics) -> EpochMetrics:
        """What ``evaluate`` returns, where it is due."""
        done, settings = state.epoch + 1, self.settings
        if self._evaluate is None or (done % settings.evaluate_every and done < settings.epochs):
            return {}
        return self._results("evaluate", self._evaluate(state.deployed()), line)

    def _draw(self, state: TrainingState) -> None:
        """The pictures of the epoch that has ended, where they are due. Before its checkpoint: where one is missing after a
        kill, so is the checkpoint, and the epoch is done again."""
        if self._pictures is None or not self._pictures.due(state.epoch, self.settings.epochs):
            return
        pictures = self._pictures

        def draw() -> None:
            figures = pictures.draw(self.procedure, state.updates, self.settings.seed)
            if self._tensorboard is not None:
                self._tensorboard.add_figures(figures, state.step)

        distributed.on_first_rank(draw)

    def _results(self, whose: str, returned: Mapping[str, Any], line: EpochMetrics) -> EpochMetrics:
        """What was returned to be logged, of rank 0."""
        results: EpochMetrics = distributed.gather(_as_floats(whose, returned))[0]
        twice = [name for name in results if name in line or name == "seconds"]
        if twice:
            raise ValueError(
                f"fastkd: {whose} returned {', '.join(twice)}, must be other names than the training's own"
            )
        return results

    def _find(
        self, state: TrainingState, lock: ExitStack, resume: bool | Literal["auto"], overwrite: bool
    ) -> dict[str, Any] | None:
        """The checkpoint to go on from, looked through, if any; else the folder is ready for a training anew."""
        if resume and overwrite:
            raise ValueError("fastkd: resume and overwrite are both asked for, must be one of them")
        if resume is True and self.folder is None:
            raise ValueError("fastkd: resume is True and folder None, must be the folder of the checkpoint")
        found = None
        if self.folder is not None:
            lock.enter_context(folder.locked(self.folder, make=resume is not True))
            draws = self._pictures is not None
            found = folder.find(self.folder, state.description(), resume=resume, overwrite=overwrite, draws=draws)
        if found is None and self._state is not None:
            raise RuntimeError(
                "fastkd: fit() is called again, and the weights are trained already: make a new procedure and Trainer, "
                "or go on from a checkpoint by fit(resume=True)"
            )
        if self.folder is not None:
            folder.clear_partial(self.folder)
            if found is None:
                folder.clear(self.folder)
        return found

    def _recorders(self) -> list[Recorder]:
        if self.folder is None:
            return []
        return [MetricsFile(self.folder / folder.METRICS), *([self._tensorboard] if self._tensorboard else [])]

    def _checkpoint_is_due(self, state: TrainingState) -> bool:
        """Within an epoch: at its end there is one anyway, after the evaluation."""
        every = self.settings.checkpoint_every
        if not every or self.folder is None or state.batch == len(self.batches):
            return False
        # where gradients are being accumulated, as soon as a step is made of them
        return state.updates.whole and state.step // every != state.saved // every

    def _save(self, state: TrainingState) -> None:
        if (into := self.folder) is not None:
            state.saved = state.step
            whole = state.state_dict()  # on all ranks, as it gathers
            # where all learn of a full disk
            distributed.on_first_rank(lambda: checkpoint.write(into / checkpoint.CHECKPOINT, whole))

    def _finish(self, state: TrainingState, into: Path) -> None:
        write_whole(into / folder.MODEL, lambda file: torch.save(state.deployed().state_dict(), file))
        if importlib.util.find_spec("matplotlib") is not None:
            from fastkd.training.figures import save_curves  # matplotlib takes a second to import

            save_curves(state.history, into / folder.CURVES, self.procedure.described().partition("(")[0])


def _check_type(name: str, value: object, kind: type | tuple[type, ...], allowed: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"fastkd: {name} is {type(value).__name__}, must be {allowed}")


def _as_floats(whose: str, results: Mapping[str, Any]) -> EpochMetrics:
    """Plain ones, as only those can be read back from a checkpoint; waits for the device where they are tensors."""
    floats: EpochMetrics = {}
    for name, value in results.items():
        try:
            floats[str(name)] = float(value)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"fastkd: {whose} returned {name} of type {type(value).__name__}, must be a number"
            ) from None
    return floats


@contextmanager
def _steps_may_be_left_out() -> Iterator[None]:
    """A GradScaler leaves out the first steps, until its scale is right, and a procedure may leave out others: the schedule
    then warns of its order of calls."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler.step\(\)` before `optimizer.step\(\)`")
        yield
