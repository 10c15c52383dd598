"""Whether an optimizer steps every converted weight, and whether there is any: otherwise no rotation happens, silently."""

from __future__ import annotations

import warnings
import weakref

from torch import nn
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from ._torch.optimizers import live_optimizers
from ._torch.parameters import modules_with
from .errors import PoetxWarning
from .factor import OrthogonalFactor
from .registry import factors

_unknown: weakref.WeakSet[OrthogonalFactor] = weakref.WeakSet()
_left: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Matrices that compiled graphs left ordinary since they were last stepped, each with its name and why."""
_told: weakref.WeakSet[Optimizer] = weakref.WeakSet()


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


def leave(weight: nn.Parameter, name: str, why: str) -> None:
    """Note a matrix that a compiled graph leaves ordinary though nobody asked for that."""
    _left[weight] = name, why


def let_go(weight: nn.Parameter) -> None:
    """Forget what :func:`leave` noted of a matrix: no compilation of ours counts for it any more."""
    _left.pop(weight, None)


def check_rotated(optimizer: Optimizer, is_rotating: bool) -> None:
    """Warn, once, of an optimizer that steps a compiled model of which nothing is rotated."""
    if not _left:
        return
    held = [(weight, _left.pop(weight)) for group in optimizer.param_groups for weight in group["params"] if weight in _left]
    if is_rotating or not held or optimizer in _told:
        return
    if any(map(factors.of_module, modules_with(weight for weight, _ in held))):
        return
    _told.add(optimizer)
    others = f", and {len(held) - 1} more stay so too" if len(held) > 1 else ""
    _, (name, why) = held[0]
    warnings.warn(
        f"poetx: {type(optimizer).__name__} trains a compiled model of which no weight is rotated: '{name}' is ordinary ({why})"
        f"{others}. poetx_compile.report(model) says why of each; change the options, or compile with backend='inductor'",
        PoetxWarning,
        stacklevel=3,
    )
