"""Products of rotations, kept as ``E = G − I``."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, normal
from torch import Tensor

from poetx_compile.kernels import cayley_neumann, compose_, orthogonalize_, unscaled

EYE = torch.eye(8, dtype=torch.float64)


def turn(seed: int, size: float = 0.3, dtype: torch.dtype = torch.float64) -> Tensor:
    """``E`` of three blocks of 8 channels."""
    return cayley_neumann(normal(3 * 28, seed=seed, dtype=dtype), 8, size)


def defect(e: Tensor) -> float:
    return (e + e.mT + e.mT @ e).abs().max().item()


@given(SEEDS, SEEDS, st.booleans())
def test_composing_multiplies_rotations(first: int, second: int, from_left: bool) -> None:
    e, step = turn(first), turn(second)
    g, by = e + EYE, step + EYE
    compose_(e, step, from_left)
    torch.testing.assert_close(e + EYE, by @ g if from_left else g @ by, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("error", [1e-2, 1e-4])
def test_a_correction_squares_the_distance_from_the_orthogonal_matrices(error: float) -> None:
    e = turn(0)
    e += error * normal(3, 8, 8, seed=1) / 8
    before, near = defect(e), e.clone()
    orthogonalize_(e)
    assert defect(e) <= 4 * before**2
    assert (e - near).abs().max() <= 4 * before


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
@pytest.mark.parametrize("from_left", [True, False])
@pytest.mark.parametrize(("blocks", "width"), [(1, 256), (5, 256), (3, 128), (2, 512), (7, 24), (4, 8)])
def test_composing_on_a_gpu(blocks: int, width: int, from_left: bool, precision: str) -> None:
    count = blocks * width * (width - 1) // 2
    skews = (normal(count, seed=seed, dtype=torch.float32, device="cuda") for seed in (0, 1))
    e, step = (cayley_neumann(skew, width, size, precision) for skew, size in zip(skews, (0.3 / width**0.5, 1e-2)))
    e = unscaled(e).contiguous()
    near, by = (torch.eye(width, device="cuda", dtype=torch.float64) + unscaled(some).double() for some in (e, step))
    wanted = (by @ near if from_left else near @ by) - torch.eye(width, device="cuda", dtype=torch.float64)
    guarded = torch.full((blocks + 2, width, width), torch.nan, device="cuda")
    inside = guarded[1:-1].copy_(e)
    compose_(inside, step, from_left)
    assert (inside - wanted).abs().max() < 1e-6 * (1 + wanted.abs().max())
    assert guarded[[0, -1]].isnan().all()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_thousands_of_small_turns_add_up_in_float32(device: str) -> None:
    """Below the rounding of ``G``: ``E`` keeps them."""
    step, exact = turn(0, 1e-5, torch.float32).to(device), turn(0, 1e-5).to(device)
    e, wanted = torch.zeros_like(step), torch.zeros_like(exact)
    for number in range(5000):
        compose_(e, step, from_left=True)
        compose_(wanted, exact, from_left=True)
        if number % 16 == 0:
            orthogonalize_(e)
    assert wanted.abs().max() > 0.05
    assert (e - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert defect(e) < 1e-6
