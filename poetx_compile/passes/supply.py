"""Take the parameters of lean weights out of a graph: they hold nothing. What a product does not make for itself is made here."""

from __future__ import annotations

import torch
from torch import fx

from .._torch.graphs import checkpointed, functorch_nodes
from ..errors import PoetxError
from ..factor import OrthogonalFactor
from ..kernels import LINEAR_VERSION, effective, lean_weight
from .rewrite import Added, Inputs, Nodes, recompile, regions, stored
from .uses import handed_on

Lean = tuple[fx.Node, OrthogonalFactor]


def supply(gm: fx.GraphModule, lean: list[Lean], added: Added) -> None:
    """Put effective weights in the place of placeholders that are still used, and erase all of them.

    Each is made before its first use, in checkpointed regions too. Gradients reach ``q`` by the dense route.

    Args:
        lean: placeholders of ``gm``, each with its factor.
        added: by :func:`rewrite`; takes up the ``inputs`` of factors that it lacks.

    Raises:
        PoetxError: the graph writes to one of these weights.
    """
    for placeholder, factor in lean:
        if placeholder.users:
            _supply(placeholder, added.of(placeholder, factor), gm, factor)
        gm.graph.erase_node(placeholder)
    if lean:
        recompile(gm)


def _supply(weight: fx.Node, inputs: Inputs, gm: fx.GraphModule, factor: OrthogonalFactor) -> None:
    nodes = inputs.within(weight.graph)
    runs = [node for node, _ in regions(gm).values()]
    users = []
    for user in list(weight.users):
        region = checkpointed(user)
        if region is None or sum(checkpointed(node) is region for node in runs) > 1:
            users.append(user)
            continue
        for outer, inner in handed_on(user, region):
            if outer is weight:
                _supply(inner, inputs, gm, factor)
        user.replace_input_with(weight, nodes["q"])
    if not users:
        return
    for user in users:
        if _is_write(user, weight):
            raise PoetxError(
                f"poetx: compiled code writes to '{factor.name}', which is stored lean; write to it outside torch.compile, or "
                f"leave it out with options={{'exclude': ['{factor.name}']}}"
            )
    order = {node: place for place, node in enumerate(weight.graph.nodes)}
    first = min(users, key=order.__getitem__)
    transformed = functorch_nodes(gm)
    if transformed:
        first = next(node for node in weight.graph.nodes if node.op != "placeholder")
    with weight.graph.inserting_before(first):
        made = _make(weight.graph, nodes, factor)
    made.meta = {key: value for key, value in weight.meta.items() if key == "example_value"}
    for user in users:
        user.replace_input_with(weight, made)


def _make(graph: fx.Graph, nodes: Nodes, factor: OrthogonalFactor) -> fx.Node:
    dtype, run, precision = factor.dtype, factor.columns.run, factor.precision
    if not (torch.is_grad_enabled() and factor.weight.requires_grad):
        return graph.call_function(effective, (*stored(nodes), dtype, run, precision))
    sides = factor.rows, factor.columns
    settings = (*(side.width for side in sides), factor.config.scale, LINEAR_VERSION, *(side.run for side in sides))
    return graph.call_function(lean_weight, (*stored(nodes), nodes["q"], dtype, precision, *settings))


def _is_write(user: fx.Node, weight: fx.Node) -> bool:
    name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
    is_in_place = (name.endswith("_") and not name.endswith("__")) or name in ("setitem", "iadd", "isub", "imul", "itruediv")
    return (is_in_place and user.args[:1] == (weight,)) or user.kwargs.get("out") is weight
