"""Half-precision weights with a residual of 8 bits, or 4: 24 or 20 bits a weight, so that thousands of folds add up.

The weight itself stays an ordinary bfloat16 or float16 tensor, correctly rounded; the residual holds what it lost. A residual
of 8 bits is int8 of the weight's shape; one of 4 bits is uint8 ``[m, ⌈n/2⌉]``, even columns in the lower half of each byte.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a weight of ``dtype`` is rotated."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def new_residual(weight: Tensor, matrices: tuple[int, int, int], bits: int) -> Tensor | None:
    """Zeros for a half-precision weight that is rotated as ``matrices`` ``[count, m, n]``; None for any other, or for 0 bits."""
    if weight.dtype not in HALF or not bits:
        return None
    if bits == 8:
        return torch.zeros_like(weight, dtype=torch.int8)
    count, m, n = matrices
    return torch.zeros(count, m, (n + 1) // 2, dtype=torch.uint8, device=weight.device)


def decode(weight: Tensor, residual: Tensor | None) -> Tensor:
    """``weight`` with what its rounding lost, as a new tensor of :func:`master_dtype`.

    Zeros and non-finite weights stay so, whatever the residual says.
    """
    if residual is None:
        return weight.to(master_dtype(weight.dtype), copy=True)
    bits = _bits(residual)
    if bits == 4:
        residual = _unpack(residual, weight.shape[-1])
    high = weight.float()
    has_residual = high.isfinite() & (high != 0)
    if weight.dtype == torch.float16:
        return torch.where(has_residual, high + residual * (float16_ulp(high) / 2**bits), high)
    low = torch.where(has_residual, residual.to(torch.int32), 0)
    return (high.view(torch.int32) + (low << (16 - bits))).view(torch.float32)


def encode_(weight: Tensor, residual: Tensor | None, master: Tensor) -> None:
    """Round ``master`` into ``weight``, and what that loses into ``residual``, both in place.

    bfloat16 and a residual of ``k`` bits are the upper ``16 + k`` bits of the float32, ties to even (away from zero they would
    lengthen the weight with every fold): relative error at most 2⁻¹⁶, or 2⁻¹². float16 counts the residual in parts of the
    weight's last place, 256 or 16.
    """
    if residual is None:
        weight.copy_(master)
        return
    bits = _bits(residual)
    if weight.dtype == torch.float16:
        high = master.half()
        ulp = float16_ulp(high.float())
        most = 2 ** (bits - 1) - 1
        steps = ((master - high.float()) * (2**bits / ulp)).round().clamp(-most, most)
        low = torch.where(high.isfinite(), steps, 0)
    else:
        word, dropped = master.view(torch.int32), 16 - bits
        upper = (word + (1 << (dropped - 1)) - 1 + ((word >> dropped) & 1)) >> dropped
        high_bits = (upper + (1 << (bits - 1))) >> bits
        low = upper - (high_bits << bits)
        high = torch.where(master.isnan(), master, (high_bits << 16).view(torch.float32))
    residual.copy_(_pack(low.to(torch.int8)) if bits == 4 else low)  # memory can be missing until here, not from here on
    weight.copy_(high)


def float16_ulp(values: Tensor) -> Tensor:
    """The last place of float16 next to each float32, as float32; below the smallest normal that of the smallest normal."""
    exponent = torch.frexp(values).exponent.clamp(min=-13)
    return torch.ldexp(torch.ones_like(values), exponent - 11)


def _bits(residual: Tensor) -> int:
    return 8 if residual.dtype == torch.int8 else 4


def _pack(low: Tensor) -> Tensor:
    """int8 in [-8, 7], ``[..., n]``, to uint8 ``[..., ⌈n/2⌉]``."""
    low = F.pad(low, (0, low.shape[-1] % 2))
    return ((low[..., ::2] & 15) | (low[..., 1::2] << 4)).view(torch.uint8)


def _unpack(packed: Tensor, n: int) -> Tensor:
    pairs = packed.view(torch.int8)
    return torch.stack((pairs << 4 >> 4, pairs >> 4), -1).flatten(-2)[..., :n]
