"""Stochastic rounding: unbiased, the same bits each time, and different ones for each seed and place."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from poetx_compile.kernels import HALF
from poetx_compile.kernels.stochastic import random_bits, round_stochastically_
from poetx_compile.layout import rounding_seed

HALVES = pytest.mark.parametrize("dtype", HALF, ids=str)
SEEDS = st.integers(0, 2**63 - 1)


def rounded(master: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    weight = torch.empty_like(master, dtype=dtype)
    round_stochastically_(weight, master, seed)
    return weight


def mixed(word: int) -> int:
    """``lowbias32`` on Python's integers."""
    word ^= word >> 16
    word = word * 0x7FEB352D & 0xFFFFFFFF
    word ^= word >> 15
    word = word * 0x846CA68B & 0xFFFFFFFF
    return word ^ word >> 16


def neighbours(master: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The largest number of ``dtype`` that is not above, and the smallest that is not below, in float64."""
    nearest = master.to(dtype)
    infinity = torch.full_like(nearest, float("inf"))
    below = torch.where(nearest.double() <= master.double(), nearest, torch.nextafter(nearest, -infinity))
    above = torch.where(nearest.double() >= master.double(), nearest, torch.nextafter(nearest, infinity))
    return below.double(), above.double()


# --- The bits --------------------------------------------------------------------------------------------------------


@given(SEEDS, st.lists(st.integers(0, 2**31 - 1), min_size=1))
def test_bits_are_the_hash_of_seed_and_place(seed: int, places: list[int]) -> None:
    low, high = seed & 0xFFFFFFFF, seed >> 32
    expected = [mixed(mixed((place + low) & 0xFFFFFFFF) ^ high) for place in places]
    found = random_bits(seed, torch.tensor(places, dtype=torch.int32))
    assert [word & 0xFFFFFFFF for word in found.tolist()] == expected


def test_every_bit_is_fair_and_independent_of_neighbours_and_steps() -> None:
    """Of the seeds that following steps of one weight have: correlations within five standard deviations."""
    count, steps = 1 << 14, 16
    places = torch.arange(count, dtype=torch.int32)
    words = torch.stack([random_bits(rounding_seed(1234, step, 0), places) for step in range(steps)])
    bits = (words[..., None] >> torch.arange(32)) & 1
    signs = bits.double() * 2 - 1  # [steps, count, 32]
    limit = 5 / count**0.5
    assert signs.mean(1).abs().max() < limit
    by_step = signs.permute(2, 0, 1)  # [32, steps, count]
    across_steps = by_step @ by_step.mT / count - torch.eye(steps, dtype=torch.float64)
    assert across_steps.abs().max() < limit
    across_bits = signs[0].T @ signs[0] / count - torch.eye(32, dtype=torch.float64)
    assert across_bits.abs().max() < limit
    for distance in (1, 2, 64, 256, 4096):
        assert (signs[:, distance:] * signs[:, :-distance]).mean(1).abs().max() < 5 / (count - distance) ** 0.5


def test_seeds_differ_by_key_step_and_place() -> None:
    drawn = {rounding_seed(key, step, place) for key in range(5) for step in range(50) for place in range(3)}
    assert len(drawn) == 750
    assert all(0 <= seed < 2**63 for seed in drawn)


# --- The rounding ----------------------------------------------------------------------------------------------------


@HALVES
def test_is_unbiased(dtype: torch.dtype) -> None:
    """The mean over 4096 seeds, in steps of the last place, within five of its standard deviations; normals and subnormals."""
    share = torch.linspace(0, 1, 33)[:, None]
    starts = torch.tensor([1.0, 1.5, -1.25, 2.0**-14 * 1.5, 2.0**-24 * 3, -(2.0**-17) * 1.0625]).to(dtype).float()
    below, above = starts, torch.nextafter(starts.to(dtype), torch.full_like(starts, float("inf")).to(dtype)).float()
    master = (below.double() + share * (above - below).double()).float()
    draws = 4096
    tall = master[:, None].expand(-1, draws, -1).reshape(-1, starts.numel())
    steps = ((rounded(tall, dtype, 99).double() - below) / (above - below)).view(33, draws, -1)
    exact = (master.double() - below) / (above - below)
    assert ((steps == 0) | (steps == 1)).all()
    deviation = (exact * (1 - exact) / draws).sqrt()
    assert ((steps.mean(1) - exact).abs() <= 5 * deviation + 1e-12).all()


@HALVES
@given(seed=SEEDS, values=st.lists(st.floats(-6e4, 6e4, width=32), min_size=1))
def test_goes_to_one_of_the_two_neighbours(dtype: torch.dtype, seed: int, values: list[float]) -> None:
    master = torch.tensor(values)
    below, above = neighbours(master, dtype)
    found = rounded(master, dtype, seed).double()
    assert ((found == below) | (found == above)).all()


@HALVES
@given(seed=SEEDS)
def test_what_needs_no_rounding_stays(dtype: torch.dtype, seed: int) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    torch.testing.assert_close(rounded(every.float(), dtype, seed), every, rtol=0, atol=0, equal_nan=True)


@HALVES
def test_is_the_same_each_time_and_another_with_another_seed(dtype: torch.dtype) -> None:
    master = torch.randn(64, 65)
    first = rounded(master, dtype, 5)
    assert torch.equal(rounded(master, dtype, 5), first)
    assert not torch.equal(rounded(master, dtype, 6), first)
    assert not torch.equal(rounded(master, dtype, 5 + (1 << 40)), first)


@pytest.mark.gpu
@HALVES
def test_a_gpu_rounds_to_the_same_bits(dtype: torch.dtype) -> None:
    master = torch.randn(300, 257)
    assert torch.equal(rounded(master.cuda(), dtype, 7).cpu(), rounded(master, dtype, 7))
