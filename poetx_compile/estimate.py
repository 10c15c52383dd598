"""What a training step of a model needs in memory: counted on graphs of fake tensors, with nothing allocated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ._torch import activation_budget, copy_graph, fake_tensors, partition_with_inductor, storage_of
from .base import BASES
from .config import PoetxConfig
from .conversion import storage_for
from .errors import PoetxError
from .factor import SKEWS_PER_BATCH, OrthogonalFactor
from .kernels import HALF
from .kernels.ops import WIDEST
from .liveness import Alive, Walk, nbytes
from .passes import LinearMatch, choose_route, match, normalize, rewrite, supply

_STATES = 2
_CAYLEY_COPIES = 6
"""Arrays of ``[r, b, b]`` float16, or as large, that the kernels of a batch of rotations hold, beside what they make."""


@dataclass(frozen=True)
class Estimate:
    """Bytes of a training step at its peak, by what they are for.

    Attributes:
        weights: all parameters, and buffers.
        residuals: the bits below half-precision weights; of lean ones the rotations since their base.
        q: skew parameters, and the channels of their blocks.
        states: of AdamW: two numbers for each number that is trained.
        gradients, activations, logits, scratch: of what is alive at the peak: gradients made so far; what the forward pass saved
            and the backward pass did not use yet; such of it, and of the scratch, as is as wide as the vocabulary; the rest.
        at: when the peak is: ``forward``, ``backward`` or ``step``.
        saved: activations and logits at the end of the forward pass.
        converted: the share of all numbers of parameters that sit in rotated weights.
    """

    weights: int
    residuals: int
    q: int
    states: int
    gradients: int
    activations: int
    logits: int
    scratch: int
    at: str
    saved: int
    converted: float

    @property
    def total(self) -> int:
        fixed = self.weights + self.residuals + self.q + self.states
        return fixed + self.gradients + self.activations + self.logits + self.scratch


@dataclass
class Traced:
    """A model's graphs as Inductor would compile them, and its rotated weights; made by :func:`trace`.

    Attributes:
        ordinary: parameters that are not rotated.
        buffers: bytes.
        forwards, backwards: in the order in which they were compiled.
        lasting: storages that these graphs read and nobody frees: of parameters, buffers, factors.
    """

    factors: list[OrthogonalFactor]
    ordinary: list[nn.Parameter]
    buffers: int
    weights: list[nn.Parameter]
    vocabulary: int | None
    forwards: list[fx.GraphModule] = field(default_factory=list)
    backwards: list[fx.GraphModule] = field(default_factory=list)
    lasting: set[object] = field(default_factory=set)

    def note(self, graph: fx.GraphModule, is_backward: bool, lasting: Sequence[int]) -> None:
        if is_backward:
            self.backwards.append(graph)
            return
        self.forwards.append(graph)
        inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        self.lasting.update(storage_of(inputs[index].meta["val"]) for index in lasting)


class _Planned(OrthogonalFactor):
    """A factor of a fake weight: all sizes are right, and there are no channels to draw."""

    def draw(self) -> None:
        pass


def trace(
    build: Callable[[], nn.Module],
    loss: Callable[[Callable[..., Any]], Tensor],
    config: PoetxConfig | None,
    vocabulary: int | None = None,
) -> Traced:
    """Build a model of fake tensors, and take one forward and backward pass through its compiled graphs.

    Args:
        build: makes the model, on CPU; what it allocates is fake.
        loss: of the compiled model, on fake inputs that it makes.
        config: None for ordinary training.
        vocabulary: the last dimension of what counts as logits.

    Raises:
        PoetxError: no linear layer of this model can be converted.
    """
    torch._dynamo.reset()
    with fake_tensors() as fake:
        model = build().train()
        planned: dict[int, _Planned] = {}
        buffers = sum(map(nbytes, model.buffers()))
        traced = Traced([], [], buffers, list(model.parameters()), vocabulary)

        def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            extra: list[Tensor] = []
            edited = copy_graph(gm)
            kept: Sequence[int] = range(len(inputs))
            if config is not None and torch.is_grad_enabled():
                with fake:  # Dynamo left it to call this
                    extra, kept = _convert(edited, inputs, config, planned)
            with activation_budget(config.activation_memory_budget if config else 1.0):
                partitioned = partition_with_inductor(edited, [*(inputs[place] for place in kept), *extra], traced.note)
            return lambda *args: partitioned(*(args[place] for place in kept), *extra)

        loss(torch.compile(model, backend=backend)).backward()
        traced.factors = list(planned.values())
        traced.ordinary = [weight for weight in traced.weights if id(weight) not in planned]
    torch._dynamo.reset()
    if config is not None and not traced.factors:
        raise PoetxError("poetx: no linear layer of this model can be converted")
    return traced


def estimate(traced: Traced, residual_bits: int = 8, is_fused: bool = False) -> Estimate:
    """Memory of a step on a GPU, with AdamW.

    Args:
        is_fused: whether with ``AdamW(fused=True)``, which writes nothing beside its states; torch's default takes a root of each
            second moment first, of all parameters of one dtype at once.

    Of the activations it counts what Inductor's partitioner saves; of the scratch what matrix products, attention and
    reductions write, and what stands between two of them. Pointwise arithmetic is taken for fused.
    """
    factors = traced.factors
    lean = [(factor, factor.base) for factor in factors if factor.base is not None]
    weights = sum(map(nbytes, traced.weights)) + traced.buffers
    weights += sum(base.number_bytes - nbytes(factor.weight) for factor, base in lean)
    unpacked = max((factor.weight.numel() for factor, _ in lean), default=0)  # the residual while a weight is made
    residuals = sum(_residual(factor, residual_bits) for factor in factors)
    skews = sum(nbytes(factor.q) for factor in factors)
    channels = sum(nbytes(factor.row_channels) + nbytes(factor.column_channels) for factor in factors)
    trained = [weight for weight in traced.ordinary if weight.requires_grad]
    gradients = sum(map(nbytes, trained)) + skews
    states = _STATES * gradients
    fixed = Estimate(
        weights=weights,
        residuals=residuals,
        q=skews + channels,
        states=states,
        gradients=0,
        activations=0,
        logits=0,
        scratch=0,
        at="",
        saved=0,
        converted=_converted(traced),
    )
    moments = [fixed]
    kept = Alive()
    for graph in traced.forwards:
        walk = Walk(graph, False, traced.vocabulary)
        moments.append(_at(fixed, "forward", kept + walk.peak() + Alive(scratch=unpacked)))
        kept += walk.outputs()
    backwards = [Walk(graph, True, traced.vocabulary, traced.lasting) for graph in traced.backwards]
    saved = kept = sum((walk.saved() for walk in backwards), Alive())
    for walk in backwards:
        kept -= walk.saved()
        moments.append(_at(fixed, "backward", kept + walk.peak() + Alive(scratch=unpacked)))
        kept += walk.outputs()
    updates = [] if is_fused else _by_dtype([*trained, *(factor.q for factor in factors)])
    scratch = max([*updates, _rotations(factors) + _fold(factors, residual_bits)])
    moments.append(_at(fixed, "step", Alive(gradients=gradients, scratch=scratch)))
    return replace(max(moments, key=lambda moment: moment.total), saved=saved.activations + saved.logits)


def _at(fixed: Estimate, at: str, alive: Alive) -> Estimate:
    return replace(fixed, at=at, **asdict(alive))


def _convert(
    gm: fx.GraphModule, inputs: Sequence[Any], config: PoetxConfig, planned: dict[int, _Planned]
) -> tuple[list[Tensor], Sequence[int]]:
    """Rewrite a graph; what it takes beside its inputs, and which of these it still takes."""
    given = dict(zip([node for node in gm.graph.nodes if node.op == "placeholder"], inputs))
    normalize(gm, given)
    rewritten: list[tuple[LinearMatch, OrthogonalFactor]] = []
    lean: list[tuple[fx.Node, OrthogonalFactor]] = []
    for found in match(gm, given, config)[0]:
        storage = storage_for(found, config)
        made = _Planned(found.weight, found.name, config, found.stack.shape, storage)
        factor = planned.setdefault(id(found.weight), made)
        if factor is made and storage != "folded":
            factor.base = BASES[storage](found.weight, factor.stack)
        factor.route = choose_route(found, config)
        if factor.route == "gram":
            rewritten.append((found, factor))
        if factor.base is not None:
            lean.append((found.placeholder, factor))
    added = rewrite(gm, rewritten)
    supply(gm, lean, added)
    dropped = {node for node, _ in lean}
    return added.tensors, [place for place, node in enumerate(given) if node not in dropped]


def _by_dtype(tensors: Sequence[Tensor]) -> list[int]:
    return [sum(nbytes(tensor) for tensor in tensors if tensor.dtype == dtype) for dtype in {t.dtype for t in tensors}]


def _converted(traced: Traced) -> float:
    rotated = sum(factor.weight.numel() for factor in traced.factors)
    return rotated / max(sum(weight.numel() for weight in traced.weights), 1)


def _residual(factor: OrthogonalFactor, bits: int) -> int:
    if factor.base is not None:
        return factor.base.nbytes - factor.base.number_bytes
    if factor.weight.dtype not in HALF:
        return 0
    count, m, n = factor.stack.shape
    return {8: count * m * n, 4: count * m * ((n + 1) // 2), 0: 0}[bits]


def _rotations(factors: Sequence[OrthogonalFactor]) -> int:
    """All ``E`` at once, float16 for half-precision weights; and the scratch of the largest batch of them."""
    sizes = [_squares(factor) * (2 if factor.weight.dtype in HALF else 4) for factor in factors]
    batch = min(2 * SKEWS_PER_BATCH, sum(map(_squares, factors)))
    return sum(sizes) + _CAYLEY_COPIES * 2 * max([batch, *map(_squares, factors)])


def _squares(factor: OrthogonalFactor) -> int:
    return factor.stack.count * sum(side.count * side.width**2 for side in factor.stack.sides)


def _fold(factors: Sequence[OrthogonalFactor], bits: int) -> int:
    """Scratch of folding the largest matrix that no Triton kernel serves: float32 copies of it, or of a lean one's rotations."""
    sizes = [
        factor.stack.rows.features * factor.stack.columns.features if factor.base is None else _squares(factor)
        for factor in factors
        if factor.base is not None or not _by_kernel(factor, bits)
    ]
    return 12 * max(sizes, default=0)


def _by_kernel(factor: OrthogonalFactor, bits: int) -> bool:
    is_whole = factor.weight.dtype not in HALF or bits == 8
    return is_whole and all(side.width <= WIDEST for side in factor.stack.sides)
