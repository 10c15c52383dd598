"""``block_gram`` on a GPU: channels gathered inside the kernel, tokens split over programs, summed in a fixed order."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .gram import GramSide
from .residual import master_dtype
from .tuning import GramTiles


@triton.jit(do_not_specialize=["tokens", "tokens_per_split", "blocks_0"])
def _gram_kernel(
    left_0,  # [N, n₀]
    right_0,  # [N, n₀]
    channels_0,  # [r₀ * WIDTH]
    left_1,  # [N, n₁]
    right_1,  # [N, n₁]
    channels_1,  # [r₁ * WIDTH]
    partial,  # [splits, r₀ + r₁, WIDTH, WIDTH]
    tokens,
    tokens_per_split,
    blocks_0,
    left_stride_0,
    right_stride_0,
    left_stride_1,
    right_stride_1,
    WIDTH: tl.constexpr,
    RUN: tl.constexpr,
    TILE_I: tl.constexpr,
    TILE_J: tl.constexpr,
    TILE_T: tl.constexpr,
):
    tiles_j: tl.constexpr = (WIDTH + TILE_J - 1) // TILE_J
    tiles: tl.constexpr = ((WIDTH + TILE_I - 1) // TILE_I) * tiles_j
    program = tl.program_id(0)
    block = program // tiles
    split = tl.program_id(1)
    left, right, channels = left_0, right_0, channels_0 + block * WIDTH
    left_stride, right_stride = left_stride_0, right_stride_0
    if block >= blocks_0:
        left, right, channels = left_1, right_1, channels_1 + (block - blocks_0) * WIDTH
        left_stride, right_stride = left_stride_1, right_stride_1
    i = (program % tiles) // tiles_j * TILE_I + tl.arange(0, TILE_I)
    j = (program % tiles) % tiles_j * TILE_J + tl.arange(0, TILE_J)
    inside_i = i < WIDTH
    inside_j = j < WIDTH
    channel_i = tl.load(channels + i, mask=inside_i, other=0)
    channel_j = tl.load(channels + j, mask=inside_j, other=0)
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
        total = tl.dot(tl.trans(a), b, total, input_precision="ieee")

    blocks = tl.num_programs(0) // tiles
    out = partial + (split * blocks + block).to(tl.int64) * WIDTH * WIDTH
    tl.store(out + i[:, None] * WIDTH + j[None, :], total, mask=inside_i[:, None] & inside_j[None, :])


@triton.jit(do_not_specialize=["splits", "first_biased", "biased"])
def _pack_kernel(
    partial,  # [splits, r, WIDTH, WIDTH]
    bias_grad,  # [n] or nothing
    bias,  # [n] or nothing
    channels,  # [biased * WIDTH]
    packed,  # [r * WIDTH * (WIDTH - 1) / 2]
    splits,
    first_biased,
    biased,
    scale,
    HAS_BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    """``scale · (A − Aᵀ)``; where ``right`` holds a bias ``c``, ``A`` without its part ``(Σ left) cᵀ``."""
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
    if HAS_BIAS:
        place_i, place_j = (block - first_biased) * WIDTH + i, (block - first_biased) * WIDTH + j
        inside_i = (i < WIDTH) & (place_i >= 0) & (place_i < biased * WIDTH)
        inside_j = (j < WIDTH) & (place_j >= 0) & (place_j < biased * WIDTH)
        channel_i = tl.load(channels + place_i, mask=inside_i, other=0)
        channel_j = tl.load(channels + place_j, mask=inside_j, other=0)
        sum_i = tl.load(bias_grad + channel_i, mask=inside_i, other=0.0)
        sum_j = tl.load(bias_grad + channel_j, mask=inside_j, other=0.0)
        bias_i = tl.load(bias + channel_i, mask=inside_i, other=0.0).to(tl.float32)
        bias_j = tl.load(bias + channel_j, mask=inside_j, other=0.0).to(tl.float32)
        total -= sum_i[:, None] * bias_j[None, :] - bias_i[:, None] * sum_j[None, :]
    place = block.to(tl.int64) * (WIDTH * (WIDTH - 1) // 2) + (i * (2 * WIDTH - i - 1) // 2 - i - 1)[:, None] + j[None, :]
    tl.store(packed + place, total * scale, mask=upper & (j[None, :] > i[:, None]))


def block_gram(
    sides: Sequence[GramSide],
    scale: float = 1.0,
    bias: Tensor | None = None,
    bias_grad: Tensor | None = None,
    bias_side: int = 0,
    tiles: GramTiles | None = None,
) -> Tensor:
    """As ``poetx::block_gram``, for float32 and half-precision inputs; bitwise repeatable.

    Two sides of one width and number of tokens share their launches where each alone would leave processors idle.
    """
    lengths = [side.skew for side in sides]
    dtype = master_dtype(sides[0].left.dtype)
    packed = torch.empty(sum(lengths), dtype=dtype, device=sides[0].left.device)
    alike = {(side.width, side.left.shape[0]) for side in sides}
    if len(sides) == 2 and len(alike) == 1 and sum(side.blocks for side in sides) <= tuning.processors(packed.device):
        _gram_sides(sides, packed, scale, bias, bias_grad, bias_side, tiles)
    else:
        for index, (side, output) in enumerate(zip(sides, packed.split(lengths))):
            correction = (bias, bias_grad) if index == bias_side else (None, None)
            _gram_sides([side], output, scale, *correction, 0, tiles)
    return packed


def _gram_sides(
    sides: Sequence[GramSide],
    packed: Tensor,
    scale: float,
    bias: Tensor | None,
    bias_grad: Tensor | None,
    bias_side: int,
    tiles: GramTiles | None,
) -> None:
    """One or two sides of one width and number of tokens, in one launch."""
    first, last = sides[0], sides[-1]
    if bias is not None and bias_grad is not None:
        bias, bias_grad = bias.contiguous(), bias_grad.contiguous()
    operands = [_with_unit_stride(tensor) for side in sides for tensor in (side.left, side.right)]
    tokens, width = first.left.shape[0], first.width
    blocks = sum(side.blocks for side in sides)
    plan = _plan(tokens, width, blocks, packed.device, tiles)
    tiles = plan.tiles
    partial = torch.empty(plan.splits, blocks, width, width, dtype=torch.float32, device=packed.device)
    _gram_kernel[(plan.programs, plan.splits)](
        *operands[:2],
        first.channels,
        *operands[-2:],
        last.channels,
        partial,
        tokens,
        plan.tokens_per_split,
        first.blocks,
        *(operand.stride(0) for operand in (*operands[:2], *operands[-2:])),
        WIDTH=width,
        RUN=math.gcd(tiles.i, tiles.j, *(side.run for side in sides)),
        TILE_I=tiles.i,
        TILE_J=tiles.j,
        TILE_T=tiles.t,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    biased = sides[bias_side]
    _pack_kernel[(blocks, plan.packs, plan.packs)](
        partial,
        bias_grad,
        bias,
        biased.channels,
        packed,
        plan.splits,
        first.blocks if bias_side else 0,
        biased.blocks,
        scale,
        HAS_BIAS=bias is not None,
        WIDTH=width,
        TILE=plan.pack,
        num_warps=4,
    )


@dataclass(frozen=True)
class _Plan:
    """How the launches for so many tokens and blocks are cut.

    Attributes:
        programs: tiles of all blocks.
        splits, tokens_per_split: parts of the tokens, each summed by programs of its own.
        pack: side of a tile when sums are packed; there are ``packs`` along each side of a block.
    """

    tiles: GramTiles
    programs: int
    splits: int
    tokens_per_split: int
    pack: int
    packs: int


@functools.lru_cache(maxsize=4096)
def _plan(tokens: int, width: int, blocks: int, device: torch.device, tiles: GramTiles | None) -> _Plan:
    tiles = tiles or tuning.gram_tiles(width, device)
    tokens = max(tokens, 1)
    programs = blocks * triton.cdiv(width, tiles.i) * triton.cdiv(width, tiles.j)
    wanted = tuning.gram_splits(programs, tokens, device)
    tokens_per_split = triton.cdiv(triton.cdiv(tokens, wanted), tiles.t) * tiles.t
    pack = min(64, triton.next_power_of_2(width))
    return _Plan(tiles, programs, triton.cdiv(tokens, tokens_per_split), tokens_per_split, pack, triton.cdiv(width, pack))


def _with_unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()
