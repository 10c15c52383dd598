"""Whether some torch optimizer steps every converted weight: otherwise its rotation never happens, silently."""

from __future__ import annotations

import warnings
import weakref

from ._torch.optimizers import live_optimizers
from .errors import PoetxWarning
from .factor import OrthogonalFactor
from .registry import factors

_unknown: weakref.WeakSet[OrthogonalFactor] = weakref.WeakSet()


def watch(factor: OrthogonalFactor) -> None:
    _unknown.add(factor)


def forget(factor: OrthogonalFactor) -> None:
    """The factor is stepped, or gone."""
    factor.is_covered = True
    _unknown.discard(factor)


def check() -> None:
    """Warn, once a weight, about those that have a gradient and no optimizer. Looks at all live optimizers."""
    waiting = sorted((factor for factor in _unknown if factor.q.grad is not None), key=lambda factor: factor.name)
    if not waiting:
        return
    for optimizer in live_optimizers():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                factor = factors.of_weight(parameter) or factors.of_skew(parameter)
                if factor is not None:
                    forget(factor)
    missed = [factor for factor in waiting if not factor.is_covered]
    for factor in missed:
        forget(factor)
    if missed:
        others = f" and {len(missed) - 1} more" if len(missed) > 1 else ""
        warnings.warn(
            f"poetx: '{missed[0].name}'{others} has a gradient, but no torch.optim.Optimizer holds it, so it will not learn. "
            "Pass it to a subclass of torch.optim.Optimizer (W.grad is the packed gradient of a rotation: a hand-written update "
            "cannot use it), set requires_grad=False, or leave it out with options={'exclude': [...]}",
            PoetxWarning,
            stacklevel=3,
        )
