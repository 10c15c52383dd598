"""Products of float32 tiles on tensor cores: rounded to 11 bits, or in three parts.

TensorFloat-32 would truncate its operands, which shortens a weight with every fold, and needs one memory order of them.
float16 has the same 11 bits, rounds to nearest, and takes either order; the caller scales operands into its range.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .precision import UNIT

_UNIT = tl.constexpr(UNIT)


@triton.jit
def split(tile, PRECISION: tl.constexpr):
    """A tile as :func:`dot` takes it: what leads, and the rest that ``tf32x3`` counts too.

    Where float16 is used: at most 2¹⁵ in size, and the digits that count above 2⁻¹⁴ (``tf32x3``: 2⁻³).
    """
    if PRECISION == "ieee":
        high = tile
        low = tile
    else:
        high = tile.to(tl.float16)
        if PRECISION == "tf32x3":
            low = (tile - high.to(tl.float32)).to(tl.float16)
        else:
            low = high
    return high, low


@triton.jit
def dot(a, a_low, b, b_low, PRECISION: tl.constexpr):
    """``A B`` in float32. ``ieee``: float32 products; ``tf32``: float16 products; ``tf32x3``: three of those."""
    if PRECISION == "ieee":
        product = tl.dot(a, b, input_precision="ieee")
    else:
        product = tl.dot(a, b)
        if PRECISION == "tf32x3":
            product = tl.dot(a, b_low, product)
            product = tl.dot(a_low, b, product)
    return product


@triton.jit
def load_rotation(pointers, mask, PRECISION: tl.constexpr):
    """``4096 E``, as :func:`dot` takes it, from ``E`` in float32 or ``4096 E`` in float16."""
    e = tl.load(pointers, mask=mask, other=0.0)
    if e.dtype == tl.float16:
        if PRECISION == "tf32":
            high = e
            low = e
        else:
            high, low = split(e.to(tl.float32), PRECISION)
    else:
        high, low = split(e * _UNIT, PRECISION)
    return high, low


@triton.jit
def power_of_two(exponent):
    """Float32 2^exponent, for int32 exponents of normal numbers."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scale_below(tile, EXPONENT: tl.constexpr):
    """The power of two that brings the largest finite number of a tile to less than 2^EXPONENT; 1 for zeros."""
    size = tl.abs(tile)
    largest = tl.max(tl.max(tl.where(size < float("inf"), size, 0.0), 1), 0)
    exponent = ((largest.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 126  # largest < 2^exponent
    exponent = tl.minimum(tl.maximum(EXPONENT - exponent, -100), 100)
    return tl.where(largest > 0, power_of_two(exponent), 1.0)
