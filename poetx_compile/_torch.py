"""All private torch API that this package leans on, in one place; ``tests/test_torch_private.py`` pins it."""

from __future__ import annotations

import functools
import gc
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import Any, get_origin

import torch
from torch import Tensor, fx, nn
from torch._C._dynamo.guards import GlobalStateGuard
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.optim import Optimizer

from .errors import PoetxError

# --- Dynamo and Inductor ---------------------------------------------------------------------------------------------


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


def global_state_check() -> Callable[[], bool]:
    """Whether what Dynamo guards beside a graph's inputs, gradients on and autocast among it, is as it is now."""
    return GlobalStateGuard().check


def is_fake(value: Any) -> bool:
    """Whether a tensor has no values: a compiler is looking."""
    return isinstance(value, FakeTensor)


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


def compile_with_inductor(gm: fx.GraphModule, inputs: Sequence[Any], patches: dict[str, Any]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    compiled: Any = compile_fx(gm, list(inputs), config_patches=patches or None)
    return compiled


def compile_with_aot_eager(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    from torch._dynamo.backends.debugging import aot_eager

    return aot_eager(gm, list(inputs))


def partition_with_inductor(
    gm: fx.GraphModule, inputs: Sequence[Any], note: Callable[[fx.GraphModule, bool, Sequence[int]], None]
) -> Callable[..., Any]:
    """Trace, decompose and cut a graph as :func:`compile_with_inductor` does, and generate no code.

    Args:
        note: receives each aten graph that Inductor would compile, whether it is a backward, and which inputs of a forward are
            parameters, buffers and others that stay for life.

    Returns:
        What runs no op, and returns empty tensors of the shapes that these graphs would make.
    """
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    def uncompiled(graph: fx.GraphModule, example_inputs: Any, **settings: Any) -> Any:
        note(graph, bool(settings.get("is_backward")), settings["static_input_idxs"])
        made = fx.map_arg(graph.graph.output_node().args[0], lambda node: node.meta.get("val"))

        def run(inputs: list[Any]) -> Any:
            return map_tensors(
                lambda tensor: torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device),
                made,
            )

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    with config.patch(enable_autograd_cache=False, force_non_lazy_backward_lowering=True):
        partitioned: Any = compile_fx(gm, list(inputs), inner_compile=uncompiled)
    return partitioned


def activation_budget(share: float) -> AbstractContextManager[Any]:
    """What is compiled inside saves at most this share of its activations, and computes the others again; 1 changes nothing."""
    from torch._functorch import config

    return config.patch(activation_memory_budget=share) if share < 1 else nullcontext()


def inductor_option_names() -> set[str]:
    from torch._inductor import config

    return set(config.get_config_copy())


def inductor_option_type(name: str) -> type | None:
    """What ``torch.compile`` takes for one of Inductor's options; None where it does not check."""
    from torch._inductor import config

    kind = config.get_type(name)  # type: ignore[attr-defined]
    return kind if isinstance(kind, type) and get_origin(kind) is None and kind is not type(None) else None


def inductor_modes() -> dict[str, dict[str, Any]]:
    """The options that each ``mode`` of ``torch.compile`` stands for."""
    return dict(torch._inductor.list_mode_options())


def is_tracing() -> bool:
    """Whether a compiler is looking at tensors just now, rather than a training loop."""
    return torch._guards.TracingContext.try_get() is not None


def graph_break() -> None:
    """Where a compiler stands, end its graph."""
    torch._dynamo.graph_break()


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors of nested containers, in order."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Nested containers with every tensor replaced."""
    return torch.utils._pytree.tree_map_only(Tensor, function, tree)


def fake_tensors() -> AbstractContextManager[Any]:
    """Inside, tensors have shapes, dtypes and strides, and no memory."""
    return FakeTensorMode()


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


def storage_of(tensor: Tensor) -> object:
    """Equal for tensors that share memory, or would if they had any."""
    from torch.multiprocessing.reductions import StorageWeakRef

    return StorageWeakRef(tensor.untyped_storage())


# --- Parameters ------------------------------------------------------------------------------------------------------

_TENSOR_GRAD: Any = torch.Tensor.grad


def own_grad(parameter: Tensor) -> Tensor | None:
    """The gradient that autograd itself keeps on a tensor, whatever ``.grad`` shows."""
    return _TENSOR_GRAD.__get__(parameter)


def set_own_grad(parameter: Tensor, grad: Tensor | None) -> None:
    _TENSOR_GRAD.__set__(parameter, grad)


def replace_grad_attribute(
    read: Callable[[nn.Parameter], Tensor | None], write: Callable[[nn.Parameter, Tensor | None], None]
) -> None:
    """Make ``.grad`` of every ``nn.Parameter`` go through two functions.

    The class stays as it is, so that compiled code, which guards on the type of each parameter, stays valid.
    """
    nn.Parameter.grad = property(read, write, lambda parameter: write(parameter, None))  # type: ignore[assignment]


def trace_as_parameter(kind: type[nn.Parameter]) -> None:
    """Let Dynamo take a subclass of ``nn.Parameter`` for a plain one where it traces for a backend that ``takes_stand_ins``.

    Others it hands the ``__torch_function__`` of the class.
    """
    from torch._dynamo.variables import builder

    infer = builder.infer_subclass_type

    @functools.wraps(infer)
    def inferring(value: Any) -> Any:
        return None if type(value) is kind and _is_for_us() else infer(value)

    builder.infer_subclass_type = inferring


def _is_for_us() -> bool:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    waiting: list[Any] = [InstructionTranslator.current_tx().output.compiler_fn]
    seen: set[int] = set()
    while waiting:
        backend = waiting.pop()
        if getattr(backend, "takes_stand_ins", False):
            return True
        if id(backend) not in seen:
            seen.add(id(backend))
            waiting += [inner for name in _WRAPPED if (inner := getattr(backend, name, None)) is not None]
    return False


_WRAPPED = (
    "_torchdynamo_orig_backend",
    "_torchdynamo_orig_callable",
    "compiler_fn",
    "backend_compile_fn",
    "func",
    "__self__",
)
"""Where the wrappers of backends, torch's and ``functools.partial``, keep what they wrap."""


def notice_changed(parameters: Sequence[nn.Parameter]) -> None:
    """Let Dynamo look again at parameters that were changed in place.

    Up to torch 2.12 its guards take what a module holds for unchanged while its dictionary of parameters is; that changes here,
    and back. Walks the garbage collector's list: not for a hot path.
    """
    if not torch._dynamo.config.use_recursive_dict_tags_for_guards:
        return
    changed = {id(parameter) for parameter in parameters}
    for holder in gc.get_referrers(*parameters):
        if type(holder) is dict:
            for name, value in list(holder.items()):
                if id(value) in changed and isinstance(name, str):
                    holder[name] = None
                    holder[name] = value


def own_operations() -> AbstractContextManager[Any]:
    """Inside, torch does to subclasses of tensors what it does to tensors."""
    return torch._C.DisableTorchFunctionSubclass()


def under_functorch() -> bool:
    """Whether this runs inside ``vmap``, ``grad``, ``jvp`` and their like."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def gradient_hooks(parameter: Tensor) -> int:
    """How many hooks wait for a gradient of this tensor."""
    accumulated = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    return len(parameter._backward_hooks or {}) + len(accumulated)


# --- Optimizers ------------------------------------------------------------------------------------------------------


def on_optimizer_state_loaded(note: Callable[[Optimizer], None]) -> None:
    """Call ``note`` wherever an optimizer receives state: load_state_dict, unpickling and deepcopy end in one method."""
    set_state = Optimizer.__setstate__

    @functools.wraps(set_state)
    def noting(self: Optimizer, state: dict[str, Any]) -> None:
        set_state(self, state)
        note(self)

    Optimizer.__setstate__ = noting  # type: ignore[method-assign]


def run_first_after_step(optimizer: Optimizer, hook: Callable[[Optimizer, Any, Any], None]) -> None:
    """Run a hook after each ``step()`` before those that the user registered on the same optimizer."""
    handle = optimizer.register_step_post_hook(hook)
    hooks: Any = optimizer._optimizer_step_post_hooks
    hooks.move_to_end(handle.id, last=False)


def live_optimizers() -> Iterator[Optimizer]:
    """Every optimizer alive in this process. Walks the garbage collector's list: not for a hot path."""
    for thing in gc.get_objects():
        if issubclass(type(thing), Optimizer) and "param_groups" in getattr(thing, "__dict__", ()):
            yield thing


def modules_with(parameters: Iterable[Tensor]) -> list[nn.Module]:
    """Every module alive in this process that holds one of these, itself or further down. Not for a hot path."""
    wanted = {id(parameter) for parameter in parameters}
    modules = [thing for thing in gc.get_objects() if issubclass(type(thing), nn.Module) and "_parameters" in thing.__dict__]
    return [module for module in modules if any(id(parameter) in wanted for parameter in nn.Module.parameters(module))]


_STEP_WITH_HOOKS = Optimizer.profile_hook_step(lambda: None).__code__


def steps_running(optimizer: Optimizer) -> int:
    """How many calls of ``optimizer.step()`` stand on the call stack of this thread: two where a subclass calls its base."""
    frame: FrameType | None = sys._getframe()
    count = 0
    while frame is not None:
        count += frame.f_code is _STEP_WITH_HOOKS and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return count


# --- Distributed wrappers --------------------------------------------------------------------------------------------


def distributed_wrapper(weights: Iterable[Tensor]) -> str | None:
    """The kind of wrapper that already manages the gradients of these weights, if any."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    wanted = {id(weight) for weight in weights}
    for wrapper in (DistributedDataParallel, FullyShardedDataParallel, FSDPModule):
        for thing in gc.get_objects():
            if issubclass(type(thing), wrapper) and any(id(p) in wanted for p in thing.parameters()):
                return wrapper.__name__
    return None


def within_ddp_constructor(context: Callable[[nn.Module, dict[str, Any]], AbstractContextManager[None]]) -> None:
    """Build every DistributedDataParallel inside ``context(module, arguments)``, by the names of its constructor."""
    if not torch.distributed.is_available():
        return
    from torch.nn.parallel import DistributedDataParallel

    build = DistributedDataParallel.__init__

    @functools.wraps(build)
    def inside(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(build).bind(self, module, *args, **kwargs)
        with context(module, dict(given.arguments)):
            build(self, module, *args, **kwargs)

    DistributedDataParallel.__init__ = inside  # type: ignore[method-assign]


def before_fsdp_constructor(check: Callable[[nn.Module], None]) -> None:
    """Call ``check(module)`` before FullyShardedDataParallel is built around a module. ``fully_shard`` is no class."""
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    build = FullyShardedDataParallel.__init__

    @functools.wraps(build)
    def checked(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        check(module)
        build(self, module, *args, **kwargs)

    FullyShardedDataParallel.__init__ = checked  # type: ignore[method-assign]


def after_ddp_join(follow: Callable[[nn.Module, Any, int], None]) -> None:
    """When ranks with unequal inputs leave ``join()`` and one sent its weights: ``follow(module, process_group, its_rank)``."""
    if not torch.distributed.is_available():
        return
    from torch.nn.parallel import DistributedDataParallel

    send = DistributedDataParallel._sync_final_model

    @functools.wraps(send)
    def sending(self: Any, is_last_joiner: bool) -> None:
        send(self, is_last_joiner)
        follow(self.module, self.process_group, self._authoritative_rank)

    DistributedDataParallel._sync_final_model = sending  # type: ignore[method-assign]


def count_in_ddp_pieces(reduced_bytes: Callable[[Tensor], int | None]) -> None:
    """Where Dynamo cuts the graph of a DistributedDataParallel model by buckets, let it count what is really reduced.

    Args:
        reduced_bytes: what a parameter takes in a bucket; None for its own bytes.
    """
    if not torch.distributed.is_available():
        return
    from torch._dynamo.backends.distributed import Bucket, DDPOptimizer

    count = DDPOptimizer.add_param_args

    @functools.wraps(count)
    def counting(self: DDPOptimizer, bucket: Bucket, node: fx.Node) -> None:
        count(self, bucket, node)
        for argument in node.args:
            if isinstance(argument, fx.Node) and argument.op == "placeholder" and "grapharg" in argument.meta:
                parameter = argument.meta["grapharg"].example
                reduced = reduced_bytes(parameter)
                if reduced is not None:
                    bucket.size += reduced - parameter.untyped_storage().nbytes()

    DDPOptimizer.add_param_args = counting  # type: ignore[method-assign]


def explain_failed_loads(explain: Callable[[set[str], set[str]], str | None]) -> None:
    """Where a distributed checkpoint does not fit, raise what ``explain(saved names, wanted names)`` says, if it says anything."""
    if not torch.distributed.is_available():
        return
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    plan = DefaultLoadPlanner.create_local_plan

    @functools.wraps(plan)
    def explaining(self: Any) -> Any:
        try:
            return plan(self)
        except (RuntimeError, ValueError) as error:
            sentence = explain(set(self.metadata.state_dict_metadata), set(self.state_dict))
            if sentence is None:
                raise
            raise PoetxError(sentence) from error

    DefaultLoadPlanner.create_local_plan = explaining  # type: ignore[method-assign]


def active_ddp() -> bool:
    """Whether this runs inside the forward of a DistributedDataParallel module."""
    if not torch.distributed.is_available():
        return False
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel._get_active_ddp_module() is not None
