"""Symmetric int8 in groups along a row: a code for each number, and a bfloat16 scale for each group of 128."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .stochastic import random_bits

GROUP = 128
LARGEST_CODE = 127
_NUMBERS_AT_ONCE = 1 << 24


def quantize_(codes: Tensor, scales: Tensor, matrix: Tensor, seed: int | None = None) -> None:
    """Write the codes and scales that stand for ``matrix``.

    A scale is the group's largest size by 127, rounded up to bfloat16, so that no code is clipped: every number is within
    half a scale of what its code stands for, or within a scale where rounding is stochastic. A group of zeros has scale 0.

    Args:
        codes: int8 ``[m, n]``.
        scales: bfloat16 ``[m, ⌈n/128⌉]``.
        matrix: ``[m, n]``, finite; any floating dtype.
        seed: of stochastic rounding, whose mean is the number itself; None rounds to nearest.
    """
    n = matrix.shape[1]
    at_once = max(1, _NUMBERS_AT_ONCE // n)
    for start in range(0, len(matrix), at_once):
        rows = matrix[start : start + at_once]
        rows = rows if rows.dtype == torch.float64 else rows.float()
        groups = F.pad(rows, (0, -n % GROUP)).unflatten(1, (-1, GROUP))  # [rows, groups, 128]
        steps = _round_up(groups.abs().amax(-1) / LARGEST_CODE)
        exact = (groups / steps[..., None].to(rows.dtype)).nan_to_num(0, 0, 0).flatten(1)[:, :n]
        if seed is None:
            rounded = exact.round()
        else:
            places = torch.arange(start * n, start * n + rows.numel(), dtype=torch.int32, device=rows.device)
            share = (random_bits(seed, places) & 0xFFFFFF) / 2.0**24
            rounded = (exact + share.view(rows.shape)).floor()
        codes[start : start + at_once] = rounded.clamp(-LARGEST_CODE, LARGEST_CODE)
        scales[start : start + at_once] = steps


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """``[m, n]`` of ``dtype``: each code times the scale of its group. Exact in float32 and float64."""
    groups = F.pad(codes, (0, -codes.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    return (groups * scales[..., None].to(dtype)).flatten(1)[:, : codes.shape[1]].contiguous()


def _round_up(sizes: Tensor) -> Tensor:
    """The next bfloat16 that is no smaller, of numbers that are not negative."""
    nearest = sizes.bfloat16()
    above = (nearest.view(torch.int16) + 1).view(torch.bfloat16)
    return torch.where(nearest.to(sizes.dtype) < sizes, above, nearest)
