"""A table whose lambda follows the epochs of a training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastkd._checks import check_callable, check_count, check_state
from fastkd.alias_table import AliasTable, check_table

__all__ = ["IqprSchedule"]


class IqprSchedule:
    """Sets a table, which must keep its scores, to the IQPR of an epoch as that begins; or never, without a function.

    A table that was set for an epoch, and updated in it, is not set again where the epoch goes on after a resumption.

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
        self._epoch: int | None = None  # that the table was set for

    def begin(self, epoch: int, *, anew: bool) -> None:
        """Before the first draw of an epoch, or of the rest of one that is not ``anew``."""
        if self.iqpr is not None and (anew or self._epoch != epoch):
            self.table.set_iqpr(self.iqpr(epoch))
            self._epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """That of the table, with what updates changed in it, and the epoch that it was set for."""
        return {"table": self.table.state_dict(weights=True), "set_for": self._epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As :meth:`state_dict` returned it."""
        state = check_state(state, ("table",), "a table with its schedule")
        epoch = state.get("set_for")
        self.table.load_state_dict(state["table"])
        self._epoch = None if epoch is None else check_count("state['set_for']", epoch, 0)
