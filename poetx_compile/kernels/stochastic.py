"""Stochastic rounding to half precision, for weights that keep no residual: unbiased, and the same bits on every machine.

The random bits are a function of a seed and an element's place, so that a resumed run and every rank round alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .residual import float16_ulp

_WORD = 0xFFFFFFFF
MIX_1, MIX_2 = 0x7FEB352D, 0x846CA68B
"""The multipliers of ``lowbias32``, a hash of 32 bits by Chris Wellons (nullprogram.com/blog/2018/07/31)."""


def random_bits(seed: int, places: Tensor) -> Tensor:
    """32 random bits for every place: ``lowbias32`` of the place and a word of the seed, and again with the other word.

    Args:
        seed: 64 bits, well mixed.
        places: int32.

    Returns:
        int32, of the shape of ``places``.
    """
    first = _mix(places + _signed(seed))
    return _mix(first ^ _signed(seed >> 32))


def round_stochastically_(weight: Tensor, master: Tensor, seed: int) -> None:
    """Round ``master`` into ``weight`` up or down, in place, so that the mean over all seeds is ``master``.

    A number that ``weight`` can hold stays as it is. float16 subnormals are unbiased to 2⁻²⁴ of their last place.

    Args:
        weight: ``[m, n]``, bfloat16 or float16.
        master: ``[m, n]``, float32.
    """
    places = torch.arange(master.numel(), dtype=torch.int32, device=master.device).view(master.shape)
    bits = random_bits(seed, places)
    if weight.dtype == torch.bfloat16:
        up = master.view(torch.int32) + (bits & 0xFFFF)
        weight.copy_(torch.where(master.isnan(), master, ((up >> 16) << 16).view(torch.float32)))
    else:
        ulp = float16_ulp(master)
        steps = master / ulp
        below = steps.floor()
        share = (bits & 0xFFFFFF) / 2.0**24
        rounded = (below + (steps - below > share)) * ulp
        weight.copy_(torch.where(master.isfinite(), rounded, master))


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 16)) * _signed(MIX_1)
    x = (x ^ _shifted(x, 15)) * _signed(MIX_2)
    return x ^ _shifted(x, 16)


def _shifted(x: Tensor, count: int) -> Tensor:
    """Logical shift to the right."""
    return (x >> count) & (_WORD >> count)


def _signed(word: int) -> int:
    """The int32 with the low 32 bits of a number."""
    word &= _WORD
    return word - (1 << 32) if word >> 31 else word
