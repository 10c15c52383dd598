"""Put the rotated linear op in place of products whose weight takes the Gram route."""

from __future__ import annotations

from torch import Tensor, fx

from .._torch.graphs import add_input, checkpointed
from .._torch.tensors import storage_of, tensors_in
from ..factor import OrthogonalFactor
from ..kernels import LINEAR_VERSION, lean_linear, rotated_linear
from .match import LinearMatch
from .normalize import ADDMM, bias_of, outputs_of

Nodes = dict[str, fx.Node]
Regions = dict[fx.Graph, tuple[fx.Node, fx.GraphModule]]


def rewrite(gm: fx.GraphModule, converted: list[tuple[LinearMatch, OrthogonalFactor]]) -> Added:
    """Replace every use of the given weights in ``gm`` itself and in its checkpointed regions.

    Legal because the op's forward is the product it replaces, bit for bit; only gradients differ.
    """
    added = Added(gm)
    for match, factor in converted:
        inputs = added.of(match.placeholder, factor)
        for use in match.uses:
            _replace(use, inputs.within(use.graph), factor)
    recompile(gm)
    return added


class Added:
    """What a graph takes beside its own inputs.

    Attributes:
        owners: the placeholders of the weights to which it belongs, in order.
        tensors: the values: of each owner its factor's ``inputs``.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.owners: list[fx.Node] = []
        self.tensors: list[Tensor] = []
        self._gm = gm
        self._regions = regions(gm)
        self._inputs: dict[fx.Node, Inputs] = {}

    def of(self, placeholder: fx.Node, factor: OrthogonalFactor) -> Inputs:
        """Those of one weight, added if they are not yet."""
        if placeholder not in self._inputs:
            self._inputs[placeholder] = Inputs(self._gm, self._regions, placeholder.name, factor)
            self.owners.append(placeholder)
            self.tensors.extend(factor.inputs.values())
        return self._inputs[placeholder]


class Inputs:
    """The placeholders of one factor's tensors, in a graph and in its checkpointed regions, which get them handed in."""

    def __init__(self, gm: fx.GraphModule, regions: Regions, name: str, factor: OrthogonalFactor) -> None:
        self._name, self._factor, self._regions = name, factor, regions
        self._nodes = {gm.graph: self._add(gm)}

    def within(self, graph: fx.Graph) -> Nodes:
        """Those of one graph, by the names of ``factor.inputs``."""
        if graph not in self._nodes:
            node, region = self._regions[graph]
            outside = self.within(node.graph)
            self._nodes[graph] = self._add(region)
            node.args = (*node.args, *outside.values())
        return self._nodes[graph]

    def _add(self, gm: fx.GraphModule) -> Nodes:
        inputs = self._factor.inputs
        return {label: add_input(gm, f"poetx_{label}_{self._name}", tensor) for label, tensor in inputs.items()}


def regions(gm: fx.GraphModule) -> Regions:
    """The checkpointed regions of a graph, innermost first, each with the node that runs it."""
    found: Regions = {}
    for node in gm.graph.nodes:
        region = checkpointed(node)
        if region is not None:
            found |= regions(region) | {region.graph: (node, region)}
    return found


def recompile(gm: fx.GraphModule) -> None:
    """Check and compile an edited graph, and its checkpointed regions."""
    for module in (*(region for _, region in regions(gm).values()), gm):
        module.graph.lint()
        module.recompile()


def _replace(use: fx.Node, nodes: Nodes, factor: OrthogonalFactor) -> None:
    bias, (x, weight) = bias_of(use), use.args[1:3] if use.target is ADDMM else use.args[:2]
    widths = (factor.rows.width, factor.columns.width)
    settings = (*widths, factor.config.scale, bool(outputs_of(use)), LINEAR_VERSION)
    runs = (factor.rows.run, factor.columns.run)
    if factor.storage == "folded":
        target, operands = (
            rotated_linear,
            (x, weight, bias, *(nodes[label] for label in ("q", "row_channels", "column_channels"))),
        )
    else:
        target, operands = lean_linear, (x, *stored(nodes), bias, nodes["q"], factor.dtype, factor.precision)
    with use.graph.inserting_before(use):
        new = use.graph.call_function(target, (*operands, *settings, *runs))
        result = use.graph.call_method("clone", (new,)) if _may_be_overwritten(use) else new
    new.meta, result.meta = dict(use.meta), dict(use.meta)
    use.replace_all_uses_with(result)
    use.graph.erase_node(use)


def _may_be_overwritten(use: fx.Node) -> bool:
    """Whether a product's result, which is saved for the backward pass, is written to: here, or where the graph hands it out."""
    value = use.meta.get("example_value")
    if not isinstance(value, Tensor) or value._version:
        return True
    outputs = [node.meta.get("example_value") for node in use.graph.output_node().all_input_nodes]
    return any(storage_of(output) == storage_of(value) for output in tensors_in(outputs))


def stored(nodes: Nodes) -> tuple[fx.Node | None, ...]:
    """What an effective weight is made of, in the order of :class:`.effective.Made`."""
    names = ("stored", "scales", "turned_rows", "row_channels", "turned_columns", "column_channels")
    return tuple(nodes.get(name) for name in names)
