"""Bring every spelling of a linear layer to one of three: ``F.linear(x, W, c)``, ``matmul(x, W)``, ``addmm(c, x, W)``.

Legal because only weights are looked through, never activations: ``x @ W.t()`` and ``F.linear(x, W)`` are one product of the
same operands, for a two-dimensional ``W`` and any ``x`` with at least one dimension.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from .._torch.graphs import checkpointed
from .uses import handed_on, is_transposed_attribute

LINEAR = torch._C._nn.linear
MATMUL = torch.matmul
ADDMM = torch.addmm

_PRODUCTS = {torch.matmul, torch.linalg.matmul, torch.mm, operator.matmul, "matmul", "mm", "__matmul__", "__rmatmul__"}


def normalize(gm: fx.GraphModule, inputs: dict[fx.Node, Any]) -> fx.GraphModule:
    """Rewrite products with a weight, transposed or not, in ``gm`` itself and in its checkpointed regions.

    Args:
        gm: a graph that may be edited.
        inputs: the value of each placeholder.
    """
    weights = {node for node, value in inputs.items() if isinstance(value, nn.Parameter) and value.ndim == 2}
    for node in list(gm.graph.nodes):
        region = checkpointed(node)
        if region is not None:
            normalize(region, {inner: inputs.get(outer) for outer, inner in handed_on(node, region)})
        canonical = _canonical(node, weights)
        if canonical is None:
            continue
        target, arguments = canonical
        sources = node.all_input_nodes
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(target, arguments)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
        for source in sources:
            if not source.users and _is_transpose(source):
                gm.graph.erase_node(source)
    return gm


def outputs_of(use: fx.Node) -> int:
    """The dimension of its weight along which the outputs of a product in canonical form lie."""
    return 0 if use.target is LINEAR else 1


def bias_of(use: fx.Node) -> Any:
    """What a product in canonical form adds; None if nothing."""
    if use.target is ADDMM:
        return use.args[0]
    return use.args[2] if use.target is LINEAR and len(use.args) > 2 else None


def _canonical(node: fx.Node, weights: set[fx.Node]) -> tuple[Any, tuple[Any, ...]] | None:
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target is LINEAR:
        x, weight, bias = _bind(node, ("input", "weight", "bias"))
        return (LINEAR, (x, weight, bias)) if weight in weights and (node.kwargs or len(node.args) < 3) else None
    if node.target in _PRODUCTS:
        x, right = _bind(node, ("input", "other"))
        if node.target == "__rmatmul__":
            x, right = right, x
        if node.target in (torch.mm, "mm") and "mat2" in node.kwargs:
            right = node.kwargs["mat2"]
        if not isinstance(x, fx.Node) or not isinstance(right, fx.Node) or x in weights or "out" in node.kwargs:
            return None
        if right in weights:
            return (MATMUL, (x, right)) if node.target is not MATMUL or node.kwargs else None
        weight = _untransposed(right, weights)
        return None if weight is None else (LINEAR, (x, weight, None))
    if node.target in (torch.addmm, "addmm"):
        bias, x, right = _bind(node, ("input", "mat1", "mat2"))
        if set(node.kwargs) - {"input", "mat1", "mat2"} or x in weights or not is_bias(bias, node):
            return None
        if right in weights:
            return (ADDMM, (bias, x, right)) if node.target is not ADDMM or node.kwargs else None
        weight = _untransposed(right, weights)
        return None if weight is None else (LINEAR, (x, weight, bias))
    return None


def _bind(node: fx.Node, names: tuple[str, ...]) -> list[Any]:
    positional = list(node.args[: len(names)])
    return positional + [node.kwargs.get(name) for name in names[len(positional) :]]


def _untransposed(node: fx.Node, weights: set[fx.Node]) -> fx.Node | None:
    """The weight whose transpose ``node`` is, if any."""
    source = node.args[0] if _is_transpose(node) else None
    return source if isinstance(source, fx.Node) and source in weights else None


def _is_transpose(node: fx.Node) -> bool:
    """Whether a node swaps the two dimensions of a matrix."""
    if node.op not in ("call_function", "call_method"):
        return False
    arguments = node.args[1:]
    if is_transposed_attribute(node):
        return True
    if node.target in ("t", torch.t, "adjoint"):
        return not arguments
    if node.target in ("transpose", torch.transpose, "swapaxes", torch.swapaxes, "swapdims", torch.swapdims):
        return sorted(_dimension(d) for d in arguments) == [0, 1] and not node.kwargs
    if node.target in ("permute", torch.permute):
        order: Any = arguments[0] if len(arguments) == 1 else arguments
        return [_dimension(d) for d in order] == [1, 0]
    return False


def _dimension(index: Any) -> int:
    return index % 2 if isinstance(index, int) and -2 <= index < 2 else -1


def is_bias(node: Any, product: fx.Node) -> bool:
    """Whether a node holds one number for each output feature of a product: no broadcasting."""
    shapes = [getattr(of.meta.get("example_value"), "shape", ()) for of in (node, product) if isinstance(of, fx.Node)]
    return len(shapes) == 2 and len(shapes[0]) == 1 and shapes[0] == shapes[1][-1:]
