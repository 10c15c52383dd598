"""What the property tests draw: sizes by Hypothesis, numbers by a seeded generator."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from poetx_compile import PoetxConfig
from poetx_compile.factor import OrthogonalFactor

SEEDS = st.integers(0, 2**16)
SCALES = st.sampled_from((0.25, 1.0, 3.0))


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    """Standard normal numbers, rounded to ``dtype``."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


class OwningFactor(OrthogonalFactor):
    """A factor that keeps its weight alive, as a model would."""

    def __init__(self, weight: nn.Parameter, name: str, config: PoetxConfig) -> None:
        super().__init__(weight, name, config)
        self.owned = weight


@st.composite
def factors(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> OwningFactor:
    """Factors of small weights: left-over channels, one-sided ones and several chunk sizes among them."""
    chunk = draw(st.integers(1, 3))
    config = PoetxConfig(block_size=chunk * draw(st.integers(2, 4)), chunk=chunk, scale=draw(SCALES), seed=draw(SEEDS))
    shapes = st.tuples(st.integers(1, 20), st.integers(1, 20)).filter(lambda shape: max(shape) >= max(2, chunk))
    weight = nn.Parameter(normal(*draw(shapes), seed=draw(SEEDS), dtype=dtype))
    return OwningFactor(weight, "weight", config)
