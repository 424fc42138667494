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
from torch import Tensor, nn

from fastkd._checks import check_callable, check_choice, check_flag
from fastkd._files import write_whole
from fastkd.methods import Objective
from fastkd.training import checkpoint, distributed, folder, progress, randomness
from fastkd.training.metrics import EpochMetrics, MetricsFile, Recorder, TensorBoard, check_finite
from fastkd.training.settings import TrainingSettings, plain_value
from fastkd.training.source import BatchSource
from fastkd.training.state import TrainingState

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Trainer"]

_DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """Trains an :class:`fastkd.methods.Objective`, and goes on bit for bit where it was interrupted.

    >>> objective = Objective(method, student, teacher).to("cuda")
    >>> trainer = Trainer(objective, batches, TrainingSettings(epochs=200), evaluate=evaluator(*test), folder=Path("run"))
    >>> history = trainer.fit()
    >>> network = trainer.deployed

    Networks of the same weights, trained with the same settings on the same batches, become the same; on CUDA as far as
    torch's kernels are deterministic (``torch.use_deterministic_algorithms``), and with more than two ranks up to the order
    of the sums over them. No step waits for the device: losses are read when they are shown, and after each epoch.

    Under ``torchrun`` (:func:`fastkd.training.process_group`) each rank trains on its own batches, rank 0 writes and shows.

    Args:
        objective: on the device to train on; its weights are where the training begins.
        batches: of this rank; see :class:`fastkd.training.BatchSource`.
        settings: how.
        evaluate: results by name of a network, images to logits, as of :func:`fastkd.training.evaluator`. Called on all
            ranks, those of rank 0 count.
        folder: for ``checkpoint.pt``, ``metrics.jsonl``, ``model.pt`` (the weights of :attr:`deployed`, at the end) and
            ``curves.png`` (where matplotlib is installed). None: nothing is written.
        on_step: called with the number of steps done after each one, before a checkpoint.
        on_epoch: called with the line of metrics after each epoch, before the checkpoint.
        show: ``bar``, ``lines`` (one an epoch), ``off``, or ``auto``: a bar on a terminal, else lines.
        console: rich's, to show on.
        description: what the training is of that the settings do not say, by name: the data, its augmentation, the
            teacher's weights. Kept in the checkpoint; a resume with another one is refused.
        tensorboard: write for TensorBoard into the folder, too.
        find_unused_parameters: of DistributedDataParallel; for students that do not use all of their parameters in each
            step. All methods of :mod:`fastkd.methods` do.

    Raises:
        TypeError: arguments of other types.
        ValueError: no batches, another word for ``show``, or TensorBoard without a folder.
    """

    def __init__(
        self,
        objective: Objective,
        batches: BatchSource,
        settings: TrainingSettings,
        *,
        evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
        folder: str | Path | None = None,
        description: Mapping[str, str | int | float] | None = None,
        on_step: Callable[[int], None] | None = None,
        on_epoch: Callable[[EpochMetrics], None] | None = None,
        show: progress.Show = "auto",
        console: Console | None = None,
        tensorboard: bool = False,
        find_unused_parameters: bool = False,
    ) -> None:
        _check_type("objective", objective, Objective, "an Objective")
        _check_type("settings", settings, TrainingSettings, "TrainingSettings")
        _check_type("folder", folder, (str, PathLike, NoneType), "a path or None")
        _check_type("description", description, (Mapping, NoneType), "a dict or None")
        if not callable(getattr(batches, "epoch", None)) or not hasattr(batches, "__len__"):
            raise TypeError(
                f"fastkd: batches is {type(batches).__name__}, must be a BatchSource, with len() and epoch(): "
                "LoaderBatches(loader) of a DataLoader"
            )
        for name, function in (("evaluate", evaluate), ("on_step", on_step), ("on_epoch", on_epoch)):
            check_callable(name, function)
        check_choice("show", show, get_args(progress.Show))
        if console is not None and not callable(getattr(console, "print", None)):
            raise TypeError(f"fastkd: console is {type(console).__name__}, must be a rich.console.Console or None")
        tensorboard = check_flag("tensorboard", tensorboard)
        find_unused_parameters = check_flag("find_unused_parameters", find_unused_parameters)
        if len(batches) < 1:
            raise ValueError("fastkd: batches is empty, must be one batch an epoch or more")
        if tensorboard and folder is None:
            raise ValueError("fastkd: tensorboard is True and folder None, must be a folder to write into")
        self.objective = objective
        self.batches = batches
        self.settings = settings
        self.description = {
            str(name): plain_value(f"description[{name!r}]", value) for name, value in (description or {}).items()
        }
        self.folder = None if folder is None else Path(folder)
        self._evaluate = evaluate
        self._on_step, self._on_epoch = on_step, on_epoch
        self._show, self._console = show, console
        self._tensorboard = TensorBoard(self.folder) if tensorboard and self.folder is not None else None
        self._find_unused_parameters = find_unused_parameters
        self._state: TrainingState | None = None

    @property
    def deployed(self) -> nn.Module:
        """The network, images to logits, that the training was for: the averaged one where ``settings.ema`` says so."""
        if self._state is None:
            return self.objective.method.deployed(self.objective.student.model)
        return self._state.deployed()

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
        settings = self.settings
        state = TrainingState(
            self.objective,
            settings,
            len(self.batches),
            about=self.description,
            find_unused_parameters=self._find_unused_parameters,
        )
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
        with display, _steps_may_be_left_out(settings), randomness.everything_seeded(settings.seed, distributed.rank()):
            if found is not None:
                state.load_state_dict(found)
            for recorder in recorders:
                recorder.begin(state.history)
            try:
                while state.epoch < settings.epochs:
                    line = self._epoch(state, found, display)
                    found = None
                    display.epoch(line)
                    if self._on_epoch is not None:
                        self._on_epoch(line)
                    self._save(state)
                    for recorder in recorders:  # what is there belongs to the checkpoint: no line without one
                        recorder.add(line)
            finally:
                for recorder in recorders:
                    recorder.close()
        self.objective.eval()
        state.deployed().eval()
        if (into := self.folder) is not None:
            distributed.on_first_rank(lambda: self._finish(state, into))  # who returns finds the files
        return state.history

    def _epoch(self, state: TrainingState, found: dict[str, Any] | None, display: progress.Display) -> EpochMetrics:
        """The batches of an epoch that are not done yet, from the randomness of ``found`` on; and its line of metrics."""
        began = time.monotonic() - state.seconds
        self.objective.train()
        batches = self.batches.epoch(state.epoch, start=state.batch)
        if found is not None:
            state.load_randomness(found)
        for images, target, *_ in batches:
            if state.batch == len(self.batches):
                raise ValueError(
                    f"fastkd: batches.epoch({state.epoch}) gives more than len(batches), {state.batch}, batches"
                )
            rate = state.optimizer.param_groups[0]["lr"]
            self._step(state, images.to(state.device, non_blocking=True), target.to(state.device, non_blocking=True))
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
        means = self._read(state, all_ranks=True)
        line = {"epoch": state.epoch + 1, "step": state.step, "learning_rate": rate, **means}
        state.agree()
        line |= self._evaluated(state, line)
        state.seconds = time.monotonic() - began
        line["seconds"] = state.seconds
        state.end_epoch(line)
        return line

    def _step(self, state: TrainingState, images: Tensor, target: Tensor) -> None:
        amp = self.settings.amp
        state.optimizer.zero_grad()
        with torch.autocast(state.device.type, _DTYPES[amp], enabled=amp != "off"):
            loss, logits = state.trained(images, target, state.epoch / self.settings.epochs)
        state.scaler.scale(loss.total).backward()
        if self.settings.gradient_clip:
            state.scaler.unscale_(state.optimizer)
            nn.utils.clip_grad_norm_(state.parameters, self.settings.gradient_clip)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.schedule.step()
        state.batch += 1
        if state.average is not None:
            state.average.update(state.student, state.step)
        state.running.add(loss, logits.detach(), target)

    def _read(self, state: TrainingState, *, all_ranks: bool = False) -> EpochMetrics:
        means = state.running.read(all_ranks=all_ranks)
        check_finite(means, state.step)
        return means

    def _evaluated(self, state: TrainingState, line: EpochMetrics) -> EpochMetrics:
        """What ``evaluate`` returns, where it is due."""
        done, settings = state.epoch + 1, self.settings
        if self._evaluate is None or (done % settings.evaluate_every and done < settings.epochs):
            return {}
        results: EpochMetrics = distributed.gather(_as_floats(self._evaluate(state.deployed())))[0]
        twice = [name for name in results if name in line or name == "seconds"]
        if twice:
            raise ValueError(
                f"fastkd: evaluate returned {', '.join(twice)}, must be other names than the training's own"
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
            found = folder.find(self.folder, state.description(), resume=resume, overwrite=overwrite)
        if found is None and self._state is not None:
            raise RuntimeError(
                "fastkd: fit() is called again, and the weights are trained already: make a new objective and Trainer, "
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
        return bool(every) and state.step % every == 0 and state.batch < len(self.batches) and self.folder is not None

    def _save(self, state: TrainingState) -> None:
        if (into := self.folder) is not None:
            whole = state.state_dict()  # on all ranks, as it gathers
            # where all learn of a full disk
            distributed.on_first_rank(lambda: checkpoint.write(into / checkpoint.CHECKPOINT, whole))

    def _finish(self, state: TrainingState, into: Path) -> None:
        write_whole(into / folder.MODEL, lambda file: torch.save(state.deployed().state_dict(), file))
        if importlib.util.find_spec("matplotlib") is not None:
            from fastkd.training.figures import save_curves  # matplotlib takes a second to import

            save_curves(state.history, into / folder.CURVES, repr(self.objective.method).partition("(")[0])


def _check_type(name: str, value: object, kind: type | tuple[type, ...], allowed: str) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"fastkd: {name} is {type(value).__name__}, must be {allowed}")


def _as_floats(results: Mapping[str, Any]) -> EpochMetrics:
    """Plain ones, as only those can be read back from a checkpoint; waits for the device where they are tensors."""
    floats: EpochMetrics = {}
    for name, value in results.items():
        try:
            floats[str(name)] = float(value)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"fastkd: evaluate returned {name} of type {type(value).__name__}, must be a number"
            ) from None
    return floats


@contextmanager
def _steps_may_be_left_out(settings: TrainingSettings) -> Iterator[None]:
    """A GradScaler leaves out the first steps, until its scale is right: the schedule then warns of its order of calls."""
    with warnings.catch_warnings():
        if settings.amp == "fp16":
            warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler.step\(\)` before `optimizer.step\(\)`")
        yield
