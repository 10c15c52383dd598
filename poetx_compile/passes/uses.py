"""The graph of parameters, views and uses: what matching asks about where a weight goes."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
import torch.nn.functional as F
from torch import fx, nn

from .._torch.graphs import WEIGHT_NORM, bodies, checkpointed

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

_TRANSPOSED = ("T", "mT", "H", "mH")
_TRANSPOSES = {torch.ops.aten.numpy_T, torch.ops.aten.mT, torch.ops.aten.matrix_H, torch.ops.aten.mH}
"""Attributes that are the transpose of a real matrix, and the operations as which torch 2.14 captures them."""

EMBEDDINGS = {F.embedding, torch.embedding, F.embedding_bag, torch.embedding_bag, "index_select", torch.index_select}
CONVOLUTIONS = {
    *(torch.conv1d, torch.conv2d, torch.conv3d),
    *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
}
LOSSES = {F.cross_entropy, torch._C._nn.cross_entropy_loss, F.nll_loss, torch._C._nn.nll_loss_nd}

_PRODUCTS: dict[Any, tuple[int | str, ...]] = {
    torch._C._nn.linear: (1, "weight"),
    **dict.fromkeys(
        (torch.matmul, torch.linalg.matmul, torch.mm, torch.bmm, operator.matmul), (0, 1, "input", "other", "mat2")
    ),
    **dict.fromkeys(("matmul", "mm", "bmm", "__matmul__"), (0, 1, "other", "mat2")),
    **dict.fromkeys((torch.addmm, torch.baddbmm, torch.addbmm), (1, 2, "mat1", "mat2", "batch1", "batch2")),
    **dict.fromkeys(("addmm", "baddbmm", "addbmm"), (1, 2, "mat1", "mat2", "batch1", "batch2")),
    **dict.fromkeys((torch.mv, "mv", torch.tensordot), (0, 1)),
    torch.bilinear: (2, "weight"),
    **dict.fromkeys((torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell), (2, 3)),
    torch.lstm_cell: (3, 4),
    **dict.fromkeys((torch.einsum, torch.functional.einsum), tuple(range(1, 8))),
    F.multi_head_attention_forward: (5, 11, *(f"{of}_proj_weight" for of in ("in", "out", "q", "k", "v"))),
}
"""Products, and where among their operands a weight may stand."""

_GROUPED_PRODUCTS = {"_grouped_mm", "grouped_mm", "grouped_mm_fallback"}
"""Products of experts, by name: torch moves its own about, and 🤗 transformers registers one for other dtypes."""

_SCALINGS = {operator.mul, torch.mul, "mul", "__mul__", "__rmul__"}
_DIVISIONS = {operator.truediv, torch.div, "div", "__truediv__"}

_LIKE = {"to", "type_as", "view_as", "reshape_as", "expand_as"}
"""Methods that read nothing but the shape or the dtype of their second operand."""


@dataclass(frozen=True)
class Use:
    """One place where a weight, or a view of it, meets something else; ``direct`` if it is the weight itself."""

    node: fx.Node
    operand: int | str
    direct: bool

    @property
    def is_embedding(self) -> bool:
        return self.node.target in EMBEDDINGS or _is_lookup(self.node)

    @property
    def is_product(self) -> bool:
        if getattr(self.node.target, "__name__", "").split(".")[0] in _GROUPED_PRODUCTS:
            return self.operand in (1, "weight", "mat_b")
        return self.operand in _PRODUCTS.get(self.node.target, ())

    @property
    def is_convolution(self) -> bool:
        return self.node.target in CONVOLUTIONS and self.operand in (1, "weight")

    @property
    def is_grouped(self) -> bool:
        """Whether a convolution has several groups, whose kernels are the blocks of a larger one."""
        groups = self.node.args[6] if len(self.node.args) > 6 else self.node.kwargs.get("groups", 1)
        return self.is_convolution and bool(groups != 1)


class UseGraph:
    """Data flow as a networkx digraph over fx nodes, the subgraphs of higher-order ops included.

    Edges carry ``operand``: the place of the producer among the consumer's positional inputs, or its keyword.
    """

    def __init__(self, gm: fx.GraphModule, inputs: dict[fx.Node, Any]) -> None:
        self.graph: nx.MultiDiGraph[fx.Node] = nx.MultiDiGraph()
        self._checkpoints: Counter[fx.Graph] = Counter()
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
            for body in bodies(node):
                self._add_body(body, node)
            region = checkpointed(node)
            if region is not None:
                self._checkpoints[region.graph] += 1

    def _add_body(self, body: fx.GraphModule, node: fx.Node) -> None:
        """Join the last operands of a higher-order op to its subgraph's placeholders, and the subgraph's output to the op."""
        self._add(body)
        for outer, inner in handed_on(node, body):
            self.graph.add_edge(outer, inner, operand=-1)
        self.graph.add_edge(body.graph.output_node(), node, operand=-1)

    def uses(self, parameter: fx.Node) -> Iterator[Use]:
        """Where the values of a parameter go, looking through views and into subgraphs."""
        seen, itself = {parameter}, {parameter}
        front = [parameter]
        while front:
            node = front.pop()
            for _, user, operand in self.graph.out_edges(node, data="operand"):
                if self._passes_on(user, operand):
                    if user not in seen:
                        seen.add(user)
                        front.append(user)
                    if user.op == "placeholder" and self._checkpoints[user.graph] == 1 and node in itself:
                        itself.add(user)
                elif not bodies(user):
                    yield Use(user, operand, node in itself)

    def _passes_on(self, user: fx.Node, operand: int | str) -> bool:
        if user.op in ("placeholder", "output"):
            return user.op == "placeholder"
        if user.target is WEIGHT_NORM:
            return operand == 0
        if user.target in _SCALINGS or (user.target in _DIVISIONS and operand == 0):
            return not user.kwargs and all(_is_scalar(other) for place, other in enumerate(user.args) if place != operand)
        if is_transposed_attribute(user):
            return True
        return user.target in VIEWS and not _is_lookup(user)

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


def is_transposed_attribute(node: fx.Node) -> bool:
    """Whether a node reads the transpose that a tensor has as an attribute."""
    return node.target in _TRANSPOSES or (node.target is getattr and node.args[1] in _TRANSPOSED)


def handed_on(node: fx.Node, body: fx.GraphModule) -> list[tuple[fx.Node, fx.Node]]:
    """What a higher-order op hands to the placeholders of its subgraph: its last operands. Nothing if they are too few."""
    inside = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
    outside: list[fx.Node] = []
    fx.node.map_arg(node.args, outside.append)
    return list(zip(outside[len(outside) - len(inside) :], inside)) if len(outside) >= len(inside) else []


def _operands(node: fx.Node) -> Iterator[tuple[int | str, fx.Node]]:
    """The tensors that a node reads, and where they stand; one level of lists counts as so many operands."""
    flat = [item for argument in node.args for item in (argument if isinstance(argument, (list, tuple)) else (argument,))]
    places: list[tuple[int | str, Any]] = [*enumerate(flat), *node.kwargs.items()]
    for operand, argument in places:
        if operand == 0 or node.target not in _LIKE:
            found: list[fx.Node] = []
            fx.node.map_arg(argument, found.append)
            yield from ((operand, source) for source in found if not _is_number(source))


def _is_lookup(node: fx.Node) -> bool:
    """Whether a node picks rows of a matrix by a tensor of their numbers, as embeddings do."""
    if node.target is not operator.getitem:
        return False
    source, index = node.args
    found: list[fx.Node] = []
    fx.node.map_arg(index, found.append)
    shape = getattr(source.meta.get("example_value"), "shape", ()) if isinstance(source, fx.Node) else ()
    return len(shape) == 2 and not all(_is_number(part) for part in found)


def _is_scalar(factor: Any) -> bool:
    """Whether a factor scales a weight as a whole."""
    if not isinstance(factor, fx.Node) or _is_number(factor):
        return True
    value = factor.meta.get("example_value")
    return isinstance(value, torch.Tensor) and all(size == 1 for size in value.shape)


def _is_number(node: fx.Node) -> bool:
    """Whether a node is a symbolic size, which says how large a tensor is and not what stands in it."""
    return isinstance(node.meta.get("example_value"), (torch.SymInt, torch.SymFloat, torch.SymBool, torch.Size))
