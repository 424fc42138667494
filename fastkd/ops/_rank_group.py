"""The ranks that have the classes of the same rows, as an operator is told of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["RankGroup", "local_part"]


class RankGroup(NamedTuple):
    """A process group by its name, and this rank in it."""

    group: str
    rank: int
    ranks: int

    @classmethod
    def of(cls, group: Any) -> RankGroup:
        """Of a process group, or a mesh of one dimension."""
        import torch.distributed as dist
        from torch.distributed.device_mesh import DeviceMesh

        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(f"fastkd: group is a mesh of {group.ndim} dimensions, must have one: mesh['tp'], say")
            group = group.get_group()
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"fastkd: group is {type(group).__name__}, must be a process group of torch.distributed or a DeviceMesh"
            )
        return cls(group.group_name, dist.get_rank(group), dist.get_world_size(group))

    def reduce(self, values: Tensor, how: str) -> Tensor:
        """``max`` or ``sum`` of the values of all ranks."""
        from torch.distributed import _functional_collectives as collectives

        reduced: Tensor = collectives.wait_tensor(collectives.all_reduce(values, how, self.group))  # type: ignore[arg-type]
        return reduced

    def gather(self, values: Sequence[int], device: torch.device) -> list[list[int]]:
        """Of each value those of all ranks, by rank; waits for the device."""
        each = torch.zeros(len(values), self.ranks, dtype=torch.int64, device=device)
        each[:, self.rank] = torch.tensor(values)
        numbers: list[list[int]] = self.reduce(each, "sum").tolist()
        return numbers


def local_part(name: str, value: Tensor, group: Any, dim: int | None = -1) -> Tensor:
    """What this rank has of a ``DTensor`` that is sharded over dimension ``dim``, or replicated if None; all of a plain tensor.

    Args:
        group: the process group or mesh that it must lie on, as the caller gave it.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if not isinstance(value, DTensor):  # torch.compile does not see a DTensor by its attributes
        return value
    placements, wanted = tuple(value.placements), Replicate() if dim is None else Shard(dim + value.dim() * (dim < 0))
    if placements != (wanted,):
        raise ValueError(
            f"fastkd: {name} is a DTensor placed {placements}, must be ({wanted!r},) on the mesh of group alone"
        )
    theirs, ours = _members(value.device_mesh), _members(group)
    if theirs != ours:
        raise ValueError(f"fastkd: {name} is a DTensor over ranks {theirs}, must be over those of group, {ours}")
    part: Tensor = value.to_local()
    return part


def _members(group: Any) -> list[int]:
    """Of a process group, or a mesh of one dimension."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    ranks: list[int] = dist.get_process_group_ranks(group.get_group() if isinstance(group, DeviceMesh) else group)
    return ranks
