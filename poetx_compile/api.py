"""What a script may call beside ``torch.compile``: :func:`prepare`, :func:`report` and :func:`restore`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.optim import Optimizer

from . import conversion, stand_in
from ._torch.compilers import run_once
from ._torch.data_parallel import distributed_wrapper
from ._torch.optimizers import live_optimizers
from .backend import Compiled, convert, settings
from .config import PoetxConfig
from .errors import PoetxError
from .fitting import resolve
from .optimizer import check_loaded, check_state, undo_raised
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
        PoetxError: nothing to convert, an option that cannot be, or an optimizer that cannot train what would be converted. No
            weight was converted then.
    """
    plain = getattr(model, "_orig_mod", model)
    with conversion.undone_if_raised(plain.parameters()):
        has_graph = _convert(plain, example_inputs, example_kwargs, settings(options)[0], optimizer)
        converted = factors.of_module(plain)
        if optimizer is not None:
            check_state(optimizer)
        check_loaded(converted)
        stand_in.pack(converted)
    if not converted and not has_graph:
        raise PoetxError(
            "poetx: Dynamo did not hand over a graph of this model, so nothing could be converted: it is switched off, or has "
            "given up on the model's code (TORCH_LOGS=recompiles,graph_breaks shows why); switch it on, or call "
            "torch._dynamo.reset(), and prepare again"
        )
    if not converted:
        raise PoetxError("poetx: no linear layer of this model can be converted; poetx_compile.report(model) says why")
    return build_report(plain)


def _convert(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], config: PoetxConfig, trainer: Optimizer | None
) -> bool:
    """Run a model once, and convert the weights of its graphs on the way. Returns whether there is a graph."""
    raised: list[PoetxError] = []
    graphs: list[fx.GraphModule] = []

    def convert_only(gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        graphs.append(gm)
        try:
            chosen = resolve(gm, inputs, config)
            places = [found.index for found, _ in convert(gm, inputs, chosen, trainer)[1]]
        except PoetxError as refusal:
            raised.append(refusal)
            raise

        def run(*inputs: Any) -> Any:
            if any(factors.of_weight(inputs[place]) is None for place in places):  # of another layer with the same code
                convert(gm, inputs, chosen, trainer)
            return gm.forward(*inputs)

        return run

    try:
        with _undisturbed(model), torch.enable_grad():
            run_once(model, convert_only, *args, **kwargs)
    except Exception:  # Dynamo wraps what a backend raises
        if raised:
            raise raised[0] from None
        raise
    return bool(graphs)


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

    The optimizer states of rotations go, since they mean nothing for whole matrices; those that were loaded, and not used yet,
    stay. Compile with another backend to go on: a module compiled with ``poetx`` converts again at its next call.

    Returns:
        The names of the restored weights.

    Raises:
        PoetxError: DistributedDataParallel waits for the gradients of rotations.
    """
    undo_raised()
    reduced = [factor.weight for factor in factors.of_module(model) if factor.is_reduced]
    if reduced and distributed_wrapper(reduced) is not None:
        raise PoetxError(
            "poetx: DistributedDataParallel, which waits for the gradients of this model's rotations, still wraps it; delete the "
            "wrapper, and then call poetx_compile.restore(model)"
        )
    restored = []
    optimizers = list(live_optimizers())
    for weight in model.parameters():
        factor = conversion.release(weight)
        if factor is not None:
            restored.append(factor.name)
            for optimizer in optimizers:
                if optimizer.state.get(weight, {}).get("poetx_live") == 1:
                    del optimizer.state[weight]
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
