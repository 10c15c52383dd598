"""Codes of 8 bits, and scales of groups."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, normal
from torch import Tensor

from poetx_compile.kernels.quantize import GROUP, LARGEST_CODE, dequantize, quantize_

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def quantized(matrix: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor]:
    m, n = matrix.shape
    codes = torch.full((m, n), 99, dtype=torch.int8)
    scales = torch.full((m, -(-n // GROUP)), float("nan"), dtype=torch.bfloat16)
    quantize_(codes, scales, matrix, seed)
    return codes, scales


def each(scales: Tensor, n: int) -> Tensor:
    """The scale of every number, float64."""
    return scales.double().repeat_interleave(GROUP, 1)[:, :n]


@given(st.integers(1, 5), st.integers(1, 400), st.integers(-30, 30), st.sampled_from(DTYPES), SEEDS)
def test_a_number_is_within_half_a_scale_of_its_code(m: int, n: int, size: int, dtype: torch.dtype, seed: int) -> None:
    """For rows of any length, whole groups and ragged ones, large numbers and tiny ones."""
    size = max(min(size, 10), -6) if dtype == torch.float16 else size
    matrix = (normal(m, n, seed=seed) * 2.0**size).to(dtype)
    codes, scales = quantized(matrix)
    back = dequantize(codes, scales, torch.float64)
    assert back.shape == matrix.shape
    assert ((back - matrix.double()).abs() <= each(scales, n) / 2 * (1 + 1e-5)).all()
    assert codes.abs().max() <= LARGEST_CODE
    largest = torch.stack([group.abs().amax(1) for group in matrix.double().split(GROUP, 1)], 1)
    assert (scales.double() * LARGEST_CODE >= largest * (1 - 1e-6)).all(), "clipped"
    assert (scales.double() * LARGEST_CODE <= largest * (1 + 2**-7) + 2.0**-126).all(), "coarser than bfloat16 needs"


@given(st.integers(1, 5), st.integers(1, 400), SEEDS)
def test_what_was_quantized_stays(m: int, n: int, seed: int) -> None:
    """With the same scales there is nothing to round, at random either; the largest code may make the next scale a finer one."""
    codes, scales = quantized(normal(m, n, seed=seed))
    codes[:, ::GROUP] = LARGEST_CODE
    exact = dequantize(codes, scales, torch.float32)
    for rounding in (None, seed):
        again = quantized(exact, rounding)
        assert torch.equal(again[0], codes)
        assert torch.equal(again[1], scales)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dequantizing_is_exact(dtype: torch.dtype) -> None:
    codes, scales = quantized(normal(7, 300, seed=0))
    assert torch.equal(dequantize(codes, scales, dtype).double(), codes.double() * each(scales, 300))


def test_groups_do_not_see_one_another() -> None:
    matrix = normal(3, 300, seed=0)
    codes, scales = quantized(matrix)
    matrix[1, 128:256] *= 1e6
    other_codes, other_scales = quantized(matrix)
    elsewhere = torch.ones(3, 3, dtype=torch.bool)
    elsewhere[1, 1] = False
    assert torch.equal(scales[elsewhere], other_scales[elsewhere])
    assert torch.equal(codes[:, :128], other_codes[:, :128])
    assert torch.equal(codes[:, 256:], other_codes[:, 256:])


def test_zeros_stay_zeros() -> None:
    matrix = normal(3, 300, seed=0)
    matrix[1] = 0
    codes, scales = quantized(matrix)
    assert not codes[1].any()
    assert not scales[1].any()
    assert not dequantize(codes, scales, torch.float32)[1].any()


@pytest.mark.parametrize("largest", [torch.finfo(torch.bfloat16).max / 2, 1e-30, 2.0**-126])
def test_extreme_numbers_stay_finite(largest: float) -> None:
    matrix = torch.full((2, 130), largest).bfloat16()
    back = dequantize(*quantized(matrix), torch.float32)
    assert back.isfinite().all()
    torch.testing.assert_close(back, matrix.float(), rtol=1 / 127, atol=2.0**-126)


def test_stochastic_rounding_has_the_right_mean_and_errs_by_less_than_a_scale() -> None:
    matrix = normal(4, 200, seed=0, dtype=torch.float32)
    draws = []
    for seed in range(400):
        codes, scales = quantized(matrix, seed * 7919 + 3)
        draws.append(dequantize(codes, scales, torch.float64))
        assert ((draws[-1] - matrix).abs() <= each(scales, 200) * (1 + 1e-5)).all()
    spread = each(scales, 200) / 2 / len(draws) ** 0.5
    assert ((torch.stack(draws).mean(0) - matrix).abs() <= 5 * spread).all()
    assert len({tuple(draw.flatten().tolist()) for draw in draws[:5]}) == 5


def test_rounding_is_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = normal(9, 200, seed=0)
    for seed in (None, 12345):
        whole = quantized(matrix, seed)
        with monkeypatch.context() as patch:
            patch.setattr("poetx_compile.kernels.quantize._NUMBERS_AT_ONCE", 450)
            assert all(torch.equal(*pair) for pair in zip(whole, quantized(matrix, seed)))
