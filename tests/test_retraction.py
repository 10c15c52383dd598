"""What folding makes of weights: the rotations that their ``q`` mean, and nothing else."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import explicit_weight
from strategies import KINDS, SEEDS, OwningFactor, factors, normal
from torch import nn
from turned import CONFIG, master, of_dtypes, retract, small_factor, turn

from poetx_compile import PoetxConfig, retraction
from poetx_compile.kernels import HALF, naive, spread_evenly
from poetx_compile.retraction import in_batches, retract_all, spread_all

GAINS = st.sampled_from((1.0, 0.5, 8.0))


@given(factors(kinds=KINDS), GAINS, SEEDS)
def test_folding_makes_the_explicit_weight(factor: OwningFactor, gain: float, seed: int) -> None:
    before = factor.weight.detach().clone()
    q = turn(factor, seed, 0.1 / gain)
    retract(factor, gain)
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
        retract(flat)
        retract(factor)
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


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_what_stops_halfway_leaves_weights_with_their_own_residuals(
    bits: int, memory: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(CONFIG, residual_bits=bits)

    def made(seed: int) -> OwningFactor:
        kernel = normal(32, 5, 3, 3, seed=seed, dtype=torch.bfloat16).to(memory_format=memory)
        factor = OwningFactor(nn.Parameter(kernel), "weight", config, (1, 32, 45))
        turn(factor, seed)
        return factor

    def stumble(*operands: object) -> None:
        rotated.append(operands)
        if len(rotated) == 2:
            raise ArithmeticError
        rotate(*operands)

    whole, first, second = made(1), made(1), made(2)
    retract(whole)
    before, version = (second.weight.detach().clone(), second.residual.clone()), first.weight._version
    rotated: list[object] = []
    rotate = naive.rotate_
    monkeypatch.setattr(naive, "rotate_", stumble)
    with pytest.raises(ArithmeticError):
        retract_all([(first, 1.0), (second, 1.0)])
    assert torch.equal(first.weight, whole.weight)
    assert torch.equal(first.residual, whole.residual)
    assert first.weight._version > version
    assert torch.equal(second.weight, before[0])
    assert torch.equal(second.residual, before[1])


@of_dtypes
def test_folding_leaves_no_rotation_behind(dtype: torch.dtype) -> None:
    factor = small_factor(dtype)
    turn(factor, seed=0)
    assert not factor.is_clean
    retract(factor)
    assert factor.is_clean
    assert not factor.q.any()
    before = factor.weight.detach().clone()
    retract(factor)
    assert torch.equal(factor.weight, before)


@of_dtypes
def test_folding_writes_in_place_and_tells_autograd(dtype: torch.dtype) -> None:
    factor = small_factor(dtype)
    held = (factor.weight, factor.q, factor.row_channels, factor.column_channels, factor.residual)
    storages = [tensor.data_ptr() for tensor in held if tensor is not None]
    version = factor.weight._version
    turn(factor, seed=0)
    retract(factor)
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
        retract(second, gain)
        torch.testing.assert_close(master(first), master(second), rtol=1e-6, atol=1e-6)
        assert first.is_clean
        assert not first.q.any()


@pytest.mark.parametrize("skew_dtype", ["float32", "bfloat16"])
def test_many_weights_are_spread_as_each_alone(skew_dtype: str) -> None:
    config = PoetxConfig(block_size=16, chunk=4, skew_dtype=skew_dtype)
    shapes = [(32, 50), (12, 32), (3, 20, 16)]
    factors = [
        OwningFactor(nn.Parameter(normal(*shape, seed=1, dtype=torch.bfloat16)), "fc.weight", config) for shape in shapes
    ]
    expected = []
    for seed, factor in enumerate(factors):
        turn(factor, seed)
        parts = [spread_evenly(packed.float(), side.width) for packed, side in factor.skews()]
        expected.append(torch.cat(parts).to(factor.q.dtype))
    spread_all(factors)
    for factor, wanted in zip(factors, expected):
        torch.testing.assert_close(factor.q.detach(), wanted, rtol=1e-2 if skew_dtype == "bfloat16" else 1e-5, atol=1e-7)


def test_work_is_cut_where_a_batch_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = [small_factor() for _ in range(5)]
    monkeypatch.setattr(retraction, "SKEWS_PER_BATCH", factors[0].q.numel() + 1)
    batches = list(in_batches((factor, place) for place, factor in enumerate(factors)))
    assert [[place for _, place in batch] for batch in batches] == [[0, 1], [2, 3], [4]]
    assert list(in_batches(zip(factors[:2]))) == [[(factors[0],), (factors[1],)]]
    assert not list(in_batches([]))
    light = list(in_batches(zip(factors), lambda factor: factor is not factors[0]))  # a quarter of the memory each
    assert [[factor for (factor,) in batch] for batch in light] == [factors[:2], factors[2:]]


@of_dtypes
def test_a_ruined_block_leaves_its_part_of_the_weight_alone(dtype: torch.dtype) -> None:
    factor = small_factor(dtype)
    before = factor.weight.detach().clone()
    with torch.no_grad():
        factor.q[0] = float("nan")
    retract(factor)
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
        retract(factor)
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
        retract(factor)
    assert abs(master(factor).norm() / before - 1) <= 1.6e-5
