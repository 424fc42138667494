"""What is measured: a case is a name and how to make its work; work is fastkd and its peers on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Run = Callable[[], Any]  # does all of the work once, allocation included
BEST_PEER = "the best peer"  # as a key of targets


@dataclass(frozen=True)
class Settings:
    """What the cases are made for.

    ``sizes``: "quick" and "full" are sizes of CPUs; those of "gpu" hold ``nbytes`` or more on each side, where that is what
    counts. With few bytes these test the benchmark itself, on any device.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    sizes: Literal["quick", "full", "gpu"] = "quick"
    nbytes: int = 1 << 30
    compile: bool = True
    """Peers that torch.compile makes, which takes it seconds."""
    memory: float = float("inf")
    """Bytes that a case may take."""

    def rows(self, row_elements: int, dtype: torch.dtype) -> int:
        """So many rows that a tensor of them holds at least ``nbytes``."""
        return -(-self.nbytes // (row_elements * dtype.itemsize))

    def pick(self, quick: Sequence[Any], full: Sequence[Any] = (), gpu: Sequence[Any] = ()) -> list[Any]:
        """The entries for these sizes; the full ones include the quick ones."""
        return list(gpu) if self.sizes == "gpu" else [*quick, *(full if self.sizes == "full" else ())]


@dataclass
class Work:
    """fastkd and its peers, ready to run. Each is checked before it is timed."""

    ours: Run
    peers: dict[str, Run]
    error: Callable[[Any], float]
    """Relative error of what a contender returned."""
    tolerance: float
    peer_tolerance: float
    floor_bytes: int | None = None
    """The fewest bytes that the work must move (floors.py)."""
    targets: dict[str, float] = field(default_factory=dict)
    """Peer, or BEST_PEER: so many times as fast fastkd wants to be."""
    target_percent: float | None = None
    """Of the copy ceiling."""
    target_ms: float | None = None
    scale: dict[str, float] = field(default_factory=dict)
    """Contender: by how much its time is multiplied, where a run of it does only a part of the work, or the work many times."""
    incomparable: tuple[str, ...] = ()
    """Peers that do the same work to random places of their own: only that they can is checked."""
    own: tuple[str, ...] = ()
    """Peers that are made of fastkd, too: they say nothing of how fast the machine is."""
    missing: dict[str, str] = field(default_factory=dict)
    """Peer: why it is not measured."""
    least_rounds: int = 0
    """Where the usual number is too small to see what is to be seen."""
    latency: bool = False
    """On a GPU: time the call in an eager loop, not the GPU's work alone."""
    cold: bool = False
    """On a CPU: overwrite the caches before each timed run."""
    in_a_row: int = 0
    """On a CPU: a turn is so many runs, and its time that of the shortest, for work whose time hangs on fresh pages."""
    pages_kept: bool = False
    """On a CPU: what is freed stays in the process, so that no contender waits for fresh pages."""
    reason: str = ""
    """Why a target is missed, with the measurement that shows it; shown beside the row where it is."""

    def leave_out(self, peer: str, reason: str) -> None:
        """Names a peer as missing."""
        self.peers.pop(peer, None)
        self.missing[peer] = reason


@dataclass(frozen=True)
class Case:
    """Work whose inputs are made only when its turn comes."""

    name: str
    build: Callable[[], Work]
    nbytes: int = 0
    """Memory that fastkd's side of it takes, inputs included."""
    threads: int | None = None
    """Threads of torch and fastkd; None leaves them as they are."""


Contest = Callable[[Case], None]  # measures a case; the fixture of every bench file


def on_threads(case: Case, counts: Sequence[int]) -> list[Case]:
    """The same case for each number of threads."""
    return [Case(f"{case.name}, {n} thread{'s' if n > 1 else ''}", case.build, case.nbytes, threads=n) for n in counts]


def thread_counts() -> list[int]:
    """1, 2, 4 … and as many threads as torch takes here."""
    most = torch.get_num_threads()
    return sorted({*(1 << i for i in range(most.bit_length()) if 1 << i <= most), most})


def peers_that_fit(work: Work, needed: float, settings: Settings, peers: Sequence[str] = ()) -> Work:
    """Leaves out peers (all if none is named) of which each takes about ``needed`` bytes, where the device has fewer: a
    peer that takes too much could end the process."""
    if needed > settings.memory:
        for peer in peers or list(work.peers):
            work.leave_out(peer, f"needs about {needed / 1e9:.2g} GB, {settings.memory / 1e9:.2g} GB may be taken")
    return work


def relative_error(value: Tensor, truth: Tensor) -> float:
    """``|value - truth| / |truth|`` in float64; NaN where the value holds one."""
    value, truth = value.detach().double(), truth.detach().double()
    return float((value - truth).norm() / truth.norm())


def short_name(dtype: torch.dtype) -> str:
    """``bf16`` and the like."""
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.uint8: "uint8"}
    return names[dtype]


def short_count(n: int) -> str:
    """``1e7`` and ``2^24`` for round numbers, digits for others."""
    power = len(str(n)) - 1
    if power <= 3:
        return str(n)
    return f"1e{power}" if n == 10**power else f"2^{n.bit_length() - 1}" if n & (n - 1) == 0 else str(n)
