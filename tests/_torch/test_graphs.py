"""What Dynamo captures, and how it is copied, edited and read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from captured import Compiled, Net, capture, placeholders
from torch import Tensor, fx, nn
from torch._higher_order_ops import map as control_map
from torch._higher_order_ops import scan
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from poetx_compile._torch.compilers import compile_with_aot_eager, compile_with_inductor
from poetx_compile._torch.graphs import (
    WEIGHT_NORM,
    add_input,
    bodies,
    checkpointed,
    context_function,
    copy_graph,
    fake_beside,
    functorch_nodes,
    live_inputs,
    source_name,
)
from poetx_compile._torch.tensors import fake_tensors, is_fake


def test_copy_graph_keeps_what_dynamo_needs() -> None:
    def check(gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        copied = copy_graph(gm)
        sources = [node._dynamo_source for node in placeholders(gm)]
        assert all(source is not None for source in sources)
        assert [node._dynamo_source for node in placeholders(copied)] == sources
        assert [source_name(node) for node in placeholders(copied)] == [source.name for source in sources]
        assert copied._param_name_to_source == gm._param_name_to_source
        assert copied.meta == gm.meta
        assert copied.meta is not gm.meta
        return copied.forward

    net, x = Net(), torch.ones(2, 3)
    torch.testing.assert_close(torch.compile(net, backend=check)(x), net(x))


def test_copy_graph_leaves_the_original_untouched() -> None:
    gm, inputs = capture(Net(), torch.ones(2, 3))
    code, nodes, expected = gm.code, len(gm.graph.nodes), gm(*inputs)
    copied = copy_graph(gm)
    for node in copied.graph.nodes:
        if node.target is F.relu:
            node.target, node.kwargs = torch.neg, {}
    add_input(copied, "extra", torch.ones(1))
    copied.recompile()
    gm.recompile()
    assert (gm.code, len(gm.graph.nodes)) == (code, nodes)
    assert len(copied.graph.nodes) == nodes + 1
    torch.testing.assert_close(gm(*inputs), expected)


def test_source_name_says_where_a_parameter_lives() -> None:
    names: dict[str, Any] = {}

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        names.update({source_name(node): value for node, value in zip(placeholders(gm), inputs)})
        return gm.forward

    net, x = Net(), torch.ones(2, 3)
    torch.compile(net, backend=backend)(x)
    assert names["L['self']._modules['fc']._parameters['weight']"] is net.fc.weight
    assert names["L['x']"] is x


def test_source_name_of_a_graph_that_dynamo_did_not_make() -> None:
    gm = fx.symbolic_trace(torch.nn.ReLU())
    assert [source_name(node) for node in placeholders(gm)] == ["input_1"]


@pytest.mark.parametrize("transform", [torch.func.vmap, lambda f: torch.func.grad(lambda x: f(x).sum())])
def test_functorch_nodes_are_those_under_a_transform(transform: Callable[..., Any]) -> None:
    gm, _ = capture(lambda x: torch.cos(transform(torch.sin)(torch.tan(x))), torch.ones(2, 3))
    inside = functorch_nodes(gm)
    calls = {node.target: node in inside for node in gm.graph.nodes}
    assert (calls[torch.tan], calls[torch.sin], calls[torch.cos]) == (False, True, False)


@pytest.mark.parametrize(
    ("call", "count"),
    [
        (lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)), 2),
        (lambda x: checkpoint(torch.sin, x, use_reentrant=False), 1),
        (lambda x: scan(lambda s, t: (s + t, s.sin()), torch.zeros(3), x)[1], 1),
        (lambda x: control_map(torch.sin, x), 1),
        (lambda x: torch.nn.attention.flex_attention.flex_attention(*[x[None, None]] * 3), 0),
        (torch.sin, 0),
    ],
    ids=["cond", "checkpoint", "scan", "map", "flex_attention", "no higher-order op"],
)
def test_bodies_take_the_last_operands(call: Callable[..., Any], count: int) -> None:
    gm, _ = capture(lambda x: call(x.tan()), torch.ones(2, 3))
    found = [body for node in gm.graph.nodes for body in bodies(node)]
    assert len(found) == count
    for body in found:
        assert any(node.target in (torch.sin, torch.cos, "sin") for node in body.graph.nodes)


def test_a_checkpointed_region_is_copied_with_its_graph() -> None:
    gm, _ = capture(lambda x: checkpoint(torch.sin, x.tan(), use_reentrant=False), torch.ones(2, 3))
    regions = [
        [region for node in module.graph.nodes if (region := checkpointed(node)) is not None]
        for module in (gm, copy_graph(gm))
    ]
    ((original,), (copied,)) = regions
    assert copied is not original
    assert copied.graph is not original.graph
    assert [node.target for node in copied.graph.nodes] == [node.target for node in original.graph.nodes]
    x = torch.ones(2, 3)
    assert torch.equal(copy_graph(gm)(x)[0], gm(x)[0])


def test_a_selective_checkpoint_keeps_its_decision_with_its_region() -> None:
    def decide() -> Any:
        return create_selective_checkpoint_contexts([])

    x = torch.ones(3, requires_grad=True)
    for given in ({}, {"context_fn": decide}):
        gm, _ = capture(functools.partial(checkpoint, torch.sin, use_reentrant=False, **given), x)
        (region,) = [found for node in gm.graph.nodes if (found := checkpointed(node)) is not None]
        assert context_function(region) is given.get("context_fn")
        (copied,) = [found for node in copy_graph(gm).graph.nodes if (found := checkpointed(node)) is not None]
        assert context_function(copied) is given.get("context_fn")


def test_weight_norm_takes_the_direction_first() -> None:
    direction, magnitude = torch.randn(3, 4), torch.randn(3, 1)
    torch.testing.assert_close(WEIGHT_NORM(direction, magnitude, 0), F.normalize(direction) * magnitude)
    gm, _ = capture(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), torch.ones(2, 3))
    assert WEIGHT_NORM in {node.target for node in gm.graph.nodes}


@pytest.mark.usefixtures("process_group")
def test_pieces_of_a_graph_have_fake_inputs_with_live_ones_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1)
    pieces: list[dict[str, Tensor]] = []
    calls: list[bool] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        live = live_inputs(gm, inputs)
        assert [value.shape for value in live] == [value.shape for value in inputs]
        weights = [(value, shown) for value, shown in zip(live, inputs) if isinstance(value, nn.Parameter)]
        pieces.append({source_name(node): value for node, value in zip(placeholders(gm), live)})
        assert all(is_fake(shown) and not is_fake(value) for value, shown in weights)
        (beside,) = fake_beside(gm, [weights[0][0]], inputs)
        assert is_fake(beside) and beside.fake_mode is weights[0][1].fake_mode
        compiled = compile_with_aot_eager(gm, inputs)

        def run(*args: Any) -> Any:
            calls.append(is_fake(args[0]))
            return compiled(*args)

        return run

    class Nets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Net(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    nets = Nets()
    wrapped = DistributedDataParallel(nets, bucket_cap_mb=1e-5)
    x = torch.ones(2, 3)
    result = torch.compile(wrapped, backend=backend)(x)
    torch.testing.assert_close(result, nets(x))
    assert len(pieces) == 2
    assert calls == [True, True, False, False]
    live = {id(value) for piece in pieces for value in piece.values()}
    assert {id(parameter) for parameter in nets.parameters()} <= live


def test_outside_pieces_inputs_are_live() -> None:
    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        assert all(a is b for a, b in zip(live_inputs(gm, inputs), inputs, strict=True))
        assert not any(is_fake(value) for value in inputs)
        extra = torch.ones(3)
        assert fake_beside(gm, [extra], inputs)[0] is extra
        return gm.forward

    torch.compile(Net(), backend=backend)(torch.ones(2, 3))


def test_an_input_may_have_no_values_yet() -> None:
    """Inductor compiles for what a tensor will be, and runs with what it is by then."""
    with fake_tensors():
        promised = torch.empty(4, 4)
    assert is_fake(promised)

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        edited = copy_graph(gm)
        extra = add_input(edited, "extra", promised)
        (output,) = [node for node in edited.graph.nodes if node.op == "output"]
        with edited.graph.inserting_before(output):
            product = edited.graph.call_function(torch.matmul, (output.args[0][0], extra))
        output.args = ((product, *output.args[0][1:]),)
        edited.recompile()
        live = torch.ones(4, 4)
        shown = fake_beside(edited, [promised, live], inputs)
        assert (shown[0].shape, shown[0].device, shown[1] is live) == ((4, 4), torch.device("cpu"), True)
        compiled = compile_with_inductor(edited, [*inputs, shown[0]], {})
        return lambda *args: compiled(*args, torch.full((4, 4), 3.0))

    net, x = Net(), torch.ones(2, 3)
    torch.testing.assert_close(torch.compile(net, backend=backend)(x), net(x) @ torch.full((4, 4), 3.0))
