"""Which tensors of compiled graphs are alive when: walks over aten graphs, in the order in which they run."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, fx

from ._torch.tensors import storage_of, tensors_in

_KERNELS = {
    *("mm", "bmm", "addmm", "baddbmm", "convolution", "convolution_backward", "sort", "topk", "cumsum"),
    *("embedding", "embedding_dense_backward", "index_put", "scatter", "scatter_add"),
}
"""Of aten: what runs as a kernel of its own, and reads and writes memory. So do attention and the ops of other libraries."""

_FUSED = {"convert_element_type", "_to_copy", "clone", "where", "cat", "constant_pad_nd", "slice_scatter", "select_scatter"}
"""What Inductor fuses as it does pointwise arithmetic, though torch does not tag it so."""


@dataclass(frozen=True)
class Alive:
    """Bytes at one moment, beside parameters and inputs."""

    gradients: int = 0
    activations: int = 0
    logits: int = 0
    scratch: int = 0

    @property
    def total(self) -> int:
        return self.gradients + self.activations + self.logits + self.scratch

    def __add__(self, other: Alive) -> Alive:
        return Alive(*(getattr(self, name) + getattr(other, name) for name in _CATEGORIES))

    def __sub__(self, other: Alive) -> Alive:
        return Alive(*(getattr(self, name) - getattr(other, name) for name in _CATEGORIES))


_CATEGORIES = ("gradients", "activations", "logits", "scratch")


@dataclass
class _Storage:
    """A piece of memory: from which node to which it lives, and whether it is more than registers of a fused kernel.

    Attributes:
        kind: ``given`` (parameters, inputs of a forward, gradients of outputs), ``saved`` (for a backward), ``output`` or
            ``scratch``.
    """

    kind: str
    size: int
    is_logits: bool
    born: int
    dies: int
    is_written: bool


class Walk:
    """The storages of one graph, each with its life. Views share one.

    What pointwise arithmetic makes is taken for fused, unless a kernel of its own reads it or runs before its last use.
    """

    def __init__(
        self, gm: fx.GraphModule, is_backward: bool, vocabulary: int | None, lasting: Collection[object] = ()
    ) -> None:
        """Args:
        gm: as :func:`._torch.compilers.partition_with_inductor` hands it out, with fake tensors in ``meta["val"]``.
        vocabulary: the last dimension of logits.
        lasting: storages of parameters and their like.
        """
        self._is_backward, self._lasting = is_backward, lasting
        self._nodes = list(gm.graph.nodes)
        self._storages: dict[object, _Storage] = {}
        for place, node in enumerate(self._nodes):
            self._use(place, node)
            self._make(place, node, vocabulary)
        kernels = [place for place, node in enumerate(self._nodes) if _is_kernel(node)]
        for storage in self._storages.values():
            storage.is_written |= any(storage.born < place < storage.dies for place in kernels)

    def _use(self, place: int, node: fx.Node) -> None:
        for tensor in tensors_in([source.meta.get("val") for source in node.all_input_nodes]):
            storage = self._storages[storage_of(tensor)]
            storage.dies = place
            storage.is_written |= _is_kernel(node) or node.op == "output"
            if node.op == "output" and storage.kind == "scratch":
                storage.kind = "output"

    def _make(self, place: int, node: fx.Node, vocabulary: int | None) -> None:
        for tensor in tensors_in(node.meta.get("val")):
            key = storage_of(tensor)
            is_logits = tensor.ndim > 1 and tensor.shape[-1] == vocabulary
            size = int(tensor.untyped_storage().nbytes())
            made = _Storage(self._kind(node, key), size, is_logits, place, place, not _is_fused(node))
            self._storages.setdefault(key, made)

    def _kind(self, node: fx.Node, key: object) -> str:
        if node.op != "placeholder":
            return "scratch"
        is_saved = self._is_backward and not node.name.startswith("tangents") and key not in self._lasting
        return "saved" if is_saved else "given"

    def peak(self) -> Alive:
        """The moment with most bytes; what leaves the graph stays to its end."""
        moments = (self._sum(s for s in self._written() if s.born <= place <= s.dies) for place in range(len(self._nodes)))
        return max(moments, key=lambda alive: alive.total)

    def saved(self) -> Alive:
        """What a backward graph received from its forward."""
        return self._sum(storage for storage in self._written() if storage.kind == "saved")

    def outputs(self) -> Alive:
        """What leaves the graph and did not come from outside."""
        return self._sum(storage for storage in self._written() if storage.kind == "output")

    def _written(self) -> list[_Storage]:
        return [storage for storage in self._storages.values() if storage.is_written and storage.kind != "given"]

    def _sum(self, storages: Iterable[_Storage]) -> Alive:
        sizes = dict.fromkeys(_CATEGORIES, 0)
        outputs = "gradients" if self._is_backward else "activations"
        for storage in storages:
            name = {"saved": "activations", "output": outputs, "scratch": "scratch"}[storage.kind]
            sizes["logits" if storage.is_logits and name != "gradients" else name] += storage.size
        return Alive(**sizes)


@dataclass
class Graphs:
    """What Inductor would compile for one forward and backward pass, in that order.

    Attributes:
        vocabulary: the last dimension of logits.
        lasting: storages that these graphs read and nobody frees: of parameters, buffers, factors.
    """

    vocabulary: int | None = None
    forwards: list[fx.GraphModule] = field(default_factory=list)
    backwards: list[fx.GraphModule] = field(default_factory=list)
    lasting: set[object] = field(default_factory=set)

    def note(self, graph: fx.GraphModule, is_backward: bool, lasting: Sequence[int]) -> None:
        """Take up what :func:`._torch.compilers.partition_with_inductor` hands out."""
        if is_backward:
            self.backwards.insert(0, graph)
            return
        self.forwards.append(graph)
        inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        self.lasting.update(storage_of(inputs[index].meta["val"]) for index in lasting)

    @cached_property
    def peaks(self) -> list[tuple[str, Alive]]:
        """The largest moment of each graph, named ``forward`` or ``backward``, with what other graphs hold meanwhile."""
        moments = []
        kept = Alive()
        for graph in self.forwards:
            walk = Walk(graph, False, self.vocabulary)
            moments.append(("forward", kept + walk.peak()))
            kept += walk.outputs()
        kept = self.saved
        for walk in self._backwards:
            kept -= walk.saved()
            moments.append(("backward", kept + walk.peak()))
            kept += walk.outputs()
        return moments

    @cached_property
    def saved(self) -> Alive:
        """What forward graphs leave for backward graphs."""
        return sum((walk.saved() for walk in self._backwards), Alive())

    @cached_property
    def _backwards(self) -> list[Walk]:
        return [Walk(graph, True, self.vocabulary, self.lasting) for graph in self.backwards]


def _is_kernel(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    library, _, name = node.target._schema.name.partition("::")
    return library not in ("aten", "prims") or name in _KERNELS or "attention" in name


def _is_fused(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or _is_kernel(node):
        return False
    name = node.target._schema.name.partition("::")[2]
    return torch.Tag.pointwise in node.target.tags or node.target.is_view or name in _FUSED or not node.all_input_nodes


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
