"""Blocks that no kernel holds in registers: rotated by the matrix library, at the precision of the kernels."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from poetx_compile.kernels import block_gram, cayley_neumann, effective, naive, rotate_, wide
from poetx_compile.kernels.precision import UNIT
from poetx_compile.kernels.residual import decode, encode_, new_residual
from poetx_compile.layout import BlockLayout

ROUNDING = 1e-4


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-300))


def halves(layout: BlockLayout, size: float, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """``4096 E`` of random blocks, and their channels."""
    turn = naive.cayley_neumann(torch.randn(layout.skew, device=device), layout.width, size / math.sqrt(layout.width))
    return (turn * UNIT).half(), layout.channels(1, 0, 0).to(device)


@given(
    m=st.sampled_from((16, 33, 100)),
    n=st.sampled_from((16, 48, 90)),
    width=st.sampled_from((8, 16, 40)),
    sides=st.sampled_from(("rows", "columns", "both")),
    exponent=st.integers(-60, 60),
)
def test_turns_as_the_oracle(m: int, n: int, width: int, sides: str, exponent: int) -> None:
    rows, columns = (halves(BlockLayout.of(size, width, 8), 0.1) for size in (m, n))
    turns = (rows[0] if sides != "columns" else None, columns[0] if sides != "rows" else None)
    weight = torch.randn(m, n) * 2.0**exponent
    exact = weight.double()
    whole = (None if turn is None else turn.double() / UNIT for turn in turns)
    naive.turn_(exact, next(whole), rows[1], next(whole), columns[1])
    wide.turn_(weight, turns[0], rows[1], turns[1], columns[1])
    assert relative(weight, exact) < ROUNDING


def test_zeros_stay_and_what_is_not_finite_spoils_its_own_column_only() -> None:
    rows, channels = halves(BlockLayout.of(16, 16, 8), 0.1)
    weight = torch.zeros(16, 4)
    wide.turn_(weight, rows, channels, None, channels)
    assert not weight.any()
    weight = torch.randn(16, 4)
    weight[3, 1] = float("nan")
    wide.turn_(weight, rows, channels, None, channels)
    assert weight[:, 1].isnan().all()
    assert weight[:, (0, 2, 3)].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("size", (0.01, 0.5), ids=("near", "far"))
@pytest.mark.parametrize("width", (640, 1280))
def test_rotations_of_wide_blocks(width: int, size: float) -> None:
    skew = torch.randn(2 * width * (width - 1) // 2, device="cuda")
    skew[: len(skew) // 2] *= 0.1
    exact = naive.cayley_neumann(skew.double(), width, size / math.sqrt(width))
    turn = cayley_neumann(skew, width, size / math.sqrt(width), "tf32")
    assert turn.dtype == torch.float16
    assert relative(turn / UNIT, exact) < 6e-4


@pytest.mark.gpu
def test_gradients_of_wide_blocks() -> None:
    layout = BlockLayout.of(1300, 1000, 8)
    channels = layout.channels(1, 0, 0).cuda()
    left, right = (torch.randn(333, 1300, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    expected = naive.block_gram(left.double(), right.double(), channels, layout.width)
    gram = block_gram([left], [right], [channels], [layout.width], [layout.run])
    assert relative(gram, expected) < 1e-6
    assert torch.equal(gram, block_gram([left], [right], [channels], [layout.width], [layout.run]))


@pytest.mark.gpu
@pytest.mark.parametrize("bits", (8, 4, 0))
def test_folds_wide_blocks_and_narrow_ones_beside_them(bits: int) -> None:
    rows, columns = (halves(BlockLayout.of(size, width, 8), 0.05, "cuda") for size, width in ((1100, 1000), (320, 160)))
    weight = torch.randn(1100, 320, device="cuda").bfloat16()
    residual = new_residual(weight, (1, *weight.shape), bits)
    residual = residual.view(weight.shape[0], -1) if residual is not None else None
    exact = decode(weight, residual).double()
    naive.rotate_(exact, None, rows[0].double() / UNIT, rows[1], columns[0].double() / UNIT, columns[1])
    expected, rest = weight.clone(), None if residual is None else residual.clone()
    encode_(expected, rest, exact.float())
    rotate_(weight, residual, rows[0], rows[1], columns[0], columns[1], 8, "tf32")
    lost = relative(decode(expected, rest), exact)
    assert relative(decode(weight, residual), exact) < ROUNDING + 1.5 * lost


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ("tf32", "tf32x3"))
def test_makes_lean_weights_of_wide_blocks(precision: str) -> None:
    (turn, channels), (other, places) = (halves(BlockLayout.of(size, 1024, 8), 0.3, "cuda") for size in (1024, 768))
    rows, columns = turn.float() / UNIT, other.float() / UNIT
    stored = torch.randn(1024, 768, device="cuda").bfloat16()
    exact = naive.effective(stored, None, rows, channels, columns, places, torch.float64)
    made = effective(stored, None, rows, channels, columns, places, torch.bfloat16, 8, precision)
    assert relative(made, exact) < 1.5 * relative(exact.bfloat16(), exact)
