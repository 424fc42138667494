"""One distillation, from data to test accuracy: a teacher trained on the same images and labels, then a student by a method.

Networks are classifiers, or dense, as the data set says: then a class is of a pixel, and so is the accuracy, beside which there
is the mean IoU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastkd._checks import check_count
from fastkd._seeding import mixed_seed, seeded
from fastkd.data import Batch, BatchSource, Collection, ImageBatches, ImageSet, NoBatches
from fastkd.methods import DataFree, Procedure
from fastkd.methods import registry as methods
from fastkd.methods.registry import Given
from fastkd.studies import checks
from fastkd.studies import data as images
from fastkd.studies.collected import Collected, make_collection, scores_of
from fastkd.studies.data import prepare
from fastkd.studies.detection import judged
from fastkd.studies.figures import course, distances, stability
from fastkd.studies.networks import check_network, first_line, make_network, read_state, take_weights
from fastkd.studies.result import MEAN_IOU, Result, read_result, write_result
from fastkd.studies.settings import Distillation
from fastkd.studies.trial import NoUpdates
from fastkd.training import Process, Trainer, evaluator
from fastkd.training.distributed import on_first_rank, sum_of_ranks
from fastkd.training.folder import MODEL
from fastkd.training.metrics import Running, check_terms
from fastkd.training.pictures import check_pictures_every
from fastkd.training.progress import Show
from fastkd.training.randomness import everything_seeded
from fastkd.training.update import trained_parts

__all__ = ["Experiment", "run"]

ALONE = Process(0, 1, torch.device("cpu"))
TEACHER_SEED = 1 << 20  # seeds of their weights begin here, away from those of students and of the others of a cohort
MADE_UP_CLASSES = 10  # where only the files tell
FEW = 4  # images of a batch where one step is only tried
COURSE_STEP = 5  # %, of the course of a method without images, which is evaluated often


def run(
    settings: Distillation,
    folder: Path,
    process: Process,
    *,
    teachers: Path | None = None,
    show: Show = "auto",
    pictures_every: int = 0,
) -> Result:
    """Runs it, or goes on where it was interrupted, or reads the result that is there.

    Args:
        folder: of the student: what :class:`fastkd.training.Trainer` writes, and ``result.json``.
        process: this one (:func:`fastkd.training.process_group`).
        teachers: a folder where teachers are kept, a folder each, so that other students of the same teacher find it; that
            of the student if None.
        show, pictures_every: as of the Trainer; the pictures are of the student's training.

    Raises:
        ValueError, FileNotFoundError, ImportError: settings that cannot be, data that is not there, a folder that holds
            another run.
    """
    experiment = Experiment(settings, process, pictures_every=pictures_every)
    experiment.check()
    done = on_first_rank(lambda: read_result(settings, folder))
    if done is not None:
        return done
    experiment.check_files(folder)
    if settings.collection.collection:
        experiment.check_data()  # before the teacher is trained
    return experiment.run(folder, teachers or folder, show)


class _Data(NamedTuple):
    """On the device."""

    train: ImageSet
    test_images: Tensor
    test_target: Tensor

    @property
    def outline(self) -> tuple[int, ...]:
        """Number of classes, channels, height, width: what networks depend on."""
        return (self.train.num_classes, *self.train.images.shape[1:])

    @property
    def class_dim(self) -> int:
        """Of the networks' logits."""
        return 1 if self.train.dense else -1

    def evaluator(self) -> Callable[[nn.Module], dict[str, float]]:
        """Of networks, on the test images."""
        return evaluator(self.test_images, self.test_target, class_dim=self.class_dim)


class _Scored(NamedTuple):
    """Of images without labels."""

    collection: Collection
    scores: dict[str, Tensor]


class Experiment:
    """A distillation, as its settings say, in this process.

    Args:
        pictures_every: as of the Trainer. No setting, as the result does not depend on it.

    Raises:
        ValueError, FileNotFoundError, ImportError: an unknown method; a plugin that is not there or cannot be imported; a
            negative pictures_every, or one without matplotlib.
    """

    def __init__(self, settings: Distillation, process: Process = ALONE, *, pictures_every: int = 0) -> None:
        self._pictures_every = check_pictures_every(pictures_every)
        if settings.plugin is not None:
            methods.load_plugin(settings.plugin)
        self.settings, self.process = settings, process
        self.entry = methods.find(settings.method)
        self.roles = ("student", "teacher") if self.entry.needs_teacher else ("student",)

    def check(self, *, step: bool = True) -> None:
        """What can be known from the settings alone: no file is looked at.

        Args:
            step: one step of the method, too, with new networks and images that are made up: what does not fit together is
                known before the teacher is trained.

        Raises:
            ValueError, ImportError: unknown names, options that a method does not have, sizes that the set does not have,
                networks that do not take its images, or that the method cannot compare.
        """
        settings = self.settings
        checks.check_needs(settings, self.entry)
        for role in self.roles:
            make_network(getattr(settings, role), role, channels=1, classes=2, seed=0)
        outline = images.check(settings.data)
        if outline.dense:
            checks.check_dense(settings, self.entry)
        checks.check_batches(settings, self.entry, outline.train_size, self.process.world_size)
        if self.entry.needs_teacher:
            settings.of_teacher()  # the schedule must fit its epochs, too
        if settings.collection.collection:
            checks.check_collection(settings, self.entry)
        elif settings.training.schedule == "plateau":
            raise ValueError("fastkd: schedule is 'plateau', must be another without images held out of a collection")
        made_up = self._made_up()
        next(self._images(made_up.train, 2, ALONE).epoch(0))  # whether crops can be that large
        for role in self.roles:
            network = self._network(role, made_up, 0)
            name, train = getattr(settings, role), made_up.train
            check_network(network, name, role, made_up.test_images, train.num_classes, dense=train.dense)
        if step:
            self._check_step(made_up)

    def check_files(self, folder: Path) -> None:
        """The weights of a teacher: whether they are there, and the teacher's; and a label file.

        Raises:
            ValueError, FileNotFoundError: they are not, or lie in ``folder``, which is written to.
        """
        images.check_label_file(self.settings.data)
        path = self.settings.teacher_weights
        if path is None or not self.entry.needs_teacher:
            return
        if path.resolve().parent == folder.resolve():
            raise ValueError(
                f"fastkd: teacher_weights is {path}, must not lie in the folder that is written to, {folder}"
            )
        state = read_state(path)
        if images.check(self.settings.data).num_classes is not None:
            take_weights(self._network("teacher", self._made_up(), 0), state, path)

    def check_data(self) -> None:
        """The images: whether they are there, and enough, those of a collection, too.

        Raises:
            ValueError, FileNotFoundError: they are not.
        """
        seed = self._data_seed
        train, _ = prepare(self.settings.data, seed)
        if self.settings.collection.collection:
            collection = make_collection(self.settings.collection, self.settings.data, train, seed)
            kept, least = self.settings.collection.most_drawn_from(len(collection)), self.settings.batch_size
            if kept < least:
                raise ValueError(
                    f"fastkd: collection has {kept} images to draw from, must have at least as many as a batch, {least}"
                )
            held_out = int(self.settings.collection.held_out * len(collection))
            if self.settings.training.schedule == "plateau" and not held_out:
                raise ValueError(
                    f"fastkd: held_out is {self.settings.collection.held_out}, must leave an image of {len(collection)} out, "
                    "for the schedule 'plateau'"
                )

    def run(self, folder: Path, teachers: Path, show: Show) -> Result:
        """Trains the teacher, where there is to be one, and the student; the result is in the folder then."""
        data = self._load()
        if data.outline != self._made_up().outline:  # files of another kind than the usual ones of that name
            self._check_step(data)
        teacher, taught = None, None
        if self.entry.needs_teacher:
            teacher, taught = self._teacher(teachers, data, show)
        scored = None
        if self.settings.collection.collection:
            scored = self._scored(data, teacher, teachers, self.settings.collection.looked_at)
        result = self._train(folder, data, teacher, show, self.settings.training.seed, scored)
        if taught is not None:
            figures = {**result.figures, "teacher_gap": taught.accuracy - result.figures["peak_accuracy"]}
            if MEAN_IOU.student in taught.figures:
                figures[MEAN_IOU.teacher] = taught.figures[MEAN_IOU.student]
            result = replace(result, figures=figures, teacher_accuracy=taught.accuracy)
        on_first_rank(lambda: write_result(self.settings, folder, result))
        return result

    def score(self, teachers: Path, name: str) -> None:
        """Scores the collection by this score, if that is not done."""
        data = self._load()
        teacher, _ = self._teacher(teachers, data, "off")
        self._scored(data, teacher, teachers, (name,))

    def train_teacher(self, teachers: Path, show: Show) -> Result:
        """Trains the teacher alone, or goes on, or reads its result."""
        return self._teacher(teachers, self._load(), show)[1]

    def _scored(self, data: _Data, teacher: nn.Module | None, folder: Path, names: tuple[str, ...]) -> _Scored:
        """The collection, with these scores, and those that were given."""
        settings = self.settings.collection
        collection = make_collection(settings, self.settings.data, data.train, self._data_seed)
        scores: dict[str, Tensor] = {}
        if names or settings.scores is not None:
            assert teacher is not None
            scores = scores_of(settings, collection, data.train, teacher, folder / "scores", names)
        return _Scored(collection, scores)

    def _collected(self, data: _Data, scored: _Scored, procedure: Procedure) -> Collected:
        """What is drawn of it, as the procedure takes it."""
        settings = self.settings
        return Collected(
            settings.collection,
            scored.collection,
            scored.scores,
            data.train,
            batch_size=settings.batch_size * procedure.batches,
            **self._moves(as_they_are=procedure.augments),
            seed=settings.training.seed,
            rank=self.process.rank,
            world_size=self.process.world_size,
        )

    def _network(self, role: str, data: _Data, seed: int) -> nn.Module:
        name = getattr(self.settings, role)
        channels, classes = data.train.images.shape[1], data.train.num_classes
        network = make_network(name, role, channels=channels, classes=classes, seed=seed)
        return network.to(data.test_images.device)

    def _made_up(self) -> _Data:
        """Four images of noise in the place of the set, on the CPU."""
        outline = images.check(self.settings.data)
        classes = outline.num_classes or MADE_UP_CLASSES
        channels = outline.shape[0]
        noise = torch.randint(256, (4, *outline.shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        names = tuple(str(i) for i in range(classes))
        target, padding = torch.arange(4) % classes, ImageSet.padding
        if outline.dense:
            target, padding = noise[:, 0].long() % classes, 0
        few = ImageSet(noise, target, names, (0.5,) * channels, (0.25,) * channels, padding=padding)
        return _Data(few, few.normalised(), few.target)

    @property
    def _data_seed(self) -> int:
        """Of the choice of images; those that a collection calls the task's and the rest are the teacher's."""
        if self.settings.collection.collection and self.entry.needs_teacher:
            return self.settings.of_teacher().training.seed
        return self.settings.training.seed

    def _load(self) -> _Data:
        train, test = prepare(self.settings.data, self._data_seed)
        test = test.to(self.process.device)
        return _Data(train.to(self.process.device), test.normalised(), test.target)

    def _moves(self, *, as_they_are: bool) -> dict[str, Any]:
        """How images are cropped and mirrored; None is as their set says."""
        if as_they_are:
            return {"padding": 0, "flip": False}
        return {"padding": self.settings.padding, "flip": None if self.settings.flip else False}

    def _images(
        self, train: ImageSet, batch_size: int, process: Process, procedure: Procedure | None = None
    ) -> ImageBatches:
        """Batches, as the procedure takes them."""
        batches, as_they_are, views, strong_views = 1, False, 1, 0
        if procedure is not None:
            batches, as_they_are = procedure.batches, procedure.augments
            views, strong_views = procedure.views, procedure.strong_views
        return ImageBatches(
            train,
            batch_size * batches,
            seed=self.settings.training.seed,
            **self._moves(as_they_are=as_they_are),
            rank=process.rank,
            world_size=process.world_size,
            views=views,
            strong_views=strong_views,
        )

    def _source(self, data: _Data, procedure: Procedure) -> BatchSource:
        if not self.entry.needs_images and self.settings.iterations:
            return NoBatches(self.settings.iterations)
        batches = self._images(data.train, self.settings.batch_size, self.process, procedure)
        if "labels" in self.entry.needs:
            return batches
        return _Unlabeled(batches) if self.entry.needs_images else NoBatches(len(batches))

    def _procedure(
        self,
        data: _Data,
        teacher: nn.Module | None,
        seed: int,
        batch_size: int,
        options: Mapping[str, Any],
        items: int,
    ) -> Procedure:
        # the networks of an online method differ; the first is the one that every other method would train
        make: Callable[[int], nn.Module] = lambda i: self._network("student", data, seed + i * (TEACHER_SEED << 1))  # noqa: E731
        given = Given(
            student=make(0),
            teacher=teacher,
            images=data.test_images[:2],
            batch_size=batch_size,
            items=items,
            num_classes=data.train.num_classes,
            class_dim=data.class_dim,
            mean=data.train.mean,
            std=data.train.std,
            padding=data.train.padding if self.settings.padding is None else self.settings.padding,
            flip=data.train.flip and self.settings.flip,
            make_student=make,
        )
        with seeded(mixed_seed("method", seed)):  # of what the method has beside the student: a regressor, a generator
            made = methods.create_procedure(self.settings.method, given, **options)
        return made.to(data.test_images.device)

    def _tried_options(self) -> dict[str, Any]:
        """With one of the hundreds of updates that a method may make in an iteration of images of its own (``..._steps``)."""
        options = dict(self.settings.options)
        if self._makes_images:
            for name, option in self.entry.options().items():
                steps = options.get(name, option.default)
                if name.endswith("_steps") and isinstance(steps, int) and steps > 1:
                    options[name] = 1
        return options

    @property
    def _makes_images(self) -> bool:
        """Whether the method makes images of its own."""
        return not self.entry.needs_images or issubclass(self.entry.kind, DataFree)

    def _check_step(self, data: _Data) -> None:
        """One iteration of the method, without an update."""
        settings = self.settings
        teacher = self._network("teacher", data, 0) if self.entry.needs_teacher else None
        batch_size = min(settings.batch_size, FEW) if self._makes_images else settings.batch_size
        try:
            with everything_seeded(0, 0):
                options = self._tried_options()
                procedure = self._procedure(data, teacher, 0, batch_size, options, len(data.train))
        except Exception as error:
            if str(error).startswith("fastkd: "):
                raise
            raise ValueError(
                f"fastkd: method {settings.method!r} cannot be made: {first_line(error)}; what is given goes by the names "
                + ", ".join(f.name for f in fields(Given))
            ) from error
        try:
            with everything_seeded(0, 0):
                self._check_validation(procedure)
                updates = NoUpdates(procedure, trained_parts(procedure, settings.training, 1))
                batch = None
                if self.entry.needs_images:
                    size = check_count("batches of the procedure", procedure.batches, 1)
                    size *= batch_size if self._makes_images else FEW
                    few = torch.arange(size, device=data.test_images.device) % len(data.test_images)
                    views = (data.test_images[few],) * check_count("views of the procedure", procedure.views, 1)
                    batch = Batch(views[0], data.test_target[few], few, views[1:])
                terms = check_terms(procedure, procedure.iteration(batch, updates))
                Running(data.test_images.device).add(terms, 1)
        except Exception as error:
            if str(error).startswith("fastkd: "):
                raise
            pair = f"student {settings.student!r}" + (f" and teacher {settings.teacher!r}" if teacher else "")
            raise ValueError(
                f"fastkd: method {settings.method!r} does not take the {pair}: {first_line(error)}"
            ) from error

    def _check_validation(self, procedure: Procedure) -> None:
        plateau = self.settings.training.schedule == "plateau"
        if plateau and type(procedure).validation is Procedure.validation:
            raise ValueError(
                f"fastkd: schedule is 'plateau', must be another for {self.settings.method!r}, which has no loss of images "
                "that are held out"
            )

    def _teacher(self, folder: Path, data: _Data, show: Show) -> tuple[nn.Module, Result]:
        """Trained, or read: its weights from a file of the user's, or from the folder."""
        own = self.settings.of_teacher()
        seed = TEACHER_SEED + own.training.seed
        network = self._network("teacher", data, seed)
        if (path := self.settings.teacher_weights) is not None:
            take_weights(network, read_state(path), path)
            figures = data.evaluator()(network)
            return network, Result(figures["test_accuracy"], None, figures)
        folder = folder / f"teacher-{own.student}-{own.digest()}"
        done = on_first_rank(lambda: read_result(own, folder))
        if done is None:
            alone = Experiment(own, self.process)
            of_its_seed = data if own.training.seed == self._data_seed else alone._load()
            done = result = alone._train(folder, of_its_seed, None, show, seed)
            on_first_rank(lambda: write_result(own, folder, result))
        take_weights(network, read_state(folder / MODEL), folder / MODEL)
        return network, done

    def _train(
        self,
        folder: Path,
        data: _Data,
        teacher: nn.Module | None,
        show: Show,
        seed: int,
        scored: _Scored | None = None,
    ) -> Result:
        """What the last epoch came to; the weights are in the folder then."""
        settings = self.settings
        plateau = settings.training.schedule == "plateau"
        items = len(data.train) if scored is None else len(scored.collection)
        procedure = self._procedure(data, teacher, seed, settings.batch_size, settings.options, items)
        collected = None if scored is None else self._collected(data, scored, procedure)
        trainer = Trainer(
            procedure,
            self._source(data, procedure) if collected is None else collected.batches,
            settings.training,
            validate=collected.held_out if collected is not None and plateau else None,
            evaluate=data.evaluator(),
            folder=folder,
            show=show,
            pictures_every=self._pictures_every,
            description={name: str(value) for name, value in settings.description().items() if name != "training"},
        )
        history = trainer.fit(resume="auto")
        last = history[-1]
        figures = {name: value for name, value in last.items() if name not in ("epoch", "step", "seconds")}
        figures |= stability(history)
        if collected is not None:
            figures |= {**collected.figures(sum_of_ranks(collected.batches.counts)), **course(history)}
        elif not self.entry.needs_images:
            figures |= course(history, COURSE_STEP)
        if "labels" in self.entry.needs and not data.train.dense:
            figures |= judged(trainer, data.train, settings.data, self._data_seed, folder)
            if not images.clean(settings.data):
                figures |= course(history, COURSE_STEP)
        if teacher is not None:
            figures |= distances(procedure, teacher, data.test_images, collected)
        return Result(last["test_accuracy"], None, figures)


class _Unlabeled:
    """Batches without their labels."""

    def __init__(self, source: ImageBatches) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def epoch(self, epoch: int, /, start: int = 0) -> Iterator[Batch]:
        return (Batch(batch.images, index=batch.index) for batch in self._source.epoch(epoch, start))
