"""Re-targeting the user's optimizer: ``q`` stands in ``W``'s slot while ``step()`` runs, and is folded into ``W`` after it.

Outside ``step()`` the optimizer holds ``W``, in its parameter groups and as the key of its state, so that schedulers,
clipping, named groups and everything else that a script built on it stay valid.
"""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Collection, Iterable
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from . import checkpoint, coverage, initial, moments
from ._torch.optimizers import live_optimizers, on_optimizer_state_loaded, run_first_after_step, steps_running
from .errors import PoetxError
from .factor import OrthogonalFactor
from .finite import FiniteWatch
from .kernels import rehearsal
from .metrics import observed
from .registry import factors
from .retraction import retract_all, spread_all

log = logging.getLogger(__name__)

_REFUSED = {
    "LBFGS": "it evaluates the model at trial points within one step",
    "SparseAdam": "it takes sparse gradients only",
    "Muon": "it orthogonalises matrices, which poetx_compile.optim.SkewMuon does for rotations",
    "ZeroRedundancyOptimizer": "it would send the whole weight to all ranks at every step",
}
_ADAMS = {"Adam", "AdamW", "NAdam", "RAdam"}

Slot: TypeAlias = tuple[OrthogonalFactor, dict[str, Any], int]
"""A factor, the group of an optimizer that holds its weight or ``q``, and its place there."""


class _Steps(threading.local):
    """The steps that one thread is taking.

    Attributes:
        running: optimizers inside ``step()``, outermost first.
        finished: steps inside others that are not counted yet, each with the factors that it moved.
    """

    def __init__(self) -> None:
        self.running: list[Optimizer] = []
        self.finished: list[tuple[Optimizer, list[OrthogonalFactor]]] = []


_steps = _Steps()
_loaded: weakref.WeakSet[Optimizer] = weakref.WeakSet()
_hooked: weakref.WeakSet[Optimizer] = weakref.WeakSet()
_finite = FiniteWatch()


@functools.cache
def install() -> None:
    """Watch the steps and the loading of all optimizers from now on; look once at those loaded before."""
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)
    on_optimizer_state_loaded(_note_loaded)
    for optimizer in live_optimizers():
        _note_loaded(optimizer)
        if steps_running(optimizer):  # this is the first forward of all, in its closure
            _steps.running.append(optimizer)


def settle() -> None:
    """Before the model runs: undo steps that raised, and read back checkpoints that arrived since the last call.

    Later would be too late: gradients would have been made with other permutations.
    """
    undo_raised()
    for optimizer in list(_loaded):
        initial.refuse_late_state(optimizer)
        if not checkpoint.adopt(optimizer):
            _loaded.discard(optimizer)


def join_running_step() -> None:
    """Let weights that were converted inside ``step(closure)`` take part in that step."""
    undo_raised()
    for optimizer in _steps.running:
        _enter(optimizer)


def part(given_up: Collection[OrthogonalFactor]) -> None:
    """Take rotations that are given up out of the steps that run. What is loaded of them waits for another conversion."""
    for optimizer in _steps.running:
        _leave(optimizer, given_up)
    weights = [factor.weight for factor in given_up]
    for optimizer in live_optimizers() if weights else ():
        if any("poetx_live" in optimizer.state.get(weight, {}) for weight in weights):
            _loaded.add(optimizer)


def check_clean(factor: OrthogonalFactor) -> None:
    """Refuse to run the model while a rotation waits to be folded.

    Raises:
        PoetxError: the optimizer moved ``q`` and evaluates the model before its step ended.
    """
    if factor.is_clean:
        return
    if _steps.running:
        raise PoetxError(
            f"poetx: {type(_steps.running[-1]).__name__} moved the rotation of '{factor.name}' and ran the model again before "
            "step() ended. Optimizers that evaluate the model at trial points (SAM, line search) cannot train rotations: use "
            "another optimizer; or call poetx_compile.restore(model), and leave this weight out with options={'exclude': [...]}"
        )
    factor.clear()


def check_can_train(optimizer: Optimizer, weights: Iterable[tuple[nn.Parameter, str]]) -> None:
    """Of weights that are about to be converted, each with its name.

    Raises:
        PoetxError: this optimizer does not hold one of them, or cannot train a rotation.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for weight, name in weights:
        _refuse_kind(optimizer, name)
        if id(weight) not in held:
            raise PoetxError(
                f"poetx: '{name}' would be converted, but {type(optimizer).__name__} does not hold it; build the optimizer from "
                "model.parameters(), or leave the weight out with options={'exclude': [...]}"
            )


def check_state(optimizer: Optimizer) -> None:
    """Raises:
    PoetxError: what an optimizer keeps of a converted weight cannot go on as that of a rotation.
    """
    _usable_entries(optimizer, _slots(optimizer))


def check_loaded(waiting: Collection[OrthogonalFactor]) -> None:
    """Of weights that are about to be stored as their factors say.

    Raises:
        PoetxError: an optimizer that holds one of them has loaded state of other settings.
    """
    for optimizer in list(_loaded):
        slots = _slots(optimizer)
        if any(factor in waiting for factor, *_ in slots):
            _check_settings(optimizer, slots)


def _check_settings(optimizer: Optimizer, slots: Iterable[Slot]) -> None:
    for factor, *_ in slots:
        entry = optimizer.state.get(factor.weight, {})
        if "poetx_live" in entry:
            checkpoint.check_settings(factor, entry)


def _note_loaded(optimizer: Optimizer) -> None:
    _loaded.add(optimizer)
    _hook(optimizer)


def _hook(optimizer: Optimizer) -> None:
    if optimizer not in _hooked:
        optimizer.register_state_dict_pre_hook(_before_state)
        optimizer.register_load_state_dict_pre_hook(_before_state)
        optimizer.register_state_dict_post_hook(checkpoint.encode)
        optimizer.register_load_state_dict_post_hook(checkpoint.start_again)
        run_first_after_step(optimizer, _after_step)  # so that the user's own hooks see weights, folded
        _hooked.add(optimizer)


def _before_state(*_: Any) -> None:
    """State is saved and loaded by places in groups: those of weights."""
    undo_raised()


def undo_raised(starting: Optimizer | None = None) -> None:
    """Undo the steps that raised: every ``W`` back in its place, no rotation waiting."""
    for optimizer in [optimizer for optimizer in _steps.running if optimizer is starting or not steps_running(optimizer)]:
        _steps.running.remove(optimizer)
        for factor, _ in _leave(optimizer):
            if not factor.is_clean:
                factor.clear()
    if not _steps.running:
        _steps.finished.clear()


@torch._dynamo.disable
def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if steps_running(optimizer) > 1:  # a subclass calls super().step()
        return
    undo_raised(starting=optimizer)
    if factors or optimizer in _loaded:
        _enter(optimizer)
    _steps.running.append(optimizer)


@torch._dynamo.disable
def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if optimizer not in _steps.running or steps_running(optimizer) > 1:
        return
    del _steps.running[_steps.running.index(optimizer) :]
    stepped = _leave(optimizer)
    for outer in _steps.running:  # a wrapper that goes on finds weights, not rotations that were folded
        _leave(outer)
    moved = [(factor, group) for factor, group in stepped if factor.q.grad is not None or not factor.is_clean]
    _finite.look([factor for factor, _ in moved])
    work = [(factor, _gain(optimizer, group)) for factor, group in moved]
    rehearsal.join()
    with observed(work) as look:
        if "SkewMuon" not in _names(optimizer):
            spread_all(factor for factor, _ in moved if factor.config.updates == "orthogonal")
        retract_all(work, look)
    for factor, _ in stepped:
        coverage.forget(factor)
    _steps.finished.append((optimizer, [factor for factor, _ in moved]))
    if not _steps.running:
        _count()
    coverage.check()
    coverage.check_rotated(optimizer, bool(stepped))


def _count() -> None:
    """Count one step for every factor that was moved, whatever wrappers stepped inside one another."""
    skipped = any(_was_skipped(optimizer) for optimizer, _ in _steps.finished)
    epochs = {factor: factor.epoch for _, moved in _steps.finished for factor in moved}
    if not skipped:
        for factor in epochs:
            factor.count_step()
    for optimizer, moved in _steps.finished:
        for factor in moved:
            checkpoint.follow(factor, optimizer.state.get(factor.weight, {}), epochs[factor])
    _steps.finished.clear()


def _slots(optimizer: Optimizer) -> list[Slot]:
    """Of the factors whose weight, or ``q``, an optimizer holds."""
    return [
        (factor, group, index)
        for group in optimizer.param_groups
        for index, parameter in enumerate(group["params"])
        if (factor := factors.of_weight(parameter) or factors.of_skew(parameter)) is not None
    ]


def _enter(optimizer: Optimizer) -> None:
    """Put ``q`` in ``W``'s place, in groups and state. Remembers nothing, so it may run any number of times.

    Raises:
        PoetxError: this optimizer, or its state, cannot train a rotation. Nothing was changed then.
    """
    slots = _slots(optimizer)
    entries = _usable_entries(optimizer, slots)
    if optimizer in _loaded:
        _refuse_orphans(optimizer)
    for (factor, group, index), entry in zip(slots, entries):
        parameters = group["params"]
        if parameters[index] is factor.weight:  # a wrapper that shares its groups put q there already
            if not factor.is_clean:
                factor.clear()
            parameters[index] = factor.q
        optimizer.state.pop(factor.weight, None)
        if entry:
            optimizer.state[factor.q] = entry
    if slots:
        _hook(optimizer)


def _refuse_orphans(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            entry = optimizer.state.get(parameter, {})
            if checkpoint.is_saved(entry) and factors.of_weight(parameter) is None and parameter.grad is not None:
                raise PoetxError(
                    f"poetx: the loaded state of {type(optimizer).__name__} holds a rotation for a weight of shape "
                    f"{tuple(parameter.shape)}, which this run trains as an ordinary one. Compile with the options of the run "
                    "that saved it, or load only the model's state_dict"
                )


def _refuse_kind(optimizer: Optimizer, name: str) -> None:
    for kind in _names(optimizer):
        if kind in _REFUSED:
            raise PoetxError(
                f"poetx: {kind} cannot train the rotation of '{name}': {_REFUSED[kind]}. Give this weight to another optimizer, "
                "AdamW for instance; or call poetx_compile.restore(model), and leave the weight out with "
                f"options={{'exclude': ['{name}']}}"
            )


def _usable_entries(optimizer: Optimizer, slots: Iterable[Slot]) -> list[checkpoint.Entry | None]:
    _check_settings(optimizer, slots)
    return [_usable_entry(optimizer, group, factor) for factor, group, _ in slots]


def _usable_entry(optimizer: Optimizer, group: dict[str, Any], factor: OrthogonalFactor) -> checkpoint.Entry | None:
    _refuse_kind(optimizer, factor.name)
    factor.follow_weight()
    entry = optimizer.state.get(factor.weight)
    if not entry:
        return None
    if "poetx_live" not in entry:
        return checkpoint.ordinary(factor, entry)
    if checkpoint.is_saved(entry):
        raise PoetxError(
            f"poetx: the state of {type(optimizer).__name__} was loaded after this step's forward, so its gradients belong "
            "to other permutations; load the optimizer's state before the forward pass"
        )
    names = set(_names(optimizer))
    if "momentum_buffer" in entry and "SkewMuon" not in names and names & _ADAMS:
        raise PoetxError(
            f"poetx: the state of '{factor.name}' is another optimizer's, and {type(optimizer).__name__} cannot go on from it: "
            "load the model's state_dict only"
        )
    moments.check_known(factor, entry)
    if checkpoint.is_current(factor, entry):
        return entry
    return moments.carried(factor, entry) or _fresh_entry(optimizer, group, factor, entry)


def _fresh_entry(
    optimizer: Optimizer, group: dict[str, Any], factor: OrthogonalFactor, entry: checkpoint.Entry
) -> checkpoint.Entry | None:
    """What an optimizer starts from where new blocks were drawn: step count and all, or Adam's first steps would be too long."""
    if "Adagrad" not in _names(optimizer):
        return None  # others make their state at the first step
    return {
        "step": torch.zeros_like(entry["step"]),
        "sum": torch.full_like(factor.q, group["initial_accumulator_value"], requires_grad=False),
    }


def _leave(
    optimizer: Optimizer, leaving: Collection[OrthogonalFactor] | None = None
) -> list[tuple[OrthogonalFactor, dict[str, Any]]]:
    """Put every ``W`` back in its place, or those that are ``leaving``, and tag its state.

    Returns:
        The factors that took part, each with its group.
    """
    slots = [slot for slot in _slots(optimizer) if leaving is None or slot[0] in leaving]
    for factor, group, index in slots:
        group["params"][index] = factor.weight
        if factor.q in optimizer.state:
            entry = optimizer.state[factor.weight] = optimizer.state.pop(factor.q)
            checkpoint.tag(factor, entry, factor.epoch)
    return [(factor, group) for factor, group, _ in slots]


def _names(optimizer: Optimizer) -> list[str]:
    return [base.__name__ for base in type(optimizer).__mro__]


def _gain(optimizer: Optimizer, group: dict[str, Any]) -> float:
    """What undoes a step size that shrinks with the size of ``q``, which is zero.

    Adafactor scales by ``max(ε₂, RMS(parameter))``. A rotation by ``q`` changes a weight by ``q`` times its own size, so the
    size that belongs here is 1.
    """
    if "Adafactor" not in _names(optimizer) or not group.get("scale_parameter", True):
        return 1.0
    return 1.0 / group["eps"][1]


def _was_skipped(optimizer: Optimizer) -> bool:
    """Whether GradScaler found infinities in a fused optimizer's gradients: it ran ``step()``, which did nothing."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found.item())
