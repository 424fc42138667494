"""Several processes, one for each device, started by ``torchrun``; without it, one."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Process", "process_group"]

T = TypeVar("T")
_BUCKET = 25 * 2**20  # bytes, as DistributedDataParallel has it
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


class Process(NamedTuple):
    """This process among all."""

    rank: int
    """From 0 on; 0 writes and shows."""
    world_size: int
    """How many there are."""
    device: torch.device
    """That of this process."""


@contextmanager
def process_group(device: torch.device | str | None = None) -> Iterator[Process]:
    """Inside the ``with`` block the processes that ``torchrun`` started are one group; without torchrun there is only this.

    >>> with process_group() as process:
    ...     objective.to(process.device)
    ...     Trainer(objective, batches_of(process.rank, process.world_size), settings).fit()

    :class:`fastkd.training.Trainer` leaves nothing of DistributedDataParallel behind. In a loop of your own, let go of it
    (``del``) within the block: torch may hang where its reducer is the last that holds the group.

    Args:
        device: ``cpu`` or ``cuda``; by default CUDA where there is a GPU. On CUDA each process takes the device of its local
            rank and they speak NCCL, on a CPU gloo. A group that is there already is taken as it is, and left.

    Raises:
        ValueError: some of RANK, WORLD_SIZE and LOCAL_RANK are in the environment and others are not.
    """
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    found = [name for name in _VARIABLES if name in os.environ]
    if dist.is_initialized() or not found:
        yield Process(rank(), world_size(), kind)
        return
    if len(found) < len(_VARIABLES):
        missing = ", ".join(name for name in _VARIABLES if name not in found)
        raise ValueError(f"fastkd: the environment has {', '.join(found)} but no {missing}: torchrun sets all of them")
    # Functions in there take the default group of the moment of their import as a default argument, and
    # DistributedDataParallel imports them: imported later, they would keep the group, and its threads, for ever. Now and
    # then such a thread aborts the process at its exit.
    importlib.import_module("torch.distributed.nn.functional")
    if kind.type == "cuda":
        kind = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(kind)
        dist.init_process_group("nccl", device_id=kind)
    else:
        dist.init_process_group("gloo")
    try:
        yield Process(rank(), world_size(), kind)
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Of this process, 0 where it is the only one."""
    return dist.get_rank() if _together() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _together() else 1


def wrap(module: nn.Module, *, find_unused_parameters: bool) -> nn.Module:
    """The module, whose gradients are then means over the processes."""
    if world_size() == 1:
        return module
    # torch 2.13 has a new name for it: buffers are not those of rank 0 again at each forward
    new = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
    options: Any = {"forward_sync_buffers" if new else "broadcast_buffers": False}
    return DistributedDataParallel(module, find_unused_parameters=find_unused_parameters, **options)


def unwrap(module: nn.Module) -> nn.Module:
    """What :func:`wrap` was given. To be called while there is a group: torch's reducer must not be the last that holds it.

    The group's end joins gloo's threads, which may want Python's lock to let the last tensors go. torch gives the lock up
    where Python lets the group go, but not where a reducer does: the training would, now and then, hang at its end.
    """
    if not isinstance(module, DistributedDataParallel):
        return module
    module.logger = None  # it holds the reducer
    del module.reducer
    original: nn.Module = module.module
    return original


def sum_of_ranks(values: Tensor) -> Tensor:
    """The sum over the processes of as many values each."""
    values = values.clone()
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def gather(value: Any) -> list[Any]:
    """The value of each process, by rank."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def on_first_rank(work: Callable[[], T]) -> T:
    """What ``work`` returns on rank 0, on all; where it raises, all raise that. No other rank goes on before it is done."""
    if world_size() == 1:
        return work()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def take_statistics_of_first_rank(module: nn.Module) -> None:
    """Batch norm's running statistics are of the images of a rank: those of rank 0 count. Other buffers stay as they are."""
    if world_size() > 1:
        for part in module.modules():
            if isinstance(part, _NormBase):
                for buffer in part.buffers(recurse=False):
                    dist.broadcast(buffer, 0)


@torch.no_grad()
def take_state_of_first_rank(module: nn.Module) -> None:
    """All processes begin with the weights and buffers of rank 0, as DistributedDataParallel has it."""
    if world_size() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor, 0)


def average_gradients(parameters: Sequence[nn.Parameter], *, find_unused_parameters: bool) -> None:
    """Gradients become their means over the processes.

    Args:
        find_unused_parameters: parameters without a gradient in all processes stay without, which takes one exchange more;
            else each without counts as one of 0.
    """
    if world_size() == 1:
        return
    wanted = list(parameters)
    if find_unused_parameters:
        have = torch.tensor([p.grad is not None for p in wanted], dtype=torch.uint8, device=wanted[0].device)
        dist.all_reduce(have, dist.ReduceOp.MAX)
        wanted = [p for p, used in zip(wanted, have.tolist(), strict=True) if used]
    for parameter in wanted:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    pending = []
    for gradients in _buckets([p.grad for p in wanted if p.grad is not None]):
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        pending.append((gradients, flat, dist.all_reduce(flat, async_op=True)))
    for gradients, flat, work in pending:
        work.wait()
        means = flat.div_(world_size()).split([gradient.numel() for gradient in gradients])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view(gradient.shape))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, of so many bytes together that an exchange is worth it, and no more."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or sum(t.nbytes for t in bucket) >= _BUCKET):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()
