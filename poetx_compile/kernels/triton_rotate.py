"""``rotate_`` on a GPU: one side at a time, in place, the residual decoded and encoded on the way.

A program holds all rows of one block (or all its columns) for a strip of the other side, reads the strip whole before it
writes any of it, and shares it with no other program: in place, and without a race.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tuning import RotateTiles, rotate_tiles


@triton.jit
def _decode(weight, residual, offsets, mask, KIND: tl.constexpr):
    """Float32 of weights and residuals: KIND 0 float32, 1 bfloat16, 2 float16."""
    value = tl.load(weight + offsets, mask=mask, other=0.0).to(tl.float32)
    if KIND != 0:
        low = tl.load(residual + offsets, mask=mask, other=0).to(tl.int32)
        bits = value.to(tl.int32, bitcast=True)
        has_residual = (value != 0) & ((bits & 0x7F800000) != 0x7F800000)
        if KIND == 1:
            value = (bits + tl.where(has_residual, low << 8, 0)).to(tl.float32, bitcast=True)
        else:
            exponent = tl.maximum((bits >> 23) & 0xFF, 113)
            step = ((exponent - 18) << 23).to(tl.float32, bitcast=True)
            value = tl.where(has_residual, value + low.to(tl.float32) * step, value)
    return value


@triton.jit
def _encode(weight, residual, offsets, mask, value, KIND: tl.constexpr):
    if KIND == 0:
        tl.store(weight + offsets, value, mask=mask)
    elif KIND == 1:
        bits = value.to(tl.int32, bitcast=True)
        upper = (bits + 0x7F + ((bits >> 8) & 1)) >> 8
        high = (upper + 0x80) >> 8
        rounded = tl.where(value != value, value, (high << 16).to(tl.float32, bitcast=True))
        tl.store(weight + offsets, rounded.to(tl.bfloat16), mask=mask)
        tl.store(residual + offsets, (upper - (high << 8)).to(tl.int8), mask=mask)
    else:
        half = value.to(tl.float16)
        high = half.to(tl.float32)
        bits = high.to(tl.int32, bitcast=True)
        exponent = tl.maximum((bits >> 23) & 0xFF, 113)
        inverse = ((272 - exponent) << 23).to(tl.float32, bitcast=True)
        steps = (value - high) * inverse
        whole = tl.floor(steps + 0.5)
        odd = (whole.to(tl.int32) & 1) == 1
        whole = tl.where((whole - steps == 0.5) & odd, whole - 1, whole)
        whole = tl.minimum(tl.maximum(whole, -127.0), 127.0)
        finite = (bits & 0x7F800000) != 0x7F800000
        tl.store(weight + offsets, half, mask=mask)
        tl.store(residual + offsets, tl.where(finite, whole, 0.0).to(tl.int8), mask=mask)


@triton.jit
def _rotate_rows_kernel(
    weight,  # [m, n]
    residual,  # [m, n] or nothing
    rotation,  # [r, WIDTH, WIDTH]
    channels,  # [r * WIDTH]
    n,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ACROSS: tl.constexpr,
    ALONG: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block = tl.program_id(0)
    column = tl.program_id(1) * ACROSS + tl.arange(0, ACROSS)
    inside_column = (column < n)[None, :]
    i = tl.arange(0, PADDED)
    inside_i = (i < WIDTH)[:, None]
    turn = rotation + block.to(tl.int64) * WIDTH * WIDTH
    change = tl.zeros((PADDED, ACROSS), dtype=tl.float32)
    for start in range(0, WIDTH, ALONG):
        k = start + tl.arange(0, ALONG)
        inside_k = k < WIDTH
        row = tl.load(channels + block * WIDTH + k, mask=inside_k, other=0).to(tl.int64)
        part = _decode(weight, residual, row[:, None] * n + column[None, :], inside_k[:, None] & inside_column, KIND)
        e = tl.load(turn + i[:, None] * WIDTH + k[None, :], mask=inside_i & inside_k[None, :], other=0.0)
        change = tl.dot(e, part, change, input_precision=PRECISION)
    row = tl.load(channels + block * WIDTH + i, mask=i < WIDTH, other=0).to(tl.int64)
    offsets = row[:, None] * n + column[None, :]
    mask = inside_i & inside_column
    before = _decode(weight, residual, offsets, mask, KIND)
    tl.debug_barrier()
    _encode(weight, residual, offsets, mask, before + change, KIND)


@triton.jit
def _rotate_columns_kernel(
    weight,  # [m, n]
    residual,  # [m, n] or nothing
    rotation,  # [r, WIDTH, WIDTH]
    channels,  # [r * WIDTH]
    m,
    n,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ACROSS: tl.constexpr,
    ALONG: tl.constexpr,
    RUN: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block = tl.program_id(0)
    row = (tl.program_id(1) * ACROSS + tl.arange(0, ACROSS)).to(tl.int64)
    inside_row = (row < m)[:, None]
    j = tl.arange(0, PADDED)
    inside_j = (j < WIDTH)[None, :]
    turn = rotation + block.to(tl.int64) * WIDTH * WIDTH
    change = tl.zeros((ACROSS, PADDED), dtype=tl.float32)
    for start in range(0, WIDTH, ALONG):
        k = start + tl.arange(0, ALONG)
        inside_k = k < WIDTH
        column = tl.load(channels + block * WIDTH + k, mask=inside_k, other=0)
        if RUN > 1:
            column = tl.max_contiguous(tl.multiple_of(column, RUN), RUN)
        part = _decode(weight, residual, row[:, None] * n + column[None, :], inside_row & inside_k[None, :], KIND)
        e = tl.load(turn + k[:, None] * WIDTH + j[None, :], mask=inside_k[:, None] & inside_j, other=0.0)
        change = tl.dot(part, e, change, input_precision=PRECISION)
    column = tl.load(channels + block * WIDTH + j, mask=j < WIDTH, other=0)
    if RUN > 1:
        column = tl.max_contiguous(tl.multiple_of(column, RUN), RUN)
    offsets = row[:, None] * n + column[None, :]
    mask = inside_row & inside_j
    before = _decode(weight, residual, offsets, mask, KIND)
    tl.debug_barrier()
    _encode(weight, residual, offsets, mask, before + change, KIND)


_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def rotate_(
    weight: Tensor,
    residual: Tensor | None,
    rows: Tensor | None,
    row_channels: Tensor,
    columns: Tensor | None,
    column_channels: Tensor,
    run: int,
    precision: str = "tf32x3",
    tiles: RotateTiles | None = None,
) -> None:
    """As :func:`.naive.rotate_`, for contiguous float32 and half-precision weights; no scratch memory.

    Half-precision weights are rounded to their 24 bits after each side.

    Args:
        precision: of the products in float32: ``ieee``, ``tf32x3`` (as exact, on tensor cores) or ``tf32``.
    """
    m, n = weight.shape
    kind = _KINDS[weight.dtype]
    for rotation, channels, across in ((rows, row_channels, n), (columns, column_channels, m)):
        if rotation is None:
            continue
        blocks, width, _ = rotation.shape
        chosen = tiles or rotate_tiles(width)
        grid = (blocks, triton.cdiv(across, chosen.across))
        padded = max(16, triton.next_power_of_2(width))
        shared = {
            "WIDTH": width,
            "PADDED": padded,
            "ACROSS": chosen.across,
            "ALONG": chosen.along,
            "KIND": kind,
            "PRECISION": precision,
            "num_warps": chosen.warps,
            "num_stages": chosen.stages,
        }
        if rotation is rows:
            _rotate_rows_kernel[grid](weight, residual, rotation, channels, n, **shared)
        else:
            _rotate_columns_kernel[grid](weight, residual, rotation, channels, m, n, RUN=run, **shared)
    torch.autograd.graph.increment_version([weight] if residual is None else [weight, residual])
