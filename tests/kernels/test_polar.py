"""Skew matrices near their polar factors, against singular values by SVD."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import by_singular_values
from torch import Tensor

from poetx_compile.kernels import orthogonalize_skew, pack_skew, spread_evenly, unpack_skew
from poetx_compile.kernels.polar import POLYNOMIALS
from poetx_compile.testing.explicit import spread_block

exact = partial(torch.testing.assert_close, rtol=0, atol=0)
QUINTIC = (3.4445, -4.7750, 2.0315)
CUBIC = (1.5, -0.5, 0.0)


def skews(count: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return unpack_skew(packed(count, width, seed), width).to(dtype)


def packed(count: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count * width * (width - 1) // 2, generator=generator, dtype=torch.float64)


class TestOrthogonalize:
    @given(width=st.integers(2, 40), count=st.integers(1, 3), seed=st.integers(0, 99), steps=st.integers(1, 7))
    def test_moves_singular_values_alone_and_stays_skew(self, width: int, count: int, seed: int, steps: int) -> None:
        blocks = skews(count, width, seed)
        turned = orthogonalize_skew(blocks, QUINTIC, steps)
        exact(turned, -turned.mT)
        for block, result in zip(blocks, turned):
            torch.testing.assert_close(result, by_singular_values(block, QUINTIC, steps), rtol=0, atol=1e-9)

    @given(half=st.integers(1, 16), seed=st.integers(0, 99), size=st.sampled_from([1e-12, 1.0, 1e12]))
    def test_converges_to_the_polar_factor(self, half: int, seed: int, size: float) -> None:
        block = skews(1, 2 * half, seed) * size
        left, _, right = torch.linalg.svd(block[0])
        torch.testing.assert_close(orthogonalize_skew(block, CUBIC, 60)[0], left @ right, rtol=0, atol=1e-7)

    @given(width=st.integers(8, 64), seed=st.integers(0, 99))
    def test_default_singular_values_are_near_one(self, width: int, seed: int) -> None:
        sizes = torch.linalg.svdvals(orthogonalize_skew(skews(1, 2 * (width // 2), seed))[0])
        assert sizes.max() < 1.3
        assert sizes.quantile(0.25) > 0.6

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_shorter_dtypes_are_near_and_exactly_skew(self, dtype: torch.dtype) -> None:
        blocks = skews(2, 24, 0, dtype)
        turned = orthogonalize_skew(blocks)
        assert turned.dtype == dtype
        exact(turned, -turned.mT)
        atol = 1e-4 if dtype == torch.float32 else 0.2
        torch.testing.assert_close(turned.double(), orthogonalize_skew(blocks.double()), rtol=0, atol=atol)

    def test_zeros_stay_zeros(self) -> None:
        exact(orthogonalize_skew(torch.zeros(2, 6, 6)), torch.zeros(2, 6, 6))

    @pytest.mark.gpu
    def test_on_a_gpu(self) -> None:
        blocks = skews(4, 256, 0, torch.float32)
        turned = orthogonalize_skew(blocks.cuda()).cpu()
        exact(turned, -turned.mT)
        error = (turned - orthogonalize_skew(blocks)).norm() / orthogonalize_skew(blocks).norm()
        assert error < 0.05


class TestSpreadEvenly:
    @given(
        width=st.integers(2, 40),
        count=st.integers(1, 3),
        seed=st.integers(0, 99),
        size=st.sampled_from([1e-15, 1e-9, 1.0, 1e9]),
        dtype=st.sampled_from([torch.float64, torch.float32]),
    )
    def test_keeps_singular_vectors_and_norms_of_blocks(
        self, width: int, count: int, seed: int, size: float, dtype: torch.dtype
    ) -> None:
        given_ = (packed(count, width, seed) * size).to(dtype)
        spread = spread_evenly(given_, width)
        assert spread.dtype == dtype
        for block, result in zip(given_.double().chunk(count), spread.double().chunk(count)):
            wanted = spread_block(block / size, width)
            torch.testing.assert_close(result / size, wanted, rtol=0, atol=1e-9 if dtype == torch.float64 else 2e-3)

    @given(size=st.floats(0.01, 1))
    def test_polynomials_bring_singular_values_near_one(self, size: float) -> None:
        for a, b, c in POLYNOMIALS:
            size = a * size + b * size**3 + c * size**5
        assert abs(size - 1) < 0.271

    @given(half=st.integers(4, 32), seed=st.integers(0, 99))
    def test_turns_all_channels_by_nearly_one_angle(self, half: int, seed: int) -> None:
        (block,) = unpack_skew(spread_evenly(packed(1, 2 * half, seed), 2 * half), 2 * half)
        sizes = torch.linalg.svdvals(block)
        mean = sizes.square().mean().sqrt()
        assert sizes.max() < 1.5 * mean
        assert sizes.quantile(0.25) > 0.6 * mean

    def test_zeros_stay_zeros_and_what_is_not_finite_stays_in_its_block(self) -> None:
        blocks = packed(3, 8, 0)
        blocks[:28] = 0
        blocks[30] = math.nan
        first, second, third = spread_evenly(blocks, 8).chunk(3)
        exact(first, torch.zeros(28, dtype=torch.float64))
        assert second.isnan().all()
        exact(third, spread_evenly(blocks[56:], 8))

    def test_an_infinite_block_is_not_a_number(self) -> None:
        blocks = packed(1, 8, 0)
        blocks[3] = math.inf
        assert not spread_evenly(blocks, 8).isfinite().any()

    def test_autocast_lowers_nothing(self) -> None:
        blocks = packed(2, 16, 0).float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            lowered = spread_evenly(blocks, 16), orthogonalize_skew(unpack_skew(blocks, 16))
        exact(lowered, (spread_evenly(blocks, 16), orthogonalize_skew(unpack_skew(blocks, 16))))

    @pytest.mark.gpu
    def test_on_a_gpu(self) -> None:
        blocks = pack_skew(skews(4, 256, 0, torch.float32))
        spread = spread_evenly(blocks.cuda(), 256).cpu()
        assert (spread - spread_evenly(blocks, 256)).norm() / spread.norm() < 0.05
        torch.testing.assert_close(spread.norm(), blocks.norm(), rtol=1e-5, atol=0)
