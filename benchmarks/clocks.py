"""Clocks of a training step: on a GPU by events in its queue, elsewhere by the wall."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Moments, and the milliseconds between two of them once the device is idle."""

    timed_by: str

    def now(self) -> Any: ...

    def ms(self, start: Any, end: Any) -> float: ...


class WallClock:
    timed_by = "clock"

    def now(self) -> float:
        return time.perf_counter()

    def ms(self, start: float, end: float) -> float:
        return 1e3 * (end - start)


class EventClock:
    """Moments in the device's queue: to note one waits for nothing."""

    timed_by = "events"

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end)
