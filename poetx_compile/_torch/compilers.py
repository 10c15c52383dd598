"""Inductor and AOTAutograd, their options, and what a compiler is doing just now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import CodeType
from typing import Any, get_origin

import torch
from torch import fx
from torch._C._dynamo.guards import GlobalStateGuard

from .tensors import map_tensors


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


def run_once(function: Callable[..., Any], backend: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a function as ``torch.compile`` would, and let Dynamo forget what it compiled for it.

    So it counts against no limit of recompilations, and Dynamo does not keep ``backend``. What was compiled of the same code before
    is forgotten too: its next call compiles again.
    """
    from torch._dynamo import config, convert_frame, eval_frame

    compiled: list[CodeType] = []
    hook = convert_frame.register_bytecode_hook(lambda code, _: compiled.append(code))
    limits = {name: 2 * getattr(config, name) for name in ("recompile_limit", "accumulated_recompile_limit")}
    try:
        with config.patch(limits):
            return torch.compile(function, backend=backend)(*args, **kwargs)
    finally:
        hook.remove()
        for code in compiled:
            eval_frame.remove_from_cache(code)
        for key, kept in list(eval_frame.cached_backends.items()):
            if getattr(kept, "compiler_fn", kept) is backend:
                del eval_frame.cached_backends[key]


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


def global_state_check() -> Callable[[], bool]:
    """Whether what Dynamo guards beside a graph's inputs, gradients on and autocast among it, is as it is now."""
    return GlobalStateGuard().check


def is_tracing() -> bool:
    """Whether a compiler is looking at tensors just now, rather than a training loop."""
    return torch._guards.TracingContext.try_get() is not None


def graph_break() -> None:
    """Where a compiler stands, end its graph."""
    torch._dynamo.graph_break()
