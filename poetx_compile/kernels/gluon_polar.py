"""``spread_evenly`` on Hopper GPUs: a program brings a block of 256 near its polar factor without leaving shared memory.

``X`` is skew, and ``S = XXᵀ`` and its polynomials are symmetric: of each, the three tiles of 128 on and above the diagonal are
held, in bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from .gluon_rotate import _barrier
from .polar import LEAST_NORM, POLYNOMIALS

WIDTH = 256
_SKEW = WIDTH * (WIDTH - 1) // 2
_WARPS = 8
_WIDTH = gl.constexpr(WIDTH)
_TILE = gl.constexpr(128)
_STEPS = gl.constexpr(len(POLYNOMIALS))


@gluon.jit
def _places(TILE_I: gl.constexpr, TILE_J: gl.constexpr, LAYOUT: gl.constexpr):
    """Where a tile lies in the packed upper triangle, and what of it does."""
    i = TILE_I * _TILE + gl.arange(0, _TILE, gl.SliceLayout(1, LAYOUT))
    j = TILE_J * _TILE + gl.arange(0, _TILE, gl.SliceLayout(0, LAYOUT))
    return (i * (2 * _WIDTH - i - 1) // 2 - i - 1)[:, None] + j[None, :], i[:, None] < j[None, :]


@gluon.jit
def _load(packed, TILE_I: gl.constexpr, TILE_J: gl.constexpr, LAYOUT: gl.constexpr):
    places, mask = _places(TILE_I, TILE_J, LAYOUT)
    return gl.load(packed + places, mask=mask, other=0.0)


@gluon.jit
def _store(packed, value, TILE_I: gl.constexpr, TILE_J: gl.constexpr, LAYOUT: gl.constexpr):
    places, mask = _places(TILE_I, TILE_J, LAYOUT)
    gl.store(packed + places, value, mask=mask)


@gluon.jit
def _floats(tile, LAYOUT: gl.constexpr):
    return tile.load(LAYOUT).to(gl.float32)


@gluon.jit
def _upper(tile, LAYOUT: gl.constexpr):
    """Of a tile on the diagonal."""
    _, mask = _places(0, 0, LAYOUT)
    return gl.where(mask, _floats(tile, LAYOUT), 0.0)


@gluon.jit
def _norm(tile_00, tile_01, tile_11):
    return gl.sqrt(gl.sum(gl.sum(tile_00 * tile_00 + tile_01 * tile_01 + tile_11 * tile_11, 1), 0))


@gluon.jit
def _make_skew(tile, LAYOUT: gl.constexpr):
    """The upper triangle of a tile on the diagonal, less its mirror image."""
    upper, lower = tile.load(LAYOUT), tile.permute((1, 0)).load(LAYOUT)
    _barrier()
    tile.store(upper - lower)


@gluon.jit
def _add_products(total, a, b, c, d):
    """``AB + CD``."""
    return warpgroup_mma(c, d, warpgroup_mma(a, b, total, is_async=True), is_async=True)


@gluon.jit
def _multiply(a_00, a_01, a_11, b_00, b_01, b_11, total_00, total_01, total_11):
    """Tiles of ``AB``, added up, of matrices that commute."""
    total_00 = _add_products(total_00, a_00, b_00.permute((1, 0)), a_01, b_01.permute((1, 0)))
    total_01 = _add_products(total_01, a_00, b_01, a_01, b_11)
    total_11 = _add_products(total_11, b_01.permute((1, 0)), a_01, b_11, a_11)
    total_00, total_01, total_11 = warpgroup_mma_wait(0, deps=[total_00, total_01, total_11])
    _barrier()
    return total_00, total_01, total_11


@gluon.jit
def _hold(tile_00, tile_01, tile_11, value_00, value_01, value_11):
    """Store for the products that follow."""
    tile_00.store(value_00.to(gl.bfloat16))
    tile_01.store(value_01.to(gl.bfloat16))
    tile_11.store(value_11.to(gl.bfloat16))
    fence_async_shared()
    _barrier()


@gluon.jit
def _rounded(tile):
    """As it is held: ``bS`` and ``cS²`` nearly cancel, and so must the errors of ``S`` in them."""
    return tile.to(gl.bfloat16).to(gl.float32)


@gluon.jit
def _of_step(step, POLYNOMIALS: gl.constexpr, PLACE: gl.constexpr):
    coefficient = 0.0
    for known in gl.static_range(_STEPS):
        coefficient = gl.where(step == known, POLYNOMIALS[known][PLACE], coefficient)
    return coefficient


@gluon.jit
def _spread_kernel(
    packed,  # [r * 256 * 255 / 2]
    out,  # [r * 256 * 255 / 2]
    LEAST: gl.constexpr,
    LEAST_BOUND: gl.constexpr,
    POLYNOMIALS: gl.constexpr,
    WARPS: gl.constexpr,
):
    ROWS: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [WARPS, 1], [1, 0])
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, _TILE, 16])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    first = gl.program_id(0).to(gl.int64) * (_WIDTH * (_WIDTH - 1) // 2)
    packed += first
    out += first
    x_00 = gl.allocate_shared_memory(gl.bfloat16, [_TILE, _TILE], SHARED)
    x_01 = gl.allocate_shared_memory(gl.bfloat16, [_TILE, _TILE], SHARED)
    x_11 = gl.allocate_shared_memory(gl.bfloat16, [_TILE, _TILE], SHARED)
    s_00 = gl.allocate_shared_memory(gl.bfloat16, [_TILE, _TILE], SHARED)
    s_01 = gl.allocate_shared_memory(gl.bfloat16, [_TILE, _TILE], SHARED)
    s_11 = gl.allocate_shared_memory(gl.bfloat16, [_TILE, _TILE], SHARED)

    upper_00, upper_01, upper_11 = _load(packed, 0, 0, ROWS), _load(packed, 0, 1, ROWS), _load(packed, 1, 1, ROWS)
    size = _norm(upper_00, upper_01, upper_11)
    unit = 1 / gl.maximum(size, LEAST)
    x_00.store((upper_00 * unit).to(gl.bfloat16))
    x_01.store((upper_01 * unit).to(gl.bfloat16))
    x_11.store((upper_11 * unit).to(gl.bfloat16))
    _barrier()
    _make_skew(x_00, PRODUCT)
    _make_skew(x_11, PRODUCT)
    fence_async_shared()
    _barrier()

    zeros = gl.full([_TILE, _TILE], 0.0, gl.float32, PRODUCT)
    for step in range(_STEPS):
        a, b, c = _of_step(step, POLYNOMIALS, 0), _of_step(step, POLYNOMIALS, 1), _of_step(step, POLYNOMIALS, 2)
        y_00, y_01, y_11 = _multiply(x_00, x_01, x_11.permute((1, 0)), x_00, x_01, x_11, zeros, zeros, zeros)
        shrink = 1.0
        if step == 0:
            shrink = 1 / gl.maximum(gl.sqrt(_norm(y_00, y_01 * 2**0.5, y_11) * 0.5**0.5), LEAST_BOUND)
        square = shrink * shrink
        y_00, y_01, y_11 = _rounded(y_00 * square), _rounded(y_01 * -square), _rounded(y_11 * square)
        _hold(s_00, s_01, s_11, y_00, y_01, y_11)
        ratio = b / c
        y_00, y_01, y_11 = _multiply(s_00, s_01, s_11, s_00, s_01, s_11, y_00 * ratio, y_01 * ratio, y_11 * ratio)
        c *= shrink
        _hold(s_00, s_01, s_11, y_00 * c, y_01 * c, y_11 * c)
        a *= shrink
        y_00, y_01, y_11 = _floats(x_00, PRODUCT) * a, _floats(x_01, PRODUCT) * a, _floats(x_11, PRODUCT) * a
        y_00, y_01, y_11 = _multiply(x_00, x_01, x_11, s_00, s_01, s_11, y_00, y_01, y_11)
        _hold(x_00, x_01, x_11, y_00, y_01, y_11)

    upper_00, upper_01, upper_11 = _upper(x_00, ROWS), _floats(x_01, ROWS), _upper(x_11, ROWS)
    scale = size / gl.maximum(_norm(upper_00, upper_01, upper_11), LEAST)
    _store(out, upper_00 * scale, 0, 0, ROWS)
    _store(out, upper_01 * scale, 0, 1, ROWS)
    _store(out, upper_11 * scale, 1, 1, ROWS)


def serves(packed: Tensor) -> bool:
    """Whether :func:`spread_evenly` takes these: some whole blocks of :data:`WIDTH`."""
    is_whole = packed.shape[0] > 0 and packed.shape[0] % _SKEW == 0
    return packed.dtype == torch.float32 and packed.is_contiguous() and is_whole


def spread_evenly(out: Tensor, packed: Tensor) -> None:
    """Write :func:`.polar.spread_in_torch` of blocks of 256, float32, with products of bfloat16.

    Norms of blocks may lie between 2e-19 and 1e19: below, a block is taken for zero, above, for infinite.
    """
    _spread_kernel[(packed.shape[0] // _SKEW,)](
        packed,
        out,
        LEAST=torch.finfo(torch.float32).tiny,
        LEAST_BOUND=LEAST_NORM,
        POLYNOMIALS=POLYNOMIALS,
        WARPS=_WARPS,
        num_warps=_WARPS,
    )
