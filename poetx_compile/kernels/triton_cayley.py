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
from .tuning import WIDEST, padded, processors

_TOLERANCE = 1e-7
_BUFFERS = 4
_MOST_SCRATCH = 1 << 26


@triton.jit
def _tile(index, SIDE: tl.constexpr, TILE: tl.constexpr):
    """The rows and the columns of one of the tiles of a square matrix."""
    across: tl.constexpr = SIDE // TILE
    arange = tl.arange(0, TILE)
    return index // across * TILE + arange, index % across * TILE + arange


@triton.jit
def _places(buffer, i, j, SIDE: tl.constexpr):
    return buffer + i[:, None] * SIDE + j[None, :]


@triton.jit
def _multiply(
    a,  # [SIDE, SIDE]
    b,  # [SIDE, SIDE]
    out,  # [SIDE, SIDE]
    ADD_A: tl.constexpr,
    ADD_B: tl.constexpr,
    SIDE: tl.constexpr,
    TILE: tl.constexpr,
    TILE_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``A B``, and with it ``A`` and ``B`` where asked for."""
    for index in range((SIDE // TILE) * (SIDE // TILE)):
        i, j = _tile(index, SIDE, TILE)
        total = tl.zeros((TILE, TILE), dtype=tl.float32)
        if ADD_A:
            total += tl.load(_places(a, i, j, SIDE))
        if ADD_B:
            total += tl.load(_places(b, i, j, SIDE))
        for start in range(0, SIDE, TILE_K):
            k = start + tl.arange(0, TILE_K)
            left, right = tl.load(_places(a, i, k, SIDE)), tl.load(_places(b, k, j, SIDE))
            total = tl.dot(left, right, total, input_precision=PRECISION)
        tl.store(_places(out, i, j, SIDE), total)
    tl.debug_barrier()


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
    tiles: tl.constexpr = (SIDE // TILE) * (SIDE // TILE)
    remainder = omega + SIDE * SIDE
    inverse = remainder + SIDE * SIDE
    spare = inverse + SIDE * SIDE
    for index in range(tiles):
        i, j = _tile(index, SIDE, TILE)
        i, j = i[:, None], j[None, :]
        low, high = tl.minimum(i, j), tl.maximum(i, j)
        mask = (high < WIDTH) & (low < high)
        value = tl.load(packed + low * (2 * WIDTH - low - 1) // 2 + high - low - 1, mask=mask, other=0.0) * scale
        tl.store(omega + i * SIDE + j, tl.where(i < j, value, -value))
    tl.debug_barrier()

    _multiply(omega, omega, remainder, False, False, SIDE, TILE, TILE_K, PRECISION)
    bound = 0.0
    for start in range(0, SIDE, TILE):
        sums = tl.zeros((TILE,), dtype=tl.float32)
        for start_j in range(0, SIDE, TILE):
            i, j = start + tl.arange(0, TILE), start_j + tl.arange(0, TILE)
            sums += tl.sum(tl.abs(tl.load(_places(remainder, i, j, SIDE))), 1)
        sums = tl.where(sums == sums, sums, float("inf"))
        bound = tl.maximum(bound, tl.max(sums, 0))
    tl.debug_barrier()

    finite = bound < float("inf")
    shorten = tl.where(finite, tl.minimum(LARGEST / tl.maximum(bound, 1e-30), 1.0), 0.0)
    bound = tl.where(finite, bound * shorten, 0.0)
    root = tl.sqrt(shorten)
    middle = 1 + bound / 2
    for index in range(tiles):
        i, j = _tile(index, SIDE, TILE)
        square = tl.where(finite, tl.load(_places(remainder, i, j, SIDE)) * shorten, 0.0)  # -B
        turn = tl.where(finite, tl.load(_places(omega, i, j, SIDE)) * root, 0.0)
        diagonal = tl.where(i[:, None] == j[None, :], 1.0, 0.0)
        rest = diagonal * (1 - 1 / middle) + square / middle
        tl.store(_places(omega, i, j, SIDE), turn + square)
        tl.store(_places(remainder, i, j, SIDE), rest)
        tl.store(_places(inverse, i, j, SIDE), rest)
    tl.debug_barrier()

    error = bound / (2 + bound)
    error = error * error
    while error > TOLERANCE:
        _multiply(remainder, remainder, spare, False, False, SIDE, TILE, TILE_K, PRECISION)
        _multiply(inverse, spare, remainder, True, True, SIDE, TILE, TILE_K, PRECISION)
        remainder, inverse, spare = spare, remainder, inverse
        error = error * error

    _multiply(omega, inverse, spare, True, False, SIDE, TILE, TILE_K, PRECISION)
    for index in range(tiles):
        i, j = _tile(index, SIDE, TILE)
        turn = 2 * unit * tl.load(_places(spare, i, j, SIDE)) / middle
        inside = (i < WIDTH)[:, None] & (j < WIDTH)[None, :]
        tl.store(_places(out, i, j, WIDTH), turn.to(out.dtype.element_ty), mask=inside)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["blocks"])
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

    Blocks above 512 that turn far keep few programs busy, so that scratch stays within 256 MB, or what one of them takes.

    Args:
        precision: of the products: ``ieee``, ``tf32x3`` (as exact, on tensor cores) or ``tf32``.
    """
    blocks = skew.shape[0] // (width * (width - 1) // 2)
    if precision == "tf32":
        rotation, norms = turn_near(skew, width, scale)
    else:
        rotation, norms = torch.empty(blocks, width, width, dtype=torch.float32, device=skew.device), None
    tile = min(128, padded(width))
    side = -(-width // tile) * tile
    programs = min(blocks, processors(skew.device))
    if width > WIDEST:
        programs = min(programs, max(1, _MOST_SCRATCH // (_BUFFERS * side * side)))
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
