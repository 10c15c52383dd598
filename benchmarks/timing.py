"""Time of pieces of work, side by side: on a GPU by CUDA events around replays of a CUDA graph, with the cache flushed."""

from __future__ import annotations

import functools
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Protocol

import torch
from torch import Tensor

MOST, LEAST, ENOUGH_MS = 30, 10, 200.0
"""Repetitions: as many as fit into ``ENOUGH_MS`` milliseconds, within these bounds."""

_FLUSH_BYTES = 256 << 20
_MOST_FLUSHES = 200


@dataclass(frozen=True)
class Work:
    """What is timed.

    Attributes:
        run: the work, with the same launches every time.
        before: goes before each run, outside the timing.
        alive: what else the work needs to stay alive.
    """

    run: Callable[[], object]
    before: Callable[[], object]
    alive: object = None


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one run: the median, and the quantiles at 20 and 80 %."""

    median: float
    q20: float
    q80: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        fifths = quantiles(samples, n=5, method="inclusive")
        return cls(median(samples), fifths[0], fifths[3])


class Stopwatch(Protocol):
    """Work that is warm: a call runs it once, and gives the milliseconds that it took."""

    timed_by: str

    def __call__(self) -> float: ...


def stopwatch(work: Work, device: torch.device) -> Stopwatch:
    """Warm ``work`` up, so that everything is compiled, and make it ready to be timed."""
    return GpuStopwatch(work) if device.type == "cuda" else Clock(work)


def side_by_side(stopwatches: Sequence[Stopwatch]) -> list[Timing]:
    """Time all in turns, so that a drift of the device's clock meets each of them alike."""
    counts = [max(LEAST, min(MOST, math.ceil(ENOUGH_MS / max(watch(), 1e-3)))) for watch in stopwatches]
    samples: list[list[float]] = [[] for _ in stopwatches]
    for turn in range(max(counts, default=0)):
        for watch, count, taken in zip(stopwatches, counts, samples):
            if turn < count:
                taken.append(watch())
    return [Timing.of(taken) for taken in samples]


class Clock:
    """Wall-clock time, for a CPU."""

    timed_by = "clock"

    def __init__(self, work: Work) -> None:
        self._work = work
        self()

    def __call__(self) -> float:
        self._work.before()
        start = time.perf_counter()
        self._work.run()
        return 1e3 * (time.perf_counter() - start)


class GpuStopwatch:
    """GPU time of a graph's replay, or of queued launches where the work cannot be captured.

    The flushes keep the GPU busy until everything behind them is queued, so that no launch is waited for.
    """

    def __init__(self, work: Work) -> None:
        self._work = work  # a graph does not keep the tensors alive that it reads
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            launch_ms = [_launch_ms(work) for _ in range(3)][-1]
            replay = _capture(work, stream)
        torch.cuda.synchronize()
        self.timed_by = "events" if replay is None else "graph"
        self._launch = replay or work.run
        self._flushes = 1 if replay else min(_MOST_FLUSHES, 1 + math.ceil(launch_ms / _flush_ms()))
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self) -> float:
        self._work.before()
        for _ in range(self._flushes):
            _flush_buffer().zero_()
        self._start.record()
        self._launch()
        self._end.record()
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end))


def peak_mib(work: Work) -> float:
    """MiB that one run on a GPU, outside any graph, takes at its peak above what is allocated before it."""
    for _ in range(2):  # the first leaves the libraries' workspaces of this stream behind
        work.before()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        work.run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    work.before()
    return (peak - allocated) / 2**20


def one_line(error: Exception) -> str:
    """What an error says, at most 300 characters of it."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _launch_ms(work: Work) -> float:
    """Milliseconds until the CPU has launched the work."""
    work.before()
    torch.cuda.synchronize()
    start = time.perf_counter()
    work.run()
    taken = 1e3 * (time.perf_counter() - start)
    torch.cuda.synchronize()
    return taken


def _capture(work: Work, stream: torch.cuda.Stream) -> Callable[[], object] | None:
    """What replays ``work`` as a CUDA graph, or None where that is not possible."""
    graph = torch.cuda.CUDAGraph()
    try:
        work.before()
        with _no_synchronization():  # a capture that meets one may leave the process's allocator in disorder
            work.run()
        work.before()
        with torch.cuda.graph(graph, stream=stream):
            work.run()
    except Exception as error:
        print(f"  not captured, so timed by events: {one_line(error)}", file=sys.stderr)
        return None
    return graph.replay


@contextmanager
def _no_synchronization() -> Iterator[None]:
    """Let operations that wait for the GPU raise."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)


@functools.cache
def _flush_buffer() -> Tensor:
    return torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")


@functools.cache
def _flush_ms() -> float:
    """Milliseconds of one flush."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _flush_buffer().zero_()
    start.record()
    for _ in range(10):
        _flush_buffer().zero_()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 10
