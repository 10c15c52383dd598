"""The backend that ``torch.compile(model, backend="poetx")`` finds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from . import conversion, initial, optimizer, retrace, stand_in
from ._torch.compilers import activation_budget, compile_with_aot_eager, compile_with_inductor, global_state_check
from ._torch.graphs import copy_graph, fake_beside, live_inputs
from ._torch.parameters import notice_changed
from ._torch.tensors import is_fake
from .config import PoetxConfig, split_options
from .factor import OrthogonalFactor
from .fitting import resolve
from .kernels import rehearsal
from .passes import LinearMatch, SkipReason, choose_route, match, normalize, rewrite, supply
from .registry import factors

log = logging.getLogger(__name__)

Compiled = Callable[..., Any]


def poetx(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | PoetxConfig | None = None,
) -> Compiled:
    """Compile a captured graph so that its linear layers learn by rotation.

    Args:
        gm: what Dynamo captured, parameters among its inputs.
        example_inputs: the live values of its placeholders.
        mode: one of Inductor's modes.
        options: fields of :class:`PoetxConfig`, and Inductor's own options; or a :class:`PoetxConfig`.

    Raises:
        PoetxError: an option, or a wrapper around the model, that cannot work. The graph's weights are as they were then.
    """
    config, patches = settings(options, mode)
    live = live_inputs(gm, example_inputs)
    with conversion.undone_if_raised(value for value in live if isinstance(value, nn.Parameter)):
        return _compile_rotating(gm, example_inputs, live, config, patches)


poetx.takes_stand_ins = True  # type: ignore[attr-defined]


def settings(options: Mapping[str, Any] | PoetxConfig | None, mode: str | None = None) -> tuple[PoetxConfig, dict[str, Any]]:
    """Our settings and Inductor's, of ``torch.compile``'s ``options`` and ``mode``."""
    if isinstance(options, PoetxConfig):
        return options, split_options(None, mode)[1]
    return split_options(options, mode)


def _compile_rotating(
    gm: fx.GraphModule, example_inputs: Sequence[Any], live: list[Any], config: PoetxConfig, patches: dict[str, Any]
) -> Compiled:
    """Args:
    live: ``example_inputs`` with the real tensors behind fake ones.
    """
    if torch.is_grad_enabled():
        config = resolve(gm, live, config)
        edited, converted = convert(gm, live, config)
    elif any(map(stand_in.is_stand_in, live)):
        edited, converted = copy_graph(gm), []
    else:
        return _compile(gm, example_inputs, config, patches)
    placeholders = [node for node in edited.graph.nodes if node.op == "placeholder"]
    owned = {node: factor for node, value in zip(placeholders, live) if (factor := factors.of_weight(value)) is not None}
    lean = [(node, factor) for node, factor in owned.items() if factor.storage != "folded"]
    if not converted and not lean:
        return _compile(gm, example_inputs, config, patches)
    added = rewrite(edited, [(found, factor) for found, factor in converted if factor.route == "gram"])
    supply(edited, lean, added)
    dropped = {placeholders.index(node) for node, _ in lean}
    outputs = {found.placeholder: found.outputs for found, _ in converted}
    taken = [Slot.of(placeholders.index(node), owned[node], outputs.get(node), takes_factor=True) for node in added.owners]
    others = [
        Slot.of(found.index, factor, found.outputs) for found, factor in converted if found.placeholder not in added.owners
    ]
    slots = [*taken, *others]
    shown = fake_beside(edited, added.tensors, example_inputs)
    inputs = [*(value for index, value in enumerate(example_inputs) if index not in dropped), *shown]
    trace = retrace.Trace.of(edited, inputs, owned.values(), slots, dropped, config, patches) if lean else None
    known = retrace.find(trace)
    if known is not None:
        return known
    compiled = _compile(edited, inputs, config, patches)
    reasons = ((index, conversion.skip_reason(value)) for index, value in enumerate(live) if isinstance(value, nn.Parameter))
    left = [(index, reason) for index, reason in reasons if reason is not None]
    runtime = Runtime(compiled, slots, config, [tensor for tensor in shown if is_fake(tensor)], dropped, left)
    if not all(factor.is_packed for _, factor in lean):
        retrace.remember(trace, runtime)
    return runtime


def convert(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: PoetxConfig, trainer: Optimizer | None = None
) -> tuple[fx.GraphModule, list[tuple[LinearMatch, OrthogonalFactor]]]:
    """Find the linear layers of a graph and give each of their weights its factor.

    Args:
        trainer: must hold these weights, and be able to train rotations; refused before any weight is touched.

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
    if trainer is not None:
        optimizer.check_can_train(trainer, ((found.weight, found.name) for found in matches))
    conversion.remember(skips)
    fresh = initial.untrained((found.weight, found.name) for found in matches) if config.init != "keep" else set()
    converted = []
    for found in matches:
        outputs = found.outputs if id(found.weight) in fresh else None
        storage = conversion.storage_for(found, config)
        factor = conversion.adopt(found.weight, found.name, config, found.stack.shape, outputs, storage)
        factor.route = choose_route(found, config)
        converted.append((found, factor))
    rehearsal.start(kind for found, factor in converted for kind in conversion.kinds(found, factor))
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
    """Where a converted weight stands among a graph's inputs, and how one that comes there later is converted."""

    index: int
    name: str
    matrices: tuple[int, int, int]
    outputs: int | None
    storage: str
    route: str
    takes_factor: bool

    @classmethod
    def of(cls, index: int, factor: OrthogonalFactor, outputs: int | None, takes_factor: bool = False) -> Slot:
        return cls(index, factor.name, factor.stack.shape, outputs, factor.storage, factor.route, takes_factor)


class Runtime:
    """A compiled graph that looks its factors up by the live weights, at every call: one graph serves many layers."""

    def __init__(
        self,
        compiled: Compiled,
        slots: list[Slot],
        config: PoetxConfig,
        shown: list[Tensor],
        dropped: Collection[int] = (),
        left: Sequence[tuple[int, SkipReason]] = (),
    ) -> None:
        """Args:
        shown: what stands for the factors' inputs where all arguments are fake.
        left: arguments that stay ordinary parameters, and why.
        dropped: arguments that the graph does not take: stand-ins.
        """
        self._compiled = compiled
        self._slots = slots
        self._config = config
        self._shown = shown
        self._dropped = dropped
        self._left = left
        self.is_same_state = global_state_check()

    def __call__(self, *args: Any) -> Any:
        given = [value for index, value in enumerate(args) if index not in self._dropped] if self._dropped else args
        if is_fake(args[self._slots[0].index]):  # a piece of a graph: the next one is compiled for what comes out
            return self._compiled(*given, *self._shown)
        extra = [tensor for slot, factor in self._ready(args) if slot.takes_factor for tensor in factor.inputs.values()]
        return self._compiled(*given, *extra)

    def _ready(self, args: Sequence[Any]) -> list[tuple[Slot, OrthogonalFactor]]:
        """The factors of the live weights, each fit to run the model."""
        rehearsal.join()
        optimizer.settle()
        late = [args[slot.index] for slot in self._slots if factors.of_weight(args[slot.index]) is None]
        with conversion.undone_if_raised(late):
            return self._adopted(args, late)

    def _adopted(self, args: Sequence[Any], late: list[nn.Parameter]) -> list[tuple[Slot, OrthogonalFactor]]:
        """Args:
        late: those of the weights that have no factor yet.
        """
        found: list[tuple[Slot, OrthogonalFactor]] = []
        if late:
            conversion.refuse_distributed(late)
            conversion.remember_alike((args[index], reason) for index, reason in self._left)
        for slot in self._slots:
            weight = args[slot.index]
            factor = factors.of_weight(weight)
            if factor is None:
                how = slot.matrices, slot.outputs, slot.storage
                factor = conversion.adopt_late(weight, slot.name, self._config, *how)
                factor.route = slot.route
            found.append((slot, factor))
        unpacked = [factor for _, factor in found if not factor.is_packed]
        if unpacked:
            optimizer.check_loaded(unpacked)
            stand_in.pack(unpacked)
            notice_changed([factor.weight for factor in unpacked])
        for _, factor in found:
            factor.follow_weight()
            optimizer.check_clean(factor)
        if late or unpacked:
            optimizer.join_running_step()
            optimizer.settle()
        return found
