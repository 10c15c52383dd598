"""Rotations of blocks that turn little: three products of float16 matrices, each a launch over all blocks.

With ``B = −Ω²``, ``E = 2(Ω − B)(I + B)⁻¹``, and three terms of the Neumann series about the middle of ``B``'s spectrum. What
leaves float32 is rounded to nearest, to 11 bits: truncation would shorten a weight with every fold.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .precision import UNIT
from .tuning import padded

NEAR = 0.03
"""Largest eigenvalue of ``B`` (a turn of 0.17 radians) that these kernels serve; their series then errs by 1e-6 at most."""

_UNIT = tl.constexpr(UNIT)
_MIDDLE = 1 + NEAR / 2
_C2 = _MIDDLE**-3  # (1 + r + r²) / middle with r = (NEAR / 2 + Ω²) / middle
_C1 = _MIDDLE**-2 + NEAR * _C2
_C0 = 1 / _MIDDLE + NEAR / 2 * _MIDDLE**-2 + NEAR * NEAR / 4 * _C2


@triton.jit
def _place(WIDTH: tl.constexpr, TILE: tl.constexpr):
    """Which block a program works on, and which of its tiles: the tiles of a block run side by side."""
    tiles: tl.constexpr = (WIDTH + TILE - 1) // TILE
    program = tl.program_id(0)
    return (program // (tiles * tiles)).to(tl.int64), program // tiles % tiles, program % tiles


@triton.jit
def _load(matrix, i, k, WIDTH: tl.constexpr):
    return tl.load(matrix + i[:, None] * WIDTH + k[None, :], mask=(i < WIDTH)[:, None] & (k < WIDTH)[None, :], other=0.0)


@triton.jit
def _store(matrix, i, j, value, WIDTH: tl.constexpr):
    mask = (i < WIDTH)[:, None] & (j < WIDTH)[None, :]
    tl.store(matrix + i[:, None] * WIDTH + j[None, :], value.to(tl.float16), mask=mask)


@triton.jit
def _unpack_kernel(
    skew,  # [r * WIDTH * (WIDTH - 1) / 2]
    omega,  # [r, WIDTH, WIDTH]
    scale,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    block, tile_i, tile_j = _place(WIDTH, TILE)
    if tile_j < tile_i:
        return
    skew += block * (WIDTH * (WIDTH - 1) // 2)
    omega += block * WIDTH * WIDTH
    i, j = tile_i * TILE + tl.arange(0, TILE), tile_j * TILE + tl.arange(0, TILE)
    inside = (i < WIDTH)[:, None] & (j < WIDTH)[None, :]
    place = (i * (2 * WIDTH - i - 1) // 2 - i - 1)[:, None] + j[None, :]
    value = (tl.load(skew + place, mask=inside & (i[:, None] < j[None, :]), other=0.0) * scale * _UNIT).to(tl.float16)
    if tile_i == tile_j:
        value -= tl.trans(value)
    else:
        transposed = (j < WIDTH)[:, None] & (i < WIDTH)[None, :]
        tl.store(omega + j[:, None] * WIDTH + i[None, :], -tl.trans(value), mask=transposed)
    tl.store(omega + i[:, None] * WIDTH + j[None, :], value, mask=inside)


@triton.jit
def _product(a, b, i, j, WIDTH: tl.constexpr, TILE: tl.constexpr, TILE_K: tl.constexpr):
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(0, WIDTH, TILE_K):
        k = start + tl.arange(0, TILE_K)
        total = tl.dot(_load(a, i, k, WIDTH), _load(b, k, j, WIDTH), total)
    return total / _UNIT


@triton.jit
def _square_kernel(
    omega,  # [r, WIDTH, WIDTH]
    square,  # [r, WIDTH, WIDTH]
    lead,  # [r, WIDTH, WIDTH]
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """``Ω²`` and ``Ω + Ω²``."""
    block, tile_i, tile_j = _place(WIDTH, TILE)
    omega += block * WIDTH * WIDTH
    i, j = tile_i * TILE + tl.arange(0, TILE), tile_j * TILE + tl.arange(0, TILE)
    total = _product(omega, omega, i, j, WIDTH, TILE, TILE_K)
    _store(square + block * WIDTH * WIDTH, i, j, total, WIDTH)
    _store(lead + block * WIDTH * WIDTH, i, j, total + _load(omega, i, j, WIDTH).to(tl.float32), WIDTH)


@triton.jit
def _series_kernel(
    square,  # [r, WIDTH, WIDTH]
    series,  # [r, WIDTH, WIDTH]
    norms,  # [r, tiles, tiles, TILE]
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    TILE_K: tl.constexpr,
    C1: tl.constexpr,
    C2: tl.constexpr,
):
    """``c₁ Ω² + c₂ Ω⁴``, and the absolute row sums of ``Ω⁴`` over each tile."""
    block, tile_i, tile_j = _place(WIDTH, TILE)
    square += block * WIDTH * WIDTH
    i, j = tile_i * TILE + tl.arange(0, TILE), tile_j * TILE + tl.arange(0, TILE)
    total = _product(square, square, i, j, WIDTH, TILE, TILE_K)
    tl.store(norms + tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE), tl.sum(tl.abs(total), 1))
    _store(series + block * WIDTH * WIDTH, i, j, C1 * _load(square, i, j, WIDTH).to(tl.float32) + C2 * total, WIDTH)


@triton.jit
def bound_of_square(
    norms,  # [r, ROW_TILES, COLUMN_TILES, TILE_I]
    block,
    ROW_TILES: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    TILE_I: tl.constexpr,
):
    """An upper bound of the largest eigenvalue of ``−Ω²``: the root of the largest absolute row sum of ``Ω⁴``."""
    largest = 0.0
    for tile_i in range(ROW_TILES):
        sums = tl.zeros((TILE_I,), dtype=tl.float32)
        for tile_j in range(COLUMN_TILES):
            tile = (block * ROW_TILES + tile_i) * COLUMN_TILES + tile_j
            sums += tl.load(norms + tile * TILE_I + tl.arange(0, TILE_I))
        sums = tl.where(sums == sums, sums, float("inf"))
        largest = tl.maximum(largest, tl.max(sums, 0))
    return tl.sqrt(largest / _UNIT)


@triton.jit
def _turn_kernel(
    lead,  # [r, WIDTH, WIDTH]
    series,  # [r, WIDTH, WIDTH]
    rotation,  # [r, WIDTH, WIDTH]
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    TILE_K: tl.constexpr,
    C0: tl.constexpr,
):
    """``E = 2(Ω + Ω²)(c₀ + c₁ Ω² + c₂ Ω⁴)``."""
    block, tile_i, tile_j = _place(WIDTH, TILE)
    lead += block * WIDTH * WIDTH
    i, j = tile_i * TILE + tl.arange(0, TILE), tile_j * TILE + tl.arange(0, TILE)
    total = _product(lead, series + block * WIDTH * WIDTH, i, j, WIDTH, TILE, TILE_K)
    total += C0 * _load(lead, i, j, WIDTH).to(tl.float32)
    _store(rotation + block * WIDTH * WIDTH, i, j, 2 * total, WIDTH)


def turn_near(skew: Tensor, width: int, scale: float) -> tuple[Tensor, Tensor]:
    """``4096 E`` in float16, right for every block with :func:`bound_of_square` up to :data:`NEAR`.

    Returns:
        ``[r, width, width]`` and what :func:`bound_of_square` reads.
    """
    blocks = skew.shape[0] // (width * (width - 1) // 2)
    side = padded(width)
    tile = min(128, side)
    tiles = -(-width // tile)
    rotation = torch.empty(blocks, width, width, dtype=torch.float16, device=skew.device)
    omega, square, lead = torch.empty(3, blocks, width, width, dtype=torch.float16, device=skew.device)
    norms = torch.empty(blocks, tiles, tiles, tile, dtype=torch.float32, device=skew.device)
    unpacked = min(64, side)
    _unpack_kernel[(blocks * (-(-width // unpacked)) ** 2,)](skew, omega, scale, WIDTH=width, TILE=unpacked, num_warps=4)
    shared = {"WIDTH": width, "TILE": tile, "TILE_K": min(64, side), "num_warps": 4, "num_stages": 3}
    grid = (blocks * tiles * tiles,)
    _square_kernel[grid](omega, square, lead, **shared)
    series = omega  # which no kernel reads any more
    _series_kernel[grid](square, series, norms, C1=_C1, C2=_C2, **shared)
    _turn_kernel[grid](lead, series, rotation, C0=_C0, **shared)
    return rotation, norms
