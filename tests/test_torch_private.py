"""Pins the private torch API that the package leans on: an upgrade that breaks a piece of it fails here, by name."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._higher_order_ops import map as control_map
from torch._higher_order_ops import scan
from torch._subclasses.fake_tensor import is_fake
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, Optimizer
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from poetx_compile import _torch

Compiled = Callable[..., Any]
Backend = Callable[[fx.GraphModule, Sequence[Any]], Compiled]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.fc(x))


def capture(function: Callable[..., Any], *args: Any) -> tuple[fx.GraphModule, list[Any]]:
    """The graph that Dynamo hands to a backend, and its inputs."""
    graphs: list[tuple[fx.GraphModule, list[Any]]] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        graphs.append((gm, list(inputs)))
        return gm.forward

    torch.compile(function, backend=backend, fullgraph=True)(*args)
    return graphs[0]


def placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def test_every_function_is_pinned_here() -> None:
    functions = {name for name, thing in vars(_torch).items() if getattr(thing, "__module__", "") == _torch.__name__}
    functions = {name for name in functions if not name.startswith("__resume_at")}  # left by Dynamo
    assert functions == {
        "activation_budget",
        "active_ddp",
        "after_ddp_join",
        "add_input",
        "before_fsdp_constructor",
        "bodies",
        "checkpointed",
        "compile_with_aot_eager",
        "compile_with_inductor",
        "context_function",
        "copy_graph",
        "count_in_ddp_pieces",
        "distributed_wrapper",
        "fake_beside",
        "explain_failed_loads",
        "_fake_input",
        "fake_inputs",
        "fake_tensors",
        "functorch_nodes",
        "global_state_check",
        "graph_break",
        "gradient_hooks",
        "inductor_modes",
        "inductor_option_names",
        "inductor_option_type",
        "is_fake",
        "is_tracing",
        "live_inputs",
        "live_optimizers",
        "map_tensors",
        "modules_with",
        "notice_changed",
        "_fake",
        "_is_for_us",
        "on_optimizer_state_loaded",
        "own_grad",
        "own_operations",
        "partition_with_inductor",
        "replace_grad_attribute",
        "run_first_after_step",
        "set_own_grad",
        "source_name",
        "steps_running",
        "storage_of",
        "tensors_in",
        "trace_as_parameter",
        "under_functorch",
        "within_ddp_constructor",
    }


# --- Graphs ----------------------------------------------------------------------------------------------------------


def test_copy_graph_keeps_what_dynamo_needs() -> None:
    def check(gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        copied = _torch.copy_graph(gm)
        sources = [node._dynamo_source for node in placeholders(gm)]
        assert all(source is not None for source in sources)
        assert [node._dynamo_source for node in placeholders(copied)] == sources
        assert [_torch.source_name(node) for node in placeholders(copied)] == [source.name for source in sources]
        assert copied._param_name_to_source == gm._param_name_to_source
        assert copied.meta == gm.meta
        assert copied.meta is not gm.meta
        return copied.forward

    net, x = Net(), torch.ones(2, 3)
    torch.testing.assert_close(torch.compile(net, backend=check)(x), net(x))


def test_copy_graph_leaves_the_original_untouched() -> None:
    gm, inputs = capture(Net(), torch.ones(2, 3))
    code, nodes, expected = gm.code, len(gm.graph.nodes), gm(*inputs)
    copied = _torch.copy_graph(gm)
    for node in copied.graph.nodes:
        if node.target is F.relu:
            node.target, node.kwargs = torch.neg, {}
    _torch.add_input(copied, "extra", torch.ones(1))
    copied.recompile()
    gm.recompile()
    assert (gm.code, len(gm.graph.nodes)) == (code, nodes)
    assert len(copied.graph.nodes) == nodes + 1
    torch.testing.assert_close(gm(*inputs), expected)


def adding(extra: Tensor, compiler: Backend) -> Backend:
    """A backend that adds a tensor to the result of a graph, as a new input."""

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        copied = _torch.copy_graph(gm)
        node = _torch.add_input(copied, "extra", extra)
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
    check_that_an_added_input_trains(_torch.compile_with_aot_eager)


def test_inductor_trains_an_added_input_and_takes_patches() -> None:
    seen: list[fx.Graph] = []
    patches = {"pre_grad_custom_pass": seen.append}
    check_that_an_added_input_trains(lambda gm, inputs: _torch.compile_with_inductor(gm, inputs, patches))
    assert len(seen) == 1


def test_source_name_says_where_a_parameter_lives() -> None:
    names: dict[str, Any] = {}

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        names.update({_torch.source_name(node): value for node, value in zip(placeholders(gm), inputs)})
        return gm.forward

    net, x = Net(), torch.ones(2, 3)
    torch.compile(net, backend=backend)(x)
    assert names["L['self']._modules['fc']._parameters['weight']"] is net.fc.weight
    assert names["L['x']"] is x


def test_source_name_of_a_graph_that_dynamo_did_not_make() -> None:
    gm = fx.symbolic_trace(torch.nn.ReLU())
    assert [_torch.source_name(node) for node in placeholders(gm)] == ["input_1"]


@pytest.mark.parametrize("transform", [torch.func.vmap, lambda f: torch.func.grad(lambda x: f(x).sum())])
def test_functorch_nodes_are_those_under_a_transform(transform: Callable[..., Any]) -> None:
    gm, _ = capture(lambda x: torch.cos(transform(torch.sin)(torch.tan(x))), torch.ones(2, 3))
    inside = _torch.functorch_nodes(gm)
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
    found = [body for node in gm.graph.nodes for body in _torch.bodies(node)]
    assert len(found) == count
    for body in found:
        assert any(node.target in (torch.sin, torch.cos, "sin") for node in body.graph.nodes)


def test_a_checkpointed_region_is_copied_with_its_graph() -> None:
    gm, _ = capture(lambda x: checkpoint(torch.sin, x.tan(), use_reentrant=False), torch.ones(2, 3))
    regions = [
        [region for node in module.graph.nodes if (region := _torch.checkpointed(node)) is not None]
        for module in (gm, _torch.copy_graph(gm))
    ]
    ((original,), (copied,)) = regions
    assert copied is not original
    assert copied.graph is not original.graph
    assert [node.target for node in copied.graph.nodes] == [node.target for node in original.graph.nodes]
    x = torch.ones(2, 3)
    assert torch.equal(_torch.copy_graph(gm)(x)[0], gm(x)[0])


def test_a_selective_checkpoint_keeps_its_decision_with_its_region() -> None:
    def decide() -> Any:
        return create_selective_checkpoint_contexts([])

    x = torch.ones(3, requires_grad=True)
    for given in ({}, {"context_fn": decide}):
        gm, _ = capture(functools.partial(checkpoint, torch.sin, use_reentrant=False, **given), x)
        (region,) = [found for node in gm.graph.nodes if (found := _torch.checkpointed(node)) is not None]
        assert _torch.context_function(region) is given.get("context_fn")
        (copied,) = [found for node in _torch.copy_graph(gm).graph.nodes if (found := _torch.checkpointed(node)) is not None]
        assert _torch.context_function(copied) is given.get("context_fn")


def test_weight_norm_takes_the_direction_first() -> None:
    direction, magnitude = torch.randn(3, 4), torch.randn(3, 1)
    torch.testing.assert_close(_torch.WEIGHT_NORM(direction, magnitude, 0), F.normalize(direction) * magnitude)
    gm, _ = capture(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), torch.ones(2, 3))
    assert _torch.WEIGHT_NORM in {node.target for node in gm.graph.nodes}


def test_graph_break_ends_a_graph_and_is_nothing_elsewhere() -> None:
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        graphs.append(gm)
        return gm.forward

    def function(x: Tensor) -> Tensor:
        y = x.sin()
        _torch.graph_break()
        return y.cos()

    x = torch.ones(2)
    assert torch.equal(torch.compile(function, backend=backend)(x), function(x))
    assert len(graphs) == 2


def test_tensors_in_nested_containers() -> None:
    tree = {"a": [torch.ones(1), 3], "b": (torch.zeros(2), None)}
    assert [tensor.shape[0] for tensor in _torch.tensors_in(tree)] == [1, 2]
    doubled = _torch.map_tensors(lambda tensor: torch.cat([tensor, tensor]), tree)
    assert [tensor.shape[0] for tensor in _torch.tensors_in(doubled)] == [2, 4]
    assert (doubled["a"][1], doubled["b"][1]) == (3, None)


def test_a_backend_call_is_tracing_and_the_code_it_makes_is_not() -> None:
    tracing: list[bool] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        tracing.append(_torch.is_tracing())

        def run(*args: Any) -> Any:
            tracing.append(_torch.is_tracing())
            return gm.forward(*args)

        return run

    assert not _torch.is_tracing()
    torch.compile(Net(), backend=backend)(torch.ones(2, 3))
    assert tracing == [True, False]
    assert not _torch.is_tracing()


# --- Inductor's options ----------------------------------------------------------------------------------------------


def test_inductor_lists_its_options() -> None:
    assert {"max_autotune", "triton.cudagraphs", "max_fusion_size"} <= _torch.inductor_option_names()


def test_inductor_types_its_options() -> None:
    assert _torch.inductor_option_type("max_autotune") is bool
    assert _torch.inductor_option_type("max_fusion_size") is int
    defaults = torch._inductor.config.get_config_copy()
    for name in _torch.inductor_option_names():
        expected = _torch.inductor_option_type(name)
        assert expected is None or isinstance(defaults[name], expected)


def test_inductor_lists_its_modes() -> None:
    modes = _torch.inductor_modes()
    assert {"default", "reduce-overhead", "max-autotune"} <= set(modes)
    assert modes["max-autotune"]["max_autotune"] is True
    assert all(set(options) <= _torch.inductor_option_names() for options in modes.values())


# --- Memory ahead ----------------------------------------------------------------------------------------------------


def test_an_activation_budget_is_aot_autograds_and_left_alone_at_one() -> None:
    from torch._functorch import config

    with config.patch(activation_memory_budget=0.7):
        with _torch.activation_budget(0.3):
            assert config.activation_memory_budget == 0.3
        with _torch.activation_budget(1.0):
            assert config.activation_memory_budget == 0.7
    assert config.activation_memory_budget == 1.0


def test_fake_tensors_have_shapes_and_share_storages() -> None:
    with _torch.fake_tensors():
        fake = torch.empty(10**6, 10**6)
        other = fake + 1
    assert _torch.is_fake(fake)
    assert not _torch.is_fake(torch.empty(1))
    assert fake.untyped_storage().nbytes() == 4 * 10**12
    assert _torch.storage_of(fake) == _torch.storage_of(fake.T) != _torch.storage_of(other)


def test_a_parameter_made_of_fake_tensors_is_one_and_fake() -> None:
    with _torch.fake_tensors():
        weight = nn.Linear(3, 4).weight
    assert isinstance(weight, nn.Parameter)
    assert _torch.is_fake(weight)


def test_inductor_hands_out_both_graphs_before_it_compiles() -> None:
    graphs: list[tuple[fx.GraphModule, bool, Sequence[int]]] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        return _torch.partition_with_inductor(gm, inputs, lambda *graph: graphs.append(graph))

    with _torch.fake_tensors():
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
        copied = _torch.copy_graph(gm)
        with _torch.fake_inputs(copied, _torch.live_inputs(gm, inputs)) as (fake, shown):
            assert torch._guards.detect_fake_mode(shown) is fake
            assert all(type(size) is int for value in shown if torch.is_tensor(value) for size in value.shape)
            _torch.partition_with_inductor(copied, shown, lambda *graph: graphs.append(graph))
        assert torch._guards.TracingContext.try_get() is context
        return _torch.compile_with_aot_eager(gm, inputs)

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


def test_modules_that_hold_a_parameter_are_found_with_those_that_hold_them() -> None:
    inner, other = nn.Linear(2, 3), nn.Linear(2, 3)
    outer = nn.Sequential(inner, nn.ReLU())
    assert {id(module) for module in _torch.modules_with([inner.bias])} == {id(inner), id(outer)}
    assert {id(module) for module in _torch.modules_with([other.bias])} == {id(other)}


def test_modules_that_hold_a_parameter_are_found_whatever_their_own_methods_take() -> None:
    class Grouped(nn.Linear):
        def parameters(self, group: str) -> Iterator[nn.Parameter]:  # type: ignore[override]
            return super().parameters()

    grouped = Grouped(2, 2)
    assert [id(module) for module in _torch.modules_with([grouped.bias])] == [id(grouped)]


# --- Gradients -------------------------------------------------------------------------------------------------------


@pytest.fixture
def original_grad() -> Iterator[None]:
    """Puts back whatever ``nn.Parameter.grad`` was."""
    before = vars(nn.Parameter).get("grad")
    yield
    if before is not None:
        nn.Parameter.grad = before
    elif "grad" in vars(nn.Parameter):
        del nn.Parameter.grad


@pytest.mark.usefixtures("original_grad")
def test_own_grad_is_autograds_whatever_the_attribute_shows() -> None:
    shown = torch.full((2,), 7.0)
    written: list[Tensor | None] = []
    _torch.replace_grad_attribute(lambda parameter: shown, lambda parameter, grad: written.append(grad))
    parameter = nn.Parameter(torch.ones(2))
    parameter.square().sum().backward()
    assert parameter.grad is shown
    own = _torch.own_grad(parameter)
    assert own is not None
    assert own.tolist() == [2, 2]

    parameter.grad = own
    del parameter.grad
    assert written == [own, None]

    _torch.set_own_grad(parameter, None)
    assert _torch.own_grad(parameter) is None
    _torch.set_own_grad(parameter, torch.zeros(2))
    assert torch.equal(_torch.own_grad(parameter), torch.zeros(2))


@pytest.mark.usefixtures("original_grad")
def test_a_replaced_attribute_reaches_every_parameter_and_no_other_tensor() -> None:
    before = nn.Parameter(torch.ones(1))
    _torch.replace_grad_attribute(lambda parameter: torch.full((1,), 7.0), lambda parameter, grad: None)
    assert type(before) is nn.Parameter
    assert before.grad is not None
    assert torch.ones(1, requires_grad=True).grad is None


class Doubled(nn.Parameter):
    """A parameter that every operation sees doubled."""

    @classmethod
    @torch._dynamo.disable
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        with _torch.own_operations():
            if func is F.linear:
                args = (args[0], args[1] * 2, *args[2:])
            return func(*args, **kwargs or {})


@pytest.fixture
def traceable(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.variables import builder

    monkeypatch.setattr(builder, "infer_subclass_type", builder.infer_subclass_type)
    _torch.trace_as_parameter(Doubled)


@pytest.fixture
def doubled(traceable: None) -> nn.Linear:
    layer = nn.Linear(3, 4, bias=False)
    layer.weight.__class__ = Doubled
    return layer


@pytest.mark.parametrize("wrap", [lambda backend: backend, lambda backend: functools.partial(backend)])
def test_a_backend_that_takes_stand_ins_gets_them_as_parameters(doubled: nn.Linear, wrap: Callable[[Any], Any]) -> None:
    seen: list[list[Any]] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        seen.append([*inputs, *(node.target for node in gm.graph.nodes)])
        return gm.forward

    backend.takes_stand_ins = True  # type: ignore[attr-defined]
    run = torch.compile(doubled, backend=wrap(backend), fullgraph=True)
    for _ in range(3):
        run(torch.ones(2, 3))
    assert len(seen) == 1
    assert any(value is doubled.weight for value in seen[0])
    assert F.linear in seen[0]


def test_another_backend_runs_what_the_class_says(doubled: nn.Linear) -> None:
    x = torch.ones(2, 3)
    with torch.no_grad():
        assert torch.equal(torch.compile(doubled, backend="aot_eager")(x), doubled(x))


@pytest.mark.usefixtures("traceable")
def test_a_parameter_that_loses_its_memory_recompiles_once() -> None:
    seen = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        seen.append(gm)
        return gm.forward

    backend.takes_stand_ins = True  # type: ignore[attr-defined]
    layer = nn.Linear(3, 4)
    run = torch.compile(layer, backend=backend)
    for step in range(5):
        run(torch.ones(2, 3))
        if step == 1:
            layer.weight.data = torch.zeros(()).expand(4, 3)
            layer.weight.__class__ = Doubled
            _torch.notice_changed([layer.weight])
    assert len(seen) == 2
    assert isinstance(layer.weight, Doubled)


def test_transforms_are_noticed() -> None:
    seen = []
    torch.func.vmap(lambda x: seen.append(_torch.under_functorch()) or x)(torch.ones(2))
    torch.func.grad(lambda x: seen.append(_torch.under_functorch()) or x)(torch.ones(()))
    seen.append(_torch.under_functorch())
    assert seen == [True, True, False]


def test_gradient_hooks_are_counted_and_forgotten() -> None:
    parameter = nn.Parameter(torch.ones(2))
    assert _torch.gradient_hooks(parameter) == 0
    first = parameter.register_hook(lambda grad: grad)
    second = parameter.register_post_accumulate_grad_hook(lambda parameter: None)
    parameter.register_hook(lambda grad: grad)
    assert _torch.gradient_hooks(parameter) == 3
    first.remove()
    second.remove()
    assert _torch.gradient_hooks(parameter) == 1


# --- Optimizers ------------------------------------------------------------------------------------------------------


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Optimizer]:
    """Optimizers that received state since the test began."""
    monkeypatch.setattr(Optimizer, "__setstate__", Optimizer.__setstate__)
    noted: list[Optimizer] = []
    _torch.on_optimizer_state_loaded(noted.append)
    return noted


def stepped(kind: type[Optimizer] = Adam) -> Optimizer:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = kind([parameter], lr=0.1)  # type: ignore[call-arg]
    parameter.sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("kind", [Adam, SGD])
def test_loading_a_state_dict_is_noted(loaded: list[Optimizer], kind: type[Optimizer]) -> None:
    first, second = stepped(kind), stepped(kind)
    assert loaded == []
    second.load_state_dict(first.state_dict())
    assert loaded == [second]


def test_copying_an_optimizer_is_noted(loaded: list[Optimizer]) -> None:
    copied = copy.deepcopy(stepped())
    assert [each is copied for each in loaded] == [True]


def test_unpickling_an_optimizer_is_noted(loaded: list[Optimizer]) -> None:
    unpickled = pickle.loads(pickle.dumps(stepped()))
    assert [each is unpickled for each in loaded] == [True]
    assert unpickled.state_dict()["state"][0]["step"] == 1


def test_noting_changes_nothing_else(loaded: list[Optimizer]) -> None:
    first, second = stepped(), stepped()
    second.load_state_dict(first.state_dict())
    assert second.state_dict()["state"][0].keys() == first.state_dict()["state"][0].keys()
    assert Optimizer.__setstate__.__name__ == "__setstate__"


def test_live_optimizers_are_found_until_they_die() -> None:
    optimizer = stepped()
    assert any(each is optimizer for each in _torch.live_optimizers())
    identity = id(optimizer)
    del optimizer
    gc.collect()
    assert all(id(each) != identity for each in _torch.live_optimizers())


def test_an_optimizer_that_is_being_built_is_not_live() -> None:
    class HalfBuilt(SGD):
        def __init__(self) -> None:
            assert all(each is not self for each in _torch.live_optimizers())
            super().__init__([nn.Parameter(torch.ones(1))], lr=0.1)

    HalfBuilt()


def test_steps_running_sees_the_step_of_this_optimizer_only() -> None:
    parameter = nn.Parameter(torch.ones(2))
    first, second = SGD([parameter], lr=0.1), SGD([parameter], lr=0.1)
    seen: list[tuple[int, int]] = []

    def closure() -> float:
        seen.append((_torch.steps_running(first), _torch.steps_running(second)))
        return 0.0

    first.step(closure)
    second.step(closure)
    closure()
    assert seen == [(1, 0), (0, 1), (0, 0)]


def test_steps_running_counts_the_step_of_the_base_class_too() -> None:
    class Derived(SGD):
        def step(this, closure: Any = None) -> Any:  # noqa: N805 (the name of ``self`` must not matter)
            return super().step(closure)

    seen: list[int] = []
    optimizer = Derived([nn.Parameter(torch.ones(2))], lr=0.1)
    SGD([nn.Parameter(torch.ones(2))], lr=0.1)  # torch hooks a class's step when its first instance is built
    optimizer.register_step_pre_hook(lambda *_: seen.append(_torch.steps_running(optimizer)))
    optimizer.step(lambda: seen.append(_torch.steps_running(optimizer)))
    assert seen == [1, 2, 2]


def test_steps_running_after_a_step_that_failed() -> None:
    optimizer = stepped(SGD)

    def closure() -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    assert not _torch.steps_running(optimizer)


# --- Distributed wrappers --------------------------------------------------------------------------------------------


@pytest.fixture
def process_group() -> Iterator[None]:
    """A world of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_without_a_process_group_nothing_is_wrapped() -> None:
    assert _torch.distributed_wrapper(Net().parameters()) is None
    assert not _torch.active_ddp()


@pytest.mark.usefixtures("process_group")
def test_a_data_parallel_model_is_recognised_by_its_weights() -> None:
    net, other = Net(), Net()
    wrapped = DistributedDataParallel(net)
    assert _torch.distributed_wrapper([net.fc.weight]) == "DistributedDataParallel"
    assert _torch.distributed_wrapper([other.fc.weight]) is None
    del wrapped


@pytest.mark.usefixtures("process_group")
def test_a_fully_sharded_model_is_recognised_by_its_weights() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = fully_shard(Net(), mesh=init_device_mesh("cpu", (1,)))
    assert _torch.distributed_wrapper(net.parameters()) == "FSDPModule"


@pytest.mark.usefixtures("process_group")
def test_what_stands_in_a_slot_while_ddp_is_built_is_what_it_reduces(monkeypatch: pytest.MonkeyPatch) -> None:
    net, other, given = Net(), nn.Parameter(torch.zeros(5)), []
    weight = net.fc.weight

    @contextmanager
    def swapped(module: nn.Module, arguments: dict[str, Any]) -> Iterator[None]:
        given.append(arguments)
        module.fc._parameters["weight"] = other
        yield
        module.fc._parameters["weight"] = weight

    monkeypatch.setattr(DistributedDataParallel, "__init__", DistributedDataParallel.__init__)
    _torch.within_ddp_constructor(swapped)
    wrapped = DistributedDataParallel(net, None, process_group=dist.group.WORLD)
    assert given[0]["process_group"] is dist.group.WORLD
    assert given[0]["device_ids"] is None
    reduced = {id(parameter) for parameter in wrapped._module_parameters}
    assert id(other) in reduced
    assert id(weight) not in reduced
    assert net.fc.weight is weight


def test_a_distributed_checkpoint_that_does_not_fit_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[set[str], set[str]]] = []

    def explain(saved: set[str], wanted: set[str]) -> str:
        asked.append((saved, wanted))
        return "as it is"

    monkeypatch.setattr(DefaultLoadPlanner, "create_local_plan", DefaultLoadPlanner.create_local_plan)
    _torch.explain_failed_loads(explain)
    dcp.save({"a": {"x": torch.zeros(3)}}, checkpoint_id=tmp_path)
    dcp.load({"a": {"x": torch.zeros(3)}}, checkpoint_id=tmp_path)
    assert not asked
    for content in ({"x": torch.zeros(4)}, {"y": torch.zeros(3)}):
        with pytest.raises(dcp.CheckpointException, match="PoetxError: as it is"):
            dcp.load({"a": content}, checkpoint_id=tmp_path)
    assert asked == [({"a.x"}, {"a.x"}), ({"a.x"}, {"a.y"})]


@pytest.mark.usefixtures("process_group")
def test_pieces_of_a_graph_have_fake_inputs_with_live_ones_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1)
    pieces: list[dict[str, Tensor]] = []
    calls: list[bool] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        live = _torch.live_inputs(gm, inputs)
        assert [value.shape for value in live] == [value.shape for value in inputs]
        weights = [(value, shown) for value, shown in zip(live, inputs) if isinstance(value, nn.Parameter)]
        pieces.append({_torch.source_name(node): value for node, value in zip(placeholders(gm), live)})
        assert all(_torch.is_fake(shown) and not _torch.is_fake(value) for value, shown in weights)
        (beside,) = _torch.fake_beside(gm, [weights[0][0]], inputs)
        assert _torch.is_fake(beside) and beside.fake_mode is weights[0][1].fake_mode
        compiled = _torch.compile_with_aot_eager(gm, inputs)

        def run(*args: Any) -> Any:
            calls.append(_torch.is_fake(args[0]))
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


@pytest.mark.usefixtures("process_group")
def test_pieces_count_what_they_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.backends.distributed import DDPOptimizer

    monkeypatch.setattr(DDPOptimizer, "add_param_args", DDPOptimizer.add_param_args)
    net = Net()
    _torch.count_in_ddp_pieces(lambda parameter: 1000 if parameter is net.fc.weight else None)
    sizes: list[int] = []
    cut = DDPOptimizer.compile_fn

    def looking(self: DDPOptimizer, *args: Any, **kwargs: Any) -> Any:
        compiled = cut(self, *args, **kwargs)
        sizes.extend(bucket.size for bucket in self.buckets)
        return compiled

    monkeypatch.setattr(DDPOptimizer, "compile_fn", looking)
    torch.compile(DistributedDataParallel(net), backend="eager")(torch.ones(2, 3))
    assert sizes == [1000 + 4 * 4]


@pytest.mark.usefixtures("process_group")
def test_a_module_is_seen_before_fsdp_shards_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    def check(module: nn.Module) -> None:
        raise ValueError(type(module).__name__)

    monkeypatch.setattr(FullyShardedDataParallel, "__init__", FullyShardedDataParallel.__init__)
    _torch.before_fsdp_constructor(check)
    with pytest.raises(ValueError, match="Net"):
        FullyShardedDataParallel(Net(), device_id=torch.device("cpu"))


@pytest.mark.usefixtures("process_group")
def test_leaving_a_join_is_noted_with_the_rank_whose_weights_were_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[nn.Module, Any, int]] = []
    monkeypatch.setattr(DistributedDataParallel, "_sync_final_model", DistributedDataParallel._sync_final_model)
    _torch.after_ddp_join(lambda *args: seen.append(args))
    net = Net()
    wrapped = DistributedDataParallel(net, process_group=dist.group.WORLD)
    with wrapped.join():
        wrapped(torch.ones(2, 3)).sum().backward()
    assert seen == [(net, dist.group.WORLD, 0)]


def test_outside_pieces_inputs_are_live() -> None:
    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        assert all(a is b for a, b in zip(_torch.live_inputs(gm, inputs), inputs, strict=True))
        assert not any(_torch.is_fake(value) for value in inputs)
        extra = torch.ones(3)
        assert _torch.fake_beside(gm, [extra], inputs)[0] is extra
        return gm.forward

    torch.compile(Net(), backend=backend)(torch.ones(2, 3))


def test_an_input_may_have_no_values_yet() -> None:
    """Inductor compiles for what a tensor will be, and runs with what it is by then."""
    with _torch.fake_tensors():
        promised = torch.empty(4, 4)
    assert _torch.is_fake(promised)

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        edited = _torch.copy_graph(gm)
        extra = _torch.add_input(edited, "extra", promised)
        (output,) = [node for node in edited.graph.nodes if node.op == "output"]
        with edited.graph.inserting_before(output):
            product = edited.graph.call_function(torch.matmul, (output.args[0][0], extra))
        output.args = ((product, *output.args[0][1:]),)
        edited.recompile()
        live = torch.ones(4, 4)
        shown = _torch.fake_beside(edited, [promised, live], inputs)
        assert (shown[0].shape, shown[0].device, shown[1] is live) == ((4, 4), torch.device("cpu"), True)
        compiled = _torch.compile_with_inductor(edited, [*inputs, shown[0]], {})
        return lambda *args: compiled(*args, torch.full((4, 4), 3.0))

    net, x = Net(), torch.ones(2, 3)
    torch.testing.assert_close(torch.compile(net, backend=backend)(x), net(x) @ torch.full((4, 4), 3.0))


def test_global_state_is_compared_with_that_of_another_time() -> None:
    is_same = _torch.global_state_check()
    assert is_same()
    with torch.no_grad():
        assert not is_same()
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_same()
    assert is_same()


@pytest.mark.usefixtures("process_group")
def test_active_ddp_holds_inside_its_forward() -> None:
    seen: list[bool] = []
    net = Net()
    net.register_forward_hook(lambda *args: seen.append(_torch.active_ddp()))
    wrapped = DistributedDataParallel(net)
    wrapped(torch.ones(2, 3))
    net(torch.ones(2, 3))
    assert seen == [True, False]


def test_a_hook_runs_before_those_of_the_user() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0)
    order: list[str] = []
    optimizer.register_step_post_hook(lambda *args: order.append("user"))
    _torch.run_first_after_step(optimizer, lambda *args: order.append("first"))
    optimizer.step()
    assert order == ["first", "user"]
