"""The least time that a piece of work can take on a device: its arithmetic, or its memory traffic, at the peak rate.

Peaks are those of NVIDIA's data sheets, for dense (not sparse) bfloat16 products and for the device's own memory: H100 SXM
(H100 Tensor Core GPU data sheet), H200 SXM (H200 Tensor Core GPU data sheet), A100 80GB SXM (A100 Tensor Core GPU data
sheet). float16 products run at the bfloat16 rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_WEIGHT = 2
"""Bytes of a bfloat16 number: weights, activations, and the states of an optimizer over them."""


@dataclass(frozen=True)
class Peaks:
    """Peak rates of a device: bfloat16 ``flops`` in flop/s, memory ``bandwidth`` in bytes/s."""

    flops: float
    bandwidth: float


PEAKS = {
    "NVIDIA H100 80GB HBM3": Peaks(989e12, 3.35e12),
    "NVIDIA H200": Peaks(989e12, 4.8e12),
    "NVIDIA A100-SXM4-80GB": Peaks(312e12, 2.039e12),
}
"""By the name that ``torch.cuda.get_device_name`` gives."""


def peaks(device: str, flops: float | None = None, bandwidth: float | None = None) -> Peaks | None:
    """The peaks of a device by its name, or those given; None where neither is known."""
    known = PEAKS.get(device)
    if known is not None:
        return Peaks(flops or known.flops, bandwidth or known.bandwidth)
    return Peaks(flops, bandwidth) if flops and bandwidth else None


@dataclass(frozen=True)
class Kernel:
    """A part of the work within which arithmetic and memory traffic can overlap.

    Attributes:
        flops: multiplications and additions in matrix products; elementwise arithmetic is not counted.
        bytes: moved to and from memory at least: each operand read once, each result written once.
    """

    flops: int
    bytes: int

    def seconds(self, peaks: Peaks) -> float:
        return max(self.flops / peaks.flops, self.bytes / peaks.bandwidth)


def floor_ms(kernels: Sequence[Kernel], peaks: Peaks | None) -> float | None:
    """Milliseconds that the kernels take at least, one after the other; None for a device of unknown peaks."""
    return None if peaks is None else 1e3 * sum(kernel.seconds(peaks) for kernel in kernels)


def linear(m: int, n: int, tokens: int) -> list[Kernel]:
    """Forward and backward of ``y = x Wᵀ``: ``y``, ``dx`` and ``dW``."""
    return 3 * [_product(m, n, tokens)]


def poetx(m: int, n: int, tokens: int, block: int) -> list[Kernel]:
    """Forward and backward with a rotated weight: ``y``, ``dx``, and a Gram sum over outputs and over inputs."""
    return [*2 * [_product(m, n, tokens)], _blockwise(m, tokens, block), _blockwise(n, tokens, block)]


def official_fast(m: int, n: int, tokens: int, block: int) -> list[Kernel]:
    """Forward and backward of rotated activations: on each side two rotations and the gradient of its blocks."""
    return [*2 * [_product(m, n, tokens)], *3 * [_blockwise(m, tokens, block), _blockwise(n, tokens, block)]]


def official_mem(m: int, n: int, tokens: int, block: int) -> list[Kernel]:
    """The same, with the rotated inputs and the outputs made again for the backward pass."""
    return [*official_fast(m, n, tokens, block), _product(m, n, tokens), _blockwise(n, tokens, block)]


def adamw(parameters: int, width: int = _WEIGHT) -> list[Kernel]:
    """A step of AdamW, all of its numbers ``width`` bytes: parameter, gradient and two moments in, all but one out."""
    return [Kernel(0, 7 * width * parameters)]


def skews(m: int, n: int, block: int) -> int:
    """Skew parameters of a weight whose dimensions are cut into whole blocks."""
    return (m + n) * (block - 1) // 2


def retract(m: int, n: int, block: int) -> list[Kernel]:
    """The fold of a rotation into a bfloat16 weight with its int8 residual, its products in float16."""
    return [
        Kernel(_cayley_flops(m, n, block), 4 * skews(m, n, block)),
        Kernel(4 * m * n * block, 2 * (_WEIGHT + 1) * m * n),
    ]


def even_steps(m: int, n: int, block: int) -> list[Kernel]:
    """Steps near their polar factors: nine products a block, each skew or symmetric, so half of it."""
    return [Kernel(9 * block**3 * ((m + n) // block), 8 * skews(m, n, block))]


def official_merge(m: int, n: int, block: int) -> list[Kernel]:
    """The same for a bfloat16 weight without residual, in bfloat16."""
    return [
        Kernel(_cayley_flops(m, n, block), _WEIGHT * skews(m, n, block)),
        Kernel(4 * m * n * block, 2 * _WEIGHT * m * n),
    ]


def frozen(m: int, n: int, tokens: int) -> list[Kernel]:
    """Forward and backward of a linear layer whose weight has no gradient: ``y`` and ``dx``."""
    return 2 * [_product(m, n, tokens)]


def lora(m: int, n: int, tokens: int, rank: int) -> list[Kernel]:
    """A frozen layer, and beside it two trained ones: ``[rank, n]`` and ``[m, rank]``."""
    return [*frozen(m, n, tokens), *linear(rank, n, tokens), *linear(m, rank, tokens)]


def attention(channels: int, tokens: int, length: int) -> list[Kernel]:
    """Forward and backward of causal attention over sequences of ``length``, scores never written to memory.

    Forward two products of which half is masked, backward four; scores that are made again are not counted. Tensors
    ``[tokens, channels]``: forward reads three and writes one, backward reads five and writes three.
    """
    product = tokens * length * channels
    return [
        Kernel(2 * product, 4 * _WEIGHT * tokens * channels),
        Kernel(4 * product, 8 * _WEIGHT * tokens * channels),
    ]


def embedding(rows: int, channels: int, tokens: int, is_trained: bool = True) -> list[Kernel]:
    """The gather, and the gradient of the whole table: made of zeros, to which ``[tokens, channels]`` is added."""
    gather = Kernel(0, 2 * _WEIGHT * tokens * channels)
    return [gather, Kernel(0, _WEIGHT * (tokens + rows) * channels)] if is_trained else [gather]


def eight_bit_adamw(parameters: int) -> list[Kernel]:
    """AdamW with moments of one byte: parameter, gradient and two moments in, all but one out. Scales are not counted."""
    return [Kernel(0, (3 * _WEIGHT + 4) * parameters)]


def adafactor(parameters: int) -> list[Kernel]:
    """Parameter and gradient in, parameter out; its factored moments are not counted."""
    return [Kernel(0, 3 * _WEIGHT * parameters)]


def muon(m: int, n: int) -> list[Kernel]:
    """Momentum, then five Newton-Schulz iterations of three products over the smaller side, then the weight."""
    small, large = sorted((m, n))
    iteration = 2 * (2 * small * small * large) + 2 * small**3
    return [Kernel(5 * iteration, 5 * _WEIGHT * m * n)]


def low_rank(m: int, n: int, rank: int, is_projected_back: bool) -> list[Kernel]:
    """A step with moments of the gradient in ``rank`` dimensions of its smaller side: GaLore's, or APOLLO's.

    The gradient is projected, two small moments go in and out, and the weight changes: by what is projected back, or by
    the gradient itself, scaled. New projections are not counted.
    """
    small, large = sorted((m, n))
    project = Kernel(2 * m * n * rank, _WEIGHT * (m * n + rank * small + rank * large))
    moments = Kernel(0, 5 * _WEIGHT * rank * large)
    if is_projected_back:
        return [project, moments, Kernel(2 * m * n * rank, _WEIGHT * (2 * m * n + rank * small + rank * large))]
    return [project, moments, Kernel(0, 3 * _WEIGHT * m * n)]


def per_step(kernels: Sequence[Kernel], period: int) -> list[Kernel]:
    """A step's share of work that is done once in ``period`` steps."""
    return [Kernel(kernel.flops // period, kernel.bytes // period) for kernel in kernels]


def _product(m: int, n: int, tokens: int) -> Kernel:
    """A matrix product over two of ``[tokens, m]``, ``[tokens, n]`` and ``[m, n]`` into the third."""
    return Kernel(2 * tokens * m * n, _WEIGHT * (tokens * m + tokens * n + m * n))


def _blockwise(features: int, tokens: int, block: int) -> Kernel:
    """A block-diagonal product with two tensors ``[tokens, features]``; the blocks themselves are not counted as traffic."""
    return Kernel(2 * tokens * features * block, 2 * _WEIGHT * tokens * features)


def _cayley_flops(m: int, n: int, block: int) -> int:
    """Three products for each block."""
    return 3 * 2 * block**3 * ((m + n) // block)
