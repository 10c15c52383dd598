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

from poetx_compile.kernels import dense, naive, triton_cayley, triton_gram, triton_rotate, triton_unpack, tuning
from poetx_compile.kernels.gram import GramSide
from poetx_compile.kernels.precision import PRECISIONS, UNIT, unscaled
from poetx_compile.kernels.quantize import GROUP, dequantize, quantize_
from poetx_compile.kernels.residual import decode, encode_
from poetx_compile.kernels.tuning import GramTiles, RotateTiles
from poetx_compile.layout import BlockLayout, StackLayout

SMALL_GRAM = GramTiles(16, 32, 16, 4, 2)
SMALL_ROTATE = RotateTiles(16, 16, 4, 2)

# relative errors of one fold, beyond what the weight's dtype rounds away
ROUNDING = {"ieee": 3e-7, "tf32x3": 3e-7, "tf32": 1e-4}

features = st.sampled_from((16, 33, 48, 64, 100, 112))
blocks = st.sampled_from((16, 32, 48))


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


@pytest.fixture(autouse=True)
def many_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: tokens are split, and two sides share a launch."""
    monkeypatch.setattr(tuning, "processors", lambda device: 12)


@given(
    m=features,
    n=features,
    block=blocks,
    tokens=st.sampled_from((0, 1, 31, 70, 520)),
    dtype=st.sampled_from((torch.float32, torch.float16)),
    bias_side=st.sampled_from((None, 0, 1)),
)
def test_block_gram(m: int, n: int, block: int, tokens: int, dtype: torch.dtype, bias_side: int | None) -> None:
    sides, expected = [], []
    bias = bias_grad = None
    for index, size in enumerate((m, n)):
        layout = BlockLayout.of(size, block, 16)
        channels = layout.channels(size + block, 0, 0)
        left, right = torch.randn(tokens, size, dtype=dtype), torch.randn(size, tokens, dtype=dtype).T
        sides.append(GramSide(left, right, channels, layout.width, layout.run))
        product = right.double()
        if index == bias_side:
            bias = torch.randn(2 * size, dtype=dtype)[::2]
            bias_grad = left.sum(0, dtype=torch.float32)
            product = product - bias.double()
        expected.append(naive.block_gram(left.double(), product, channels, layout.width))
    exact = torch.cat(expected) * 0.5
    size = sum(side.left.double().norm() * side.right.double().norm() for side in sides)
    for tiles in (None, SMALL_GRAM):
        actual = triton_gram.block_gram(sides, 0.5, bias, bias_grad, bias_side or 0, tiles)
        assert actual.dtype == torch.float32
        assert (actual - exact).norm() <= 1e-6 * exact.norm() + 1e-7 * size


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize("shape", ((1, 48, 64), (3, 64, 48), (4, 16, 33)))
def test_projection_of_a_stack(shape: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """All matrices in one launch, as further channels."""
    stack = StackLayout.of(shape, 32, 16)
    channels = [side.channels(1, place, 0) for place, side in enumerate((stack.rows, stack.columns))]
    gradient, weight = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    settings = (*channels, (stack.rows.width, stack.columns.width), (stack.rows.run, stack.columns.run), 2.0)
    exact = dense.project(gradient.double(), weight.double(), *settings)

    def by_triton(*operands: list[Tensor] | float) -> Tensor:
        *sides, scale = operands
        return triton_gram.block_gram([GramSide(*side) for side in zip(*sides)], scale)

    monkeypatch.setattr(dense, "block_gram", by_triton)
    assert relative(dense.project(gradient, weight, *settings), exact) < 1e-6


@given(width=st.sampled_from((16, 32, 48, 80)), count=st.integers(1, 3), log_scale=st.floats(-4, 1))
def test_cayley_neumann(width: int, count: int, log_scale: float) -> None:
    skew = torch.randn(count * width * (width - 1) // 2)
    scale = math.exp(log_scale) / width**0.5
    actual = triton_cayley.cayley_neumann(skew, width, scale, "ieee")
    assert relative(actual, naive.cayley_neumann(skew.double(), width, scale)) < 2e-6


@given(width=st.sampled_from((16, 48, 80, 144)), count=st.integers(1, 3), log_size=st.floats(-12, 1))
def test_cayley_neumann_in_float16(width: int, count: int, log_size: float) -> None:
    """Near and far turns: right to the 11 bits that are kept, and as orthogonal as those are."""
    skew = torch.randn(count * width * (width - 1) // 2)
    size = math.exp(log_size) / width**0.5
    exact = naive.cayley_neumann(skew.double(), width, size)
    turn = triton_cayley.cayley_neumann(skew, width, size, "tf32")
    assert turn.dtype == torch.float16
    e = turn.double() / 4096
    assert relative(e, exact) < 6e-4
    defect = torch.linalg.matrix_norm(e + e.mT + e.mT @ e, 2).max()
    assert defect < 2e-3 * torch.linalg.matrix_norm(exact, 2).max()


def test_cayley_neumann_leaves_a_block_with_nan_alone() -> None:
    skew = torch.randn(3 * 120) * 0.1
    skew[120] = float("nan")
    rotation = triton_cayley.cayley_neumann(skew, 16, 1.0, "ieee")
    assert not rotation[1].any()
    assert torch.allclose(rotation, naive.cayley_neumann(skew, 16, 1.0), atol=1e-6)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("precision", PRECISIONS)
@given(m=features, n=features, block=blocks, sides=st.sampled_from((0, 1, 2)), log_size=st.floats(-80, 9))
def test_rotate_(dtype: torch.dtype, precision: str, m: int, n: int, block: int, sides: int, log_size: float) -> None:
    layouts = BlockLayout.of(m, block, 16), BlockLayout.of(n, block, 16)
    channels = [layout.channels(m, side, 0) for side, layout in enumerate(layouts)]
    rotations = [naive.cayley_neumann(torch.randn(layout.skew) * 0.02, layout.width, 1.0) for layout in layouts]
    rows, columns = (None if sides == 1 - side else rotation for side, rotation in enumerate(rotations))
    weight = (torch.randn(m, n) * (1.0 if dtype == torch.float16 else math.exp(log_size))).to(dtype)
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
    if precision == "tf32":
        rows, columns = (None if side is None else (side * 4096).half() for side in (rows, columns))
    triton_rotate.rotate_(weight, residual, rows, channels[0], columns, channels[1], layouts[1].run, precision, SMALL_ROTATE)
    assert relative(decode(weight, residual), expected) < ROUNDING[precision] + (0 if dtype == torch.float32 else 2e-5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_rotate_keeps_zeros_and_spoils_no_more_than_it_must(dtype: torch.dtype, bad: float) -> None:
    layout = BlockLayout.of(32, 16, 16)
    channels = layout.channels(0, 0, 0)
    turn = naive.cayley_neumann(torch.randn(layout.skew) * 0.1, 16, 1.0)
    weight = torch.zeros(32, 48, dtype=dtype)
    residual = None if dtype == torch.float32 else torch.full((32, 48), 7, dtype=torch.int8)
    weight[0, 20] = 1
    weight[channels[3], 5] = bad
    length = decode(weight, residual)[:, 20].norm()
    triton_rotate.rotate_(weight, residual, turn, channels, None, channels, 1, "tf32x3", SMALL_ROTATE)
    after = decode(weight, residual)
    assert not after[channels[:16], 5].isfinite().all()
    assert abs(after[:, 20].norm() - length) < 3e-5
    others = [column for column in range(48) if column not in (5, 20)]
    assert not after[:, others].any()


@given(
    width=st.sampled_from((2, 8, 16, 24, 33, 64)),
    count=st.integers(1, 3),
    from_left=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.float16)),
)
def test_multiply_(width: int, count: int, from_left: bool, dtype: torch.dtype) -> None:
    skews = (torch.randn(count * width * (width - 1) // 2) for _ in range(2))
    turn, step = (naive.cayley_neumann(skew, width, size) for skew, size in zip(skews, (0.3, 1e-2)))
    step = step if dtype == torch.float32 else (step * UNIT).half()
    exact = unscaled(step).double()
    expected = turn.double() + (exact @ turn.double() if from_left else turn.double() @ exact)
    guarded = torch.full((count + 2, width, width), math.nan)
    inside = guarded[1:-1].copy_(turn)
    triton_rotate.multiply_(inside, step, from_left)
    assert relative(inside, expected) < 3e-7
    assert guarded[[0, -1]].isnan().all()


@given(
    m=st.integers(1, 5),
    n=st.sampled_from((1, 33, 127, 128, 129, 1300)),
    dtype=st.sampled_from((torch.bfloat16, torch.float16)),
)
def test_unpack(m: int, n: int, dtype: torch.dtype) -> None:
    matrix = torch.randn(m, n)
    matrix[0] = 0
    codes, scales = torch.empty(m, n, dtype=torch.int8), torch.empty(m, -(-n // GROUP), dtype=torch.bfloat16)
    quantize_(codes, scales, matrix)
    weight, residual = torch.full((m, n), torch.nan, dtype=dtype), torch.full((m, n), 99, dtype=torch.int8)
    triton_unpack.unpack_(weight, residual, codes, scales)
    wanted = torch.empty_like(weight), torch.empty_like(residual)
    encode_(*wanted, dequantize(codes, scales, torch.float32))
    assert torch.equal(weight, wanted[0])
    assert torch.equal(residual, wanted[1])
