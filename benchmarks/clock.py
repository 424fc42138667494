"""How long one run takes, on a CPU and on a GPU."""

from __future__ import annotations

import statistics
import time
from typing import Any, Protocol

import torch

from benchmarks.case import Run

SHORT = 1.0  # seconds
IN_A_ROW = 2e-3  # seconds of runs of which the median is the time of a round
MOST_IN_A_ROW = 99
AHEAD = 2_000_000  # cycles, about a millisecond: the GPU waits so long while Python queues what is timed
EVICTED = 512 << 20  # bytes, more than the caches of a CPU hold


class Clock(Protocol):
    """Times runs."""

    def seconds(self, run: Run) -> float:
        """One timed call; what it returned is freed outside the clock."""
        ...


class WallClock:
    """The host's clock. Work shorter than ``SHORT`` is timed at its second run in a row, so that nobody pays for the caches
    and the heap that another one left; much shorter work at more of them, as ``timeit`` does.
    """

    def __init__(self, *, cold: bool = False, in_a_row: int = 0) -> None:
        self._evict = torch.zeros(EVICTED, dtype=torch.uint8) if cold else None
        self._in_a_row = in_a_row

    def seconds(self, run: Run) -> float:
        """One timed call, or the median of those after it; after the caches were overwritten, if ``cold``; or the shortest of
        ``in_a_row``."""
        if self._in_a_row:
            return min(self._once(run) for _ in range(self._in_a_row))
        elapsed = self._once(run)
        if self._evict is not None:
            self._evict.add_(1)
            return self._once(run)
        if elapsed >= SHORT:
            return elapsed
        more = max(1, min(MOST_IN_A_ROW, round(IN_A_ROW / elapsed)))
        return statistics.median(self._once(run) for _ in range(more))

    @staticmethod
    def _once(run: Run) -> float:
        start = time.perf_counter()
        result = run()
        elapsed = time.perf_counter() - start
        del result
        return elapsed


class EventClock:
    """CUDA events around the call, after the L2 cache has been overwritten.

    ``latency=False``: the GPU is kept waiting while Python queues the call, so that what is timed is the GPU's work and
    not the gaps between launches. ``latency=True``: it idles, and the time is that of a call in an eager loop.
    """

    def __init__(self, device: torch.device, *, latency: bool = False) -> None:
        self.device, self.latency = device, latency
        cache: int = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(2 * cache, dtype=torch.uint8, device=device)

    def seconds(self, run: Run) -> float:
        """One timed call."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(self.device):
            self._flush.zero_()
            if self.latency:
                torch.cuda.synchronize()
            else:
                torch.cuda._sleep(AHEAD)
            start.record()
            result = run()
            end.record()
            end.synchronize()
        del result
        milliseconds: float = start.elapsed_time(end)
        return milliseconds * 1e-3


def clock_for(device: torch.device, *, latency: bool = False, cold: bool = False, in_a_row: int = 0) -> Clock:
    """The clock of a device."""
    if device.type == "cuda":
        return EventClock(device, latency=latency)
    return WallClock(cold=cold, in_a_row=in_a_row)


def graph_replay(run: Run, replays: int) -> Run:
    """``run`` captured as a CUDA graph; each call replays it ``replays`` times in a row and returns the last result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Any:
        for _ in range(replays):
            graph.replay()
        return result

    return replay
