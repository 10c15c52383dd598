"""Put the rotated linear op in place of products whose weight takes the Gram route."""

from __future__ import annotations

from torch import Tensor, fx

from .._torch import add_input, checkpointed
from ..factor import OrthogonalFactor
from ..kernels import LINEAR_VERSION, rotated_linear
from .match import LinearMatch
from .normalize import ADDMM, LINEAR

Nodes = list[fx.Node]


def rewrite(gm: fx.GraphModule, converted: list[tuple[LinearMatch, OrthogonalFactor]]) -> list[Tensor]:
    """Replace every use of the given weights in ``gm`` itself and in its checkpointed regions.

    Legal because the op's forward is the product it replaces, bit for bit; only gradients differ.

    Returns:
        The values of the placeholders that were added, in order: each factor's ``inputs``.
    """
    extra: list[Tensor] = []
    regions = _regions(gm)
    for match, factor in converted:
        nodes = {gm.graph: _add_inputs(gm, match, factor)}
        extra.extend(factor.inputs)
        for use in match.uses:
            _replace(use, _inputs_in(use.graph, nodes, regions, match, factor), factor)
    for module in (*(region for _, region in regions.values()), gm):
        module.graph.lint()
        module.recompile()
    return extra


def _regions(gm: fx.GraphModule) -> dict[fx.Graph, tuple[fx.Node, fx.GraphModule]]:
    """The checkpointed regions of a graph, innermost first, each with the node that runs it."""
    found: dict[fx.Graph, tuple[fx.Node, fx.GraphModule]] = {}
    for node in gm.graph.nodes:
        region = checkpointed(node)
        if region is not None:
            found |= _regions(region) | {region.graph: (node, region)}
    return found


def _add_inputs(gm: fx.GraphModule, match: LinearMatch, factor: OrthogonalFactor) -> Nodes:
    name = match.placeholder.name
    return [add_input(gm, f"poetx_{label}_{name}", tensor) for label, tensor in zip(("q", "rows", "columns"), factor.inputs)]


def _inputs_in(
    graph: fx.Graph,
    nodes: dict[fx.Graph, Nodes],
    regions: dict[fx.Graph, tuple[fx.Node, fx.GraphModule]],
    match: LinearMatch,
    factor: OrthogonalFactor,
) -> Nodes:
    """A factor's placeholders in one graph; those of a region are handed in from the graph around it."""
    if graph not in nodes:
        node, region = regions[graph]
        outside = _inputs_in(node.graph, nodes, regions, match, factor)
        nodes[graph] = _add_inputs(region, match, factor)
        node.args = (*node.args, *outside)
    return nodes[graph]


def _replace(use: fx.Node, nodes: Nodes, factor: OrthogonalFactor) -> None:
    bias, (x, weight) = None, use.args[:2]
    if use.target is ADDMM:
        bias, x, weight = use.args[:3]
    elif use.target is LINEAR and len(use.args) > 2:
        bias = use.args[2]
    widths = (factor.rows.width, factor.columns.width)
    settings = (*widths, factor.config.scale, use.target is not LINEAR, LINEAR_VERSION)
    runs = (factor.rows.run, factor.columns.run)
    with use.graph.inserting_before(use):
        new = use.graph.call_function(rotated_linear, (x, weight, bias, *nodes, *settings, *runs))
    new.meta = dict(use.meta)
    use.replace_all_uses_with(new)
    use.graph.erase_node(use)
