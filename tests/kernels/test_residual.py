"""Half-precision weights with an int8 residual: what 24 bits a weight keep of a float32."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from poetx_compile.kernels import HALF, decode, master_dtype, new_residual
from poetx_compile.kernels.residual import encode_

HALVES = pytest.mark.parametrize("dtype", HALF)
PATTERNS = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
LOW_BITS = torch.tensor(
    [0, 1, 0x7F, 0x80, 0x81, 0x17F, 0x180, 0x181, 0x7F7F, 0x7F80, 0x7FFF, 0x8000, 0x8001, 0xFF7F, 0xFF80, 0xFFFF]
)
FLOAT16_RESIDUALS = torch.tensor([*range(-127, 128, 6), -64, 0, 63, 64]).to(torch.int8)
SPECIAL = torch.tensor([0.0, -0.0, float("inf"), -float("inf")])


def encode(master: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight = torch.empty_like(master, dtype=dtype)
    residual = torch.empty_like(master, dtype=torch.int8)
    encode_(weight, residual, master)
    return weight, residual


def masters() -> Tensor:
    """Float32 numbers on, just below and just above every bfloat16, every tie between two, and those of the residual."""
    bits = (PATTERNS.to(torch.int32) << 16)[:, None] + LOW_BITS.to(torch.int32)
    values = bits.reshape(-1).view(torch.float32)
    return values[values.isfinite()]


def in_range(dtype: torch.dtype) -> Tensor:
    """Those of :func:`masters` that ``dtype`` rounds to finite numbers, and for float16 more between its own values."""
    values = masters()
    if dtype == torch.float16:
        halves = PATTERNS.view(torch.float16).float()
        steps = torch.tensor([0, 0.25, 0.499, 0.4999, 0.5, 0.501, 0.75, 127.5 / 256, 128 / 256, 1 / 512])
        values = torch.cat([values, (halves[:, None] * (1 + steps * 2.0**-10)).reshape(-1)])
    return values[values.to(dtype).isfinite() & encode(values, dtype)[0].isfinite()]


def last_place(weight: Tensor) -> Tensor:
    """The distance to the next larger number of the same half precision, in float64."""
    away = torch.nextafter(weight.abs(), torch.full_like(weight, float("inf")))
    return torch.where(away.isfinite(), away.double() - weight.abs().double(), 2.0**5)


def same_bits(left: Tensor, right: Tensor) -> bool:
    integers = torch.int32 if left.dtype == torch.float32 else torch.int16
    return torch.equal(left.view(integers), right.view(integers))


@pytest.mark.parametrize(
    ("dtype", "master"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_halves_are_rotated_in_float32(dtype: torch.dtype, master: torch.dtype) -> None:
    weight = torch.ones(2, 2, dtype=dtype)
    decoded = decode(weight, None)
    assert master_dtype(dtype) == decoded.dtype == master
    decoded.zero_()
    assert weight.all(), "a copy, even where the dtype stays"


# --- What a master loses ---------------------------------------------------------------------------------------------


def test_bfloat16_and_residual_err_by_at_most_2_to_the_minus_16() -> None:
    master = in_range(torch.bfloat16)
    normals = master[master.abs() >= torch.finfo(torch.bfloat16).smallest_normal]
    decoded = decode(*encode(normals, torch.bfloat16))
    assert ((decoded.double() - normals.double()).abs() <= 2.0**-16 * normals.double().abs()).all()


def test_bfloat16_subnormals_err_by_less_than_their_last_place() -> None:
    master = in_range(torch.bfloat16)
    subnormal = master[master.abs() < torch.finfo(torch.bfloat16).smallest_normal]
    decoded = decode(*encode(subnormal, torch.bfloat16))
    assert ((decoded.double() - subnormal.double()).abs() <= 2.0**-134).all()


def test_float16_and_residual_err_by_at_most_a_256th_of_the_last_place() -> None:
    master = in_range(torch.float16)
    weight, residual = encode(master, torch.float16)
    kept = weight != 0
    error = (decode(weight, residual).double() - master.double()).abs()
    assert (error[kept] <= last_place(weight[kept]) / 256).all()
    assert (error[~kept] <= 2.0**-25).all(), "what float16 rounds to zero is zero"


def test_float16_and_residual_err_by_at_most_2_to_the_minus_18_of_a_normal_number() -> None:
    master = in_range(torch.float16)
    normals = master[master.abs() >= torch.finfo(torch.float16).smallest_normal]
    decoded = decode(*encode(normals, torch.float16))
    assert ((decoded.double() - normals.double()).abs() <= 2.0**-18 * normals.double().abs()).all()


@HALVES
@given(values=st.lists(st.floats(width=32), min_size=1))
def test_any_float32_round_trips(dtype: torch.dtype, values: list[float]) -> None:
    master = torch.tensor(values)
    weight, residual = encode(master, dtype)
    decoded = decode(weight, residual)
    kept = weight.isfinite() & (weight != 0)
    bound = 2.0**-16 if dtype == torch.bfloat16 else 2.0**-17
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2
    error = (decoded.double() - master.double()).abs()
    assert (error[kept] <= bound * master[kept].double().abs().clamp(min=torch.finfo(dtype).smallest_normal)).all()
    assert ((weight != 0) | (master.abs() <= smallest)).all()
    assert torch.equal(decoded[~kept].isnan(), master[~kept].isnan())


# --- What the weight itself shows ------------------------------------------------------------------------------------


@HALVES
def test_the_weight_is_the_rounding_of_what_is_stored(dtype: torch.dtype) -> None:
    """No neighbour is nearer; ties may go either way."""
    weight, residual = encode(in_range(dtype), dtype)
    decoded = decode(weight, residual)
    nearest = decoded.to(dtype)
    assert ((weight.double() - decoded.double()).abs() <= (nearest.double() - decoded.double()).abs()).all()


def test_a_float16_weight_is_the_rounding_of_its_master() -> None:
    master = in_range(torch.float16)
    assert same_bits(encode(master, torch.float16)[0], master.half())


def test_a_bfloat16_weight_is_the_rounding_of_its_master_up_to_the_residual() -> None:
    master = in_range(torch.bfloat16)
    distance = (encode(master, torch.bfloat16)[0].double() - master.double()).abs()
    nearest = (master.bfloat16().double() - master.double()).abs()
    assert (distance <= nearest + 2 * (2.0**-16 * master.double().abs() + 2.0**-142)).all()


@HALVES
def test_signs_are_symmetric(dtype: torch.dtype) -> None:
    master = in_range(dtype)
    assert same_bits(decode(*encode(-master, dtype)), -decode(*encode(master, dtype)))


@HALVES
def test_rounding_does_not_lengthen_weights(dtype: torch.dtype) -> None:
    """Errors of one sign would add up over thousands of folds: ties of the residual must go both ways."""
    master = torch.arange(2**23, 2**24, 16, dtype=torch.int32).float() / 2**23
    ties = torch.cat([master, master + 2.0**-16])
    error = decode(*encode(ties, dtype)).double() - ties.double()
    assert error.mean().abs() <= 2.0**-30


# --- Fixed points ----------------------------------------------------------------------------------------------------


def test_every_bfloat16_pair_round_trips() -> None:
    weight = PATTERNS.view(torch.bfloat16)
    weight = weight[weight.isfinite() & (weight != 0)][:, None].expand(-1, 256)
    residual = torch.arange(-128, 128).to(torch.int8).expand_as(weight)
    again, residual_again = encode(decode(weight, residual), torch.bfloat16)
    assert same_bits(again, weight.contiguous())
    assert torch.equal(residual_again, residual)


def test_float16_pairs_keep_their_value() -> None:
    """The pair may change: half a last place below a power of two has two names."""
    weight = PATTERNS.view(torch.float16)
    weight = weight[weight.isfinite()][:, None].expand(-1, len(FLOAT16_RESIDUALS))
    value = decode(weight, FLOAT16_RESIDUALS.expand_as(weight))
    reachable = value.half().isfinite() & (value.half() != 0)
    assert same_bits(decode(*encode(value, torch.float16))[reachable], value[reachable])


@HALVES
def test_folding_nothing_changes_nothing(dtype: torch.dtype) -> None:
    weight, residual = encode(in_range(dtype), dtype)
    again, residual_again = encode(decode(weight, residual), dtype)
    assert same_bits(again, weight)
    stored = weight != 0
    assert torch.equal(residual_again[stored], residual[stored])


# --- Four bits -------------------------------------------------------------------------------------------------------


def encode_four(master: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of a matrix."""
    weight = torch.empty_like(master, dtype=dtype)
    residual = new_residual(weight, (1, *master.shape), 4)
    assert residual is not None
    encode_(weight, residual[0], master)
    return weight, residual[0]


@HALVES
@pytest.mark.parametrize("n", [1, 2, 7, 8])
def test_four_bits_fill_half_the_bytes(dtype: torch.dtype, n: int) -> None:
    _, residual = encode_four(torch.randn(5, n), dtype)
    assert residual.shape == (5, (n + 1) // 2)
    assert residual.dtype == torch.uint8


@HALVES
@pytest.mark.parametrize("n", [1, 2, 7, 8])
def test_four_bits_err_by_at_most_2_to_the_minus_12(dtype: torch.dtype, n: int) -> None:
    master = in_range(dtype)
    master = master[(master.abs() >= torch.finfo(dtype).smallest_normal) & (master.abs() <= torch.finfo(dtype).max / 2)]
    master = master[: master.numel() // n * n].view(-1, n)
    error = (decode(*encode_four(master, dtype)).double() - master.double()).abs()
    bound = 2.0**-12 if dtype == torch.bfloat16 else 2.0**-14
    assert (error <= bound * master.double().abs()).all()


def test_every_bfloat16_pair_with_four_bits_round_trips() -> None:
    weight = PATTERNS.view(torch.bfloat16)
    weight = weight[weight.isfinite() & (weight != 0)][:, None].expand(-1, 16)
    low = torch.arange(-8, 8).to(torch.int8).expand_as(weight)
    packed = ((low[:, ::2] & 15) | (low[:, 1::2] << 4)).view(torch.uint8)
    again, packed_again = encode_four(decode(weight, packed), torch.bfloat16)
    assert same_bits(again, weight.contiguous())
    assert torch.equal(packed_again, packed)


@HALVES
def test_four_bits_do_not_lengthen_weights(dtype: torch.dtype) -> None:
    master = torch.arange(2**11, 2**12, dtype=torch.int32).float() / 2**11
    ties = torch.cat([master, master + 2.0**-12])[None]
    error = decode(*encode_four(ties, dtype)).double() - ties.double()
    assert error.mean().abs() <= 2.0**-22


@HALVES
def test_four_bits_keep_zeros_and_ruined_weights(dtype: torch.dtype) -> None:
    special = torch.cat([SPECIAL, torch.tensor([float("nan")])])
    decoded = decode(special.to(dtype)[:, None].expand(-1, 3), torch.full((5, 2), 0x97, dtype=torch.uint8))
    torch.testing.assert_close(decoded, special[:, None].expand(-1, 3), rtol=0, atol=0, equal_nan=True)


# --- Zeros, infinities and NaN ---------------------------------------------------------------------------------------


@HALVES
def test_zeros_and_infinities_stay(dtype: torch.dtype) -> None:
    assert same_bits(decode(*encode(SPECIAL, dtype)), SPECIAL)


@HALVES
def test_every_nan_stays_nan(dtype: torch.dtype) -> None:
    bits = torch.cat([torch.arange(0x7F800001, 0x7FFFFFFF, 4099), torch.tensor([0x7FFFFFFF])]).to(torch.int32)
    nan = torch.cat([bits, bits | -(2**31)]).view(torch.float32)
    assert nan.isnan().all()
    weight, residual = encode(nan, dtype)
    assert weight.isnan().all()
    assert decode(weight, residual).isnan().all()


@HALVES
def test_what_a_half_cannot_hold_becomes_infinite(dtype: torch.dtype) -> None:
    largest = torch.finfo(torch.float32).max
    weight, residual = encode(torch.tensor([largest, -largest]), dtype)
    assert torch.equal(decode(weight, residual), torch.tensor([float("inf"), -float("inf")]))


@HALVES
def test_a_zeroed_or_ruined_weight_ignores_a_stale_residual(dtype: torch.dtype) -> None:
    special = torch.cat([SPECIAL, torch.tensor([float("nan")])])
    weight = special.to(dtype)[:, None].expand(-1, 256)
    residual = torch.arange(-128, 128).to(torch.int8).expand_as(weight)
    torch.testing.assert_close(decode(weight, residual), special[:, None].expand(-1, 256), rtol=0, atol=0, equal_nan=True)


@HALVES
def test_without_a_residual_a_half_is_only_rounded(dtype: torch.dtype) -> None:
    master = in_range(dtype)
    weight = torch.empty_like(master, dtype=dtype)
    encode_(weight, None, master)
    assert same_bits(weight, master.to(dtype))
