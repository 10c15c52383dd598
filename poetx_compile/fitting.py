"""What ``memory=`` can know when the first graph of a model is compiled: that graph, all parameters, and their optimizers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from . import checkpoint, conversion, stepper
from ._torch.graphs import copy_graph, fake_inputs
from ._torch.optimizers import live_optimizers
from ._torch.parameters import modules_with
from ._torch.tensors import is_fake
from .config import PoetxConfig
from .errors import PoetxError
from .estimate import Traced
from .ladder import Chosen, choose, chosen_from, moved
from .liveness import Graphs, nbytes
from .passes import SkipReason, match, normalize
from .registry import factors

log = logging.getLogger(__name__)

_VOCABULARY = {SkipReason.HEAD, SkipReason.EMBEDDING, SkipReason.TIED}


def resolve(gm: fx.GraphModule, live: Sequence[Any], config: PoetxConfig) -> PoetxConfig:
    """``config`` with what ``memory`` asks for chosen, from a captured graph and all parameters of its model.

    A model that holds converted weights keeps the settings of these. Nothing is chosen before a graph has a weight to convert.

    Args:
        gm: left as it is.
        live: its inputs.

    Raises:
        PoetxError: no settings fit; ``auto`` on another device than a GPU; a graph that cannot be estimated.
    """
    if not config.memory:
        return config
    weights = [value for value in live if isinstance(value, nn.Parameter)]
    modules = modules_with(weights)
    weights = list(_unique([*weights, *(weight for module in modules for weight in nn.Module.parameters(module))]))
    before = next((factor.config for weight in weights if (factor := factors.of_weight(weight)) is not None), None)
    if before is not None:
        return _as_before(config, before)
    if any(map(is_fake, live)):
        return config  # pieces of a graph, of weights that were converted before or are refused
    buffers = sum(map(nbytes, _unique(buffer for module in modules for buffer in nn.Module.buffers(module))))
    sketch = _Sketch(gm, live, weights, buffers, config)
    if not sketch.holds_weights:
        return config
    optimizers = [optimizer for optimizer in live_optimizers() if _holds(optimizer, weights)]
    saved = next((found for optimizer in optimizers if (found := _saved(optimizer, weights))), {})
    settled = {name: saved[name] for name in config.movable & saved.keys()}
    steps, assumed = stepper.of(optimizers)
    limit = _limit(config, weights)
    try:
        chosen = choose(
            replace(config, **settled), limit, sketch.trace, steps, config.movable - saved.keys(), assumed + sketch.unknown
        )
    except PoetxError:
        raise
    except Exception as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise PoetxError(
            f"poetx: memory={config.memory} needs an estimate, and this graph cannot be estimated ({why}); leave memory out, and "
            "set storage, skew_dtype and activation_memory_budget yourself"
        ) from error
    log.log(logging.WARNING if sketch.unknown else logging.INFO, "%s", chosen)
    return chosen


class _Sketch:
    """One captured graph, and all parameters of its model: what is known of a step when the first graph is compiled."""

    def __init__(
        self, gm: fx.GraphModule, live: Sequence[Any], weights: list[nn.Parameter], buffers: int, config: PoetxConfig
    ) -> None:
        self._gm, self._live, self._weights, self._buffers = gm, live, weights, buffers
        edited = copy_graph(gm)
        inputs = dict(zip([node for node in edited.graph.nodes if node.op == "placeholder"], live))
        normalize(edited, inputs)
        matches, skips = match(edited, inputs, config, conversion.binding_reason)
        self.holds_weights = bool(matches)
        self._skipped = {id(skip.weight): skip.reason for skip in skips}
        wide = [skip.weight.shape[0] for skip in skips if skip.reason in _VOCABULARY]
        self._vocabulary = max(wide, default=None)
        here = {id(value) for value in live}
        self._elsewhere = {id(weight) for weight in weights if weight.requires_grad and id(weight) not in here}

    @property
    def unknown(self) -> str:
        """What the estimate lacks, in words."""
        if not self._elsewhere:
            return ""
        return (
            f"; {len(self._elsewhere)} parameters are in later graphs: counted, and taken for rotated where this graph rotates "
            "their shape, but without the activations of those graphs"
        )

    def trace(self, config: PoetxConfig) -> Traced:
        """The graphs of this one forward and backward pass."""
        edited = copy_graph(self._gm)
        with fake_inputs(edited, self._live) as (fake, inputs):
            fakes = {id(value): shown for value, shown in zip(self._live, inputs)}
            reasons = {id(fakes[key]): reason for key, reason in self._skipped.items()}
            weights = [fakes.get(id(weight), weight) for weight in self._weights]
            traced = Traced(fake, weights, self._buffers, Graphs(self._vocabulary), lambda weight: reasons.get(id(weight)))
            traced.take(edited, inputs, config)
            self._add_alike(traced, config)
        return traced

    def _add_alike(self, traced: Traced, config: PoetxConfig) -> None:
        """Take parameters of other graphs for rotated where this one rotates such as they are."""
        alike = {(found.weight.shape, found.weight.dtype): found for found in traced.matches.values()}
        for place, weight in enumerate(self._weights):
            found = alike.get((weight.shape, weight.dtype))
            if found is not None and id(weight) in self._elsewhere and type(weight) is nn.Parameter:
                traced.weights[place] = traced.fake.from_tensor(weight, static_shapes=True)
                with traced.fake:
                    traced.add(replace(found, weight=traced.weights[place]), config)


def _as_before(config: PoetxConfig, before: PoetxConfig) -> PoetxConfig:
    settled = replace(config, **{name: getattr(before, name) for name in config.movable})
    if isinstance(before, Chosen) and before.estimate is not None:
        return chosen_from(settled, before.estimate, before.limit, before.assumed)
    log.warning(
        "memory=%s chooses nothing: weights of this model were converted before, with %s", config.memory, moved(settled)
    )
    return settled


def _limit(config: PoetxConfig, weights: Sequence[Tensor]) -> float:
    if isinstance(config.memory, float):
        return config.memory * 1e9
    card = next((weight.device for weight in weights if weight.is_cuda), None)
    if card is None:
        raise PoetxError(
            f"poetx: memory='auto' is what a GPU has, and this model is on {weights[0].device}: give gigabytes, memory=24.0"
        )
    return torch.cuda.get_device_properties(card).total_memory * torch.cuda.get_per_process_memory_fraction(card)


def _holds(optimizer: Optimizer, weights: Sequence[Tensor]) -> bool:
    wanted = {id(weight) for weight in weights}
    return any(id(parameter) in wanted for group in optimizer.param_groups for parameter in group["params"])


def _saved(optimizer: Optimizer, weights: Sequence[Tensor]) -> dict[str, Any]:
    """With which settings the loaded state of an optimizer goes on."""
    entries = (optimizer.state.get(weight, {}) for weight in weights)
    return next((found for entry in entries if (found := checkpoint.settings_of(entry))), {})


def _unique(tensors: Iterable[Any]) -> Iterator[Any]:
    seen: set[int] = set()
    for tensor in tensors:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor
