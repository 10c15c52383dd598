"""What one converted weight owns, how it is folded, and how it is found again."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import explicit_weight
from strategies import KINDS, SEEDS, OwningFactor, factors, normal
from torch import Tensor, nn

from poetx_compile import PoetxConfig
from poetx_compile.errors import PoetxError
from poetx_compile.factor import OrthogonalFactor, Registry, retract_all
from poetx_compile.kernels import HALF, decode

CONFIG = PoetxConfig(block_size=16, chunk=4)
DTYPES = (torch.float64, torch.float32, *HALF)
GAINS = st.sampled_from((1.0, 0.5, 8.0))
of_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def small_factor(dtype: torch.dtype = torch.float64, config: PoetxConfig = CONFIG, name: str = "fc.weight") -> OwningFactor:
    """Of a weight with two blocks of rows, and three of columns beside two left-over channels."""
    return OwningFactor(nn.Parameter(normal(32, 50, seed=1, dtype=dtype)), name, config)


def turn(factor: OrthogonalFactor, seed: int, size: float = 0.1) -> Tensor:
    """Write a random rotation into ``q``, as an optimizer would; returns a copy of it."""
    q = normal(factor.q.numel(), seed=seed, dtype=factor.q.dtype) * (size / factor.config.scale)
    with torch.no_grad():
        factor.q.copy_(q)
    return q


def master(factor: OrthogonalFactor) -> Tensor:
    return decode(factor.weight.detach(), factor.residual).double()


# --- Folding ---------------------------------------------------------------------------------------------------------


@given(factors(kinds=KINDS), GAINS, SEEDS)
def test_folding_makes_the_explicit_weight(factor: OwningFactor, gain: float, seed: int) -> None:
    before = factor.weight.detach().clone()
    q = turn(factor, seed, 0.1 / gain)
    factor.retract(gain)
    torch.testing.assert_close(factor.weight.detach(), explicit_weight(factor, before, gain * q), rtol=1e-12, atol=1e-12)


@of_dtypes
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_kernel_is_folded_in_any_memory_order(dtype: torch.dtype, channels_last: bool) -> None:
    kernel = normal(32, 5, 3, 3, seed=1, dtype=dtype)
    flat = OwningFactor(nn.Parameter(kernel.flatten(1).clone()), "weight", CONFIG)
    memory = torch.channels_last if channels_last else torch.contiguous_format
    factor = OwningFactor(nn.Parameter(kernel.to(memory_format=memory)), "weight", CONFIG, (1, 32, 45))
    for step in range(3):
        turn(flat, step)
        turn(factor, step)
        flat.retract()
        factor.retract()
    assert torch.equal(factor.weight, flat.weight.view(32, 5, 3, 3))
    assert torch.equal(master(factor), master(flat).view(32, 5, 3, 3))
    assert factor.weight.is_contiguous(memory_format=memory)


@of_dtypes
def test_the_matrices_of_a_stack_turn_each_on_its_own(dtype: torch.dtype) -> None:
    matrices = normal(3, 32, 50, seed=1, dtype=dtype)
    stack = OwningFactor(nn.Parameter(matrices.clone()), "weight", CONFIG)
    alone = [OwningFactor(nn.Parameter(matrix.clone()), "weight", CONFIG) for matrix in matrices]
    q = turn(stack, seed=0)
    for factor, part in zip(alone, q.chunk(3)):
        with torch.no_grad():
            factor.q.copy_(part)
    retract_all((factor, 1.0) for factor in (stack, *alone))
    assert torch.equal(master(stack), torch.stack([master(factor) for factor in alone]))


@of_dtypes
def test_folding_leaves_no_rotation_behind(dtype: torch.dtype) -> None:
    factor = small_factor(dtype)
    turn(factor, seed=0)
    assert not factor.is_clean
    factor.retract()
    assert factor.is_clean
    assert not factor.q.any()
    before = factor.weight.detach().clone()
    factor.retract()
    assert torch.equal(factor.weight, before)


@of_dtypes
def test_folding_writes_in_place_and_tells_autograd(dtype: torch.dtype) -> None:
    factor = small_factor(dtype)
    held = (factor.weight, factor.q, factor.row_channels, factor.column_channels, factor.residual)
    storages = [tensor.data_ptr() for tensor in held if tensor is not None]
    version = factor.weight._version
    turn(factor, seed=0)
    factor.retract()
    assert [tensor.data_ptr() for tensor in held if tensor is not None] == storages
    assert factor.weight._version > version


def test_folding_many_at_once_equals_folding_one_by_one() -> None:
    configs = [CONFIG, PoetxConfig(block_size=16, chunk=4, scale=0.5), PoetxConfig(block_size=8, chunk=4), CONFIG, CONFIG]
    dtypes = [torch.float64, torch.float64, torch.float64, torch.float32, torch.bfloat16]
    gains = [1.0, 2.0, 1.0, 1.0, 3.0]
    together, alone = ([small_factor(*pair) for pair in zip(dtypes, configs)] for _ in range(2))
    for seed, (first, second) in enumerate(zip(together, alone)):
        turn(first, seed)
        turn(second, seed)
    retract_all(zip(together, gains))
    for first, second, gain in zip(together, alone, gains):
        second.retract(gain)
        torch.testing.assert_close(master(first), master(second), rtol=1e-6, atol=1e-6)
        assert first.is_clean
        assert not first.q.any()


def test_a_cleared_rotation_never_reaches_the_weight() -> None:
    factor = small_factor()
    before = factor.weight.detach().clone()
    turn(factor, seed=0)
    factor.clear()
    assert factor.is_clean
    factor.retract()
    assert torch.equal(factor.weight, before)


@of_dtypes
def test_a_ruined_block_leaves_its_part_of_the_weight_alone(dtype: torch.dtype) -> None:
    factor = small_factor(dtype)
    before = factor.weight.detach().clone()
    with torch.no_grad():
        factor.q[0] = float("nan")
    factor.retract()
    assert torch.equal(factor.weight, before)
    assert not factor.q.any()


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-4), (torch.float16, 1e-4)],
    ids=str,
)
@pytest.mark.parametrize("size", [2e-3, 0.1])
def test_singular_values_stay_over_a_thousand_steps(dtype: torch.dtype, tolerance: float, size: float) -> None:
    """Relative to the largest one, for small and for large steps, with new permutations now and then."""
    factor = small_factor(dtype, PoetxConfig(block_size=16, chunk=4, permutation_period=100))
    before = torch.linalg.svdvals(master(factor))
    for step in range(1000):
        turn(factor, step, size)
        factor.retract()
        factor.count_step()
    after = torch.linalg.svdvals(master(factor))
    assert (after - before).abs().max() <= tolerance * before.max()
    assert (factor.weight.detach().double() - master(factor)).abs().max() <= torch.finfo(dtype).eps * before.max()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_rounding_does_not_lengthen_a_half_precision_weight(dtype: torch.dtype) -> None:
    """Its length may only wander: by 4e-6 (a standard deviation of the rounding errors), where ties away from zero add 4e-5."""
    factor = small_factor(dtype)
    before = master(factor).norm()
    for step in range(1000):
        turn(factor, step, 2e-3)
        factor.retract()
    assert abs(master(factor).norm() / before - 1) <= 1.6e-5


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
    factor.retract()
    assert factor.residual.any()
    factor.check_residual()
    assert factor.residual.any()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_write_from_outside_drops_the_residual(dtype: torch.dtype) -> None:
    factor = small_factor(dtype)
    turn(factor, seed=0)
    factor.retract()
    with torch.no_grad():
        factor.weight.mul_(2)
    written = factor.weight.detach().clone()
    factor.check_residual()
    assert torch.equal(master(factor), written.double())


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_folding_starts_from_what_was_written_from_outside(dtype: torch.dtype) -> None:
    factor = small_factor(dtype)
    turn(factor, seed=0)
    factor.retract()
    written = normal(*factor.weight.shape, seed=9, dtype=dtype)
    with torch.no_grad():
        factor.weight.copy_(written)
    q = turn(factor, seed=1)
    factor.retract()
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
    factor.retract()
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
        each.retract()
    assert dtype in HALF or torch.equal(factor.weight, twin.weight)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@BITS
def test_a_fold_errs_by_the_bits_it_keeps(dtype: torch.dtype, bits: int) -> None:
    place = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
    tolerance = place if bits == 0 else place / 2**bits / (2 if dtype == torch.bfloat16 else 1)
    factor = small_factor(dtype, with_bits(bits))
    before = factor.weight.detach().double().clone()
    q = turn(factor, seed=0)
    factor.retract()
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
        factor.retract()
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
        factor.retract()
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
            factor.retract()
            factor.count_step()
        residual = None if factor.residual is None else factor.residual[0]
        masters.append(decode(factor.weight.detach().reshape(32, 45), residual))
    assert torch.equal(*masters)


@BITS
@of_dtypes
def test_a_fold_of_nothing_changes_nothing(dtype: torch.dtype, bits: int) -> None:
    factor = small_factor(dtype, with_bits(bits))
    turn(factor, seed=0)
    factor.retract()
    before = master(factor)
    factor.retract()
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
    factor.retract()
    twin.retract()
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
        first.retract()
        first.count_step()
    second = OwningFactor(copy.deepcopy(first.owned), "another name", config)
    second.resume(first.key, first.epoch, first.steps, first.kept or None)
    for factor in (first, second):
        turn(factor, seed=3)
        factor.retract()
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
    factor.retract()
    expected = explicit_weight(factor, start, turned.double())
    tolerance = 1e-12 if after == torch.float64 else 1e-4
    torch.testing.assert_close(master(factor), expected, rtol=tolerance, atol=tolerance)


def test_a_weight_that_did_not_change_keeps_its_residual() -> None:
    factor = small_factor(torch.bfloat16)
    turn(factor, seed=0)
    factor.retract()
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
            each.retract()
        factor.weight.data = factor.weight.data.cuda()
        factor.follow_weight()
        held = (factor.q, factor.q.grad, factor.row_channels, factor.column_channels, factor.residual)
        assert all(tensor.is_cuda for tensor in held if tensor is not None)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(master(factor).cpu(), master(stays), rtol=tolerance, atol=tolerance)


# --- The registry ----------------------------------------------------------------------------------------------------


def registered(registry: Registry) -> tuple[nn.Parameter, OrthogonalFactor]:
    weight = nn.Parameter(torch.ones(16, 16))
    factor = OrthogonalFactor(weight, "fc.weight", CONFIG)
    registry.add(factor)
    return weight, factor


def test_a_factor_is_found_by_its_weight_and_by_its_q() -> None:
    registry = Registry()
    weight, factor = registered(registry)
    assert registry.of_weight(weight) is registry.of_skew(factor.q) is factor
    assert list(registry) == [factor]
    assert registry.of_weight(factor.q) is registry.of_skew(weight) is None
    assert registry.of_weight(copy.deepcopy(weight)) is None
    assert registry.of_weight(None) is registry.of_weight(object()) is None


def test_a_factor_goes_with_its_weight() -> None:
    registry = Registry()
    weight, factor = registered(registry)
    gone = weakref.ref(factor)
    del weight, factor
    gc.collect()
    assert gone() is None
    assert len(registry) == 0
    assert not registry._by_skew


def test_a_factor_outlives_the_swap_of_its_weights_data() -> None:
    registry = Registry()
    weight, factor = registered(registry)
    weight.data = torch.zeros(16, 16)
    assert registry.of_weight(weight) is factor


def test_a_weight_may_be_registered_again() -> None:
    """The first factor's death notice must not take the second one along, nor leave it behind."""
    registry = Registry()
    weight, first = registered(registry)
    registry.remove(first)
    assert registry.of_weight(weight) is registry.of_skew(first.q) is None
    second = OrthogonalFactor(weight, "fc.weight", CONFIG)
    registry.add(second)
    registry.remove(first)
    del first
    gc.collect()
    assert registry.of_weight(weight) is second
    del weight, second
    gc.collect()
    assert len(registry) == 0
    assert not registry._by_skew


def test_the_death_of_a_released_weight_spares_a_factor_whose_q_took_the_place_of_its_own() -> None:
    registry = Registry()
    released, first = registered(registry)
    second = small_factor()
    registry.remove(first)
    place, data = id(first.q), second.q.data
    del first
    same_place = [q for q in [nn.Parameter(data) for _ in range(100)] if id(q) == place]
    assert same_place, "no identity was used again: nothing is tested"
    second.q = same_place[0]
    registry.add(second)
    del released
    gc.collect()
    assert registry.of_skew(second.q) is second


def test_weights_that_come_and_go_leave_nothing() -> None:
    """Identities are used again; a factor of a dead weight must not be taken for that of its successor."""
    registry = Registry()
    for _ in range(50):
        weight, factor = registered(registry)
        assert registry.of_weight(weight) is factor
        assert len(registry) == 1
        del weight, factor
    gc.collect()
    assert len(registry) == 0
