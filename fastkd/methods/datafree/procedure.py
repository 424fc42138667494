"""Distillation without data: what makes the images, and the student that learns on them, in one procedure for all methods.

A method is a choice of its options (:mod:`.recipes`); one with a term of its own overrides :meth:`DataFree.generator_terms`.
Networks are classifiers, or dense: logits ``[B, K, H, W]``, where a row is a pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fastkd import _checks
from fastkd.data.batch import Batches
from fastkd.methods.datafree import terms
from fastkd.methods.datafree.bank import Bank
from fastkd.methods.datafree.contrast import Contrast
from fastkd.methods.datafree.judged import Glanced, Judged, glance, judge, own_losses
from fastkd.methods.datafree.lessons import Lesson, Lessons, choose
from fastkd.methods.datafree.maker import Maker, Source, Squash
from fastkd.methods.datafree.replay import Replay
from fastkd.methods.datafree.terms import Divergence
from fastkd.methods.datafree.watched_teacher import WatchedTeacher
from fastkd.methods.features import FeatureTap, check_module
from fastkd.methods.procedure import Part, Procedure, Step
from fastkd.methods.representation import AT
from fastkd.models.layers import feature_layers
from fastkd.models.modes import evaluating
from fastkd.patches import random_patches
from fastkd.selection import TwoGaussianMixture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DataFree"]

Memory = Literal["none", "bank", "replay"]
GeneratorSchedule = Literal["constant", "cosine"]
SHOWN = 64  # images of a picture
_GIVEN = ("self", "__class__", "student", "teacher", "images", "mean", "std")  # what is no option, of the arguments


class DataFree(Procedure):
    """A generator, or images themselves, go down the loss that a method has for them; a student learns from the teacher there.

    An iteration: ``generator_steps`` updates of what makes the images, down the sum of the terms with a weight above 0; then
    ``student_steps`` of the student, each on images of its own. With ``select`` (TA-DFKD) images that the teacher is unsure of
    are left out of the adversarial term and of what the student sees. The teacher runs once on a batch: its logits serve for
    the selection, all terms and the student's loss. Nothing waits for the device within an epoch.

    Args:
        adversarial: weight of minus the divergence of student and teacher (of js: of 1 - it).
        adversary: which: kl, l1, js (exact, at most 1) or js-published.
        adversary_temperature: T of it.
        agreed_only: whether it is of those images alone in whose class both agree (CMI, NAYER).
        class_prior: weight of the teacher's cross-entropy with its own prediction, or with the class that was asked for.
        ask_classes: whether each image is asked to be of a class, all classes alike.
        entropy: weight of the mean entropy of the teacher's predictions.
        balance: weight of sum p ln p of the teacher's mean prediction.
        activation: weight of minus the mean size of the features before the teacher's last layer.
        bn_statistics: weight of the distance to the statistics of the teacher's batch norms; must be 0 without any.
        total_variation: weight of the norms of differences of neighbouring pixels, of the whole batch.
        l2: weight of the norm of the whole batch of images.
        contrast: weight of the contrastive term of CMI.
        select: whether images are selected by the teacher's confidence (fastkd.select_clean); not with a bank.
        threshold: posterior above which one is selected.
        most_rounds: batches at most that one of the student is selected from, on average; 2 at first, then as many as it takes.
        distance: the student's loss: kl, l1, js or js-published.
        temperature: T of it.
        attention: weight of the attention maps in it (AT; ZSKT).
        generator_steps: updates of what makes the images, an iteration.
        student_steps: updates of the student, an iteration.
        share_images: whether the student's first update is on the images, and the teacher's logits, of the generator's last.
        source: what is optimised: noise (a generator of fresh noise), latents (a generator and what goes into it, drawn anew in
            each iteration) or pixels (the images themselves, drawn anew).
        squash: of the generator: tanh and a batch norm without weights, or sigmoid, normalised as the teacher's images are.
        jitter: pixels by which images are shifted, at random, before each update of theirs.
        renew: iterations, counted anew in each epoch, after which the generator gets new weights; 0: never.
        memory: what the student learns on beside new images: none, bank (images made before, with the teacher's logits, and
            nothing else) or replay (those of a variational autoencoder that learns to make them).
        capacity: images in the bank, or negatives of the contrastive term.
        latent: dimensions of the noise.
        width: maps of the generator.
        first_stage: maps of the generator's first stage, over width.
        generator_learning_rate: of Adam, for what makes the images.
        generator_betas: of Adam.
        generator_schedule: of its learning rate: constant or cosine.

    Raises:
        ValueError: options that do not go together; networks with other numbers of classes; images that a generator cannot
            make; batch norms or layers that the teacher does not have.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        images: Tensor,
        batch_size: int = 256,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        *,
        adversarial: float = 0.0,
        adversary: Divergence = "js",
        adversary_temperature: float = 1.0,
        agreed_only: bool = False,
        class_prior: float = 0.0,
        ask_classes: bool = False,
        entropy: float = 0.0,
        balance: float = 0.0,
        activation: float = 0.0,
        bn_statistics: float = 0.0,
        total_variation: float = 0.0,
        l2: float = 0.0,
        contrast: float = 0.0,
        select: bool = False,
        threshold: float = 0.5,
        most_rounds: int = 8,
        distance: Divergence = "kl",
        temperature: float = 1.0,
        attention: float = 0.0,
        generator_steps: int = 1,
        student_steps: int = 1,
        share_images: bool = False,
        source: Source = "noise",
        squash: Squash = "tanh",
        jitter: int = 0,
        renew: int = 0,
        memory: Memory = "none",
        capacity: int = 4096,
        latent: int = 256,
        width: int = 128,
        first_stage: int = 1,
        generator_learning_rate: float = 1e-3,
        generator_betas: tuple[float, float] = (0.9, 0.999),
        generator_schedule: GeneratorSchedule = "constant",
    ) -> None:
        options = {name: value for name, value in locals().items() if name not in _GIVEN}
        super().__init__()
        self._options = options
        self.weights = {
            name: _checks.check_not_negative(name, value)
            for name, value in (
                ("adversarial", adversarial),
                ("class_prior", class_prior),
                ("entropy", entropy),
                ("balance", balance),
                ("activation", activation),
                ("bn_statistics", bn_statistics),
                ("total_variation", total_variation),
                ("l2", l2),
                ("contrast", contrast),
            )
        }
        for name, value, choices in (
            ("adversary", adversary, Divergence),
            ("distance", distance, Divergence),
            ("source", source, Source),
            ("squash", squash, Squash),
            ("memory", memory, Memory),
            ("generator_schedule", generator_schedule, GeneratorSchedule),
        ):
            _checks.check_choice(name, value, get_args(choices))
        self.adversary: Divergence = adversary
        self.distance: Divergence = distance
        self.adversary_temperature = _checks.check_positive("adversary_temperature", adversary_temperature)
        self.temperature = _checks.check_positive("temperature", temperature)
        self.attention = _checks.check_not_negative("attention", attention)
        self.agreed_only = _checks.check_flag("agreed_only", agreed_only)
        self.share_images = _checks.check_flag("share_images", share_images)
        self.generator_steps = _checks.check_count("generator_steps", generator_steps, 1)
        self.student_steps = _checks.check_count("student_steps", student_steps, 1)
        self.renew = _checks.check_count("renew", renew, 0)
        self.learning_rate = _checks.check_positive("generator_learning_rate", generator_learning_rate)
        self.batch_size, self.betas, self.schedule = batch_size, generator_betas, generator_schedule
        capacity = _checks.check_count("capacity", capacity, 1)

        check_module("student", student)
        few = images.detach()
        rows = _rows_of_both(student, teacher, few)
        class_dim = 1 if len(rows) > 1 else -1
        if len(rows) > 1 and ask_classes:
            raise ValueError(
                "fastkd: ask_classes is True, must be False for dense networks: an image is of no one class"
            )
        layers: list[tuple[str, ...]] = [(), ()]
        self.attention_maps: AT | None = None
        if attention:
            layers = [feature_layers(network).stages for network in (student, teacher)]
            self.attention_maps = AT(*layers, feature_weight=attention)
        self.student = FeatureTap(student, layers[0], class_dim)
        asked = rows[-1] if _checks.check_flag("ask_classes", ask_classes) else 0
        shape = images.shape[1:]
        sizes = {"latent": latent, "width": width, "first_stage": first_stage, "jitter": jitter, "classes": asked}
        self.maker = Maker(source, batch_size, shape, mean, std, squash=squash, **sizes)
        self.bank, self.replay = None, None
        if memory == "bank":
            self.bank = Bank(max(capacity, batch_size), images=shape, logits=rows)
        elif memory == "replay":
            self.replay = Replay(latent, shape, width=width)
        self.lessons = Lessons(
            batch_size, self.student_steps, select=select, threshold=threshold, most_rounds=most_rounds
        )
        self._check_together()
        self.freeze("teacher", teacher)
        self._teacher = (  # in a tuple, nn.Module does not see it
            WatchedTeacher(
                teacher,
                few,
                layers=layers[1],
                statistics=bn_statistics > 0,
                latents=activation > 0,
                instances=contrast > 0,
                class_dim=class_dim,
            ),
        )
        self.contrast = None
        if contrast:
            self.contrast = Contrast(self._features_of(few), max(capacity, batch_size))
        there = {"generator": self.maker.generator, "head": self.contrast, "drawn": self.maker.drawn}
        self._making = [name for name, value in there.items() if value is not None]

    @property
    def teacher(self) -> WatchedTeacher:
        """As it is run."""
        return self._teacher[0]

    # ---- what the trainer asks for

    def parts(self) -> dict[str, Part]:
        how: dict[str, Any] = {
            "optimizer": "adam",
            "learning_rate": self.learning_rate,
            "betas": self.betas,
            "weight_decay": 0.0,
            "schedule": self.schedule,
            "warmup_epochs": 0.0,
        }
        found = {"student": Part(self.student)}
        found |= {name: Part(module, **how) for name, module in self.helpers().items() if module is not None}
        if self.maker.drawn is not None:
            found["drawn"] = Part([self.maker.drawn], shared=False, **how)
        return found

    def helpers(self) -> dict[str, nn.Module | None]:
        """By name, what is trained as the generator is, and with it."""
        return {"generator": self.maker.generator, "head": self.contrast, "replay": self.replay}

    def network(self) -> nn.Module:
        return self.student.model

    def networks(self) -> dict[str, nn.Module]:
        return {**super().networks(), "student": self.student.model}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self._options.items())

    def before_epoch(self, step: Step) -> None:
        self.lessons.begin_epoch()

    def after_epoch(self, step: Step) -> dict[str, float]:
        return self.lessons.end_epoch(step.epoch)

    def iteration(self, batch: Batches, step: Step) -> dict[str, Tensor]:
        given = self.images_of(batch)
        self._draw_anew(step)
        made, found = self._make(given, step)
        losses = []
        for lesson in self._lessons_of(made, given):
            loss = self.student_loss(lesson.images, lesson.logits, lesson.weight)
            step.update(loss, "student")
            losses.append(loss.detach())
        if self.replay is not None:
            replayed = self.replay.loss(made.images.detach(), made.logits.detach(), self.teacher)
            step.update(replayed, "replay")
            found["replay_loss"] = replayed
        return {"loss": torch.stack(losses).mean(), **found}

    def pictures(self, step: Step) -> Mapping[str, Figure]:
        """Images of now, and the teacher's losses on them: those that are selected and those that are not."""
        from fastkd.methods import pictures  # matplotlib takes a second to import

        made = self.judge(self.samples(max(SHOWN, self.batch_size)))
        chosen = self.lessons.mask([made])[0].cpu() if self.lessons.select else None
        losses = own_losses([made])[0]
        grid = pictures.image_grid(
            made.images[:SHOWN].float().cpu(),
            selected=None if chosen is None else chosen[:SHOWN],
            confidence=(-losses).exp()[:SHOWN].cpu(),
            mean=self.maker.mean,
            std=self.maker.std,
        )
        mixture = TwoGaussianMixture(normalize=True).fit(losses) if chosen is not None else None
        histogram = pictures.loss_histogram(losses.cpu(), mixture, chosen)
        return {"images": grid, "losses": histogram}

    @torch.no_grad()
    def samples(self, count: int) -> Tensor:
        """Images ``[count, C, H, W]`` as the student gets them, before a selection; from the bank, where there is one."""
        if self.bank is not None and len(self.bank):
            return self.bank.draw(count)["images"]
        return self.maker.samples(count)

    # ---- images, and what is asked of them

    def images_of(self, batch: Batches) -> Tensor | None:
        """Those that are given for an iteration: none, to methods without data."""
        return None

    def before_terms(self, made: Judged, given: Tensor | None, step: Step) -> dict[str, Tensor]:
        """Called with each batch before its terms are asked for: updates what else learns from it, and returns terms of its
        own to log."""
        return {}

    def other_images(self, given: Tensor | None, number: int) -> Tensor | None:
        """What the student sees beside new images in its step of this number: those of the memory that replays, if any."""
        return None if self.replay is None else self.replay.samples(self.batch_size)

    def judge(self, images: Tensor, labels: Tensor | None = None) -> Judged:
        """What the teacher says to images."""
        return judge(self.teacher, images, labels)

    def generator_terms(self, made: Judged) -> dict[str, Tensor]:
        """The terms of the loss of what makes the images, each with its weight; their sum is minimised. Those of weight 0 are
        not there."""
        every = terms.shares(made.usable)
        asked: dict[str, Callable[[], Tensor]] = {
            "adversarial": lambda: self._adversarial(made),
            "class_prior": lambda: terms.class_prior(made.stats, made.logits, made.labels, every),
            "entropy": lambda: terms.label_entropy(made.stats, every),
            "balance": lambda: terms.balance(made.logits, every),
            "activation": lambda: -terms.mean_activation(made.seen.latents, every),
            "bn_statistics": lambda: terms.bn_statistics(made.seen.moments, made.seen.running),
            "total_variation": lambda: terms.total_variation(made.images),
            "l2": lambda: terms.l2_norm(made.images),
            "contrast": lambda: self._contrasted(made),
        }
        return {name: self.weights[name] * term() for name, term in asked.items() if self.weights[name]}

    def student_loss(self, images: Tensor, teacher_logits: Tensor, weight: Tensor) -> Tensor:
        """Of images ``[B, C, H, W]`` on which the teacher's logits are known; weight is each one's share of the mean."""
        outputs = self.student(images)
        loss = terms.divergence(self.distance, outputs.logits, teacher_logits, weight, self.temperature)
        if self.attention_maps is None:
            return loss
        with torch.no_grad():
            theirs = self.teacher.features(images)
        distance = self.attention_maps.distance(list(outputs.features.values()), list(theirs.values()))
        return loss + self.attention * weight.sum() * distance  # 0 where no image counts

    # ---- an iteration, part by part

    def _draw_anew(self, step: Step) -> None:
        """What each batch begins with."""
        renewed = self.renew > 0 and step.iteration % self.renew == 0
        if renewed or not self.maker.lasting:
            self.maker.draw_anew(generator=renewed)
            step.restart(*(name for name in self._making if name != "head"))

    def _make(self, given: Tensor | None, step: Step) -> tuple[Judged, dict[str, Tensor]]:
        """Updates of what makes the images; the last ones made, and the last terms."""
        # a batch that is made for long is made against a student that stays as it is
        with evaluating(self.student) if self.generator_steps > 1 else nullcontext():
            for _ in range(self.generator_steps):
                made = self.judge(*self.maker())
                others = self.before_terms(made, given, step)
                found = self.generator_terms(made)
                step.update(torch.stack(list(found.values())).sum(), *self._making)
                self.maker.keep_in_range()
        self._remember(made)
        logged = {f"{name}_loss": term.detach() for name, term in found.items()}
        return made, {"generator_loss": torch.stack(list(logged.values())).sum(), **logged, **others}

    @torch.no_grad()
    def _remember(self, made: Judged) -> None:
        """Places of images in which nothing can be learnt are filled with others."""
        if self.bank is None and self.contrast is None:
            return
        chosen = choose(made.usable, self.batch_size)
        index = chosen.index
        if self.bank is not None:
            self.lessons.count(made.usable, made.usable, chosen.filled)
            self.bank.add(images=made.images[index], logits=made.logits[index])
        if self.contrast is not None:
            self.contrast.bank.add(features=made.seen.description[index])

    @torch.no_grad()
    def _lessons_of(self, made: Judged, given: Tensor | None) -> Iterator[Lesson]:
        """One for each of the student's steps, each made when it is asked for."""
        shared = [made] if self.share_images else []
        lessons: Iterator[Lesson]
        if self.bank is not None:
            weight = torch.full((self.batch_size,), 1.0 / self.batch_size, device=self.maker.device)
            lessons = (Lesson(**self.bank.draw(self.batch_size), weight=weight) for _ in range(self.student_steps))
        elif self.lessons.select:
            rounds = self.lessons.rounds - len(shared)
            lessons = self.lessons([*shared, *(self._fresh() for _ in range(rounds))])
        else:
            rounds = self.student_steps - len(shared)
            lessons = map(self.lessons.whole, chain(shared, (self._fresh() for _ in range(rounds))))
        return (self._with_others(lesson, given, number) for number, lesson in enumerate(lessons))

    @torch.no_grad()
    def _fresh(self) -> Glanced:
        """New images of the generator."""
        return glance(self.teacher, self.maker().images)

    @torch.no_grad()
    def _with_others(self, lesson: Lesson, given: Tensor | None, number: int) -> Lesson:
        """With further images, if there are any, that count for a half."""
        images = self.other_images(given, number)
        if images is None:
            return lesson
        others = glance(self.teacher, images)
        return Lesson(
            torch.cat([lesson.images, others.images]),
            torch.cat([lesson.logits, others.logits]),
            torch.cat([lesson.weight, terms.shares(others.usable)]) / 2,
        )

    def _adversarial(self, made: Judged) -> Tensor:
        """Lowest where student and teacher differ most."""
        logits = self.student(made.images).logits
        weight = terms.shares(self.lessons.mask([made])[0])
        if self.agreed_only:
            weight = terms.of_rows(weight, logits.shape[:-1]) * (logits.detach().argmax(-1) == made.stats.argmax)
        found = terms.divergence(self.adversary, logits, made.logits, weight, self.adversary_temperature)
        return 1.0 - found if self.adversary.startswith("js") else -found

    def _contrasted(self, made: Judged) -> Tensor:
        assert self.contrast is not None
        height, width = (max(1, (3 * side) // 4) for side in made.images.shape[2:])
        patches, _ = random_patches(made.images, (height, width))
        part = F.interpolate(patches, made.images.shape[2:], mode="bilinear")
        described = made.seen.description, self.teacher.look(part).description
        return self.contrast(*described, self.contrast.bank.all()["features"])  # type: ignore[no-any-return]

    def _features_of(self, images: Tensor) -> int:
        """Numbers that the teacher describes an image by."""
        with torch.no_grad():
            return self.teacher.look(images).description.shape[1]

    def _check_together(self) -> None:
        its_own = type(self).generator_terms is not DataFree.generator_terms  # terms of a subclass have other weights
        if not any(self.weights.values()) and not its_own:
            raise ValueError(
                f"fastkd: {', '.join(self.weights)} are all 0, must be one above 0: nothing to make images by"
            )
        if not self.maker.lasting and self.bank is None:
            raise ValueError(
                "fastkd: memory is not 'bank', must be for the source 'latents' or 'pixels', whose images are made anew in "
                "each iteration"
            )
        if self.bank is not None and self.share_images:
            raise ValueError(
                "fastkd: share_images is True, must be False with the memory 'bank', which the student learns on"
            )
        if self.bank is not None and self.lessons.select:
            raise ValueError(
                "fastkd: select is True, must be False with the memory 'bank', all of which the student learns on"
            )


@torch.no_grad()
def _rows_of_both(student: nn.Module, teacher: nn.Module, images: Tensor) -> tuple[int, ...]:
    """The shape of the logits of an image, classes last: (K,), or (H, W, K) of dense networks."""
    found = {}
    for name, network in (("student", student), ("teacher", teacher)):
        with evaluating(check_module(name, network)):
            result = network(images)
        found[name] = getattr(result, "logits", result).shape
    if found["student"] != found["teacher"] or len(found["student"]) not in (2, 4):
        raise ValueError(
            f"fastkd: student has logits of shape {tuple(found['student'])}, must be that of the teacher's, "
            f"{tuple(found['teacher'])}, [B, K] or [B, K, H, W]"
        )
    _, classes, *places = found["student"]
    return (*places, classes)
