"""The processes of a group that make a thing together: what they tell one another, and errors that all of them raise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

__all__ = ["Group"]

_KINDS = {kind.__name__: kind for kind in (TypeError, ValueError, RuntimeError, MemoryError)}


class Group:
    """Those of a process group of torch.distributed, by default of the one of all; without any, this process.

    Tensors are on the CPU; where the group speaks NCCL alone they travel by way of the current GPU.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        there = dist.is_available() and dist.is_initialized()
        if group is not None and not (there and isinstance(group, dist.ProcessGroup)):
            raise TypeError(f"fastkd: group is {type(group).__name__}, must be a process group of torch.distributed")
        self._group = group
        self.rank = dist.get_rank(group) if there else 0
        self.size = dist.get_world_size(group) if there else 1
        if self.rank < 0:
            raise ValueError("fastkd: group does not hold this process, must be one that it is in")
        self._device = torch.device("cuda" if there and dist.get_backend(group) == "nccl" else "cpu")

    def gather(self, value: T) -> list[T]:
        """The value of each process, by rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self._group)
        return values

    def together(self, work: Callable[[], T]) -> list[T]:
        """What ``work`` returns in each process, by rank; where it raises in one, all raise that."""
        result: T | None = None
        wrong: Exception | None = None
        try:
            result = work()
        except Exception as error:
            wrong = error
        if self.size == 1:
            if wrong is not None:
                raise wrong
            return [result]  # type: ignore[list-item]
        told = None if wrong is None else (type(wrong).__name__, str(wrong))
        outcomes = self.gather((result, told))
        for rank, (_, problem) in enumerate(outcomes):
            if problem is not None:
                kind, text = problem
                raise _KINDS.get(kind, RuntimeError)(f"{text} (on rank {rank})") from wrong
        return [value for value, _ in outcomes]  # type: ignore[misc]

    def check_same(self, number: int) -> bool:
        """Whether all processes have the same number, from -2^62 to 2^63 - 1; 16 bytes from each."""
        if self.size == 1:
            return True
        both = torch.tensor([number, -number], device=self._device)
        dist.all_reduce(both, dist.ReduceOp.MAX, group=self._group)
        most, least = both.tolist()
        return bool(most == -least)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes of as many values each."""
        if self.size == 1:
            return values
        moved = values.to(self._device, copy=True)
        dist.all_reduce(moved, group=self._group)
        return moved.cpu()

    def exchange(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Rows ``[sum(sent), ...]``, the first ``sent[0]`` of which go to rank 0 and so on; returns those that come."""
        if self.size == 1:
            return rows
        packed = rows.detach().contiguous().to(self._device)
        arrived = torch.empty((sum(received), *rows.shape[1:]), dtype=rows.dtype, device=self._device)
        if rows.shape[1:].numel():
            dist.all_to_all_single(_bytes_of(arrived), _bytes_of(packed), list(received), list(sent), group=self._group)
        return arrived.to(rows.device)


def _bytes_of(rows: Tensor) -> Tensor:
    """The same memory as uint8 ``[rows, bytes of a row]``, which every backend sends."""
    return rows.reshape(len(rows), rows.shape[1:].numel()).view(torch.uint8)
