"""Which parameters of a graph are weights of linear layers, and why the others are not. Reads, never writes."""

from __future__ import annotations

import enum
import fnmatch
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from .._torch.graphs import checkpointed, functorch_nodes, source_name
from .._torch.parameters import gradient_hooks, modules_with
from .._torch.tensors import is_fake
from ..config import PoetxConfig
from ..factor import stacked
from ..layout import StackLayout
from ..registry import factors
from .normalize import ADDMM, LINEAR, MATMUL, is_bias, outputs_of
from .uses import Use, UseGraph


class SkipReason(enum.Enum):
    """Why a parameter stays an ordinary parameter, in the words of the report."""

    FROZEN = "frozen (requires_grad=False)"
    NOT_A_MATRIX = "not a matrix"
    DTYPE = "not a plain nn.Parameter of a floating dtype"
    EXCLUDED = "excluded by name"
    HEAD = "output head"
    EMBEDDING = "embedding"
    TIED = "tied to an embedding"
    UNUSED = "not used in the graph"
    NOT_A_LINEAR = "not only used as the weight of a linear layer"
    CONVOLUTION = "kernel of a convolution (include_conv=False)"
    GROUPED = "kernel of a grouped convolution"
    NO_INPUT = "multiplied with other parameters only"
    TOO_SMALL = "shorter than a chunk along all sides that rotate"
    GRADIENT_HOOK = "a gradient hook waits for its dense gradient"
    ZERO = "a matrix of zeros, which no rotation can change"


@dataclass(frozen=True)
class LinearMatch:
    """A weight to convert.

    ``stack`` is what is rotated: one matrix where the weight is one. ``uses`` are its products in canonical form if it has no
    other uses, else empty: then only the dense route serves.
    """

    placeholder: fx.Node
    index: int
    weight: nn.Parameter = field(compare=False)  # tensors compare number by number
    name: str
    stack: StackLayout
    uses: tuple[fx.Node, ...]

    @property
    def outputs(self) -> int | None:
        """The dimension of the matrix along which its outputs lie, where all products agree on one."""
        dimensions = set(map(outputs_of, self.uses))
        return dimensions.pop() if len(dimensions) == 1 else None


@dataclass(frozen=True)
class Skip:
    """A parameter to leave alone."""

    index: int
    weight: nn.Parameter
    name: str
    reason: SkipReason


Lookup = Callable[[nn.Parameter], "SkipReason | None"]


def match(
    gm: fx.GraphModule, inputs: dict[fx.Node, Any], config: PoetxConfig, remembered: Lookup = lambda weight: None
) -> tuple[list[LinearMatch], list[Skip]]:
    """Sort the parameters of a normalised graph.

    Args:
        remembered: the reason for which another graph left a weight alone, where that binds this graph too.
    """
    graph = UseGraph(gm, inputs)
    parameters = {node: value for node, value in inputs.items() if isinstance(value, nn.Parameter)}
    uses = {node: list(graph.uses(node)) for node, weight in parameters.items() if weight.ndim >= 2}
    linears = {use.node for found in uses.values() for use in found if use.is_product or use.is_convolution}
    linears |= {node for node in gm.graph.nodes if node.target is LINEAR}
    transformed = _transformed(gm)
    names = {node: parameter_name(source_name(node)) for node in parameters}
    excluded = _excluded([(weight, names[node]) for node, weight in parameters.items()], config.exclude)
    matches, skips = [], []
    for index, (node, value) in enumerate(inputs.items()):
        if node not in parameters:
            continue
        name = names[node]
        reason = remembered(value) or _reason(value, name, uses.get(node, []), graph, linears, config, id(value) in excluded)
        if reason is not None:
            skips.append(Skip(index, value, name, reason))
        else:
            stack, canonical = _stack(value, uses[node], config), _canonical(value, uses[node], transformed)
            matches.append(LinearMatch(node, index, value, name, stack, canonical))
    return matches, skips


def _reason(
    weight: nn.Parameter,
    name: str,
    uses: list[Use],
    graph: UseGraph,
    linears: set[fx.Node],
    config: PoetxConfig,
    is_excluded: bool,
) -> SkipReason | None:
    if not weight.requires_grad:
        return SkipReason.FROZEN
    if weight.ndim < 2 or (weight.ndim == 2 and 1 in weight.shape):
        return SkipReason.NOT_A_MATRIX
    if factors.of_weight(weight) is not None:
        return None
    is_plain = type(weight) is nn.Parameter or is_fake(weight)
    if weight.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16) or not is_plain:
        return SkipReason.DTYPE
    if is_excluded:
        return SkipReason.EXCLUDED
    embedded = [use.is_embedding for use in uses]
    if any(embedded):
        return SkipReason.EMBEDDING if all(embedded) else SkipReason.TIED
    if not uses:
        return SkipReason.UNUSED
    convolved = [use.is_convolution for use in uses]
    if not all(convolved if any(convolved) else [use.is_product for use in uses]):
        return (
            SkipReason.NOT_A_LINEAR if weight.ndim == 2 or any(use.is_product for use in uses) else SkipReason.NOT_A_MATRIX
        )
    if any(use.is_grouped for use in uses):
        return SkipReason.GROUPED
    if any(convolved) and not config.include_conv:
        return SkipReason.CONVOLUTION
    stack = _stack(weight, uses, config)
    if 1 in stack.shape[1:]:
        return SkipReason.NOT_A_MATRIX
    if is_head(name, config.heads) or any(graph.reaches_loss(use.node, linears) for use in uses):
        return SkipReason.HEAD
    if not all(use.node.target is LINEAR or graph.has_data(use) for use in uses):
        return SkipReason.NO_INPUT
    if not stack.sides:
        return SkipReason.TOO_SMALL
    return unfit(weight, stack.shape)


def unfit(weight: nn.Parameter, matrices: tuple[int, int, int] | None = None) -> SkipReason | None:
    """What keeps this very parameter from being rotated, whatever the graph. Waits for the device.

    Args:
        matrices: the stack ``[count, m, n]`` as which it is rotated; by default over its last two dimensions.
    """
    if gradient_hooks(weight):
        return SkipReason.GRADIENT_HOOK
    if is_fake(weight):
        return None  # an estimate, which takes weights for such as can be rotated
    moves = weight.detach().reshape(matrices or stacked(weight)).flatten(1).any(1)
    return None if bool(moves.all()) else SkipReason.ZERO


def _stack(weight: nn.Parameter, uses: list[Use], config: PoetxConfig) -> StackLayout:
    """The kernel of a convolution is one flat matrix, any other weight a stack over its last two dimensions."""
    is_kernel = bool(uses) and uses[0].is_convolution
    matrices = (1, weight.shape[0], weight.shape[1:].numel()) if is_kernel else stacked(weight)
    return StackLayout.of(matrices, config.block_size, config.chunk, config.sides)


def _transformed(gm: fx.GraphModule) -> set[fx.Node]:
    """What runs under a transform of ``torch.func``, in checkpointed regions too."""
    found = functorch_nodes(gm)
    for node in gm.graph.nodes:
        region = checkpointed(node)
        if region is not None:
            found |= set(region.graph.nodes) if node in found else _transformed(region)
    return found


def _canonical(weight: nn.Parameter, uses: list[Use], transformed: set[fx.Node]) -> tuple[fx.Node, ...]:
    """The nodes of all uses if each is a product that the rotated op can stand for, else nothing."""
    direct = weight.ndim == 2 and all(use.direct and use.node not in transformed for use in uses)
    canonical = direct and all(_is_canonical(use.node, use.operand) for use in uses)
    return tuple(use.node for use in uses) if canonical else ()


def _is_canonical(node: fx.Node, operand: int | str) -> bool:
    if node.target is MATMUL:
        return operand == 1
    if node.target is ADDMM:
        return operand == 2 and is_bias(node.args[0], node)
    if node.target is LINEAR:
        return operand == 1 and (len(node.args) < 3 or node.args[2] is None or is_bias(node.args[2], node))
    return False


def parameter_name(source: str) -> str:
    """``L['self']._modules['fc']._parameters['weight']`` to ``fc.weight``."""
    steps = re.findall(r"_(?:modules|parameters)\['([^']+)'\]", source)
    if not steps:
        steps = re.findall(r"[A-Za-z_0-9]+", re.sub(r"^[LG]\['self'\]|^[LG]\['(\w+)'\]", "", source)) or [source]
    return ".".join(step for step in steps if step != "_orig_mod")


def all_names(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every name that a module has for each of its parameters, without what ``torch.compile`` adds to it."""
    for name, weight in nn.Module.named_parameters(module, remove_duplicate=False):
        yield name.replace("_orig_mod.", ""), weight


def is_named(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a pattern fits the whole name, or is one of its components."""
    components = name.split(".")
    return any(fnmatch.fnmatchcase(name, pattern) or pattern in components for pattern in patterns)


def is_head(name: str, heads: tuple[str, ...]) -> bool:
    """Whether one of ``heads`` is the module that owns the weight, its place in a container aside (``classifier.1.weight``), or
    one around it, where the name goes through no numbered layer (``head.fc.weight``, not ``sa.heads.0.key.weight``)."""
    path = re.sub(r"(\.\d+)*\.[^.]+$", "", name).split(".")
    candidates = path[-1:] if any(map(str.isdecimal, path)) else name.split(".")
    return any(head in candidates or fnmatch.fnmatchcase(name, head) for head in heads)


def _excluded(parameters: list[tuple[nn.Parameter, str]], patterns: tuple[str, ...]) -> set[int]:
    """Identities of the weights of a graph of which a pattern fits a name: of a tied weight, any that its module has for it."""
    found = {id(weight) for weight, name in parameters if is_named(name, patterns)}
    for module in modules_with(weight for weight, _ in parameters) if patterns else ():
        held = {name: id(weight) for name, weight in all_names(module)}
        here = {id(weight) for weight, name in parameters if held.get(name) == id(weight)}
        found |= {key for name, key in held.items() if key in here and is_named(name, patterns)}
    return found
