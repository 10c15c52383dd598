"""Half-precision weights with an int8 residual: 24 bits a weight, so that thousands of folds round away nothing.

The weight itself stays an ordinary bfloat16 or float16 tensor, correctly rounded; the residual holds what it lost.
"""

from __future__ import annotations

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a weight of ``dtype`` is rotated."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def decode(weight: Tensor, residual: Tensor | None) -> Tensor:
    """``weight`` with what its rounding lost, as a new tensor of :func:`master_dtype`.

    Zeros and non-finite weights stay so, whatever the residual says.
    """
    if residual is None:
        return weight.to(master_dtype(weight.dtype), copy=True)
    high = weight.float()
    has_residual = high.isfinite() & (high != 0)
    if weight.dtype == torch.float16:
        return torch.where(has_residual, high + residual * (_float16_ulp(high) / 256), high)
    low = torch.where(has_residual, residual.to(torch.int32), 0)
    return (high.view(torch.int32) + (low << 8)).view(torch.float32)


def encode_(weight: Tensor, residual: Tensor | None, master: Tensor) -> None:
    """Round ``master`` into ``weight``, and what that loses into ``residual``, both in place.

    bfloat16 and residual are the upper 24 bits of the float32, ties to even (away from zero they would lengthen the weight
    with every fold): relative error at most 2⁻¹⁶. float16 counts the residual in 1/256 of the weight's last place.
    """
    if residual is None:
        weight.copy_(master)
        return
    if weight.dtype == torch.float16:
        high = master.half()
        steps = ((master - high.float()) * (256 / _float16_ulp(high.float()))).round().clamp(-127, 127)
        low = torch.where(high.isfinite(), steps, 0)
    else:
        bits = master.view(torch.int32)
        upper = (bits + 0x7F + ((bits >> 8) & 1)) >> 8
        high_bits = (upper + 0x80) >> 8
        low = upper - (high_bits << 8)
        high = torch.where(master.isnan(), master, (high_bits << 16).view(torch.float32))
    residual.copy_(low)  # memory can be missing until here, not from here on
    weight.copy_(high)


def _float16_ulp(high: Tensor) -> Tensor:
    """The last place of each float16 value, given as float32; subnormals share that of the smallest normal."""
    exponent = torch.frexp(high).exponent.clamp(min=-13)
    return torch.ldexp(torch.ones_like(high), exponent - 11)
