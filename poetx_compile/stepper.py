"""How much memory an optimizer keeps for each number that it trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.optim import SGD, Adam, Optimizer

from .optim import SkewMuon


@dataclass(frozen=True)
class Stepper:
    """An optimizer, as far as memory goes.

    Attributes:
        states, skew_states: numbers that it keeps for each number of an ordinary parameter, and of ``q``.
        is_fused: whether a step writes nothing beside its states; torch's default takes a root of each second moment first, of all
            parameters of one dtype at once.
    """

    name: str = "AdamW"
    states: int = 2
    skew_states: int = 2
    is_fused: bool = False


ADAMW = Stepper()


def of(optimizers: Sequence[Optimizer]) -> tuple[Stepper, str]:
    """What an estimate takes the optimizers for, and in words what of it is assumed."""
    if not optimizers:
        return ADAMW, "; with AdamW's states, since no optimizer holds these parameters yet"
    known = [_known(optimizer) for optimizer in optimizers]
    unknown = sorted({type(optimizer).__name__ for optimizer, found in zip(optimizers, known) if found is None})
    found = [stepper or ADAMW for stepper in known]
    together = Stepper(
        " and ".join(sorted({stepper.name for stepper in found})),
        max(stepper.states for stepper in found),
        max(stepper.skew_states for stepper in found),
        all(stepper.is_fused for stepper in found),
    )
    return together, f"; with AdamW's states for {', '.join(unknown)}, which it does not know" if unknown else ""


def _known(optimizer: Optimizer) -> Stepper | None:
    groups, kind = optimizer.param_groups, type(optimizer)
    is_fused = all(group.get("fused") for group in groups)
    if issubclass(kind, SkewMuon):
        return Stepper(kind.__name__, 2, 1, is_fused)
    if issubclass(kind, SGD):
        states = int(any(group["momentum"] for group in groups))
    elif issubclass(kind, Adam):
        states = 2 + any(group["amsgrad"] for group in groups)
    else:
        return None
    return Stepper(kind.__name__, states, states, is_fused)
