"""What a script may call beside ``torch.compile``: :func:`prepare`, :func:`report` and :func:`restore`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.optim import Optimizer

from . import conversion, stand_in
from ._torch.optimizers import live_optimizers
from .backend import Compiled, convert
from .config import PoetxConfig, split_options
from .errors import PoetxError
from .fitting import resolve
from .optimizer import check_state, undo_raised
from .registry import factors
from .report import Report, build_report


def prepare(
    model: nn.Module,
    *example_inputs: Any,
    optimizer: Optimizer | None = None,
    options: Mapping[str, Any] | PoetxConfig | None = None,
    **example_kwargs: Any,
) -> Report:
    """Convert a model's linear layers now, instead of at the first compiled forward.

    For those who want to look at the report, or check their optimizer, before training. Runs the model once, uncompiled;
    buffers and random numbers are as before afterwards.

    Args:
        model: the module, compiled or not.
        example_inputs, example_kwargs: what its forward takes.
        optimizer: if given, must be able to train every converted weight.
        options: as given to ``torch.compile``, or a :class:`PoetxConfig`.

    Raises:
        PoetxError: nothing to convert, an option that cannot be, or an optimizer that cannot train what would be converted.
    """
    config = options if isinstance(options, PoetxConfig) else split_options(options, None)[0]
    refusals: list[PoetxError] = []

    def convert_only(gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        try:
            convert(gm, inputs, resolve(gm, inputs, config), optimizer)
        except PoetxError as refusal:
            refusals.append(refusal)
            raise
        return gm.forward

    plain = getattr(model, "_orig_mod", model)
    try:
        with _undisturbed(plain), torch.enable_grad():
            torch.compile(plain, backend=convert_only)(*example_inputs, **example_kwargs)
    except Exception:  # Dynamo wraps what a backend raises
        if refusals:
            raise refusals[0] from None
        raise
    converted = factors.of_module(plain)
    if not converted:
        raise PoetxError("poetx: no linear layer of this model can be converted; poetx_compile.report(model) says why")
    if optimizer is not None:
        check_state(optimizer)
    stand_in.pack(converted)
    return build_report(plain)


def report(model: nn.Module, *, show: bool = True) -> Report:
    """Say of every parameter whether it is rotated, how or why not, and what memory that saves.

    Args:
        model: the module, compiled or not.
        show: also print the tables.
    """
    built = build_report(getattr(model, "_orig_mod", model))
    if show:
        built.print()
    return built


def restore(model: nn.Module) -> list[str]:
    """Make every weight of a model ordinary again; the values stay as they were trained.

    The optimizer states of rotations go, since they mean nothing for whole matrices. Compile with another backend to go
    on: a module compiled with ``poetx`` converts again at its next call.

    Returns:
        The names of the restored weights.
    """
    undo_raised()
    restored = []
    optimizers = list(live_optimizers())
    for weight in model.parameters():
        factor = conversion.release(weight)
        if factor is not None:
            restored.append(factor.name)
            for optimizer in optimizers:
                optimizer.state.pop(weight, None)
    return restored


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Put back what a forward pass changes: buffers, and the random number generators of the model's devices."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, values in before:
                    buffer.copy_(values)
