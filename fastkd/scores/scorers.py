"""From images to scores, by way of the teacher. Higher = more alike the teacher's own task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastkd import _checks
from fastkd._names import unknown_name
from fastkd._seeding import mixed_generator
from fastkd.models.heads import linear_head, watch_latents
from fastkd.models.modes import evaluating
from fastkd.patches import random_crop_flip
from fastkd.scores import indicators
from fastkd.scores.logits import max_softmax, negative_energy, negative_entropy, t1000

__all__ = ["LOGIT_SCORES", "NAMES", "LogitScore", "OneClassSum", "ScoreName", "Scorer", "make_scorer"]

LOGIT_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "t1000": t1000,
    "max-softmax": max_softmax,
    "entropy": negative_entropy,
    "energy": negative_energy,
}
"""By name, functions of the logits; "entropy" and "energy" are negated, so that more alike is higher."""
ONE_CLASS_SUM = "1c-sum"
ScoreName = Literal["1c-sum", "t1000", "max-softmax", "entropy", "energy"]
NAMES: tuple[str, ...] = get_args(ScoreName)
NOISE_IMAGES = 10_000  # of the paper


class Scorer:
    """Scores of images by a teacher, which runs once on each, in evaluation mode and without gradients.

    Args:
        teacher: images to logits ``[B, K]``, or to an object that has them as ``.logits``.
        amp: bfloat16 or float16, in which the teacher runs under ``torch.autocast``; None: as it is.
    """

    def __init__(self, teacher: nn.Module, *, amp: torch.dtype | None = None) -> None:
        if not isinstance(teacher, nn.Module):
            raise TypeError(f"fastkd: teacher is {type(teacher).__name__}, must be a torch.nn.Module")
        if amp not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"fastkd: amp is {amp}, must be torch.bfloat16, torch.float16 or None")
        self.teacher, self.amp = teacher, amp

    def __call__(self, images: Tensor) -> Tensor:
        """float64 ``[B]`` of images ``[B, C, H, W]``, normalised, on the teacher's device. Does not wait for it."""
        with torch.no_grad(), evaluating(self.teacher):
            return self._scores(_checks.check_tensor("images", images))

    def _scores(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def logits(self, images: Tensor) -> Tensor:
        """Of the teacher, ``[B, K]``."""
        with torch.autocast(images.device.type, self.amp, enabled=self.amp is not None):
            found = self.teacher(images)
        logits = _checks.check_dtype("the teacher's logits", getattr(found, "logits", found))
        if logits.dim() != 2 or logits.shape[0] != images.shape[0]:
            raise ValueError(
                f"fastkd: the teacher's logits have shape {tuple(logits.shape)}, must be ({images.shape[0]}, K)"
            )
        return logits

    def prepare(
        self, shape: Sequence[int], mean: float | Sequence[float] | None, std: float | Sequence[float] | None
    ) -> None:
        """Calibrates it for images of this shape and normalisation, where it must be and is not."""

    def state_dict(self) -> dict[str, Any]:
        """What it has learnt from noise, in plain types."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As :meth:`state_dict` returned it."""
        _checks.check_state(state, (), type(self).__name__)


class LogitScore(Scorer):
    """A function of the logits.

    >>> scores = LogitScore(teacher, fastkd.scores.t1000)(images)

    Args:
        function: of :mod:`fastkd.scores`, or your own: logits ``[B, K]`` to ``[B]``, higher = more alike.
    """

    def __init__(
        self, teacher: nn.Module, function: Callable[[Tensor], Tensor] = t1000, *, amp: torch.dtype | None = None
    ) -> None:
        super().__init__(teacher, amp=amp)
        if not callable(function):
            raise TypeError(f"fastkd: function is {type(function).__name__}, must be one of logits")
        self.function = function

    def _scores(self, images: Tensor) -> Tensor:
        return self.function(self.logits(images)).double()


class OneClassSum(Scorer):
    """1C-Sum: the negative sum of fifteen indicators (:mod:`fastkd.scores.indicators`), each standardised on noise.

    No image of the task is needed: mean and deviation of each indicator are those of the teacher's response to images of
    uniform noise.

    >>> score = OneClassSum(teacher).calibrate((3, 32, 32), mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26))
    >>> scores = score(images)

    Source: Begon & Geurts, "Distillation from heterogeneous unlabeled collections", section 2.1, and their "Sample-free
    white-box out-of-distribution detection for deep learning". There the images count as a layer of batch norm, too; here
    they do not. Of a teacher without batch norm, eleven indicators are left.

    Args:
        teacher: a classifier that ends with a linear layer, on one device.
        head: the name of that layer; by default it is looked for.
        amp: as of :class:`Scorer`; calibrated alike.
    """

    def __init__(self, teacher: nn.Module, *, head: str | None = None, amp: torch.dtype | None = None) -> None:
        super().__init__(teacher, amp=amp)
        self._channels = indicators.ChannelIndicators(teacher)
        self._head: nn.Linear | None = None if head is None else _named_head(teacher, head)
        self.names = indicators.COMPONENTS if self._channels.there_are_any else indicators.COMPONENTS[:-4]
        """Of the components, in order."""
        self._mean: Tensor | None = None
        self._std: Tensor | None = None

    def calibrate(
        self,
        shape: Sequence[int],
        *,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        images: int = NOISE_IMAGES,
        seed: int = 0,
        batch_size: int = 256,
    ) -> OneClassSum:
        """Mean and deviation of each component over images of uniform noise; one that does not vary is only shifted.

        Args:
            shape: C, H, W of the teacher's images.
            mean, std: of each channel, in units of x / 255: the normalisation of the teacher's images.
            images: how many, 2 or more.
            seed: of the noise, which is the same on every device.
            batch_size: images at once.

        Returns:
            Itself.

        Raises:
            ValueError: a component of noise is NaN or infinite; numbers out of range.
        """
        count, batch_size = _checks.check_count("images", images, 2), _checks.check_count("batch_size", batch_size, 1)
        sizes = tuple(_checks.check_count("shape", side, 1) for side in shape)
        if len(sizes) != 3:
            raise ValueError(f"fastkd: shape is {tuple(shape)}, must be C, H, W")
        device = next(self.teacher.parameters()).device
        generator, found = mixed_generator("noise", _checks.check_count("seed", seed)), []
        for start in range(0, count, batch_size):
            n = min(batch_size, count - start)
            noise = torch.randint(256, (n, *sizes), dtype=torch.uint8, generator=generator, device="cpu").to(device)
            found.append(self.components(random_crop_flip(noise, 0, None, 0.0, mean, std)))
        components = torch.cat(found)
        finite = components.isfinite().all(0).tolist()
        if not all(finite):
            names = ", ".join(name for name, good in zip(self.names, finite, strict=True) if not good)
            raise ValueError(f"fastkd: the teacher's {names} of noise images are not finite, must be numbers")
        deviation, self._mean = torch.std_mean(components, 0, correction=0)
        # what differs by roundings alone does not vary
        still = deviation <= 1e-12 * self._mean.abs()
        self._std = torch.where(still, 1.0, deviation)
        return self

    def prepare(
        self, shape: Sequence[int], mean: float | Sequence[float] | None, std: float | Sequence[float] | None
    ) -> None:
        if self._mean is None:
            self.calibrate(shape, mean=mean, std=std)

    def components(self, images: Tensor) -> Tensor:
        """The indicators, not standardised; higher = less alike.

        Args:
            images: ``[B, C, H, W]``, normalised, on the teacher's device.

        Returns:
            float64 ``[B, n]``, in the order of :attr:`names`.
        """
        with torch.no_grad(), evaluating(self.teacher):
            return self._components(_checks.check_tensor("images", images))

    def _components(self, images: Tensor) -> Tensor:
        if self._head is None:
            self._head = linear_head(self.teacher, images[:2]).layer
        with watch_latents(self._head) as latents, self._channels.watching():
            logits = self.logits(images)
        found = [
            indicators.response_indicators(logits),
            indicators.latent_indicators(latents[-1].flatten(1), logits, self._head.weight),
        ]
        if self._channels.there_are_any:
            found.append(self._channels.found())
        return torch.cat(found, 1)

    def _scores(self, images: Tensor) -> Tensor:
        if self._mean is None or self._std is None:
            raise RuntimeError(
                "fastkd: this OneClassSum is not calibrated: call calibrate(shape, mean=..., std=...) first"
            )
        return -((self._components(images) - self._mean) / self._std).sum(1)

    def state_dict(self) -> dict[str, Any]:
        if self._mean is None or self._std is None:
            return {"mean": None, "std": None}
        return {"mean": self._mean.tolist(), "std": self._std.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = _checks.check_state(state, ("mean", "std"), "OneClassSum")
        device = next(self.teacher.parameters()).device
        loaded = []
        for name in ("mean", "std"):
            value = state[name]
            if value is not None and len(value) != len(self.names):
                raise ValueError(
                    f"fastkd: state[{name!r}] has {len(value)} numbers, must have {len(self.names)}, one a component"
                )
            loaded.append(None if value is None else torch.tensor(value, dtype=torch.float64, device=device))
        self._mean, self._std = loaded


def make_scorer(name: str, teacher: nn.Module, *, amp: torch.dtype | None = None, head: str | None = None) -> Scorer:
    """The score of a name, of :data:`NAMES`. 1c-sum is to be calibrated before it is used.

    Raises:
        ValueError: an unknown name, answered with the nearest right ones.
    """
    if name == ONE_CLASS_SUM:
        return OneClassSum(teacher, head=head, amp=amp)
    if name not in LOGIT_SCORES:
        raise unknown_name("score", name, NAMES)
    return LogitScore(teacher, LOGIT_SCORES[name], amp=amp)


def _named_head(teacher: nn.Module, name: str) -> nn.Linear:
    found = dict(teacher.named_modules()).get(name)
    if not isinstance(found, nn.Linear):
        given = "no module of the teacher" if found is None else f"a {type(found).__name__}"
        raise ValueError(f"fastkd: head is {name!r}, {given}, must be the name of its last nn.Linear")
    return found
