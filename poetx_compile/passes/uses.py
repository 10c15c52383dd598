"""The graph of parameters, views and uses: what matching asks about where a weight goes."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
import torch.nn.functional as F
from torch import fx, nn

_VIEW_METHODS = """
    t transpose permute swapaxes swapdims adjoint view view_as reshape reshape_as flatten unflatten unsqueeze squeeze expand
    expand_as contiguous chunk split unbind narrow select clone to type type_as float half bfloat16 double
"""
_VIEW_FUNCTIONS = (
    *(torch.t, torch.transpose, torch.permute, torch.swapaxes, torch.reshape, torch.flatten, torch.unflatten),
    *(torch.unsqueeze, torch.squeeze, torch.chunk, torch.split, torch.unbind, torch.narrow, torch.select, torch.clone),
    *(torch.cat, torch.concat, torch.stack, operator.getitem),
)
VIEWS = {*_VIEW_METHODS.split(), *_VIEW_FUNCTIONS}
"""Ops that hand on a weight's values, in another shape, order or dtype."""

TRANSPOSED = ("T", "mT", "H", "mH")
"""Attributes that are the transpose of a real matrix."""

EMBEDDINGS = {F.embedding, torch.embedding, F.embedding_bag, torch.embedding_bag, "index_select", torch.index_select}
LOSSES = {F.cross_entropy, torch._C._nn.cross_entropy_loss, F.nll_loss, torch._C._nn.nll_loss_nd}

_PRODUCTS: dict[Any, tuple[int | str, ...]] = {
    torch._C._nn.linear: (1, "weight"),
    **dict.fromkeys(
        (torch.matmul, torch.linalg.matmul, torch.mm, torch.bmm, operator.matmul), (0, 1, "input", "other", "mat2")
    ),
    **dict.fromkeys(("matmul", "mm", "bmm", "__matmul__"), (0, 1, "other", "mat2")),
    **dict.fromkeys((torch.addmm, torch.baddbmm, torch.addbmm), (1, 2, "mat1", "mat2", "batch1", "batch2")),
    **dict.fromkeys(("addmm", "baddbmm", "addbmm"), (1, 2, "mat1", "mat2", "batch1", "batch2")),
    **dict.fromkeys((torch.mv, "mv", torch.tensordot, torch.bilinear), (0, 1)),
    **dict.fromkeys((torch.einsum, torch.functional.einsum), tuple(range(1, 8))),
    F.multi_head_attention_forward: (5, 11, *(f"{of}_proj_weight" for of in ("in", "out", "q", "k", "v"))),
}
"""Products, and where among their operands a weight may stand."""

_LIKE = {"to", "type_as", "view_as", "reshape_as", "expand_as"}
"""Methods that read nothing but the shape or the dtype of their second operand."""

_CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint


@dataclass(frozen=True)
class Use:
    """One place where a weight, or a view of it, meets something else."""

    node: fx.Node
    operand: int | str
    direct: bool

    @property
    def is_embedding(self) -> bool:
        return self.node.target in EMBEDDINGS

    @property
    def is_product(self) -> bool:
        return self.operand in _PRODUCTS.get(self.node.target, ())


class UseGraph:
    """Data flow as a networkx digraph over fx nodes, the subgraphs of higher-order ops included.

    Edges carry ``operand``: the place of the producer among the consumer's positional inputs, or its keyword.
    """

    def __init__(self, gm: fx.GraphModule, inputs: dict[fx.Node, Any]) -> None:
        self.graph: nx.MultiDiGraph[fx.Node] = nx.MultiDiGraph()
        self._add(gm)
        parameters = {node for node, value in inputs.items() if isinstance(value, nn.Parameter)}
        sources = [
            node for node in gm.graph.nodes if not node.all_input_nodes and node.op in ("placeholder", "call_function")
        ]
        self._data: set[fx.Node] = set()
        for source in sources:
            if source not in parameters and source not in self._data:
                self._data |= {source, *nx.descendants(self.graph, source)}

    def _add(self, gm: fx.GraphModule) -> None:
        for node in gm.graph.nodes:
            self.graph.add_node(node)
            for operand, source in _operands(node):
                self.graph.add_edge(source, node, operand=operand)
            self._add_subgraphs(gm, node)

    def _add_subgraphs(self, gm: fx.GraphModule, node: fx.Node) -> None:
        """Join the inputs of a checkpointed region to its subgraph's placeholders, and its output to the op."""
        if node.target is not _CHECKPOINT:
            return
        body, *outside = node.all_input_nodes
        subgraph = getattr(gm, str(body.target))
        self._add(subgraph)
        inside = [inner for inner in subgraph.graph.nodes if inner.op == "placeholder"]
        for outer, inner in zip(outside, inside, strict=True):
            self.graph.add_edge(outer, inner, operand=-1)
        self.graph.add_edge(subgraph.graph.output_node(), node, operand=-1)

    def uses(self, parameter: fx.Node) -> Iterator[Use]:
        """Where the values of a parameter go, looking through views and into subgraphs."""
        seen = {parameter}
        front = [parameter]
        while front:
            node = front.pop()
            for _, user, operand in self.graph.out_edges(node, data="operand"):
                if self._passes_on(user):
                    if user not in seen:
                        seen.add(user)
                        front.append(user)
                elif user.target is not _CHECKPOINT:
                    yield Use(user, operand, node is parameter)

    def _passes_on(self, user: fx.Node) -> bool:
        if user.op in ("placeholder", "output"):
            return user.op == "placeholder"
        return user.target in VIEWS or (user.target is getattr and user.args[1] in TRANSPOSED)

    def has_data(self, use: Use) -> bool:
        """Whether a product's other operands come from anything but parameters."""
        others = [source for source, _, operand in self.graph.in_edges(use.node, data="operand") if operand != use.operand]
        return any(source in self._data for source in others)

    def reaches_loss(self, node: fx.Node, linears: set[fx.Node]) -> bool:
        """Whether a result goes to a classification loss with no other linear layer between."""
        front, seen = [node], {node}
        while front:
            for user in self.graph.successors(front.pop()):
                if user.target in LOSSES:
                    return True
                if user not in seen and user not in linears:
                    seen.add(user)
                    front.append(user)
        return False


def _operands(node: fx.Node) -> Iterator[tuple[int | str, fx.Node]]:
    """The tensors that a node reads, and where they stand; one level of lists counts as so many operands."""
    flat = [item for argument in node.args for item in (argument if isinstance(argument, (list, tuple)) else (argument,))]
    places: list[tuple[int | str, Any]] = [*enumerate(flat), *node.kwargs.items()]
    for operand, argument in places:
        if operand == 0 or node.target not in _LIKE:
            found: list[fx.Node] = []
            fx.node.map_arg(argument, found.append)
            yield from ((operand, source) for source in found if not _is_number(source))


def _is_number(node: fx.Node) -> bool:
    """Whether a node is a symbolic size, which says how large a tensor is and not what stands in it."""
    return isinstance(node.meta.get("example_value"), (torch.SymInt, torch.SymFloat, torch.SymBool, torch.Size))
