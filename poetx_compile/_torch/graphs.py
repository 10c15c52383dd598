"""The graphs that Dynamo captures: how they are copied and edited, and what their nodes stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from .tensors import is_fake


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """Copy a captured graph for editing: Dynamo walks its own again after the backend returns.

    So are checkpointed regions; the subgraphs of other higher-order ops stay shared with the original.
    """
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, env)
    graph.output(output)
    for old, new in env.items():
        if old.op == "placeholder":
            new._dynamo_source = getattr(old, "_dynamo_source", None)  # type: ignore[attr-defined]
    copy = fx.GraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    for node in graph.nodes:
        region = checkpointed(node)
        if region is not None:
            setattr(copy, node.args[0].target, copy_graph(region))
    if hasattr(gm, "_param_name_to_source"):
        copy._param_name_to_source = gm._param_name_to_source
    return copy


def checkpointed(node: fx.Node) -> fx.GraphModule | None:
    """The region that an activation checkpoint runs on all its other operands; None if the node is no checkpoint."""
    if node.target is not torch.ops.higher_order.tag_activation_checkpoint:
        return None
    (region,) = bodies(node)
    return region


def context_function(region: fx.GraphModule) -> Callable[..., Any] | None:
    """What decides which results of a checkpointed region are kept, where the user gave that decision to ``context_fn``."""
    return region.meta.get("_checkpoint_context_fn")


def add_input(gm: fx.GraphModule, name: str, tensor: Tensor) -> fx.Node:
    """Append a placeholder for a long-lived tensor, whose storage never moves, after all others."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    examples = [node.meta["example_value"] for node in placeholders if "example_value" in node.meta]
    fake_mode = torch._guards.detect_fake_mode(examples)
    with gm.graph.inserting_after(placeholders[-1]):
        node = gm.graph.placeholder(name)
    node._dynamo_source = None  # type: ignore[attr-defined]
    node.meta["example_value"] = tensor if fake_mode is None else _fake(tensor, fake_mode)
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    return node


def live_inputs(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """The tensors behind a graph's example inputs, which are fake where DistributedDataParallel had the graph cut in pieces."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    return [
        node.meta["grapharg"].example if is_fake(value) and "grapharg" in node.meta else value
        for node, value in zip(placeholders, inputs)
    ]


def fake_beside(gm: fx.GraphModule, tensors: Sequence[Tensor], inputs: Sequence[Any]) -> list[Tensor]:
    """What :func:`add_input` was given, as a compiler is to see it: fake if one of ``inputs`` is, or where it has no values yet."""
    mode = next((value.fake_mode for value in inputs if is_fake(value)), None)
    if mode is None and any(map(is_fake, tensors)):
        mode = torch._guards.detect_fake_mode([node.meta.get("example_value") for node in gm.graph.nodes])
        return [_fake(tensor, mode) if is_fake(tensor) else tensor for tensor in tensors]
    return list(tensors) if mode is None else [_fake(tensor, mode) for tensor in tensors]


def _fake(tensor: Tensor, mode: Any) -> Tensor:
    if not is_fake(tensor):
        return mode.from_tensor(tensor, static_shapes=True)
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


@contextmanager
def fake_inputs(gm: fx.GraphModule, live: Sequence[Any]) -> Iterator[tuple[Any, list[Any]]]:
    """Within a backend's call, a fake mode beside Dynamo's, and a graph's inputs in it, of the sizes that they have now.

    Args:
        gm: a copy. Where it reads the number in a tensor, it gets that number.
        live: as :func:`live_inputs` finds them.
    """
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    for node, value in zip([node for node in gm.graph.nodes if node.op == "placeholder"], live):
        for user in list(node.users):
            if isinstance(value, Tensor) and value.ndim == 0 and (user.op, user.target) == ("call_method", "item"):
                user.replace_all_uses_with(value.item())
                gm.graph.erase_node(user)
    gm.recompile()
    fake = FakeTensorMode(shape_env=ShapeEnv())
    with torch._guards.tracing(torch._guards.TracingContext(fake)):
        yield fake, [_fake_input(fake, value) for value in live]


def _fake_input(fake: Any, value: Any) -> Any:
    if isinstance(value, Tensor):
        return fake.from_tensor(value, static_shapes=True)
    return value.node.hint if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) else value


def source_name(placeholder: fx.Node) -> str:
    """Dynamo's expression for where an input comes from, such as ``L['self']._modules['fc']._parameters['weight']``."""
    grapharg = placeholder.meta.get("grapharg")
    if grapharg is None:
        return placeholder.name
    name = grapharg.source.name
    return name() if callable(name) else name


def functorch_nodes(gm: fx.GraphModule) -> set[fx.Node]:
    """What runs under ``vmap``, ``grad``, ``jvp`` and their like, where custom backwards without a vmap rule fail."""
    inside: set[fx.Node] = set()
    depth = 0
    for node in gm.graph.nodes:
        name = getattr(node.target, "__name__", "")
        depth += name.endswith("_increment_nesting") - name.endswith("_decrement_nesting")
        if depth:
            inside.add(node)
    return inside


WEIGHT_NORM = torch._weight_norm
"""What both of torch's weight norms call on the direction of a weight, first, and on its magnitudes."""


_WITH_BODIES = {"tag_activation_checkpoint", "invoke_subgraph", "map_impl", "scan", "cond"}


def bodies(node: fx.Node) -> list[fx.GraphModule]:
    """The subgraphs that a higher-order op runs on its last operands; none if it is another op."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator) or node.target.name() not in _WITH_BODIES:
        return []
    return [
        getattr(node.graph.owning_module, str(source.target)) for source in node.all_input_nodes if source.op == "get_attr"
    ]
