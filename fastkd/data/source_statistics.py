"""What was drawn, by source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fastkd import statistics
from fastkd.data.collection import Source

__all__ = ["SourceStatistics", "by_source", "statistics_by_source"]


class SourceStatistics(NamedTuple):
    """Of the items of one source."""

    items: int
    draws: int
    share: float
    """Of all draws of the collection; NaN before the first."""
    distinct: int
    """Items that were drawn at least once."""
    skip_ratio: float
    """Share of the items that was never drawn."""


def by_source(values: Tensor, sources: Sequence[Source]) -> dict[str, Tensor]:
    """The parts of values ``[N, ...]``, counts or scores, that belong to each source: views."""
    return {source.name: values[source.start : source.stop] for source in sources}


def statistics_by_source(counts: Tensor, sources: Sequence[Source]) -> dict[str, SourceStatistics]:
    """Of counts int64 ``[N]``, :func:`fastkd.statistics.draw_counts`; waits for their device."""
    total = int(counts.sum())
    made = {}
    for name, own in by_source(counts, sources).items():
        draws, distinct = int(own.sum()), int((own > 0).sum())
        share = draws / total if total else float("nan")
        made[name] = SourceStatistics(len(own), draws, share, distinct, float(statistics.skip_ratio(own)))
    return made
