"""One distillation, from data to test accuracy: a teacher trained on the same images and labels, then a student by a method."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastkd._files import write_whole
from fastkd._library import build_info
from fastkd.data.image_batches import ImageBatches
from fastkd.data.images import ImageSet
from fastkd.methods import Method, Objective
from fastkd.methods import registry as methods
from fastkd.models import registry as models
from fastkd.models.modes import evaluating
from fastkd.patches import padding_of
from fastkd.studies import data as images
from fastkd.studies.data import DataSettings, prepare
from fastkd.training import Process, Trainer, TrainingSettings, evaluator
from fastkd.training.distributed import on_first_rank
from fastkd.training.progress import Show
from fastkd.training.settings import MOST_EPOCHS

__all__ = [
    "Distillation",
    "Networks",
    "Result",
    "check",
    "check_data",
    "check_files",
    "read_result",
    "run",
    "train_teacher",
]

RESULT = "result.json"
WEIGHTS = "model.pt"  # as the trainer calls it
TEACHERS = 1 << 20  # seeds of their weights begin here, away from those of students and of the others of a cohort


@dataclass(frozen=True)
class Networks:
    """What is distilled into what, on which images."""

    teacher: str = "resnet26"
    """resnet<6n+2>, wrn-<6n+4>-<width>, cifar-resnet34, ... (all: fastkd.models.names()), or a network of torchvision.
    It learns the same images and labels first."""
    student: str = "resnet8"
    """As teacher."""
    teacher_epochs: int = 0
    """Of the teacher's training; 0: as many as the student's."""
    batch_size: int = 128
    """Images of a batch, in each process."""
    padding: int | None = None
    """Pixels of zeros that random crops may reach into; by default those of the set, 4 for sides of 32 and 28. 0: no crops."""
    flip: bool = True
    """Mirror half of the images, where a mirrored one is still one of its class."""
    data: DataSettings = field(default_factory=DataSettings)
    """The images."""
    training: TrainingSettings = field(default_factory=TrainingSettings)
    """The training of the student, and, but for teacher_epochs, of the teacher. The seed is also that of the networks'
    weights, of the order of the images, and of their choice and their wrong labels."""

    def __post_init__(self) -> None:
        if self.batch_size < 2:
            raise ValueError(f"fastkd: batch_size is {self.batch_size}, must be 2 or more, as batch norm needs")
        if self.padding is not None:
            padding_of(self.padding)
        if not 0 <= self.teacher_epochs <= MOST_EPOCHS:
            raise ValueError(
                f"fastkd: teacher_epochs is {self.teacher_epochs}, must be 0 (as the student) or more, "
                f"and at most {MOST_EPOCHS}"
            )


@dataclass(frozen=True)
class Distillation(Networks):
    """How, too."""

    method: str = "hinton"
    """baseline, hinton, bss, fitnet, fsp, at, sp, rkd-d, rkd-a, rkd-da, one or dml."""
    teacher_weights: Path | None = None
    """A state dict of the teacher, instead of training it."""
    temperature: float | None = None
    """T of the method; that of the study by default, as are the weights."""
    task_weight: float | None = None
    """r, of the cross-entropy with the labels."""
    kd_weight: float | None = None
    """a, of the teacher's response."""
    feature_weight: float | None = None
    """b, of the method's distance of features."""

    def of_method(self) -> dict[str, Any]:
        """The settings of the method that are not those of the study."""
        names = ("temperature", "task_weight", "kd_weight", "feature_weight")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def of_teacher(self) -> Distillation:
        """The training of the teacher, as a distillation without one."""
        epochs = self.teacher_epochs or self.training.epochs
        training = replace(self.training, epochs=epochs, warmup_epochs=min(self.training.warmup_epochs, epochs / 2))
        return Distillation(
            method="baseline",
            teacher="",
            student=self.teacher,
            batch_size=self.batch_size,
            padding=self.padding,
            flip=self.flip,
            data=self.data,
            training=training,
        )

    def description(self) -> dict[str, Any]:
        """All that the result depends on."""
        everything = asdict(self)
        if not methods.needs_teacher(self.method):
            del everything["teacher"], everything["teacher_epochs"], everything["teacher_weights"]
        elif self.teacher_weights is not None and self.teacher_weights.is_file():
            everything["teacher_weights"] = hashlib.sha256(self.teacher_weights.read_bytes()).hexdigest()
        del everything["data"]["data_root"]  # the images are the same wherever they lie
        everything["training"]["checkpoint_every"] = 0
        everything["training"]["warmup_epochs"] = float(self.training.warmup_epochs)
        return everything

    def digest(self) -> str:
        """Ten letters that differ where the description does."""
        return hashlib.sha256(json.dumps(self.description(), default=str, sort_keys=True).encode()).hexdigest()[:10]


class Result(NamedTuple):
    """Shares of the test images that are right, after the last epoch."""

    accuracy: float
    teacher_accuracy: float | None
    """None where the method has no teacher."""


class _Data(NamedTuple):
    """On the device."""

    train: ImageSet
    test_images: Tensor
    test_target: Tensor

    @property
    def outline(self) -> tuple[int, ...]:
        """Number of classes, channels, height, width: what networks depend on."""
        return (self.train.num_classes, *self.train.images.shape[1:])


def run(
    settings: Distillation, folder: Path, process: Process, *, teachers: Path | None = None, show: Show = "auto"
) -> Result:
    """Runs it, or goes on where it was interrupted, or reads the result that is there.

    Args:
        folder: of the student: what :class:`fastkd.training.Trainer` writes, and ``result.json``.
        process: this one (:func:`fastkd.training.process_group`).
        teachers: a folder where teachers are kept, a folder each, so that other students of the same teacher find it; that
            of the student if None.
        show: as of the Trainer.

    Raises:
        ValueError, FileNotFoundError, ImportError: settings that cannot be, data that is not there, a folder that holds
            another run.
    """
    check(settings, process.world_size)
    done = on_first_rank(lambda: read_result(settings, folder))
    if done is not None:
        return done
    check_files(settings, folder)
    data = _load(settings, process.device)
    if data.outline != _made_up(settings).outline:  # files of another kind than the usual ones of that name
        _check_step(settings, data)
    teacher, teacher_accuracy = None, None
    if methods.needs_teacher(settings.method):
        teacher, teacher_accuracy = _teacher(settings, teachers or folder, data, process, show)
    accuracy = _train(settings, folder, data, teacher, process, show)
    result = Result(accuracy, teacher_accuracy)
    _write_result(settings, folder, result)
    return result


def check(settings: Distillation, world_size: int = 1, *, step: bool = True) -> None:
    """What can be known from the settings alone: no file is looked at.

    Args:
        world_size: processes, each of which takes batches.
        step: one step of the method, too, with new networks and images that are made up: what does not fit together is
            known before the teacher is trained.

    Raises:
        ValueError, ImportError: unknown names, settings that a method does not have, sizes that the set does not have,
            networks that do not take its images, or that the method cannot compare.
    """
    make_method(settings)
    teacher = methods.needs_teacher(settings.method)
    for role in ("student", "teacher") if teacher else ("student",):
        _create(getattr(settings, role), role, 1, 2, 0)
    outline = images.check(settings.data)
    if outline.train_size is not None and settings.batch_size * world_size > outline.train_size:
        ranks = f" on each of {world_size} ranks" if world_size > 1 else ""
        raise ValueError(
            f"fastkd: batch_size is {settings.batch_size}{ranks}, must be at most the {outline.train_size} images"
        )
    if teacher:
        settings.of_teacher()  # the schedule must fit its epochs, too
    made_up = _made_up(settings)
    next(_batches(settings, made_up.train, 2).epoch(0))  # whether crops can be that large
    for role in ("student", "teacher") if teacher else ("student",):
        _check_network(settings, role, made_up)
    if step:
        _check_step(settings, made_up)


def check_files(settings: Distillation, folder: Path) -> None:
    """The weights of a teacher: whether they are there, and the teacher's.

    Raises:
        ValueError, FileNotFoundError: they are not, or lie in ``folder``, which is written to.
    """
    path = settings.teacher_weights
    if path is None or not methods.needs_teacher(settings.method):
        return
    if path.resolve().parent == folder.resolve():
        raise ValueError(f"fastkd: teacher_weights is {path}, must not lie in the folder that is written to, {folder}")
    state = _state_dict(path)
    if images.check(settings.data).num_classes is not None:
        _take_weights(_network(settings, "teacher", _made_up(settings), 0), state, path)


def check_data(settings: Distillation) -> None:
    """The images: whether they are there, and enough.

    Raises:
        ValueError, FileNotFoundError: they are not.
    """
    prepare(settings.data, settings.training.seed)


def train_teacher(settings: Distillation, folder: Path, process: Process, *, show: Show = "auto") -> Result:
    """Trains the teacher alone, or goes on, or reads its result; ``folder`` is that of :func:`run`'s ``teachers``."""
    _, accuracy = _teacher(settings, folder, _load(settings, process.device), process, show)
    return Result(accuracy, None)


def read_result(settings: Distillation, folder: Path) -> Result | None:
    """The result in the folder, or None where there is none.

    Raises:
        ValueError: it is the result of other settings.
    """
    path = folder / RESULT
    if not path.exists():
        return None
    try:
        document = json.loads(path.read_text())
        digest, result = document["digest"], Result(document["test_accuracy"], document["teacher_accuracy"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"fastkd: {path} is no result of a distillation; delete it to run it again") from None
    if digest != settings.digest():
        raise ValueError(f"fastkd: {path} is of other settings; choose another folder, or delete it")
    return result


def _write_result(settings: Distillation, folder: Path, result: Result) -> None:
    document = {
        "test_accuracy": result.accuracy,
        "teacher_accuracy": result.teacher_accuracy,
        "digest": settings.digest(),
        "settings": asdict(settings),
        "fastkd": build_info()["version"],
        "torch": torch.__version__,
    }
    text = json.dumps(document, indent=2, default=str) + "\n"
    on_first_rank(lambda: write_whole(folder / RESULT, lambda file: file.write(text.encode())))


def make_method(settings: Distillation, *networks: Any) -> Method:
    """Of (student, teacher, images), or, without them, to see whether it can be made."""
    own = settings.of_method()
    if settings.method == "bss":
        own["attack_size"] = max(1, settings.batch_size // 4)  # its authors' share: 64 of 256
    if settings.method == "fitnet" and not networks:
        own.update(student_channels=1, teacher_channels=1)  # which are not known yet
    return methods.create(settings.method, *networks, **own)


def _create(name: str, role: str, channels: int, classes: int, seed: int) -> nn.Module:
    try:
        return models.create(name, in_channels=channels, num_classes=classes, seed=seed)
    except ValueError as error:
        raise ValueError(str(error).replace("fastkd: name", f"fastkd: {role}", 1)) from None
    except (RuntimeError, MemoryError) as error:  # torch's, of an allocation
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"fastkd: {role} {name!r} cannot be made: {why}") from None


def _network(settings: Distillation, role: str, data: _Data, seed: int) -> nn.Module:
    name = settings.student if role == "student" else settings.teacher
    return _create(name, role, data.train.images.shape[1], data.train.num_classes, seed).to(data.test_images.device)


MADE_UP_CLASSES = 10  # where only the files tell


def _made_up(settings: Distillation) -> _Data:
    """Four images of noise in the place of the set, on the CPU."""
    outline = images.check(settings.data)
    classes = outline.num_classes or MADE_UP_CLASSES
    channels = outline.shape[0]
    noise = torch.randint(256, (4, *outline.shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    names = tuple(str(i) for i in range(classes))
    few = ImageSet(noise, torch.arange(4) % classes, names, (0.5,) * channels, (0.25,) * channels)
    return _Data(few, few.normalised(), few.target)


def _batches(settings: Distillation, train: ImageSet, size: int, rank: int = 0, world_size: int = 1) -> ImageBatches:
    return ImageBatches(
        train,
        size,
        seed=settings.training.seed,
        padding=settings.padding,
        flip=None if settings.flip else False,
        rank=rank,
        world_size=world_size,
    )


def _check_network(settings: Distillation, role: str, data: _Data) -> None:
    """Whether it takes the images, and has a logit for each class."""
    network = _network(settings, role, data, 0)
    expected = (len(data.test_images), data.train.num_classes)
    try:
        with torch.no_grad(), evaluating(network):
            logits = network(data.test_images)
        why = "" if getattr(logits, "shape", None) == expected else "its output is not one logit for each class"
    except Exception as error:  # what torch says of maps that have become too small, for instance
        why = next(iter(str(error).splitlines()), type(error).__name__)
    if why:
        size = "x".join(map(str, data.test_images.shape[1:]))
        raise ValueError(f"fastkd: {role} {getattr(settings, role)!r} does not take images of {size}: {why}")


def _check_step(settings: Distillation, data: _Data) -> None:
    """One step of the method."""
    teacher = _network(settings, "teacher", data, 0) if methods.needs_teacher(settings.method) else None
    try:
        objective = _objective(settings, data, teacher, 0)
        with torch.no_grad():
            objective(data.test_images[:4], data.test_target[:4])
    except Exception as error:
        if str(error).startswith("fastkd: "):
            raise
        why = next(iter(str(error).splitlines()), type(error).__name__)
        pair = f"student {settings.student!r}" + (f" and teacher {settings.teacher!r}" if teacher is not None else "")
        raise ValueError(f"fastkd: method {settings.method!r} does not take the {pair}: {why}") from error


def _load(settings: Distillation, device: torch.device) -> _Data:
    train, test = prepare(settings.data, settings.training.seed)
    test = test.to(device)
    return _Data(train.to(device), test.normalised(), test.target)


def _teacher(
    settings: Distillation, folder: Path, data: _Data, process: Process, show: Show
) -> tuple[nn.Module, float]:
    """Trained, or read: its weights from a file of the user's, or from the folder."""
    network = _network(settings, "teacher", data, TEACHERS + settings.training.seed)
    if settings.teacher_weights is not None:
        _read_weights(network, settings.teacher_weights)
        return network, evaluator(data.test_images, data.test_target)(network)["test_accuracy"]
    own = settings.of_teacher()
    folder = folder / f"teacher-{own.student}-{own.digest()}"
    done = on_first_rank(lambda: read_result(own, folder))
    if done is None:
        accuracy = _train(own, folder, data, None, process, show, TEACHERS + settings.training.seed)
        done = Result(accuracy, None)
        _write_result(own, folder, done)
    _read_weights(network, folder / WEIGHTS)
    return network, done.accuracy


def _train(
    settings: Distillation,
    folder: Path,
    data: _Data,
    teacher: nn.Module | None,
    process: Process,
    show: Show,
    weights_seed: int | None = None,
) -> float:
    """Test accuracy after the last epoch; the weights are in the folder then."""
    seed = settings.training.seed if weights_seed is None else weights_seed
    objective = _objective(settings, data, teacher, seed)
    batches = _batches(settings, data.train, settings.batch_size, process.rank, process.world_size)
    trainer = Trainer(
        objective,
        batches,
        settings.training,
        evaluate=evaluator(data.test_images, data.test_target),
        folder=folder,
        show=show,
        description={name: str(value) for name, value in settings.description().items() if name != "training"},
    )
    return float(trainer.fit(resume="auto")[-1]["test_accuracy"])


def _objective(settings: Distillation, data: _Data, teacher: nn.Module | None, seed: int) -> Objective:
    first = _network(settings, "student", data, seed)
    method = make_method(settings, *(() if teacher is None else (first, teacher, data.test_images[:2])))
    # the networks of an online method differ; the first is the one that every other method would train
    student = method.build_student(
        lambda i: first if i == 0 else _network(settings, "student", data, seed + i * (TEACHERS << 1))
    )
    return Objective(method, student, teacher).to(data.test_images.device)


def _read_weights(network: nn.Module, path: Path) -> None:
    _take_weights(network, _state_dict(path), path)


def _state_dict(path: Path) -> object:
    """A state dict, whole or under ``model``, ``state_dict`` or ``net``, as checkpoints of others have it."""
    if not path.is_file():
        raise FileNotFoundError(f"fastkd: there are no weights {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever pickle and torch make of a damaged file
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"fastkd: the weights {path} cannot be read: {why}") from None
    for key in ("model", "state_dict", "net"):
        state = state.get(key, state) if isinstance(state, dict) else state
    return state


def _take_weights(network: nn.Module, state: Any, path: Path) -> None:
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        what = " ".join(str(error).split())[:300]
        raise ValueError(f"fastkd: the weights {path} are not of this {type(network).__name__}: {what}") from None
