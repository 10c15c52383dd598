"""What one converted weight owns, and how that follows the weight and the permutations."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from hypothesis import given
from oracle import explicit_weight
from strategies import KINDS, SEEDS, OwningFactor, factors, normal
from torch import Tensor, nn
from turned import CONFIG, DTYPES, master, of_dtypes, retract, small_factor, turn

from poetx_compile import PoetxConfig
from poetx_compile.errors import PoetxError
from poetx_compile.kernels import HALF, decode


def test_a_cleared_rotation_never_reaches_the_weight() -> None:
    factor = small_factor()
    before = factor.weight.detach().clone()
    turn(factor, seed=0)
    factor.clear()
    assert factor.is_clean
    retract(factor)
    assert torch.equal(factor.weight, before)


# --- Gradients -------------------------------------------------------------------------------------------------------


@given(factors(kinds=KINDS), SEEDS)
def test_a_projected_gradient_is_that_of_the_explicit_weight(factor: OwningFactor, seed: int) -> None:
    weight = factor.weight.detach()
    gradient = normal(*weight.shape, seed=seed)
    by_autograd = torch.func.grad(lambda q: (gradient * explicit_weight(factor, weight, q)).sum())(factor.q.detach())
    torch.testing.assert_close(factor.project(gradient), by_autograd, rtol=1e-10, atol=1e-10)


# --- Residuals of half-precision weights -----------------------------------------------------------------------------


@of_dtypes
def test_only_halves_have_a_residual(dtype: torch.dtype) -> None:
    factor = small_factor(dtype)
    assert (factor.residual is not None) == (dtype in HALF)
    assert factor.q.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_residual_outlives_the_packages_own_writes(dtype: torch.dtype) -> None:
    factor = small_factor(dtype)
    assert factor.residual is not None
    turn(factor, seed=0)
    retract(factor)
    assert factor.residual.any()
    factor.check_residual()
    assert factor.residual.any()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_write_from_outside_drops_the_residual(dtype: torch.dtype) -> None:
    factor = small_factor(dtype)
    turn(factor, seed=0)
    retract(factor)
    with torch.no_grad():
        factor.weight.mul_(2)
    written = factor.weight.detach().clone()
    factor.check_residual()
    assert torch.equal(master(factor), written.double())


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_folding_starts_from_what_was_written_from_outside(dtype: torch.dtype) -> None:
    factor = small_factor(dtype)
    turn(factor, seed=0)
    retract(factor)
    written = normal(*factor.weight.shape, seed=9, dtype=dtype)
    with torch.no_grad():
        factor.weight.copy_(written)
    q = turn(factor, seed=1)
    retract(factor)
    expected = explicit_weight(factor, written.double(), q.double())
    assert (master(factor) - expected).abs().max() <= 2.0**-16 * expected.abs().max() + 1e-5


BITS = pytest.mark.parametrize("bits", [8, 4, 0])


def with_bits(bits: int) -> PoetxConfig:
    return PoetxConfig(block_size=16, chunk=4, residual_bits=bits)


@BITS
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", [(32, 50), (32, 51), (3, 20, 33)], ids=str)
def test_fewer_bits_take_less_memory(dtype: torch.dtype, bits: int, shape: tuple[int, ...]) -> None:
    factor = OwningFactor(nn.Parameter(normal(*shape, seed=1, dtype=dtype)), "weight", with_bits(bits))
    turn(factor, seed=0)
    retract(factor)
    *rows, n = shape
    expected = {8: n, 4: (n + 1) // 2, 0: 0}[bits] * torch.Size(rows).numel()
    held = 0 if factor.residual is None else factor.residual.untyped_storage().nbytes()
    assert held == expected


@BITS
@of_dtypes
def test_bits_are_of_half_precision_only(dtype: torch.dtype, bits: int) -> None:
    factor = small_factor(dtype, with_bits(bits))
    twin = small_factor(dtype)
    assert (factor.residual is not None) == (dtype in HALF and bits > 0)
    for each in (factor, twin):
        turn(each, seed=0)
        retract(each)
    assert dtype in HALF or torch.equal(factor.weight, twin.weight)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@BITS
def test_a_fold_errs_by_the_bits_it_keeps(dtype: torch.dtype, bits: int) -> None:
    place = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
    tolerance = place if bits == 0 else place / 2**bits / (2 if dtype == torch.bfloat16 else 1)
    factor = small_factor(dtype, with_bits(bits))
    before = factor.weight.detach().double().clone()
    q = turn(factor, seed=0)
    retract(factor)
    expected = explicit_weight(factor, before, q.double())
    error = (master(factor) - expected).abs()
    assert (error <= tolerance * expected.abs() + 1e-5).all()
    assert bits == 8 or (error > tolerance / 4 * expected.abs() + 1e-5).any(), "no worse than is said, and no better"


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_small_rotations_add_up_without_a_residual(dtype: torch.dtype) -> None:
    """A thousand turns of one plane, each below the rounding: rounded to nearest, bfloat16 would never move."""
    config = PoetxConfig(block_size=4, chunk=4, residual_bits=0)
    factor = OwningFactor(nn.Parameter(normal(4, 1024, seed=1, dtype=dtype)), "weight", config)
    before = factor.weight.detach().double().clone()
    for _ in range(1000):
        with torch.no_grad():
            factor.q[0] = 5e-5
        retract(factor)
        factor.count_step()
    first, second = before[factor.row_channels[:2]]
    angle = torch.tensor(1000 * 2 * 5e-5)
    wanted = torch.stack([first * angle.cos() + second * angle.sin(), second * angle.cos() - first * angle.sin()])
    moved, wanted = (rows - torch.stack([first, second]) for rows in (master(factor)[factor.row_channels[:2]], wanted))
    assert abs((moved * wanted).sum() / (wanted * wanted).sum() - 1) < 0.05
    assert torch.equal(master(factor)[factor.row_channels[2:]], before[factor.row_channels[2:]])


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_stochastic_folds_are_those_of_key_step_and_place(dtype: torch.dtype) -> None:
    def folded(steps: int = 0, name: str = "fc.weight", shape: tuple[int, ...] = (32, 50)) -> Tensor:
        weight = normal(32, 50, seed=1, dtype=dtype).expand(shape).contiguous()
        factor = OwningFactor(nn.Parameter(weight), "fc.weight", with_bits(0))
        factor.key += name != "fc.weight"
        factor.steps = steps
        with torch.no_grad():
            factor.q.view(factor.stack.count, -1).copy_(0.1 * normal(factor.q.numel() // factor.stack.count, seed=0))
        retract(factor)
        return factor.weight.detach()

    first = folded()
    assert torch.equal(folded(), first)
    assert not torch.equal(folded(steps=1), first)
    assert not torch.equal(folded(name="other"), first)
    stack = folded(shape=(2, 32, 50))
    assert torch.equal(stack[0], first)
    assert not torch.equal(stack[1], first)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("bits", [4, 0])
def test_a_kernel_is_folded_alike_in_any_memory_order(dtype: torch.dtype, bits: int) -> None:
    kernel = normal(32, 5, 3, 3, seed=1, dtype=dtype)
    masters = []
    for memory in (torch.contiguous_format, torch.channels_last):
        parameter = nn.Parameter(kernel.clone(memory_format=memory))
        factor = OwningFactor(parameter, "weight", with_bits(bits), (1, 32, 45))
        for step in range(3):
            turn(factor, step)
            retract(factor)
            factor.count_step()
        residual = None if factor.residual is None else factor.residual[0]
        masters.append(decode(factor.weight.detach().reshape(32, 45), residual))
    assert torch.equal(*masters)


@BITS
@of_dtypes
def test_a_fold_of_nothing_changes_nothing(dtype: torch.dtype, bits: int) -> None:
    factor = small_factor(dtype, with_bits(bits))
    turn(factor, seed=0)
    retract(factor)
    before = master(factor)
    retract(factor)
    assert torch.equal(master(factor), before)


@of_dtypes
def test_bfloat16_skews_are_of_half_precision_weights_and_folded_in_float32(dtype: torch.dtype) -> None:
    factor = small_factor(dtype, PoetxConfig(block_size=16, chunk=4, skew_dtype="bfloat16"))
    twin = small_factor(dtype)
    assert factor.q.dtype == (torch.bfloat16 if dtype in HALF else twin.q.dtype)
    assert factor.project(torch.ones_like(factor.weight)).dtype == factor.q.dtype
    q = turn(factor, seed=0)
    with torch.no_grad():
        twin.q.copy_(q)
    retract(factor)
    retract(twin)
    assert torch.equal(master(factor), master(twin))
    factor.weight.data = factor.weight.data.float()
    factor.follow_weight()
    assert factor.q.dtype == torch.float32


# --- Permutations ----------------------------------------------------------------------------------------------------


def test_the_draw_depends_on_seed_and_name_only() -> None:
    def drawn(seed: int, name: str) -> tuple[list[int], list[int]]:
        factor = small_factor(name=name, config=PoetxConfig(block_size=16, chunk=4, seed=seed))
        return factor.row_channels.tolist(), factor.column_channels.tolist()

    first = drawn(0, "a")
    torch.manual_seed(7)
    assert drawn(0, "a") == first
    assert drawn(1, "a") != first
    assert drawn(0, "b") != first


def test_new_permutations_come_with_the_period_and_stay_in_place() -> None:
    factor = small_factor(config=PoetxConfig(block_size=16, chunk=4, permutation_period=3))
    storages = factor.row_channels.data_ptr(), factor.column_channels.data_ptr()
    draws = [factor.row_channels.tolist()]
    due = []
    for _ in range(9):
        due.append(factor.count_step())
        draws.append(factor.row_channels.tolist())
    assert due == [False, False, True] * 3
    assert (factor.steps, factor.epoch) == (9, 3)
    assert [draws[i] == draws[i + 1] for i in range(9)] == [not new for new in due]
    assert (factor.row_channels.data_ptr(), factor.column_channels.data_ptr()) == storages


def test_without_a_period_the_first_permutation_stays() -> None:
    factor = small_factor()
    before = factor.row_channels.clone()
    assert not any(factor.count_step() for _ in range(5))
    assert (factor.steps, factor.epoch) == (5, 0)
    assert torch.equal(factor.row_channels, before)


def test_a_new_permutation_leaves_the_weight_alone() -> None:
    factor = small_factor(config=PoetxConfig(block_size=16, chunk=4, permutation_period=1))
    before = factor.weight.detach().clone()
    assert factor.count_step()
    assert torch.equal(factor.weight, before)


@pytest.mark.parametrize("bits", [8, 4, 0])
@of_dtypes
def test_a_resumed_factor_goes_on_as_the_one_it_continues(dtype: torch.dtype, bits: int) -> None:
    config = PoetxConfig(block_size=16, chunk=4, permutation_period=2, residual_bits=bits)
    first = small_factor(dtype, config)
    for step in range(3):
        turn(first, step)
        retract(first)
        first.count_step()
    second = OwningFactor(copy.deepcopy(first.owned), "another name", config)
    second.resume(first.key, first.epoch, first.steps, first.kept or None)
    for factor in (first, second):
        turn(factor, seed=3)
        retract(factor)
        assert factor.count_step()
    assert torch.equal(master(first), master(second))
    assert torch.equal(first.column_channels, second.column_channels)


# --- A weight that changes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", DTYPES, ids=str)
@pytest.mark.parametrize("before", DTYPES, ids=str)
def test_a_factor_follows_its_weight_to_another_dtype(before: torch.dtype, after: torch.dtype) -> None:
    factor = small_factor(before)
    factor.q.grad = torch.ones_like(factor.q)
    q = factor.q
    factor.weight.data = factor.weight.data.to(after)
    factor.follow_weight()
    assert factor.q is q
    assert factor.is_clean
    assert factor.q.grad is not None
    assert factor.q.dtype == factor.q.grad.dtype == (torch.float64 if after == torch.float64 else torch.float32)
    assert (factor.residual is not None) == (after in HALF)

    start = factor.weight.detach().double().clone()
    turned = turn(factor, seed=0)
    retract(factor)
    expected = explicit_weight(factor, start, turned.double())
    tolerance = 1e-12 if after == torch.float64 else 1e-4
    torch.testing.assert_close(master(factor), expected, rtol=tolerance, atol=tolerance)


def test_a_weight_that_did_not_change_keeps_its_residual() -> None:
    factor = small_factor(torch.bfloat16)
    turn(factor, seed=0)
    retract(factor)
    before = master(factor)
    factor.follow_weight()
    assert torch.equal(master(factor), before)


def test_a_weight_of_another_shape_is_refused() -> None:
    factor = small_factor()
    factor.weight.data = torch.zeros(32, 51, dtype=torch.float64)
    with pytest.raises(PoetxError, match=r"'fc.weight' was converted as 32 x 50 and is now 32 x 51; call .*restore"):
        factor.follow_weight()


@pytest.mark.gpu
@of_dtypes
def test_a_factor_follows_its_weight_to_another_device(dtype: torch.dtype) -> None:
    config = dataclasses.replace(CONFIG, precision="tf32x3")
    factor, stays = small_factor(dtype, config), small_factor(dtype, config)
    for seed in range(2):
        for each in (factor, stays):
            turn(each, seed)
            each.q.grad = torch.ones_like(each.q)
            retract(each)
        factor.weight.data = factor.weight.data.cuda()
        factor.follow_weight()
        held = (factor.q, factor.q.grad, factor.row_channels, factor.column_channels, factor.residual)
        assert all(tensor.is_cuda for tensor in held if tensor is not None)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(master(factor).cpu(), master(stays), rtol=tolerance, atol=tolerance)
