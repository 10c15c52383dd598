"""Optimizers: their steps, and how their state is loaded."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch.optim import Optimizer

from ..errors import PoetxError


def on_optimizer_state_loaded(note: Callable[[Optimizer], None]) -> None:
    """Call ``note`` wherever an optimizer receives state: load_state_dict, unpickling and deepcopy end in one method."""
    set_state = Optimizer.__setstate__

    @functools.wraps(set_state)
    def noting(self: Optimizer, state: dict[str, Any]) -> None:
        set_state(self, state)
        note(self)

    Optimizer.__setstate__ = noting  # type: ignore[method-assign]


def explain_failed_loads(explain: Callable[[set[str], set[str]], str | None]) -> None:
    """Where a distributed checkpoint does not fit, raise what ``explain(saved names, wanted names)`` says, if it says anything."""
    if not torch.distributed.is_available():
        return
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    plan = DefaultLoadPlanner.create_local_plan

    @functools.wraps(plan)
    def explaining(self: Any) -> Any:
        try:
            return plan(self)
        except (RuntimeError, ValueError) as error:
            sentence = explain(set(self.metadata.state_dict_metadata), set(self.state_dict))
            if sentence is None:
                raise
            raise PoetxError(sentence) from error

    DefaultLoadPlanner.create_local_plan = explaining  # type: ignore[method-assign]


def run_first_after_step(optimizer: Optimizer, hook: Callable[[Optimizer, Any, Any], None]) -> None:
    """Run a hook after each ``step()`` before those that the user registered on the same optimizer."""
    handle = optimizer.register_step_post_hook(hook)
    hooks: Any = optimizer._optimizer_step_post_hooks
    hooks.move_to_end(handle.id, last=False)


def live_optimizers() -> Iterator[Optimizer]:
    """Every optimizer alive in this process. Walks the garbage collector's list: not for a hot path."""
    for thing in gc.get_objects():
        if issubclass(type(thing), Optimizer) and "param_groups" in getattr(thing, "__dict__", ()):
            yield thing


_STEP_WITH_HOOKS = Optimizer.profile_hook_step(lambda: None).__code__


def steps_running(optimizer: Optimizer) -> int:
    """How many calls of ``optimizer.step()`` stand on the call stack of this thread: two where a subclass calls its base."""
    frame: FrameType | None = sys._getframe()
    count = 0
    while frame is not None:
        count += frame.f_code is _STEP_WITH_HOOKS and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return count
