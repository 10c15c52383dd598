"""What a training step of a model needs in memory: counted on graphs of fake tensors, with nothing allocated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ._torch.compilers import activation_budget, partition_with_inductor
from ._torch.graphs import copy_graph
from ._torch.tensors import fake_tensors
from .base import BASES
from .config import PoetxConfig
from .conversion import storage_for
from .errors import PoetxError
from .factor import OrthogonalFactor
from .kernels import HALF
from .kernels.tuning import WIDEST
from .liveness import Alive, Graphs, nbytes
from .passes import LinearMatch, SkipReason, choose_route, match, normalize, rewrite, supply
from .retraction import LIGHTER, SKEWS_PER_BATCH
from .stepper import ADAMW, Stepper

_OF_KERNELS, _OF_TORCH = 8, 26
"""Bytes an element of ``[r, b, b]`` that a batch of rotations takes beside what it makes, by kernels and in plain PyTorch."""


@dataclass(frozen=True)
class Peak:
    """Bytes of a training step at its peak, by what they are for.

    Attributes:
        weights: all parameters, and buffers.
        residuals: the bits below half-precision weights; of lean ones the rotations since their base.
        q: skew parameters, and the channels of their blocks.
        states: of the optimizer.
        gradients, activations, logits, scratch: of what is alive at the peak: gradients made so far; what the forward pass saved
            and the backward pass did not use yet; such of it, and of the scratch, as is as wide as the vocabulary; the rest.
    """

    weights: int
    residuals: int
    q: int
    states: int
    gradients: int
    activations: int
    logits: int
    scratch: int

    @property
    def total(self) -> int:
        fixed = self.weights + self.residuals + self.q + self.states
        return fixed + self.gradients + self.activations + self.logits + self.scratch


@dataclass(frozen=True)
class Estimate(Peak):
    """A training step at its peak, and what is known beside.

    Attributes:
        at: when the peak is: ``forward``, ``backward`` or ``step``.
        saved: activations and logits at the end of the forward pass.
        converted: the share of all numbers of parameters that sit in rotated weights.
    """

    at: str
    saved: int
    converted: float


@dataclass
class Traced:
    """A model's graphs as Inductor would compile them, and its rotated weights; made by :func:`trace`.

    Attributes:
        fake: the mode to which all tensors here belong.
        weights: all parameters.
        buffers: bytes.
        remembered: why a weight stays ordinary though a graph could rotate it.
        matches, factors: of rotated weights, by their identity.
        unseen: whether lean weights are made in these graphs, which were traced with folded ones.
    """

    fake: Any
    weights: list[nn.Parameter]
    buffers: int
    graphs: Graphs
    remembered: Callable[[nn.Parameter], SkipReason | None] = lambda weight: None
    matches: dict[int, LinearMatch] = field(default_factory=dict)
    factors: dict[int, OrthogonalFactor] = field(default_factory=dict)
    unseen: bool = False

    @property
    def ordinary(self) -> list[nn.Parameter]:
        """Parameters that are not rotated."""
        return [weight for weight in self.weights if id(weight) not in self.factors]

    def add(self, found: LinearMatch, config: PoetxConfig) -> OrthogonalFactor:
        """The factor of a weight that some graph uses so; the first use decides how it is stored."""
        key = id(found.weight)
        if key not in self.factors:
            self.matches[key] = found
            self.factors[key] = _planned(found, config)
        return self.factors[key]

    def take(self, gm: fx.GraphModule, inputs: Sequence[Any], config: PoetxConfig) -> Callable[..., Any]:
        """Convert, partition and note one graph; what would run it.

        Args:
            gm: edited in place.
            inputs: fake.
        """
        with self.fake:  # Dynamo left it to call this
            extra, kept = _convert(gm, inputs, config, self)
        return self.partition(gm, inputs, extra, kept, config.activation_memory_budget)

    def partition(
        self, gm: fx.GraphModule, inputs: Sequence[Any], extra: list[Tensor], kept: Sequence[int], budget: float
    ) -> Callable[..., Any]:
        with activation_budget(budget):
            partitioned = partition_with_inductor(gm, [*(inputs[place] for place in kept), *extra], self.graphs.note)
        return lambda *args: partitioned(*(args[place] for place in kept), *extra)

    def stored_as(self, config: PoetxConfig) -> Traced:
        """The same graphs, traced with folded weights, and weights stored by other settings."""
        with self.fake:
            made = {key: _planned(found, config) for key, found in self.matches.items()}
        return replace(self, factors=made, unseen=True)


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
        traced = Traced(fake, list(model.parameters()), sum(map(nbytes, model.buffers())), Graphs(vocabulary))

        def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            edited = copy_graph(gm)
            if config is None or not torch.is_grad_enabled():
                return traced.partition(edited, inputs, [], range(len(inputs)), 1.0)
            return traced.take(edited, inputs, config)

        loss(torch.compile(model, backend=backend)).backward()
    torch._dynamo.reset()
    if config is not None and not traced.factors:
        raise PoetxError("poetx: no linear layer of this model can be converted")
    return traced


def estimate(traced: Traced, residual_bits: int = 8, stepper: Stepper = ADAMW) -> Estimate:
    """Memory of a step on a GPU.

    Of the activations it counts what Inductor's partitioner saves; of the scratch what matrix products, attention and
    reductions write, and what stands between two of them. Pointwise arithmetic is taken for fused.
    """
    fixed = _kept(traced, residual_bits, stepper)
    factors = list(traced.factors.values())
    trained = [weight for weight in traced.ordinary if weight.requires_grad]
    gradients = sum(map(nbytes, trained)) + sum(nbytes(factor.q) for factor in factors)
    made = Alive(scratch=_made(traced))
    moments = [fixed, *(_at(fixed, name, alive + made) for name, alive in traced.graphs.peaks)]
    updates = [] if stepper.is_fused else _by_dtype([*trained, *(factor.q for factor in factors)])
    scratch = max([*updates, _rotations(factors) + _fold(factors, residual_bits)])
    moments.append(_at(fixed, "step", Alive(gradients=gradients, scratch=scratch)))
    saved = traced.graphs.saved
    return replace(max(moments, key=lambda moment: moment.total), saved=saved.activations + saved.logits)


def _kept(traced: Traced, residual_bits: int = 8, stepper: Stepper = ADAMW) -> Estimate:
    """The part that is there at all moments of a step."""
    factors = list(traced.factors.values())
    weights = sum(map(nbytes, traced.weights)) + traced.buffers
    weights += sum(factor.base.number_bytes - nbytes(factor.weight) for factor in factors if factor.base is not None)
    skews = sum(nbytes(factor.q) for factor in factors)
    channels = sum(nbytes(factor.row_channels) + nbytes(factor.column_channels) for factor in factors)
    trained = sum(nbytes(weight) for weight in traced.ordinary if weight.requires_grad)
    return Estimate(
        weights=weights,
        residuals=sum(_residual(factor, residual_bits) for factor in factors),
        q=skews + channels,
        states=stepper.states * trained + stepper.skew_states * skews,
        gradients=0,
        activations=0,
        logits=0,
        scratch=0,
        at="",
        saved=0,
        converted=_converted(traced),
    )


def _made(traced: Traced) -> int:
    """Bytes of the largest lean weight while a product needs it, as far as the graphs do not show it."""
    weights = [factor.weight for factor in traced.factors.values() if factor.base is not None]
    return max((weight.numel() + (nbytes(weight) if traced.unseen else 0) for weight in weights), default=0)


def _at(fixed: Estimate, at: str, alive: Alive) -> Estimate:
    return replace(fixed, at=at, **asdict(alive))


def _convert(
    gm: fx.GraphModule, inputs: Sequence[Any], config: PoetxConfig, traced: Traced
) -> tuple[list[Tensor], Sequence[int]]:
    """Rewrite a graph; what it takes beside its inputs, and which of these it still takes."""
    given = dict(zip([node for node in gm.graph.nodes if node.op == "placeholder"], inputs))
    normalize(gm, given)
    rewritten: list[tuple[LinearMatch, OrthogonalFactor]] = []
    lean: list[tuple[fx.Node, OrthogonalFactor]] = []
    for found in match(gm, given, config, traced.remembered)[0]:
        factor = traced.add(found, config)
        factor.route = choose_route(found, config)
        if factor.route == "gram":
            rewritten.append((found, factor))
        if factor.base is not None:
            lean.append((found.placeholder, factor))
    added = rewrite(gm, rewritten)
    supply(gm, lean, added)
    dropped = {node for node, _ in lean}
    return added.tensors, [place for place, node in enumerate(given) if node not in dropped]


def _planned(found: LinearMatch, config: PoetxConfig) -> OrthogonalFactor:
    storage = storage_for(found, config)
    factor = _Planned(found.weight, found.name, config, found.stack.shape, storage)
    if storage != "folded":
        factor.base = BASES[storage](found.weight, factor.stack)
    return factor


def _by_dtype(tensors: Sequence[Tensor]) -> list[int]:
    return [sum(nbytes(tensor) for tensor in tensors if tensor.dtype == dtype) for dtype in {t.dtype for t in tensors}]


def _converted(traced: Traced) -> float:
    rotated = sum(factor.weight.numel() for factor in traced.factors.values())
    return rotated / max(sum(weight.numel() for weight in traced.weights), 1)


def _residual(factor: OrthogonalFactor, bits: int) -> int:
    if factor.base is not None:
        return factor.base.nbytes - factor.base.number_bytes
    if factor.weight.dtype not in HALF:
        return 0
    count, m, n = factor.stack.shape
    return {8: count * m * n, 4: count * m * ((n + 1) // 2), 0: 0}[bits]


def _rotations(factors: Sequence[OrthogonalFactor]) -> int:
    """All ``E`` at once, float16 where kernels make them for half precision; and the scratch of the largest batch of them."""
    sizes = [_squares(factor) * (2 if factor.weight.dtype in HALF else 4) for factor in factors]
    by_kernel = [factor.weight.dtype in HALF or _is_narrow(factor) for factor in factors]
    scratch = [_squares(factor) * (_OF_KERNELS if ours else _OF_TORCH) for factor, ours in zip(factors, by_kernel)]
    batch = min(2 * SKEWS_PER_BATCH * max(LIGHTER * _OF_KERNELS, _OF_TORCH), sum(scratch))
    return sum(sizes) + max([batch, *scratch])


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
    return is_whole and _is_narrow(factor)


def _is_narrow(factor: OrthogonalFactor) -> bool:
    return all(side.width <= WIDEST for side in factor.stack.sides)
