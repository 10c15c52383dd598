"""Stochastic rounding in Triton: the bits of :mod:`.stochastic`, for a kernel that stores half-precision weights."""

from __future__ import annotations

import triton
import triton.language as tl

from .stochastic import MIX_1, MIX_2

_MIX_1 = tl.constexpr(MIX_1)
_MIX_2 = tl.constexpr(MIX_2)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * _MIX_1
    x = (x ^ (x >> 15)) * _MIX_2
    return x ^ (x >> 16)


@triton.jit
def stochastic_bits(seed, places):
    """As :func:`.stochastic.random_bits`, in uint32.

    Args:
        seed: an integer of the launch; name it in ``do_not_specialize``, since each step brings another.
        places: row · n + column of each element of the matrix.
    """
    words = seed.to(tl.int64)
    first = _mix(places.to(tl.uint32) + words.to(tl.uint32))
    return _mix(first ^ (words >> 32).to(tl.uint32))


@triton.jit
def encode_stochastic(weight, offsets, mask, value, random, KIND: tl.constexpr):
    """Store float32 values as :func:`.stochastic.round_stochastically_` does: KIND 1 bfloat16, 2 float16."""
    bits = value.to(tl.int32, bitcast=True)
    if KIND == 1:
        up = (bits + (random & 0xFFFF).to(tl.int32)) >> 16
        high = tl.where(value == value, up, 0x7FC0)
        tl.store(weight + offsets, high.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        exponent = tl.maximum((bits >> 23) & 0xFF, 113)
        ulp = ((exponent - 10) << 23).to(tl.float32, bitcast=True)
        inverse = ((264 - exponent) << 23).to(tl.float32, bitcast=True)
        steps = value * inverse
        below = tl.floor(steps)
        share = (random & 0xFFFFFF).to(tl.float32) * (1 / 16777216)
        rounded = (below + tl.where(steps - below > share, 1.0, 0.0)) * ulp
        finite = (bits & 0x7F800000) != 0x7F800000
        tl.store(weight + offsets, tl.where(finite, rounded, value).to(tl.float16), mask=mask)
