"""Numbers of a training: sums kept on the device, and one JSON object for each epoch in a file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fastkd.training import distributed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EpochMetrics", "MetricsFile", "Recorder", "Running", "TensorBoard", "is_loss", "is_share", "read_metrics"]

EpochMetrics = dict[str, float]
"""What an epoch came to: epoch, step, learning_rate, means of what the iterations returned, results, seconds."""


class Running:
    """Means over the images of an epoch so far, of what the iterations returned: nothing is read from the device but by
    :meth:`read`."""

    def __init__(self, device: torch.device) -> None:
        self._names: list[str] = []
        self._sums = torch.zeros(0, dtype=torch.float64, device=device)
        self._images = 0

    @torch.no_grad()
    def add(self, terms: Mapping[str, Tensor | float], images: int) -> None:
        """The terms of an iteration, scalars, means over so many images."""
        values = {name: _scalar(name, value, self._sums) for name, value in terms.items()}
        new = [name for name in values if name not in self._names]
        if new:  # a term may begin, or end, within the training
            self._names += new
            self._sums = torch.cat([self._sums, self._sums.new_zeros(len(new))])
        if not self._names:
            return
        nothing = self._sums.new_zeros(())
        means = torch.stack([values.get(name, nothing) for name in self._names])
        self._sums.add_(means, alpha=images)
        self._images += images

    def read(self, *, all_ranks: bool = False) -> EpochMetrics:
        """The means by name, of this rank or, called by all of them, of all; waits for the device, once."""
        if not self._names:
            return {}
        sums = torch.cat([self._sums, self._sums.new_tensor([self._images])])
        *sums_, images = (distributed.sum_of_ranks(sums) if all_ranks else sums).tolist()
        means = {name: value / images for name, value in zip(self._names, sums_, strict=True)}
        # losses first, those that began later among them
        return dict(sorted(means.items(), key=lambda item: not is_loss(item[0])))

    def state_dict(self) -> dict[str, Any]:
        """The sums of this rank."""
        return {"names": list(self._names), "sums": self._sums.cpu(), "images": self._images}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As :meth:`state_dict` returned them."""
        self._names, self._images = list(state["names"]), state["images"]
        self._sums = state["sums"].to(self._sums.device, copy=True)


def check_terms(procedure: object, terms: object) -> Mapping[str, Tensor | float]:
    """What an iteration returned: a mapping of names to scalars."""
    if not isinstance(terms, Mapping):
        raise TypeError(
            f"fastkd: {type(procedure).__name__}.iteration returned {type(terms).__name__}, must be a dict of terms by name"
        )
    return terms


def is_loss(name: str) -> bool:
    """Whether a metric of this name is a loss, or a term of one."""
    return name.endswith("loss")


def is_share(name: str) -> bool:
    """Whether it is a share, to be shown in percent."""
    return name.endswith(("accuracy", "iou"))


def _scalar(name: str, value: object, like: Tensor) -> Tensor:
    if isinstance(value, (int, float)):
        return like.new_full((), value)  # no copy from the host
    if not isinstance(value, Tensor) or value.numel() != 1:
        given = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"fastkd: the term {name} of an iteration is {given}, must be a number or a tensor of one")
    scalar = value.detach() if value.dim() == 0 else value.detach().reshape(())
    return scalar.to(like)


def check_finite(line: EpochMetrics, step: int) -> None:
    """Whether all are numbers.

    Raises:
        FloatingPointError: some are not; the message names them, and the step.
    """
    wrong = {name: value for name, value in line.items() if not math.isfinite(value)}
    if wrong:
        terms = ", ".join(f"{name} is {value}" for name, value in wrong.items())
        others = ", ".join(f"{name} {value:.4g}" for name, value in line.items() if name not in wrong)
        raise FloatingPointError(
            f"fastkd: at step {step} {terms} (means over the epoch so far{'; ' if others else ''}{others}): "
            "lower learning_rate, or set warmup_epochs or gradient_clip; with amp='fp16' try 'bf16'"
        )


class Recorder(Protocol):
    """Keeps the lines of a training."""

    def begin(self, lines: list[EpochMetrics]) -> None:
        """These are there already: those after them, of an earlier run, go."""

    def add(self, line: EpochMetrics) -> None:
        """One more."""

    def close(self) -> None:
        """No more."""


class MetricsFile:
    """Lines of JSON, each there as soon as its epoch has ended."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def begin(self, lines: list[EpochMetrics]) -> None:
        self._path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    def add(self, line: EpochMetrics) -> None:
        with self._path.open("a") as file:
            file.write(f"{json.dumps(line)}\n")

    def close(self) -> None:
        pass


class TensorBoard:
    """The same numbers as TensorBoard shows them, by step, and pictures.

    Raises:
        ModuleNotFoundError: it is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            import tensorboard  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                'fastkd: tensorboard is True, which needs TensorBoard: pip install "fastkd[tensorboard]"'
            ) from None
        self._folder = folder
        self._writer: Any = None

    def begin(self, lines: list[EpochMetrics]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        done = int(lines[-1]["step"]) if lines else 0
        self._writer = SummaryWriter(str(self._folder), purge_step=done + 1)  # type: ignore[no-untyped-call,unused-ignore]

    def add(self, line: EpochMetrics) -> None:
        for name, value in line.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(line["step"]))
        self._writer.flush()

    def add_figures(self, figures: Mapping[str, Figure], step: int) -> None:
        """Pictures of the training, after so many steps."""
        for name, figure in figures.items():
            self._writer.add_figure(f"pictures/{name}", figure, step, close=False)  # pyplot knows nothing of them

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def read_metrics(path: str | Path) -> list[EpochMetrics]:
    """The lines of a ``metrics.jsonl``."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]
