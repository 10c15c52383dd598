"""A small factor, and rotations as an optimizer would write them."""

from __future__ import annotations

import pytest
import torch
from strategies import OwningFactor, normal
from torch import Tensor, nn

from poetx_compile import PoetxConfig
from poetx_compile.factor import OrthogonalFactor
from poetx_compile.kernels import HALF, decode
from poetx_compile.retraction import retract_all

CONFIG = PoetxConfig(block_size=16, chunk=4)
DTYPES = (torch.float64, torch.float32, *HALF)
of_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def small_factor(dtype: torch.dtype = torch.float64, config: PoetxConfig = CONFIG, name: str = "fc.weight") -> OwningFactor:
    """Of a weight with two blocks of rows, and three of columns beside two left-over channels."""
    return OwningFactor(nn.Parameter(normal(32, 50, seed=1, dtype=dtype)), name, config)


def turn(factor: OrthogonalFactor, seed: int, size: float = 0.1) -> Tensor:
    """Write a random rotation into ``q``, as an optimizer would; returns a copy of it."""
    q = normal(factor.q.numel(), seed=seed, dtype=factor.q.dtype) * (size / factor.config.scale)
    with torch.no_grad():
        factor.q.copy_(q)
    return q


def retract(factor: OrthogonalFactor, gain: float = 1.0) -> None:
    retract_all([(factor, gain)])


def master(factor: OrthogonalFactor) -> Tensor:
    return decode(factor.weight.detach(), factor.residual).double()
