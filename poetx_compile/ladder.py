"""``memory=``: the first settings of a fixed order with which a training step is estimated to fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from .config import PoetxConfig
from .errors import PoetxError
from .estimate import Estimate, Traced, estimate
from .liveness import Graphs
from .stepper import ADAMW, Stepper

MARGIN = 0.05
"""Of the limit, what an estimate leaves free."""

STORED: tuple[dict[str, Any], ...] = (
    {"storage": "folded", "skew_dtype": "float32"},
    {"storage": "bf16-lean", "skew_dtype": "float32"},
    {"storage": "int8", "skew_dtype": "float32"},
    {"storage": "int8", "skew_dtype": "bfloat16"},
)
BUDGETS = (1.0, 0.5)
"""Shares of the activations to save: tried for each of :data:`STORED`, in its order."""

CATEGORIES = ("weights", "residuals", "q", "states", "gradients", "activations", "logits", "scratch")


@dataclass(frozen=True)
class Chosen(PoetxConfig):
    """Settings that ``memory`` chose, with the reason; what every factor that was made with them keeps.

    Attributes:
        estimate: of a step.
        limit: bytes.
        assumed: what the estimate took for granted, in words.
    """

    estimate: Estimate | None = None
    limit: float = 0.0
    assumed: str = ""

    def __str__(self) -> str:
        assert self.estimate is not None
        return f"memory={self.memory} takes {moved(self)}: {_peak(self.estimate, self.limit)}{self.assumed}"


def moved(config: PoetxConfig) -> str:
    """The settings that a ladder moves, in words."""
    return ", ".join(f"{name}={getattr(config, name)}" for name in (*STORED[0], "activation_memory_budget"))


def rungs(config: PoetxConfig, movable: frozenset[str]) -> Iterator[PoetxConfig]:
    """What to try, in order: only settings in ``movable`` differ from ``config``'s."""
    tried = []
    for stored in STORED:
        for budget in BUDGETS:
            wanted = stored | {"activation_memory_budget": budget}
            changes = {name: value for name, value in wanted.items() if name in movable}
            if changes not in tried:
                tried.append(changes)
                yield replace(config, **changes)


def choose(
    config: PoetxConfig,
    limit: float,
    trace: Callable[[PoetxConfig], Traced],
    stepper: Stepper = ADAMW,
    movable: frozenset[str] | None = None,
    assumed: str = "",
) -> Chosen:
    """The first rung that fits.

    Args:
        limit: bytes.
        trace: the graphs of a step by settings, with folded weights; called once for each share of activations that is tried.

    Raises:
        PoetxError: none does.
    """
    traces: dict[float, Traced] = {}

    def traced(rung: PoetxConfig) -> Traced:
        share = rung.activation_memory_budget
        if share not in traces:
            traces[share] = trace(replace(rung, storage="folded"))
        return traces[share].stored_as(rung)

    room = limit * (1 - MARGIN)
    tried = list(rungs(config, config.movable if movable is None else movable))
    first = traced(tried[0])
    for rung in tried:
        without = replace(first.stored_as(rung), graphs=Graphs())
        if estimate(without, rung.residual_bits, stepper).total > room and rung is not tried[-1]:
            continue  # whatever the activations
        found = estimate(traced(rung), rung.residual_bits, stepper)
        if found.total <= room:
            return chosen_from(rung, found, limit, assumed)
    known = [rung for rung in tried if rung.activation_memory_budget in traces]
    found, rung = min(
        ((estimate(traced(rung), rung.residual_bits, stepper), rung) for rung in known), key=lambda pair: pair[0].total
    )
    raise PoetxError(
        f"poetx: no settings fit memory={config.memory} with {MARGIN:.0%} of it left free. The leanest, {moved(rung)}: "
        f"{_peak(found, limit)}{assumed}. Take a shorter sequence, a smaller batch or activation checkpointing in the model"
    )


def chosen_from(config: PoetxConfig, found: Estimate, limit: float, assumed: str) -> Chosen:
    settings = {field.name: getattr(config, field.name) for field in fields(PoetxConfig)}
    return Chosen(**settings, estimate=found, limit=limit, assumed=assumed)


def _peak(found: Estimate, limit: float) -> str:
    parts = ", ".join(f"{name} {_gigabytes(getattr(found, name))}" for name in CATEGORIES)
    return f"estimated peak {_gigabytes(found.total)} of {_gigabytes(limit)} GB in {found.at} ({parts})"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g}"
