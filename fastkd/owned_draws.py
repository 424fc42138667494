"""Draws of a sharded table that are of one rank's items, and how what it loads of them comes to the ranks that drew it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastkd._checks import check_tensor
from fastkd._group import Group
from fastkd._seeding import mixed_seed

__all__ = ["OwnedDraws", "check_on_cpu", "check_same", "gathered"]


@dataclass(frozen=True)
class OwnedDraws:
    """The draws, of some that all ranks make together, that fall into the items of this rank.

    Attributes:
        positions: int64 ``[m]``, ascending: which of the draws, counted from 0.
        items: int64 ``[m]``: what they drew, counted within this rank; of all ranks it is ``items + table.offset``.
    """

    positions: Tensor
    items: Tensor
    _group: Group = field(repr=False)
    _draws: tuple[int, int, int] = field(repr=False)  # seed, start, count
    _owners: Tensor | None = field(repr=False)  # of the draws that this rank gets; None: all are its own

    def gather(self, loaded: Tensor) -> Tensor:
        """Brings what the owners have loaded to the ranks that drew it. Called by all ranks, of the same draws.

        One ``all_to_all``, before it 16 bytes from each rank, to see that they agree. No indices travel: how many rows come
        from whom, and for which draw, each rank knows.

        Args:
            loaded: ``[m, ...]``, row i for draw ``positions[i]``, on the CPU; but for ``m`` of one shape and dtype on all
                ranks.

        Returns:
            ``[k, ...]``: rows of the draws number r, r + w, ... on rank r of w. For ``next_owned(n)`` k = n.

        Raises:
            TypeError, ValueError: rows that are not as many as the draws here, not on the CPU, or of another shape or dtype
            than on other ranks, or of other draws than theirs; on all of them.
        """
        wrong: Exception | None = None
        try:
            loaded = check_tensor("loaded", loaded)
            check_on_cpu("loaded", loaded)
            if loaded.dim() == 0 or len(loaded) != len(self.positions):
                raise ValueError(
                    f"fastkd: loaded has shape {tuple(loaded.shape)}, must have {len(self.positions)} rows, one for each "
                    "draw that is owned here"
                )
        except Exception as error:
            wrong = error
        return gathered(self._group, self, loaded, wrong)

    @property
    def rows_sent(self) -> int:
        """How many rows :meth:`gather` sends to other ranks."""
        return int((self.positions % self._group.size != self._group.rank).sum())


def gathered(group: Group, draws: OwnedDraws | None, loaded: Tensor | None, wrong: Exception | None) -> Tensor:
    """Each row to the rank that drew it; an error of one rank is one of all."""
    agreed, doing = -1, ""
    if draws is not None and loaded is not None and wrong is None:
        seed, start, count = draws._draws
        doing = f"rows {tuple(loaded.shape[1:])} of {loaded.dtype} for {count} draws of seed {seed} from {start} on"
        agreed = mixed_seed(doing)
    if not group.check_same(agreed) or wrong is not None:

        def tell() -> str:
            if wrong is not None:
                raise wrong
            return doing

        check_same("what is gathered", group.together(tell))
    assert draws is not None
    assert loaded is not None
    if draws._owners is None:
        return loaded
    drawer = draws.positions % group.size
    sent = torch.bincount(drawer, minlength=group.size).tolist()
    received = torch.bincount(draws._owners, minlength=group.size).tolist()
    arrived = group.exchange(loaded[drawer.argsort(stable=True)], sent, received)
    rows = torch.empty_like(arrived)
    rows[draws._owners.argsort(stable=True)] = arrived
    return rows


def check_on_cpu(name: str, tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        raise ValueError(f"fastkd: {name} is on {tensor.device}, must be on the CPU, where a sharded table is")


def check_same(name: str, values: list[Any]) -> None:
    for rank, value in enumerate(values):
        if value != values[0]:
            raise ValueError(f"fastkd: {name} is {value} on rank {rank}, must be {values[0]} as on rank 0")
