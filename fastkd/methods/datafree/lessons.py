"""What a student sees of the images that were made for it: all, or those that the teacher vouches for (TA-DFKD).

The choice is made on the device and fills a fixed number of places, so that nothing waits for it. How many images are made
follows from the epoch before.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastkd import _checks
from fastkd.methods.datafree.judged import Glanced, own_losses
from fastkd.methods.datafree.terms import shares
from fastkd.selection import select_clean

__all__ = ["Chosen", "Lesson", "Lessons", "choose"]

SPARE = 1.1  # images for each place, times those that the last epoch needed


@dataclass
class Lesson:
    """Of one step of the student."""

    images: Tensor
    """``[B, C, H, W]``."""
    logits: Tensor
    """The teacher's, ``[B, ..., K]``."""
    weight: Tensor
    """``[B]``, the share of each in the mean."""


@dataclass
class Chosen:
    """Places, filled with candidates that were selected."""

    index: Tensor
    """int64 ``[size]``: the candidate in each place. Where fewer were selected than there are places they come again, in turn,
    so that nothing else gets into a batch norm."""
    weight: Tensor
    """``[size]``, 1; all 0 where none was selected."""
    filled: Tensor
    """Scalar, the share of the places that have a candidate of their own."""


def choose(mask: Tensor, size: int) -> Chosen:
    """The first ``size`` of the candidates that were selected, bool ``[N]``."""
    order = torch.argsort(mask.to(torch.uint8), descending=True, stable=True)
    ranks = _in_turn(mask.sum(), size)
    return Chosen(order[ranks.index], ranks.weight, ranks.filled)


def _in_turn(count: Tensor, size: int) -> Chosen:
    """Places, filled with the first ``count`` numbers."""
    kept = count.clamp(max=size)
    places = torch.arange(size, device=count.device)
    return Chosen(places % kept.clamp(min=1), (count > 0).float().expand(size), kept / size)


def _put(batches: Sequence[Tensor], place: Tensor, size: int) -> Tensor:
    """Rows of batches ``[B, ...]`` at their places ``[batches, B]``, ``[size + 1, ...]``: the last place is of those that have
    none, and the first is 0 where nobody has it. Copies fewer bytes than one tensor of all rows and an index of it."""
    first = batches[0]
    channels_last = first.dim() == 4 and first.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    rows = torch.empty(size + 1, *first.shape[1:], dtype=first.dtype, device=first.device, memory_format=memory_format)
    rows[0].zero_()
    for batch, places in zip(batches, place, strict=True):
        rows.index_copy_(0, places, batch)
    return rows


class Lessons(nn.Module):
    """Selects, and counts.

    Args:
        batch_size: B, of a lesson.
        steps: lessons of an iteration.
        select: whether images are selected by the teacher's losses, else all that are usable are taken.
        threshold: posterior of the clean component above which one is selected.
        most_rounds: batches at most that one lesson is selected from, on average; 2 at first.
    """

    tally: Tensor

    def __init__(
        self, batch_size: int, steps: int, *, select: bool, threshold: float = 0.5, most_rounds: int = 8
    ) -> None:
        super().__init__()
        self.batch_size, self.steps = batch_size, steps
        self.select, self.threshold = _checks.check_flag("select", select), _checks.check_share("threshold", threshold)
        self.most_rounds = _checks.check_count("most_rounds", most_rounds, 2)
        self.rounds = 2 * steps if select else steps
        """Batches of images that are made for the lessons of an iteration."""
        # of an epoch: the shares usable, selected and filled, how often not all places were filled, iterations
        self.register_buffer("tally", torch.zeros(5))
        self._warned = False

    def mask(self, batches: Sequence[Glanced]) -> Tensor:
        """Which images are taken, bool ``[batches, B]``: each batch is a mixture of its own, all are fitted in one call."""
        if not self.select:
            return torch.stack([batch.usable for batch in batches])
        return select_clean(own_losses(batches), self.threshold)[0]

    @torch.no_grad()
    def whole(self, batch: Glanced) -> Lesson:
        """A lesson of all that is usable of a batch. In the places of other images is the first of these, which does not count
        there, or 0: nothing else gets into a batch norm."""
        usable = batch.usable
        self.count(usable, usable, usable.float().mean())
        first = usable.to(torch.uint8).argmax(0, keepdim=True)

        def filled(rows: Tensor) -> Tensor:
            filler = rows.index_select(0, first).where(usable.any(), 0.0)
            return rows.where(usable.view(-1, *[1] * (rows.dim() - 1)), filler)

        return Lesson(filled(batch.images), filled(batch.logits), shares(usable))

    @torch.no_grad()
    def forward(self, batches: Sequence[Glanced]) -> Iterator[Lesson]:
        """The lessons of an iteration of what is selected, each made when it is asked for, so that not all of their images are
        there twice. All are by the same generator: what one lesson leaves, the next one takes."""
        usable, mask = torch.stack([batch.usable for batch in batches]), self.mask(batches)
        size = self.steps * self.batch_size
        rank = mask.flatten().cumsum(0).view_as(mask) - 1
        place = rank.where(mask & (rank < size), size)
        images, logits = (
            _put(rows, place, size) for rows in zip(*((b.images, b.logits) for b in batches), strict=True)
        )
        chosen = _in_turn(mask.sum(), size)
        self.count(usable, mask, chosen.filled)
        parts = zip(chosen.index.split(self.batch_size), chosen.weight.split(self.batch_size), strict=True)
        return (Lesson(images[index], logits[index], weight / self.batch_size) for index, weight in parts)

    def count(self, usable: Tensor, mask: Tensor, filled: Tensor) -> None:
        """One iteration more, or lesson: which of its images were usable, which were taken, and the share of places filled."""
        shares = torch.stack([usable.float().mean(), mask.float().mean(), filled])
        self.tally += torch.cat([shares, (shares[2:] < 1.0).float(), torch.ones_like(shares[:1])])

    def begin_epoch(self) -> None:
        """Counts from 0 on."""
        self.tally.zero_()

    def end_epoch(self, epoch: int) -> dict[str, float]:
        """Shares of the images that were selected and of the places that were filled, over all processes. The next epoch makes
        as many batches as this one would have needed.

        Raises:
            FloatingPointError: no image was finite.
        """
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.tally)
        usable, selected, filled, short, iterations = self.tally.tolist()
        if iterations and usable == 0.0:
            raise FloatingPointError(
                f"fastkd: no image of epoch {epoch + 1} was finite, or had finite logits of the teacher: what makes them is "
                "lost; lower generator_learning_rate"
            )
        if not self.select or not iterations:
            return {}
        found = {"selected": selected / iterations, "filled": filled / iterations, "rounds": float(self.rounds)}
        self._set_rounds(epoch, found["selected"], found["filled"], short > 0)
        return found

    def _set_rounds(self, epoch: int, selected: float, filled: float, short: bool) -> None:
        """With some to spare; a warning where more is needed than there may be."""
        wanted = math.ceil(SPARE * self.steps / max(selected, 1e-9))
        most = self.most_rounds * self.steps
        if short:
            wanted = max(wanted, self.rounds + 1)
            if self.rounds >= most and not self._warned:
                self._warned = True
                warnings.warn(
                    f"fastkd: {100 * filled:.0f} % of the student's places were filled in epoch {epoch + 1}, although each "
                    f"batch was selected from {self.most_rounds}: images come again; raise most_rounds, or lower threshold",
                    stacklevel=2,
                )
        self.rounds = min(wanted, most)

    def get_extra_state(self) -> dict[str, int]:
        return {"rounds": self.rounds}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.rounds = state["rounds"]
