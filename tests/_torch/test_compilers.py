"""What Inductor and AOTAutograd take, and what is seen while they run."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from captured import Backend, Compiled, Net, placeholders
from torch import Tensor, fx, nn
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._subclasses.fake_tensor import is_fake

from poetx_compile._torch.compilers import (
    activation_budget,
    compile_with_aot_eager,
    compile_with_inductor,
    global_state_check,
    graph_break,
    inductor_modes,
    inductor_option_names,
    inductor_option_type,
    is_tracing,
    partition_with_inductor,
    run_once,
)
from poetx_compile._torch.graphs import add_input, copy_graph, fake_inputs, live_inputs
from poetx_compile._torch.tensors import fake_tensors


def adding(extra: Tensor, compiler: Backend) -> Backend:
    """A backend that adds a tensor to the result of a graph, as a new input."""

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        copied = copy_graph(gm)
        node = add_input(copied, "extra", extra)
        assert placeholders(copied)[-1] is node
        assert is_fake(node.meta["example_value"])
        assert node.meta["example_value"].shape == extra.shape
        output = copied.graph.output_node()
        with copied.graph.inserting_before(output):
            output.args = ((copied.graph.call_function(torch.add, (output.args[0][0], node)),),)
        copied.recompile()
        compiled = compiler(copied, [*inputs, extra])
        return lambda *args: compiled(*args, extra)

    return backend


def check_that_an_added_input_trains(compiler: Backend) -> None:
    net, x = Net(), torch.randn(2, 3)
    extra = torch.randn(2, 4, requires_grad=True)
    expected = net(x) + extra
    result = torch.compile(net, backend=adding(extra, compiler))(x)
    torch.testing.assert_close(result, expected)
    got = torch.autograd.grad(result.square().sum(), (net.fc.weight, extra))
    torch.testing.assert_close(got, torch.autograd.grad(expected.square().sum(), (net.fc.weight, extra)))


def test_aot_eager_trains_an_added_input() -> None:
    check_that_an_added_input_trains(compile_with_aot_eager)


def test_inductor_trains_an_added_input_and_takes_patches() -> None:
    seen: list[fx.Graph] = []
    patches = {"pre_grad_custom_pass": seen.append}
    check_that_an_added_input_trains(lambda gm, inputs: compile_with_inductor(gm, inputs, patches))
    assert len(seen) == 1


def test_inductor_hands_out_both_graphs_before_it_compiles() -> None:
    graphs: list[tuple[fx.GraphModule, bool, Sequence[int]]] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        return partition_with_inductor(gm, inputs, lambda *graph: graphs.append(graph))

    with fake_tensors():
        net = Net()
        y = torch.compile(net, backend=backend)(torch.zeros(5, 3))
        assert y.shape == (5, 4)
        y.sum().backward()
        assert net.fc.weight.grad.shape == (4, 3)
    (forward, is_backward, lasting), (backward, last_is_backward, _) = graphs
    assert (is_backward, last_is_backward) == (False, True)
    inputs = [node.meta["val"].shape for node in placeholders(forward)]
    assert sorted(tuple(inputs[index]) for index in lasting) == [(4,), (4, 3)]
    names = [node.name for node in placeholders(backward)]
    assert names[-1].startswith("tangents")
    assert all("val" in node.meta for node in placeholders(backward))


def test_inductor_hands_out_both_graphs_within_a_call_of_dynamos_and_leaves_that_alone() -> None:
    """Of a model whose sizes are symbolic there, and numbers here; a number in a tensor is itself."""
    graphs: list[tuple[fx.GraphModule, bool, Sequence[int]]] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        context = torch._guards.TracingContext.try_get()
        copied = copy_graph(gm)
        with fake_inputs(copied, live_inputs(gm, inputs)) as (fake, shown):
            assert torch._guards.detect_fake_mode(shown) is fake
            assert all(type(size) is int for value in shown if torch.is_tensor(value) for size in value.shape)
            partition_with_inductor(copied, shown, lambda *graph: graphs.append(graph))
        assert torch._guards.TracingContext.try_get() is context
        return compile_with_aot_eager(gm, inputs)

    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.25))
    start = torch.get_rng_state()
    y = torch.compile(net, backend=backend, dynamic=True)(torch.zeros(5, 3))
    torch.set_rng_state(start)
    torch._dynamo.reset()
    assert torch.equal(y, torch.compile(net, backend="aot_eager", dynamic=True)(torch.zeros(5, 3)))
    forward, backward = graphs[-2:]
    assert [is_backward for _, is_backward, _ in (forward, backward)] == [False, True]
    sizes = {tuple(node.meta["val"].shape) for node in placeholders(forward[0]) if torch.is_tensor(node.meta["val"])}
    assert {(4,), (4, 3), (5, 3)} <= sizes


def test_an_activation_budget_is_aot_autograds_and_left_alone_at_one() -> None:
    from torch._functorch import config

    with config.patch(activation_memory_budget=0.7):
        with activation_budget(0.3):
            assert config.activation_memory_budget == 0.3
        with activation_budget(1.0):
            assert config.activation_memory_budget == 0.7
    assert config.activation_memory_budget == 1.0


def test_inductor_lists_its_options() -> None:
    assert {"max_autotune", "triton.cudagraphs", "max_fusion_size"} <= inductor_option_names()


def test_inductor_types_its_options() -> None:
    assert inductor_option_type("max_autotune") is bool
    assert inductor_option_type("max_fusion_size") is int
    defaults = torch._inductor.config.get_config_copy()
    for name in inductor_option_names():
        expected = inductor_option_type(name)
        assert expected is None or isinstance(defaults[name], expected)


def test_inductor_lists_its_modes() -> None:
    modes = inductor_modes()
    assert {"default", "reduce-overhead", "max-autotune"} <= set(modes)
    assert modes["max-autotune"]["max_autotune"] is True
    assert all(set(options) <= inductor_option_names() for options in modes.values())


def test_global_state_is_compared_with_that_of_another_time() -> None:
    is_same = global_state_check()
    assert is_same()
    with torch.no_grad():
        assert not is_same()
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_same()
    assert is_same()


def test_what_runs_once_leaves_neither_code_nor_backend_behind() -> None:
    calls: list[str] = []

    def backend_named(name: str) -> Backend:
        def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
            calls.append(name)
            return gm.forward

        return backend

    net, x = Net(), torch.ones(2, 3)
    expected = net(x)
    kept: list[weakref.ref[Backend]] = []
    for _ in range(torch._dynamo.config.recompile_limit + 1):
        once = backend_named("once")
        kept.append(weakref.ref(once))
        assert torch.equal(run_once(net, once, x), expected)
        assert not _debug_get_cache_entry_list(Net.forward.__code__)
    assert calls == ["once"] * len(kept)
    del once
    gc.collect()
    assert not any(backend() for backend in kept)

    lasting = torch.compile(net, backend=backend_named("lasting"))
    lasting(x)
    run_once(net, backend_named("between"), x)
    lasting(x)
    assert calls[len(kept) :] == ["lasting", "between", "lasting"]


def test_what_runs_once_may_be_compiled_where_the_limit_of_others_is_reached() -> None:
    net, calls = Net(), []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        calls.append(inputs)
        return gm.forward

    with torch._dynamo.config.patch(recompile_limit=1):
        torch.compile(net, backend=lambda gm, _: gm.forward)(torch.ones(2, 3))
        run_once(net, backend, torch.ones(2, 3))
    assert len(calls) == 1


def test_a_backend_call_is_tracing_and_the_code_it_makes_is_not() -> None:
    tracing: list[bool] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        tracing.append(is_tracing())

        def run(*args: Any) -> Any:
            tracing.append(is_tracing())
            return gm.forward(*args)

        return run

    assert not is_tracing()
    torch.compile(Net(), backend=backend)(torch.ones(2, 3))
    assert tracing == [True, False]
    assert not is_tracing()


def test_graph_break_ends_a_graph_and_is_nothing_elsewhere() -> None:
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        graphs.append(gm)
        return gm.forward

    def function(x: Tensor) -> Tensor:
        y = x.sin()
        graph_break()
        return y.cos()

    x = torch.ones(2)
    assert torch.equal(torch.compile(function, backend=backend)(x), function(x))
    assert len(graphs) == 2
