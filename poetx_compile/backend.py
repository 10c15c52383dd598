"""The backend that ``torch.compile(model, backend="poetx")`` finds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from . import conversion, initial, optimizer
from ._torch import (
    activation_budget,
    compile_with_aot_eager,
    compile_with_inductor,
    copy_graph,
    fake_beside,
    is_fake,
    live_inputs,
)
from .config import PoetxConfig, split_options
from .factor import OrthogonalFactor, factors
from .passes import LinearMatch, choose_route, match, normalize, rewrite

log = logging.getLogger(__name__)

Compiled = Callable[..., Any]


def poetx(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compile a captured graph so that its linear layers learn by rotation.

    Args:
        gm: what Dynamo captured, parameters among its inputs.
        example_inputs: the live values of its placeholders.
        mode: one of Inductor's modes.
        options: fields of :class:`PoetxConfig`, and Inductor's own options.

    Raises:
        PoetxError: an option, or a wrapper around the model, that cannot work.
    """
    config, patches = split_options(options, mode)
    if not torch.is_grad_enabled():
        return _compile(gm, example_inputs, config, patches)
    edited, converted = convert(gm, live_inputs(gm, example_inputs), config)
    if not converted:
        return _compile(gm, example_inputs, config, patches)
    extra = rewrite(edited, [(found, factor) for found, factor in converted if factor.route == "gram"])
    shown = fake_beside(extra, example_inputs)
    compiled = _compile(edited, [*example_inputs, *shown], config, patches)
    slots = [
        Slot(found.index, found.name, found.stack.shape, found.outputs, factor.route == "gram")
        for found, factor in converted
    ]
    return Runtime(compiled, slots, config, [tensor for tensor in shown if is_fake(tensor)])


def convert(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: PoetxConfig
) -> tuple[fx.GraphModule, list[tuple[LinearMatch, OrthogonalFactor]]]:
    """Find the linear layers of a graph and give each of their weights its factor.

    Returns:
        A normalised copy of the graph, and what of it is converted.
    """
    started = time.perf_counter()
    optimizer.install()
    edited = copy_graph(gm)
    placeholders = [node for node in edited.graph.nodes if node.op == "placeholder"]
    inputs = dict(zip(placeholders, example_inputs))
    normalize(edited, inputs)
    matches, skips = match(edited, inputs, config, conversion.binding_reason)
    if matches:
        conversion.refuse_distributed([found.weight for found in matches])
    conversion.remember(skips)
    fresh = initial.untrained((found.weight, found.name) for found in matches) if config.init != "keep" else set()
    converted = []
    for found in matches:
        outputs = found.outputs if id(found.weight) in fresh else None
        factor = conversion.adopt(found.weight, found.name, config, found.stack.shape, outputs)
        factor.route = choose_route(found, config)
        converted.append((found, factor))
    optimizer.join_running_step()
    optimizer.settle()
    seconds = time.perf_counter() - started
    log.info("%d weights converted, %d parameters left, in %.2f s", len(matches), len(skips), seconds)
    return edited, converted


def _compile(gm: fx.GraphModule, inputs: Sequence[Any], config: PoetxConfig, patches: dict[str, Any]) -> Compiled:
    with activation_budget(config.activation_memory_budget):
        if config.inner == "aot_eager":
            return compile_with_aot_eager(gm, inputs)
        return compile_with_inductor(gm, inputs, patches)


@dataclass(frozen=True)
class Slot:
    """Where a converted weight stands among a graph's inputs."""

    index: int
    name: str
    matrices: tuple[int, int, int]
    outputs: int | None
    takes_factor: bool


class Runtime:
    """A compiled graph that looks its factors up by the live weights, at every call: one graph serves many layers."""

    def __init__(self, compiled: Compiled, slots: list[Slot], config: PoetxConfig, shown: list[Tensor]) -> None:
        """Args:
        shown: what stands for the factors' inputs where all arguments are fake.
        """
        self._compiled = compiled
        self._slots = slots
        self._config = config
        self._shown = shown

    def __call__(self, *args: Any) -> Any:
        if is_fake(args[self._slots[0].index]):  # a piece of a graph: the next one is compiled for what comes out
            return self._compiled(*args, *self._shown)
        optimizer.settle()
        extra: list[Tensor] = []
        late = False
        for slot in self._slots:
            weight = args[slot.index]
            factor = factors.of_weight(weight)
            if factor is None:
                conversion.refuse_distributed([weight])
                factor = conversion.adopt_late(weight, slot.name, self._config, slot.matrices, slot.outputs)
                late = True
            factor.follow_weight()
            optimizer.check_clean(factor)
            if slot.takes_factor:
                extra.extend(factor.inputs)
        if late:
            optimizer.join_running_step()
            optimizer.settle()
        return self._compiled(*args, *extra)
