"""A base matrix and the rotations since: what is kept, and what a write, a turn and a move do to it."""

from __future__ import annotations

import pytest
import torch
from strategies import normal
from torch import Tensor

from poetx_compile import PoetxError
from poetx_compile.base import BASES, Base, check_range
from poetx_compile.kernels import naive
from poetx_compile.layout import StackLayout

of_storages = pytest.mark.parametrize("storage", BASES)
STACK = StackLayout.of((1, 32, 50), 16, 4)
CHANNELS = [side.channels(3, place, 0) for place, side in enumerate((STACK.rows, STACK.columns))]


def made(storage: str, dtype: torch.dtype = torch.float64) -> tuple[Base, Tensor]:
    weight = normal(32, 50, seed=0, dtype=dtype)
    base = BASES[storage](weight, STACK)
    base.write(weight)
    return base, weight


def value(base: Base, dtype: torch.dtype = torch.float64) -> Tensor:
    return naive.effective(base.stored, base.scales, base.rows, CHANNELS[0], base.columns, CHANNELS[1], dtype)


def steps(seed: int) -> tuple[Tensor, Tensor]:
    """``E`` of both sides for one step."""
    sides = (STACK.rows, STACK.columns)
    skews = (normal(side.skew, seed=seed + place) for place, side in enumerate(sides))
    rows, columns = (naive.cayley_neumann(skew, side.width, 0.2) for skew, side in zip(skews, sides))
    return rows, columns


@of_storages
def test_turning_is_folding(storage: str) -> None:
    base, _ = made(storage)
    folded = value(base)
    stored = base.stored.clone()
    for step in range(40):
        rows, columns = steps(step)
        base.turn(rows, columns, step)
        naive.rotate_(folded, None, rows, CHANNELS[0], columns, CHANNELS[1])
    assert base.is_turned
    assert torch.equal(base.stored, stored)
    torch.testing.assert_close(value(base), folded, rtol=1e-12, atol=1e-12)


@of_storages
def test_a_write_starts_again_without_rotations(storage: str) -> None:
    base, weight = made(storage)
    base.turn(*steps(0), 0)
    held = {name: tensor.data_ptr() for name, tensor in base.tensors.items()}
    base.write(2 * weight)
    assert not base.is_turned
    assert base.rows is not None
    assert not base.rows.any()
    assert (value(base) - 2 * weight).abs().max() <= (weight.abs().max() / 127 * 1.01 if storage == "int8" else 0)
    assert {name: tensor.data_ptr() for name, tensor in base.tensors.items()} == held


@of_storages
def test_what_one_keeps_another_takes(storage: str) -> None:
    base, _ = made(storage)
    base.turn(*steps(0), 0)
    other = BASES[storage](normal(32, 50, seed=5), STACK)
    other.load(base.tensors)
    assert torch.equal(value(other), value(base))
    assert other.is_turned


@pytest.mark.parametrize(("storage", "bytes_of_numbers"), [("int8", 32 * 50 + 2 * 32), ("bf16-lean", 2 * 32 * 50)])
def test_bytes(storage: str, bytes_of_numbers: int) -> None:
    base, _ = made(storage, torch.bfloat16)
    turns = 4 * (2 * 16 * 16 + 3 * 16 * 16)
    assert base.number_bytes == bytes_of_numbers
    assert base.nbytes == bytes_of_numbers + turns == sum(t.untyped_storage().nbytes() for t in base.tensors.values())


def test_a_side_that_is_not_rotated_keeps_nothing() -> None:
    base = BASES["int8"](normal(2, 50, seed=0), StackLayout.of((1, 2, 50), 16, 4))
    assert base.rows is None
    assert base.columns is not None
    assert set(base.tensors) == {"stored", "scales", "turned_columns"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rounded_base_has_the_right_mean(dtype: torch.dtype) -> None:
    base, _ = made("bf16-lean", dtype)
    exact = normal(32, 50, seed=9, dtype=torch.float32)
    total = torch.zeros(32, 50, dtype=torch.float64)
    for seed in range(300):
        base.write(exact, seed * 7919 + 1)
        total += base.stored
    place = torch.finfo(dtype).eps * exact.abs()
    assert ((total / 300 - exact).abs() <= 5 * place / 300**0.5 + 1e-6).all()


def test_numbers_without_a_code_are_refused() -> None:
    for bad in (torch.nan, torch.inf, -torch.inf, torch.finfo(torch.float16).max):
        matrix = torch.full((3, 4), bad, dtype=torch.float16)
        with pytest.raises(
            PoetxError, match=r"'fc.weight' holds NaN, infinite or very large numbers, which int8 cannot keep"
        ):
            check_range(matrix, "fc.weight", "int8")
        check_range(matrix, "fc.weight", "bf16-lean")
    check_range(torch.full((3, 4), 3e4, dtype=torch.float16), "fc.weight", "int8")
