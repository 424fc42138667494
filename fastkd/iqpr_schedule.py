"""A table whose lambda follows the epochs of a training."""

from __future__ import annotations

from collections.abc import Callable

from fastkd._checks import check_callable
from fastkd.alias_table import AliasTable, check_table

__all__ = ["IqprSchedule"]


class IqprSchedule:
    """Sets a table, which must keep its scores, to the IQPR of an epoch as that begins; or never, without a function.

    The table knows which epoch it was set for, also in its state: where that goes on after a resumption, it stays as updates
    have left it.

    Args:
        table: the table.
        iqpr: of an epoch, from 0 on. It must depend on the epoch alone, and take no locks.

    Raises:
        TypeError, ValueError: no table, no function, a table that was built without ``keep_scores=True``.
    """

    def __init__(self, table: AliasTable, iqpr: Callable[[int], float] | None) -> None:
        self.table, self.iqpr = check_table("table", table), check_callable("iqpr_schedule", iqpr)
        if iqpr is not None and not table.keeps_scores:
            raise ValueError(
                "fastkd: table was built with keep_scores=False, must be AliasTable(scores, keep_scores=True) for an "
                "iqpr_schedule"
            )

    def begin(self, epoch: int, *, anew: bool) -> None:
        """Before the first draw of an epoch, or of the rest of one that is not ``anew``."""
        if self.iqpr is not None:
            with self.table._alone():
                if anew or self.table._content.epoch != epoch:
                    self.table.set_iqpr(self.iqpr(epoch))
                    self.table._content.epoch = epoch
