"""A graph that Dynamo captures twice, since its parameters became stand-ins in between: compiled once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx

from .config import PoetxConfig


class Runtime(Protocol):
    """A compiled graph.

    Attributes:
        is_same_state: whether torch's global state is that of its compilation.
    """

    is_same_state: Callable[[], bool]

    def __call__(self, *args: Any) -> Any: ...


@dataclass(frozen=True)
class Trace:
    """All that a compiled graph depends on, but for torch's global state."""

    code: str
    inputs: tuple[Any, ...]
    settings: str

    @classmethod
    def of(
        cls,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        slots: Sequence[Any],
        dropped: Collection[int],
        config: PoetxConfig,
        patches: Mapping[str, Any],
    ) -> Trace | None:
        """None where two graphs may differ in what is not seen here: sizes that vary, and constants.

        Args:
            gm: as it is to be compiled.
            inputs: live or fake values of its placeholders.
            slots, dropped: how a runtime finds them among the arguments that it is called with.
        """
        if not all(isinstance(value, Tensor) for value in inputs) or not _is_constant_free(gm):
            return None
        shapes = [(value.shape, value.stride()) for value in inputs]
        if any(isinstance(size, torch.SymInt) for sizes in shapes for part in sizes for size in part):
            return None
        facts = zip(shapes, ((value.dtype, value.device, value.requires_grad) for value in inputs))
        settings = repr((list(slots), sorted(dropped), config, sorted(patches.items())))
        return cls(gm.print_readable(print_output=False), tuple(facts), settings)


_known: WeakValueDictionary[Trace, Runtime] = WeakValueDictionary()


def remember(trace: Trace | None, runtime: Runtime) -> None:
    """Keep what a trace was compiled to, for as long as somebody else does."""
    if trace is not None:
        _known[trace] = runtime


def find(trace: Trace | None) -> Runtime | None:
    """What an equal trace was compiled to under the same global state; else None."""
    runtime = None if trace is None else _known.get(trace)
    return runtime if runtime is not None and runtime.is_same_state() else None


def _is_constant_free(gm: fx.GraphModule) -> bool:
    modules = [module for module in gm.modules() if isinstance(module, fx.GraphModule)]
    return all(
        isinstance(getattr(module, node.target, None), fx.GraphModule)
        for module in modules
        for node in module.graph.nodes
        if node.op == "get_attr"
    )
