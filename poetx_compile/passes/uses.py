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

VIEWS = {
    *("t", "transpose", "permute", "swapaxes", "view", "reshape", "contiguous", "flatten", "unflatten", "unsqueeze", "squeeze"),
    *("expand", "chunk", "split", "unbind", "narrow", "select", "clone", "to", "type", "type_as", "float", "half", "bfloat16"),
    *("double", "view_as", "adjoint"),
    *(torch.t, torch.transpose, torch.permute, torch.swapaxes, torch.reshape, torch.flatten, torch.unsqueeze, torch.squeeze),
    *(torch.chunk, torch.split, torch.unbind, torch.narrow, torch.select, torch.clone, torch.cat, torch.concat, torch.stack),
    *(torch.unflatten, operator.getitem),
}
"""Ops that hand on a weight's values, in another shape, order or dtype."""

EMBEDDINGS = {F.embedding, torch.embedding, F.embedding_bag, torch.embedding_bag, "index_select", torch.index_select}
LOSSES = {F.cross_entropy, torch._C._nn.cross_entropy_loss, F.nll_loss, torch._C._nn.nll_loss_nd}

_PRODUCTS: dict[Any, tuple[int, ...]] = {
    torch._C._nn.linear: (1,),
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm, operator.matmul, "matmul", "mm", "bmm", "__matmul__"), (0, 1)),
    **dict.fromkeys((torch.addmm, torch.baddbmm, torch.addbmm, "addmm", "baddbmm", "addbmm"), (1, 2)),
    **dict.fromkeys((torch.mv, "mv", torch.tensordot, torch.bilinear), (0, 1)),
    **dict.fromkeys((torch.einsum, torch.functional.einsum), tuple(range(1, 8))),
    F.multi_head_attention_forward: tuple(range(5, 40)),
}
"""Products, and the places in their flattened inputs where a weight may stand."""

_CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint


@dataclass(frozen=True)
class Use:
    """One place where a weight, or a view of it, meets something else."""

    node: fx.Node
    operand: int
    direct: bool

    @property
    def is_embedding(self) -> bool:
        return self.node.target in EMBEDDINGS

    @property
    def is_product(self) -> bool:
        return self.operand in _PRODUCTS.get(self.node.target, ())


class UseGraph:
    """Data flow as a networkx digraph over fx nodes, the subgraphs of higher-order ops included.

    Edges carry ``operand``: the place of the producer among the consumer's flattened inputs.
    """

    def __init__(self, gm: fx.GraphModule, inputs: dict[fx.Node, Any]) -> None:
        self.graph: nx.MultiDiGraph[fx.Node] = nx.MultiDiGraph()
        self._add(gm)
        parameters = {node for node, value in inputs.items() if isinstance(value, nn.Parameter)}
        sources = [node for node in gm.graph.nodes if not node.all_input_nodes and node.op in ("placeholder", "call_function")]
        self._data: set[fx.Node] = set()
        for source in sources:
            if source not in parameters and source not in self._data:
                self._data |= {source, *nx.descendants(self.graph, source)}

    def _add(self, gm: fx.GraphModule) -> None:
        for node in gm.graph.nodes:
            self.graph.add_node(node)
            for operand, source in enumerate(_flat_inputs(node)):
                if isinstance(source, fx.Node):
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
        return user.target in VIEWS or (user.target is getattr and user.args[1] in ("T", "mT"))

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


def _flat_inputs(node: fx.Node) -> list[Any]:
    """Arguments in order, one level of lists opened, so that an operand's place is a number."""
    flat: list[Any] = []
    for argument in (*node.args, *node.kwargs.values()):
        flat.extend(argument) if isinstance(argument, (list, tuple)) else flat.append(argument)
    return flat
