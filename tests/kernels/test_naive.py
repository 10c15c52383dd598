"""The meaning of the kernels, against dense linear algebra in float64."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from oracle import orthogonal
from strategies import SCALES, SEEDS, factors, normal
from torch import Tensor

from poetx_compile.factor import OrthogonalFactor
from poetx_compile.kernels import decode
from poetx_compile.kernels.naive import (
    LARGEST_SQUARE,
    block_gram,
    cayley_neumann,
    pack_skew,
    rotate_,
    unpack_skew,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "transposed", "every second column", "one row repeated")
WIDTHS = st.integers(2, 12)


def packed_size(width: int) -> int:
    return width * (width - 1) // 2


# --- Packing ---------------------------------------------------------------------------------------------------------


def test_a_packed_triangle_runs_row_by_row() -> None:
    expected = torch.tensor([[[0.0, 1, 2], [-1, 0, 3], [-2, -3, 0]]])
    assert torch.equal(unpack_skew(torch.tensor([1.0, 2, 3]), 3), expected)


@given(WIDTHS, st.integers(1, 4), SEEDS)
def test_unpacking_inverts_packing(width: int, blocks: int, seed: int) -> None:
    matrices = normal(blocks, width, width, seed=seed)
    assert torch.equal(unpack_skew(pack_skew(matrices), width), matrices - matrices.mT)


@given(WIDTHS, st.integers(1, 4), SEEDS)
def test_packing_a_skew_matrix_doubles_its_triangle(width: int, blocks: int, seed: int) -> None:
    packed = normal(blocks * packed_size(width), seed=seed)
    assert torch.equal(pack_skew(unpack_skew(packed, width)), 2 * packed)


# --- Gram matrices of blocks -----------------------------------------------------------------------------------------


def laid_out(values: Tensor, layout: str) -> Tensor:
    """A tensor of the same shape with another memory layout; ``one row repeated`` changes the values too."""
    if layout == "transposed":
        return values.mT.contiguous().mT
    if layout == "every second column":
        return values.repeat_interleave(2, dim=1)[:, ::2]
    if layout == "one row repeated" and len(values):
        return values[:1].expand_as(values)
    return values


def skew_of_block(left: Tensor, right: Tensor, block: Tensor) -> list[float]:
    """The definition, one number after another."""
    a, b = left.double()[:, block], right.double()[:, block]
    entries = [(i, j) for i in range(len(block)) for j in range(i + 1, len(block))]
    return [float(a[:, i] @ b[:, j] - a[:, j] @ b[:, i]) for i, j in entries]


@given(
    tokens=st.integers(0, 33),
    width=WIDTHS,
    blocks=st.integers(1, 3),
    left_over=st.integers(0, 5),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    seed=SEEDS,
)
@example(tokens=0, width=4, blocks=2, left_over=1, dtype=torch.bfloat16, layout="contiguous", seed=0)
@example(tokens=1, width=4, blocks=2, left_over=1, dtype=torch.float32, layout="transposed", seed=0)
def test_block_gram_is_the_skew_part_of_each_block(
    tokens: int, width: int, blocks: int, left_over: int, dtype: torch.dtype, layout: str, seed: int
) -> None:
    features = blocks * width + left_over
    left, right = (laid_out(normal(tokens, features, seed=seed + i, dtype=dtype), layout) for i in range(2))
    channels = torch.randperm(features, generator=torch.Generator().manual_seed(seed))[: blocks * width]

    result = block_gram(left, right, channels, width)

    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = [skew_of_block(left, right, block) for block in channels.view(blocks, width)]
    sizes = left.double().abs().mT @ right.double().abs()
    terms = pack_skew_of_sum(sizes, channels.view(blocks, width))
    rounding = torch.finfo(result.dtype).eps / 2
    bound = (tokens + 2) * rounding * terms + tokens * 2.0**-52 * terms
    assert ((result.double() - torch.tensor(expected, dtype=torch.float64).reshape(-1)).abs() <= bound).all()


def pack_skew_of_sum(sizes: Tensor, blocks: Tensor) -> Tensor:
    """``|A| + |A|ᵀ`` of each block, packed: what rounding errors of its skew part are relative to."""
    inside = torch.stack([sizes[block][:, block] for block in blocks])
    rows, columns = torch.triu_indices(inside.shape[-1], inside.shape[-1], 1)
    return (inside + inside.mT)[:, rows, columns].reshape(-1)


def test_autocast_does_not_reach_the_gram_sums() -> None:
    left, right = (normal(64, 8, seed=seed, dtype=torch.float32) for seed in range(2))
    alone = block_gram(left, right, torch.arange(8), 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(block_gram(left, right, torch.arange(8), 4), alone)


# --- Rotations from skew matrices ------------------------------------------------------------------------------------


def skew_of_size(size: float, width: int, blocks: int, seed: int) -> Tensor:
    """Packed skew matrices whose ``ΩᵀΩ`` has ``size²`` as its largest row sum of absolute values.

    That is a bound on the square of the largest eigenvalue, the one that :func:`cayley_neumann` goes by.
    """
    omega = unpack_skew(normal(blocks * packed_size(width), seed=seed), width)
    omega = omega * size / (omega.mT @ omega).abs().sum(-1).amax(-1).sqrt()[:, None, None]
    return pack_skew(omega) / 2


def exact_rotation(packed: Tensor, width: int) -> Tensor:
    """``(I + Ω)(I − Ω)⁻¹ − I``, without the cancellation."""
    eye = torch.eye(width, dtype=torch.float64)
    return torch.stack([torch.linalg.solve(eye - omega, 2 * omega) for omega in unpack_skew(packed.double(), width)])


def defect(rotation: Tensor) -> float:
    """How far ``I + E`` is from orthogonal."""
    e = rotation.double()
    return float(torch.linalg.matrix_norm(e + e.mT + e.mT @ e, 2).max())


SIZES = st.floats(1e-3, 1.5)


@given(SIZES, WIDTHS, st.integers(1, 3), SEEDS)
def test_float64_rotations_are_exact_cayley_transforms(size: float, width: int, blocks: int, seed: int) -> None:
    packed = skew_of_size(size, width, blocks, seed)
    result, expected = cayley_neumann(packed, width, 1.0), exact_rotation(packed, width)
    assert (result - expected).abs().max() <= 1e-14 * expected.abs().max()
    assert defect(result) <= 1e-14


@given(SIZES, WIDTHS, st.integers(1, 3), SEEDS)
def test_float32_rotations_err_by_float32_rounding(size: float, width: int, blocks: int, seed: int) -> None:
    packed = skew_of_size(size, width, blocks, seed).float()
    result, expected = cayley_neumann(packed, width, 1.0).double(), exact_rotation(packed, width)
    assert (result - expected).abs().max() <= 1e-6 * expected.abs().max()


@given(SIZES, WIDTHS, st.integers(1, 3), SEEDS)
def test_small_rotations_are_orthogonal_to_more_digits(size: float, width: int, blocks: int, seed: int) -> None:
    packed = skew_of_size(size, width, blocks, seed).float()
    assert defect(cayley_neumann(packed, width, 1.0)) <= 1e-6 * size


@pytest.mark.parametrize("size", [1e-3, 1e-2, 0.1, 1.0, 1.5, 1e2])
def test_blocks_of_the_default_width_are_orthogonal(size: float) -> None:
    packed = skew_of_size(size, 256, 2, seed=0)
    assert defect(cayley_neumann(packed.float(), 256, 1.0)) <= 2e-6
    assert defect(cayley_neumann(packed, 256, 1.0)) <= 1e-14


@given(st.floats(LARGEST_SQUARE**0.5, 1e15), WIDTHS, st.sampled_from((torch.float32, torch.float64)), SEEDS)
def test_rotations_beyond_the_limit_are_shortened(size: float, width: int, dtype: torch.dtype, seed: int) -> None:
    packed = skew_of_size(size, width, 1, seed)
    result = cayley_neumann(packed.to(dtype), width, 1.0)
    shortened = exact_rotation(packed * (LARGEST_SQUARE**0.5 / size), width)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    assert (result.double() - shortened).abs().max() <= tolerance * shortened.abs().max()
    assert defect(result) <= tolerance


@pytest.mark.parametrize("width", [2, 3])
def test_no_rotation_turns_by_more_than_120_degrees(width: int) -> None:
    e = cayley_neumann(torch.full((packed_size(width),), 1e6, dtype=torch.float64), width, 1.0)
    angles = torch.linalg.eigvals(torch.eye(width) + e[0]).angle().rad2deg()
    assert angles.abs().max() <= 120 + 1e-9


def test_a_zero_skew_matrix_rotates_nothing() -> None:
    assert not cayley_neumann(torch.zeros(12), 4, 1.0).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_block_with_a_non_finite_number_is_not_rotated_and_its_neighbours_are(bad: float, dtype: torch.dtype) -> None:
    packed = skew_of_size(0.5, 4, 3, seed=0).to(dtype)
    alone = cayley_neumann(packed, 4, 1.0)
    packed[8] = bad
    result = cayley_neumann(packed, 4, 1.0)
    assert not result[1].any()
    assert torch.equal(result[[0, 2]], alone[[0, 2]])


@given(SCALES, WIDTHS, st.sampled_from((torch.float32, torch.float64)), SEEDS)
def test_the_scale_multiplies_the_skew_matrix(scale: float, width: int, dtype: torch.dtype, seed: int) -> None:
    packed = skew_of_size(0.3, width, 2, seed).to(dtype)
    assert torch.equal(cayley_neumann(packed, width, scale), cayley_neumann(packed * scale, width, 1.0))


def test_wide_float64_blocks_survive_a_chosen_number_of_threads() -> None:
    """Batched LU, which torch would use for a plain solve, fails there (pytorch/pytorch#142815)."""
    script = (
        "import torch; from poetx_compile.kernels import cayley_neumann; torch.set_num_threads(2);"
        "assert cayley_neumann(torch.full((3 * 256 * 255 // 2,), 1e-3, dtype=torch.float64), 256, 1.0).isfinite().all()"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


# --- Folding rotations into a weight ---------------------------------------------------------------------------------

SIDES = ("rows", "columns", "both")


def rotation(factor: OrthogonalFactor, q: Tensor, sides: str) -> tuple[Tensor | None, Tensor | None]:
    """``E`` of each side that takes part, in ``q``'s dtype."""
    rows, columns = q.split((factor.rows.skew, factor.columns.skew))
    scale = factor.config.scale
    return (
        cayley_neumann(rows, factor.rows.width, scale) if factor.rows.count and sides != "columns" else None,
        cayley_neumann(columns, factor.columns.width, scale) if factor.columns.count and sides != "rows" else None,
    )


def dense_product(factor: OrthogonalFactor, weight: Tensor, q: Tensor, sides: str) -> Tensor:
    rows, columns = q.double().split((factor.rows.skew, factor.columns.skew))
    scale = factor.config.scale
    left = orthogonal(rows * (sides != "columns"), factor.rows, factor.row_channels, scale)
    right = orthogonal(columns * (sides != "rows"), factor.columns, factor.column_channels, scale)
    return left @ weight.double() @ right


def small_skew(factor: OrthogonalFactor, seed: int) -> Tensor:
    return normal(factor.q.numel(), seed=seed) * (0.1 / factor.config.scale)


@given(factors(), st.sampled_from(SIDES), st.booleans(), SEEDS)
def test_folding_equals_the_dense_product(factor: OrthogonalFactor, sides: str, transposed: bool, seed: int) -> None:
    before = factor.weight.detach().clone()
    weight = before.mT.clone(memory_format=torch.contiguous_format).mT if transposed else before.clone()
    q = small_skew(factor, seed)
    rows, columns = rotation(factor, q, sides)
    rotate_(weight, None, rows, factor.row_channels, columns, factor.column_channels)
    torch.testing.assert_close(weight, dense_product(factor, before, q, sides), rtol=1e-12, atol=1e-12)


@given(st.data(), st.sampled_from((torch.bfloat16, torch.float16)), st.sampled_from(SIDES), SEEDS)
def test_folding_half_precision_loses_only_what_the_residual_cannot_hold(
    data: st.DataObject, dtype: torch.dtype, sides: str, seed: int
) -> None:
    factor = data.draw(factors(dtype))
    weight = factor.weight.detach()
    residual = torch.randint(-127, 128, weight.shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    q = small_skew(factor, seed).float()
    rows, columns = rotation(factor, q, sides)
    expected = dense_product(factor, decode(weight, residual), q, sides)

    rotate_(weight, residual, rows, factor.row_channels, columns, factor.column_channels)

    folded = decode(weight, residual).double()
    stored = 2.0**-16 if dtype == torch.bfloat16 else 2.0**-18
    assert ((folded - expected).abs() <= stored * expected.abs() + 1e-6 * expected.norm()).all()
    assert ((weight.double() - folded).abs() <= (folded.to(dtype).double() - folded).abs()).all()


@given(st.data(), st.sampled_from(DTYPES), SEEDS)
def test_left_over_channels_keep_their_bits(data: st.DataObject, dtype: torch.dtype, seed: int) -> None:
    factor = data.draw(factors(dtype))
    weight = factor.weight.detach()
    before = weight.clone()
    q = small_skew(factor, seed).to(factor.q.dtype)
    rows, columns = rotation(factor, q, "both")
    rotate_(weight, factor.residual, rows, factor.row_channels, columns, factor.column_channels)
    left_out = torch.ones(weight.shape, dtype=torch.bool)
    left_out[factor.row_channels] = False
    left_out[:, factor.column_channels] = False
    assert torch.equal(weight[left_out], before[left_out])
