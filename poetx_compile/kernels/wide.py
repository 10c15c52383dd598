"""Rotations too wide for a kernel's registers, multiplied at half precision by the matrix library of the GPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .precision import UNIT

_BITS = 11


def turn_(
    master: Tensor, rows: Tensor | None, row_channels: Tensor, columns: Tensor | None, column_channels: Tensor
) -> None:
    """As :func:`.naive.turn_`, each product of operands with 11 bits, summed in float32: what ``tf32`` means.

    Args:
        master: float32 ``[m, n]``.
        rows, columns: ``4096 E`` in float16, ``[r, b, b]``; None leaves that side alone.
    """
    if rows is not None:
        part = master.index_select(0, row_channels)
        scale = _scale_(part)
        change = _multiply(rows, part.half().view(*rows.shape[:2], -1))  # [r, b, n]
        del part
        master.index_add_(0, row_channels, change.div_(scale).flatten(0, 1))
    if columns is not None:
        part = master.index_select(1, column_channels)
        scale = _scale_(part)
        change = _multiply(part.half().unflatten(1, columns.shape[:2]).transpose(0, 1), columns)  # [r, m, b]
        del part
        master.index_add_(1, column_channels, change.div_(scale).transpose(0, 1).flatten(1))


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    """``[r, i, k]`` by ``[r, k, j]``, float16 to float32."""
    with torch.autocast(left.device.type, enabled=False):
        if left.is_cuda:
            return torch.bmm(left, right, out_dtype=torch.float32)
        return torch.bmm(left.float(), right.float())


def _scale_(part: Tensor) -> Tensor:
    """Multiply by the power of two that brings the largest number just below 2¹¹; returned times the 4096 of ``4096 E``."""
    largest = torch.linalg.vector_norm(part, math.inf).nan_to_num(1.0, 1.0)
    scale = torch.exp2((_BITS - torch.frexp(largest).exponent).clamp(-100, 100).float())
    part *= scale
    return scale * UNIT
