"""What the property tests draw: sizes by Hypothesis, numbers by a seeded generator."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from poetx_compile import PoetxConfig
from poetx_compile.factor import OrthogonalFactor

SEEDS = st.integers(0, 2**16)
KINDS = ("matrix", "stack", "kernel")
"""Weights: of a linear layer, of experts, and of a convolution in channels-last memory."""
SCALES = st.sampled_from((0.25, 1.0, 3.0))


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    """Standard normal numbers, rounded to ``dtype``."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


class OwningFactor(OrthogonalFactor):
    """A factor that keeps its weight alive, as a model would."""

    def __init__(
        self, weight: nn.Parameter, name: str, config: PoetxConfig, matrices: tuple[int, int, int] | None = None
    ) -> None:
        super().__init__(weight, name, config, matrices)
        self.owned = weight


@st.composite
def factors(draw: st.DrawFn, dtype: torch.dtype = torch.float64, kinds: tuple[str, ...] = ("matrix",)) -> OwningFactor:
    """Factors of small weights: left-over channels, one-sided ones and several chunk sizes among them.

    Args:
        kinds: which of :data:`KINDS` to draw.
    """
    chunk = draw(st.integers(1, 3))
    config = PoetxConfig(block_size=chunk * draw(st.integers(2, 4)), chunk=chunk, scale=draw(SCALES), seed=draw(SEEDS))
    shapes = st.tuples(st.integers(1, 20), st.integers(1, 20)).filter(lambda shape: max(shape) >= max(2, chunk))
    m, n = draw(shapes)
    kind, more, seed = draw(st.sampled_from(kinds)), draw(st.integers(1, 3)), draw(SEEDS)
    if kind == "matrix":
        return OwningFactor(nn.Parameter(normal(m, n, seed=seed, dtype=dtype)), "weight", config)
    if kind == "stack":
        return OwningFactor(nn.Parameter(normal(more, m, n, seed=seed, dtype=dtype)), "weight", config)
    kernel = nn.Parameter(normal(m, more, n, seed=seed, dtype=dtype).transpose(1, 2))
    return OwningFactor(kernel, "weight", config, (1, m, n * more))
