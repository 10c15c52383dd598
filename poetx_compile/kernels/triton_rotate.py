"""``rotate_`` on a GPU: one side at a time, in place, the residual decoded and encoded on the way.

A program holds all rows of one block (or all its columns) for a strip of the other side, reads the strip whole before it
writes any of it, and shares it with no other program: in place, and without a race.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .precision import UNIT
from .triton_dot import dot, load_rotation, scale_below, split
from .tuning import RotateTiles, padded, rotate_tiles

_UNIT = tl.constexpr(UNIT)


@triton.jit
def _load(weight, residual, offsets, mask, KIND: tl.constexpr):
    high = tl.load(weight + offsets, mask=mask, other=0.0)
    if KIND == 0:
        low = high
    else:
        low = tl.load(residual + offsets, mask=mask, other=0)
    return high, low


@triton.jit
def decode(high, low, KIND: tl.constexpr):
    """Float32 of weights and residuals: KIND 0 float32, 1 bfloat16, 2 float16."""
    value = high.to(tl.float32)
    if KIND == 1:
        low = tl.where(value != 0, low.to(tl.int32) << 8, 0)
        value = (value.to(tl.int32, bitcast=True) + low).to(tl.float32, bitcast=True)
    elif KIND == 2:
        bits = value.to(tl.int32, bitcast=True)
        has_residual = (value != 0) & ((bits & 0x7F800000) != 0x7F800000)
        exponent = tl.maximum((bits >> 23) & 0xFF, 113)
        step = ((exponent - 18) << 23).to(tl.float32, bitcast=True)
        value = tl.where(has_residual, value + low.to(tl.float32) * step, value)
    return value


@triton.jit
def encode(value, KIND: tl.constexpr):
    """The weights and the residuals of float32 values, as :func:`.residual.encode_` rounds them."""
    if KIND == 1:
        bits = tl.minimum(value.to(tl.int32, bitcast=True), 0x7FC00000)  # NaN stays NaN
        bits += 0x7F + ((bits >> 8) & 1)
        high = ((bits + 0x8000) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        low = (bits >> 8).to(tl.int8)
    else:
        high = value.to(tl.float16)
        rounded = high.to(tl.float32)
        bits = rounded.to(tl.int32, bitcast=True)
        exponent = tl.maximum((bits >> 23) & 0xFF, 113)
        inverse = ((272 - exponent) << 23).to(tl.float32, bitcast=True)
        steps = (value - rounded) * inverse
        whole = tl.floor(steps + 0.5)
        odd = (whole.to(tl.int32) & 1) == 1
        whole = tl.where((whole - steps == 0.5) & odd, whole - 1, whole)
        whole = tl.minimum(tl.maximum(whole, -127.0), 127.0)
        finite = (bits & 0x7F800000) != 0x7F800000
        low = tl.where(finite, whole, 0.0).to(tl.int8)
    return high, low


@triton.jit
def _store(weight, residual, offsets, mask, value, KIND: tl.constexpr):
    if KIND == 0:
        tl.store(weight + offsets, value, mask=mask)
    else:
        high, low = encode(value, KIND)
        tl.store(weight + offsets, high, mask=mask)
        tl.store(residual + offsets, low, mask=mask)


@triton.jit
def _places(channels, i, across, channel_stride, stride, WIDTH: tl.constexpr, RUN: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Offsets into the weight of channels ``i`` of a block, by the places ``across``: ``[i, across]``, or transposed."""
    channel = tl.load(channels + i, mask=i < WIDTH, other=0)
    if RUN > 1:
        channel = tl.max_contiguous(tl.multiple_of(channel, RUN), RUN)
    if TRANSPOSED:
        offsets = across[:, None] * stride + channel[None, :] * channel_stride
    else:
        offsets = channel[:, None] * channel_stride + across[None, :] * stride
    return offsets


@triton.jit
def _inside(i, across, size, WIDTH: tl.constexpr, TRANSPOSED: tl.constexpr):
    if TRANSPOSED:
        mask = (across < size)[:, None] & (i < WIDTH)[None, :]
    else:
        mask = (i < WIDTH)[:, None] & (across < size)[None, :]
    return mask


@triton.jit
def _rotate_kernel(
    weight,  # [m, n]
    residual,  # [m, n] or nothing
    rotation,  # [r, WIDTH, WIDTH]
    channels,  # [r * WIDTH]
    size,
    channel_stride,
    stride,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ACROSS: tl.constexpr,
    ALONG: tl.constexpr,
    RUN: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block = tl.program_id(0)
    rotation += block.to(tl.int64) * WIDTH * WIDTH
    channels += block * WIDTH
    across = (tl.program_id(1) * ACROSS + tl.arange(0, ACROSS)).to(tl.int64)
    k = tl.arange(0, PADDED)
    everything = _places(channels, k, across, channel_stride, stride, WIDTH, RUN, TRANSPOSED)
    tile, rest = _load(weight, residual, everything, _inside(k, across, size, WIDTH, TRANSPOSED), KIND)
    tile = decode(tile, rest, KIND)
    scale = scale_below(tile, 11)
    high, low = split(tile * scale, PRECISION)
    i = tl.arange(0, ALONG)
    offsets = _places(channels, i, across, channel_stride, stride, WIDTH, RUN, TRANSPOSED)
    mask = _inside(i, across, size, WIDTH, TRANSPOSED)
    before, rest = _load(weight, residual, offsets, mask, KIND)
    for start in range(0, WIDTH, ALONG):
        following = start + ALONG + tl.arange(0, ALONG)
        offsets_following = _places(channels, following, across, channel_stride, stride, WIDTH, RUN, TRANSPOSED)
        mask_following = _inside(following, across, size, WIDTH, TRANSPOSED)
        before_following, rest_following = _load(weight, residual, offsets_following, mask_following, KIND)
        if TRANSPOSED:
            inside = (k < WIDTH)[:, None] & (i < WIDTH)[None, :]
            e_high, e_low = load_rotation(rotation + k[:, None] * WIDTH + i[None, :], inside, PRECISION)
            change = dot(high, low, e_high, e_low, PRECISION)
        else:
            inside = (i < WIDTH)[:, None] & (k < WIDTH)[None, :]
            e_high, e_low = load_rotation(rotation + i[:, None] * WIDTH + k[None, :], inside, PRECISION)
            change = dot(e_high, e_low, high, low, PRECISION)
        _store(weight, residual, offsets, mask, decode(before, rest, KIND) + change * (1 / (scale * _UNIT)), KIND)
        i, offsets, mask, before, rest = following, offsets_following, mask_following, before_following, rest_following


KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


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
        precision: of the products, as in :func:`.triton_dot.dot`.
    """
    m, n = weight.shape
    if columns is not None:
        _rotate_side(weight, residual, columns, column_channels, (m, 1, n), run, True, precision, tiles)
    if rows is not None:
        _rotate_side(weight, residual, rows, row_channels, (n, n, 1), 1, False, precision, tiles)
    torch.autograd.graph.increment_version([weight] if residual is None else [weight, residual])


def multiply_(turn: Tensor, step: Tensor, from_left: bool) -> None:
    """``E ← E + E_step E``, or ``E ← E + E E_step`` where not ``from_left``, in place, to 22 bits of the products.

    Args:
        turn: ``E``, float32 ``[r, b, b]``, contiguous.
        step: ``E_step``, as in :func:`.triton_dot.load_rotation`.
    """
    blocks, width, _ = turn.shape
    channels = _of_blocks(blocks, width, from_left, turn.device)
    geometry = (width, width, 1) if from_left else (width, 1, width)
    _rotate_side(turn, None, step, channels, geometry, math.gcd(width, 32), not from_left, "tf32x3", None)
    torch.autograd.graph.increment_version(turn)


@functools.lru_cache(maxsize=256)
def _of_blocks(blocks: int, width: int, are_rows: bool, device: torch.device) -> Tensor:
    """What stands for the channels of blocks that lie one behind the other: their rows, or the places of their columns."""
    if are_rows:
        return torch.arange(blocks * width, device=device)
    return (torch.arange(blocks, device=device)[:, None] * width**2 + torch.arange(width, device=device)).flatten()


def _rotate_side(
    weight: Tensor,
    residual: Tensor | None,
    rotation: Tensor,
    channels: Tensor,
    geometry: tuple[int, int, int],
    run: int,
    transposed: bool,
    precision: str,
    tiles: RotateTiles | None,
) -> None:
    """One side; ``geometry``: length of the other side, and the strides of this side and of the other."""
    blocks, width, _ = rotation.shape
    tiles = tiles or rotate_tiles(width, transposed, precision, weight.device)
    _rotate_kernel[(blocks, -(-geometry[0] // tiles.across))](
        weight,
        residual,
        rotation,
        channels,
        *geometry,
        WIDTH=width,
        PADDED=padded(width),
        ACROSS=tiles.across,
        ALONG=tiles.along,
        RUN=run,
        TRANSPOSED=transposed,
        KIND=KINDS[weight.dtype],
        PRECISION=precision,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
