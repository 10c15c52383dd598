"""``cayley_neumann`` on a GPU: a program turns one block after another, and sums as many terms as that block needs.

Scratch belongs to programs, not to blocks: its size depends on the GPU, and most of it stays in the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .naive import LARGEST_SQUARE
from .precision import UNIT
from .triton_series import NEAR, bound_of_square, turn_near
from .tuning import processors

_TOLERANCE = 1e-7
_BUFFERS = 5


@triton.jit
def _square(buffer, i, j, SIDE: tl.constexpr):
    return buffer + i[:, None] * SIDE + j[None, :]


@triton.jit
def _product(a, b, i, j, SIDE: tl.constexpr, TILE_K: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr):
    """One tile of ``A B``, or of ``Aᵀ B``, of two square matrices in global memory."""
    total = tl.zeros((i.shape[0], j.shape[0]), dtype=tl.float32)
    for start in range(0, SIDE, TILE_K):
        k = start + tl.arange(0, TILE_K)
        if TRANSPOSED:
            left = tl.trans(tl.load(_square(a, k, i, SIDE)))
        else:
            left = tl.load(_square(a, i, k, SIDE))
        total = tl.dot(left, tl.load(_square(b, k, j, SIDE)), total, input_precision=PRECISION)
    return total


@triton.jit
def _turn_far(
    packed,  # [WIDTH * (WIDTH - 1) / 2]
    out,  # [WIDTH, WIDTH]
    omega,  # [BUFFERS, SIDE, SIDE]
    scale,
    unit,
    WIDTH: tl.constexpr,
    SIDE: tl.constexpr,
    TILE: tl.constexpr,
    TILE_K: tl.constexpr,
    LARGEST: tl.constexpr,
    TOLERANCE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    remainder = omega + SIDE * SIDE
    remainder_next = remainder + SIDE * SIDE
    inverse = remainder_next + SIDE * SIDE
    inverse_next = inverse + SIDE * SIDE
    arange = tl.arange(0, TILE)
    for tile_i in range(0, SIDE, TILE):
        for tile_j in range(0, SIDE, TILE):
            i, j = (tile_i + arange)[:, None], (tile_j + arange)[None, :]
            low, high = tl.minimum(i, j), tl.maximum(i, j)
            mask = (high < WIDTH) & (low < high)
            value = tl.load(packed + low * (2 * WIDTH - low - 1) // 2 + high - low - 1, mask=mask, other=0.0) * scale
            tl.store(omega + i * SIDE + j, tl.where(i < j, value, -value))
    tl.debug_barrier()

    bound = 0.0
    for tile_i in range(0, SIDE, TILE):
        sums = tl.zeros((TILE,), dtype=tl.float32)
        for tile_j in range(0, SIDE, TILE):
            i, j = tile_i + arange, tile_j + arange
            square = _product(omega, omega, i, j, SIDE, TILE_K, True, PRECISION)
            tl.store(_square(remainder, i, j, SIDE), square)
            sums += tl.sum(tl.abs(square), 1)
        sums = tl.where(sums == sums, sums, float("inf"))
        bound = tl.maximum(bound, tl.max(sums, 0))
    tl.debug_barrier()

    finite = bound < float("inf")
    shorten = tl.where(finite, tl.minimum(LARGEST / tl.maximum(bound, 1e-30), 1.0), 0.0)
    bound = tl.where(finite, bound * shorten, 0.0)
    root = tl.sqrt(shorten)
    middle = 1 + bound / 2
    for tile_i in range(0, SIDE, TILE):
        for tile_j in range(0, SIDE, TILE):
            i, j = tile_i + arange, tile_j + arange
            square = tl.load(_square(remainder, i, j, SIDE))
            omega_tile = tl.load(_square(omega, i, j, SIDE))
            square = tl.where(finite, square * shorten, 0.0)
            diagonal = tl.where(i[:, None] == j[None, :], 1.0, 0.0)
            rest = diagonal * (1 - 1 / middle) - square / middle
            tl.store(_square(omega, i, j, SIDE), tl.where(finite, omega_tile * root, 0.0) - square)
            tl.store(_square(remainder, i, j, SIDE), rest)
            tl.store(_square(inverse, i, j, SIDE), rest)
    tl.debug_barrier()

    error = bound / (2 + bound)
    error = error * error
    while error > TOLERANCE:
        for tile_i in range(0, SIDE, TILE):
            for tile_j in range(0, SIDE, TILE):
                i, j = tile_i + arange, tile_j + arange
                tl.store(
                    _square(remainder_next, i, j, SIDE),
                    _product(remainder, remainder, i, j, SIDE, TILE_K, False, PRECISION),
                )
        tl.debug_barrier()
        for tile_i in range(0, SIDE, TILE):
            for tile_j in range(0, SIDE, TILE):
                i, j = tile_i + arange, tile_j + arange
                more = _product(inverse, remainder_next, i, j, SIDE, TILE_K, False, PRECISION)
                more += tl.load(_square(inverse, i, j, SIDE)) + tl.load(_square(remainder_next, i, j, SIDE))
                tl.store(_square(inverse_next, i, j, SIDE), more)
        tl.debug_barrier()
        remainder, remainder_next = remainder_next, remainder
        inverse, inverse_next = inverse_next, inverse
        error = error * error

    for tile_i in range(0, SIDE, TILE):
        for tile_j in range(0, SIDE, TILE):
            i, j = tile_i + arange, tile_j + arange
            turn = _product(omega, inverse, i, j, SIDE, TILE_K, False, PRECISION)
            turn = 2 * unit * (turn + tl.load(_square(omega, i, j, SIDE))) / middle
            tl.store(
                _square(out, i, j, WIDTH), turn.to(out.dtype.element_ty), mask=(i < WIDTH)[:, None] & (j < WIDTH)[None, :]
            )
    tl.debug_barrier()


@triton.jit
def _far_kernel(
    skew,  # [r * WIDTH * (WIDTH - 1) / 2]
    rotation,  # [r, WIDTH, WIDTH]
    scratch,  # [programs, BUFFERS, SIDE, SIDE]
    norms,  # as bound_of_square reads it, or nothing
    blocks,
    scale,
    WIDTH: tl.constexpr,
    SIDE: tl.constexpr,
    TILE: tl.constexpr,
    TILE_K: tl.constexpr,
    BUFFERS: tl.constexpr,
    LARGEST: tl.constexpr,
    TOLERANCE: tl.constexpr,
    TILES: tl.constexpr,
    NORM_TILE: tl.constexpr,
    NEAR: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All blocks, or where there are ``norms`` those that turn far."""
    program = tl.program_id(0).to(tl.int64)
    omega = scratch + program * (BUFFERS * SIDE * SIDE)
    for block in range(program, blocks, tl.num_programs(0)):
        is_far = True
        if TILES > 0:
            is_far = bound_of_square(norms, block, TILES, TILES, NORM_TILE) > NEAR
        if is_far:
            packed = skew + block * (WIDTH * (WIDTH - 1) // 2)
            out = rotation + block * (WIDTH * WIDTH)
            _turn_far(packed, out, omega, scale, UNIT, WIDTH, SIDE, TILE, TILE_K, LARGEST, TOLERANCE, PRECISION)


def far_precision(precision: str, is_amd: bool) -> str:
    """Triton's own name for the products of the far kernel: AMD's matrix units take float32 as it is."""
    return "ieee" if precision == "ieee" or is_amd else "tf32x3"


def cayley_neumann(skew: Tensor, width: int, scale: float, precision: str = "tf32x3") -> Tensor:
    """As :func:`.naive.cayley_neumann`, for float32.

    Args:
        precision: of the products: ``ieee``, ``tf32x3`` (as exact, on tensor cores) or ``tf32``.
    """
    blocks = skew.shape[0] // (width * (width - 1) // 2)
    if precision == "tf32":
        rotation, norms = turn_near(skew, width, scale)
    else:
        rotation, norms = torch.empty(blocks, width, width, dtype=torch.float32, device=skew.device), None
    tile = min(128, max(16, triton.next_power_of_2(width)))
    side = triton.cdiv(width, tile) * tile
    programs = min(blocks, processors(skew.device))
    scratch = torch.empty(programs, _BUFFERS, side, side, dtype=torch.float32, device=skew.device)
    _far_kernel[(programs,)](
        skew,
        rotation,
        scratch,
        norms,
        blocks,
        scale,
        WIDTH=width,
        SIDE=side,
        TILE=tile,
        TILE_K=min(32, tile),
        BUFFERS=_BUFFERS,
        LARGEST=LARGEST_SQUARE,
        TOLERANCE=_TOLERANCE,
        TILES=0 if norms is None else norms.shape[1],
        NORM_TILE=1 if norms is None else norms.shape[-1],
        NEAR=NEAR,
        UNIT=1.0 if norms is None else UNIT,
        PRECISION=far_precision(precision, torch.version.hip is not None),
        num_warps=8 if tile == 128 else 4,
        num_stages=2,
    )
    return rotation
