"""``block_gram`` on a GPU: channels gathered inside the kernel, tokens split over programs, summed in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .residual import master_dtype
from .tuning import GramTiles, gram_tiles


@triton.jit
def _gram_kernel(
    left,  # [N, n]
    right,  # [N, n]
    channels,  # [r * WIDTH]
    partial,  # [splits, r, WIDTH, WIDTH]
    tokens,
    left_stride,
    right_stride,
    tokens_per_split,
    WIDTH: tl.constexpr,
    RUN: tl.constexpr,
    TILE_I: tl.constexpr,
    TILE_J: tl.constexpr,
    TILE_T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles_j: tl.constexpr = (WIDTH + TILE_J - 1) // TILE_J
    tiles: tl.constexpr = ((WIDTH + TILE_I - 1) // TILE_I) * tiles_j
    program = tl.program_id(0)
    block = program // tiles
    split = tl.program_id(1)
    i = (program % tiles) // tiles_j * TILE_I + tl.arange(0, TILE_I)
    j = (program % tiles) % tiles_j * TILE_J + tl.arange(0, TILE_J)
    inside_i = i < WIDTH
    inside_j = j < WIDTH
    channel_i = tl.load(channels + block * WIDTH + i, mask=inside_i, other=0)
    channel_j = tl.load(channels + block * WIDTH + j, mask=inside_j, other=0)
    if RUN > 1:
        channel_i = tl.max_contiguous(tl.multiple_of(channel_i, RUN), RUN)
        channel_j = tl.max_contiguous(tl.multiple_of(channel_j, RUN), RUN)

    total = tl.zeros((TILE_I, TILE_J), dtype=tl.float32)
    first = split * tokens_per_split
    last = tl.minimum(first + tokens_per_split, tokens)
    for start in range(first, last, TILE_T):
        t = start + tl.arange(0, TILE_T)
        inside_t = (t < last)[:, None]
        rows = t.to(tl.int64)[:, None]
        a = tl.load(left + rows * left_stride + channel_i[None, :], mask=inside_t & inside_i[None, :], other=0.0)
        b = tl.load(right + rows * right_stride + channel_j[None, :], mask=inside_t & inside_j[None, :], other=0.0)
        total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)

    blocks = tl.num_programs(0) // tiles
    out = partial + (split * blocks + block).to(tl.int64) * WIDTH * WIDTH
    tl.store(out + i[:, None] * WIDTH + j[None, :], total, mask=inside_i[:, None] & inside_j[None, :])


@triton.jit
def _pack_kernel(
    partial,  # [splits, r, WIDTH, WIDTH]
    packed,  # [r * WIDTH * (WIDTH - 1) / 2]
    splits,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    block = tl.program_id(0)
    tile_i = tl.program_id(1)
    tile_j = tl.program_id(2)
    if tile_j < tile_i:
        return
    blocks = tl.num_programs(0)
    i = tile_i * TILE + tl.arange(0, TILE)
    j = tile_j * TILE + tl.arange(0, TILE)
    upper = (i < WIDTH)[:, None] & (j < WIDTH)[None, :]
    lower = (j < WIDTH)[:, None] & (i < WIDTH)[None, :]
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for split in range(splits):
        source = partial + (split * blocks + block).to(tl.int64) * WIDTH * WIDTH
        a = tl.load(source + i[:, None] * WIDTH + j[None, :], mask=upper, other=0.0)
        b = tl.load(source + j[:, None] * WIDTH + i[None, :], mask=lower, other=0.0)
        total += a - tl.trans(b)
    place = block.to(tl.int64) * (WIDTH * (WIDTH - 1) // 2) + (i * (2 * WIDTH - i - 1) // 2 - i - 1)[:, None] + j[None, :]
    tl.store(packed + place, total, mask=upper & (j[None, :] > i[:, None]))


def block_gram(
    left: Tensor, right: Tensor, channels: Tensor, width: int, run: int, tiles: GramTiles | None = None
) -> Tensor:
    """As :func:`.naive.block_gram`, for float32 and half-precision inputs; bitwise repeatable."""
    left, right = (tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in (left, right))
    tokens, blocks = left.shape[0], channels.shape[0] // width
    tiles = tiles or gram_tiles(width, tokens, blocks, left.device)
    per_block = triton.cdiv(width, tiles.i) * triton.cdiv(width, tiles.j)
    tokens_per_split = triton.cdiv(triton.cdiv(max(tokens, 1), tiles.splits), tiles.t) * tiles.t
    splits = triton.cdiv(max(tokens, 1), tokens_per_split)
    partial = torch.empty(splits, blocks, width, width, dtype=torch.float32, device=left.device)
    packed = torch.empty(blocks * (width * (width - 1) // 2), dtype=master_dtype(left.dtype), device=left.device)
    _gram_kernel[(blocks * per_block, splits)](
        left,
        right,
        channels,
        partial,
        tokens,
        left.stride(0),
        right.stride(0),
        tokens_per_split,
        WIDTH=width,
        RUN=run,
        TILE_I=tiles.i,
        TILE_J=tiles.j,
        TILE_T=tiles.t,
        PRECISION="ieee",
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    pack_tile = min(64, triton.next_power_of_2(width))
    sides = triton.cdiv(width, pack_tile)
    _pack_kernel[(blocks, sides, sides)](partial, packed, splits, WIDTH=width, TILE=pack_tile, num_warps=4)
    return packed
