"""The Triton kernels against their oracle, by Triton's interpreter: run by ``test_triton.py`` in a process of its own.

bfloat16 products are left to the GPU: the interpreter multiplies their bits as integers.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from poetx_compile.kernels import naive, triton_cayley, triton_gram, triton_rotate
from poetx_compile.kernels.residual import decode
from poetx_compile.kernels.tuning import GramTiles, RotateTiles
from poetx_compile.layout import BlockLayout

SMALL_GRAM = GramTiles(16, 32, 16, 3, 4, 2)
SMALL_ROTATE = RotateTiles(16, 16, 4, 2)

features = st.sampled_from((16, 33, 48, 64, 100, 112))
blocks = st.sampled_from((16, 32, 48))


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


@given(
    n=features, block=blocks, tokens=st.sampled_from((0, 1, 31, 70)), dtype=st.sampled_from((torch.float32, torch.float16))
)
def test_block_gram(n: int, block: int, tokens: int, dtype: torch.dtype) -> None:
    layout = BlockLayout.of(n, block, 16)
    channels = layout.channels(n + block, 0, 0)
    left, right = torch.randn(tokens, n, dtype=dtype), torch.randn(n, tokens, dtype=dtype).T
    expected = naive.block_gram(left.double(), right.double(), channels, layout.width)
    for tiles in (None, SMALL_GRAM):
        actual = triton_gram.block_gram(left, right, channels, layout.width, layout.run, tiles)
        assert actual.dtype == torch.float32
        assert relative(actual, expected) < 1e-6 or (not tokens and not actual.any())


@given(width=st.sampled_from((16, 32, 48, 80)), count=st.integers(1, 3), log_scale=st.floats(-4, 1))
def test_cayley_neumann(width: int, count: int, log_scale: float) -> None:
    skew = torch.randn(count * width * (width - 1) // 2)
    scale = math.exp(log_scale) / width**0.5
    actual = triton_cayley.cayley_neumann(skew, width, scale, "ieee")
    assert relative(actual, naive.cayley_neumann(skew.double(), width, scale)) < 2e-6


def test_cayley_neumann_leaves_a_block_with_nan_alone() -> None:
    skew = torch.randn(3 * 120) * 0.1
    skew[120] = float("nan")
    rotation = triton_cayley.cayley_neumann(skew, 16, 1.0, "ieee")
    assert not rotation[1].any()
    assert torch.allclose(rotation, naive.cayley_neumann(skew, 16, 1.0), atol=1e-6)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@given(m=features, n=features, block=blocks, sides=st.sampled_from((0, 1, 2)))
def test_rotate_(dtype: torch.dtype, m: int, n: int, block: int, sides: int) -> None:
    layouts = BlockLayout.of(m, block, 16), BlockLayout.of(n, block, 16)
    channels = [layout.channels(m, side, 0) for side, layout in enumerate(layouts)]
    rotations = [naive.cayley_neumann(torch.randn(layout.skew) * 0.02, layout.width, 1.0) for layout in layouts]
    rows, columns = (None if sides == 1 - side else rotation for side, rotation in enumerate(rotations))
    weight = torch.randn(m, n).to(dtype)
    residual = None if dtype == torch.float32 else torch.randint(-100, 100, (m, n), dtype=torch.int8)
    expected = decode(weight, residual).double()
    naive.rotate_(
        expected,
        None,
        None if rows is None else rows.double(),
        channels[0],
        None if columns is None else columns.double(),
        channels[1],
    )
    triton_rotate.rotate_(weight, residual, rows, channels[0], columns, channels[1], layouts[1].run, "ieee", SMALL_ROTATE)
    assert relative(decode(weight, residual), expected) < (3e-7 if dtype == torch.float32 else 2e-5)
