"""A graph that Dynamo captures twice, since its parameters became stand-ins in between: compiled once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor, fx

from ._torch.graphs import context_function
from .config import PoetxConfig
from .factor import OrthogonalFactor


class Runtime(Protocol):
    """A compiled graph.

    Attributes:
        is_same_state: whether torch's global state is that of its compilation.
    """

    is_same_state: Callable[[], bool]

    def __call__(self, *args: Any) -> Any: ...


@dataclass(frozen=True)
class Trace:
    """All that a compiled graph depends on, but for torch's global state, and the weights that it was captured with.

    Attributes:
        functions: those that ``code`` names, since a name may stand for another one by now, and those of selective checkpoints.
    """

    code: str
    functions: tuple[Any, ...]
    owners: tuple[ref[OrthogonalFactor], ...]
    inputs: tuple[Any, ...]
    settings: str

    @classmethod
    def of(
        cls,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        owners: Iterable[OrthogonalFactor],
        slots: Sequence[Any],
        dropped: Collection[int],
        config: PoetxConfig,
        patches: Mapping[str, Any],
    ) -> Trace | None:
        """None where two graphs may differ in what is not seen here: sizes that vary, and constants.

        Args:
            gm: as it is to be compiled.
            inputs: live or fake values of its placeholders.
            owners: the factors of its weights.
            slots, dropped: how a runtime finds them among the arguments that it is called with.
        """
        modules = [module for module in gm.modules() if isinstance(module, fx.GraphModule)]
        nodes = [node for module in modules for node in module.graph.nodes]
        if not all(isinstance(value, Tensor) for value in inputs) or any(map(_is_constant, nodes)):
            return None
        shapes = [(value.shape, value.stride()) for value in inputs]
        if any(isinstance(size, torch.SymInt) for sizes in shapes for part in sizes for size in part):
            return None
        facts = zip(shapes, ((value.dtype, value.device, value.requires_grad) for value in inputs))
        settings = repr((list(slots), sorted(dropped), config, sorted(patches.items())))
        called = (node.target for node in nodes if node.op == "call_function")
        functions = *called, *map(context_function, modules)
        return cls(gm.print_readable(print_output=False), functions, tuple(map(ref, owners)), tuple(facts), settings)


_known: WeakValueDictionary[Trace, Runtime] = WeakValueDictionary()


def remember(trace: Trace | None, runtime: Runtime) -> None:
    """Keep what a trace was compiled to, for as long as somebody else does."""
    if trace is not None:
        _known[trace] = runtime


def find(trace: Trace | None) -> Runtime | None:
    """What an equal trace was compiled to under the same global state; else None."""
    runtime = None if trace is None else _known.get(trace)
    return runtime if runtime is not None and runtime.is_same_state() else None


def _is_constant(node: fx.Node) -> bool:
    return node.op == "get_attr" and not isinstance(
        getattr(node.graph.owning_module, str(node.target), None), fx.GraphModule
    )
