"""``effective`` on Hopper GPUs in one pass: a stored matrix is read once, and its weight written once.

As in :mod:`.gluon_rotate` a program owns the tile of one block of rows by one block of columns. Here nothing of the stored
matrix is written: the product starts from the tile itself, in float16, and is rounded at its end.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from .gluon_rotate import (
    _LARGEST,
    _PART,
    _STEP,
    _STRIP,
    WIDTHS,
    _barrier,
    _channels,
    _copy,
    _gather,
    _halves,
    _scale_of,
    _weights,
)
from .quantize import GROUP

_GROUP = gl.constexpr(GROUP)


@gluon.jit
def _scales_of(scales, row_channels, column_channels, groups, RUNS: gl.constexpr, RUN: gl.constexpr, LAYOUT: gl.constexpr):
    """The scale of each row of a part in each of its runs of columns; a run lies within one group."""
    row = gl.load(row_channels + gl.arange(0, _PART, gl.SliceLayout(1, LAYOUT))).to(gl.int32) * groups
    column = gl.load(column_channels + RUN * gl.arange(0, RUNS, gl.SliceLayout(0, LAYOUT))).to(gl.int32)
    return gl.load(scales + row[:, None] + (column // _GROUP)[None, :]).to(gl.float32)


@gluon.jit
def _largest_scale(
    scales,
    row_channels,
    column_channels,
    groups,
    M: gl.constexpr,
    RUNS: gl.constexpr,
    RUN: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    largest = gl.full([_PART, RUNS], 0.0, gl.float32, LAYOUT)
    for start in gl.static_range(0, M, _PART):
        largest = gl.maximum(largest, _scales_of(scales, row_channels + start, column_channels, groups, RUNS, RUN, LAYOUT))
    return gl.max(gl.max(largest, 1), 0)


@gluon.jit
def _by_run(code, scales, row_channels, column_channels, groups, scale, RUN: gl.constexpr):
    """Codes ``[_PART, runs, RUN]`` times their scales, and ``scale``."""
    LAYOUT: gl.constexpr = gl.SliceLayout(2, code.type.layout)
    factor = _scales_of(scales, row_channels, column_channels, groups, code.shape[1], RUN, LAYOUT) * scale
    return code.to(gl.float32) * factor.expand_dims(2)


@gluon.jit
def _decoded(
    tile,
    codes,
    scales,
    row_channels,
    column_channels,
    groups,
    scale,
    RUNS: gl.constexpr,
    RUN: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Codes become float16 of ``scale`` times what they stand for."""
    HEIGHT: gl.constexpr = tile.shape[0]
    for start in gl.static_range(0, HEIGHT, _PART):
        code = codes.slice(start, _PART).load(LAYOUT).reshape([_PART, RUNS, RUN])
        value = _by_run(code, scales, row_channels + start, column_channels, groups, scale, RUN)
        tile.slice(start, _PART).store(value.reshape([_PART, RUNS * RUN]).to(gl.float16))


@gluon.jit
def _scaled(tile, scale, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):
    """Weights in a tile become float16 of ``scale`` times themselves; the largest of these is given back."""
    HEIGHT: gl.constexpr = tile.shape[0]
    largest = gl.full([_PART, tile.shape[1]], 0.0, gl.float32, LAYOUT)
    for start in gl.static_range(0, HEIGHT, _PART):
        part = tile.slice(start, _PART)
        value = _weights(part, DTYPE, LAYOUT).to(gl.float32) * scale
        largest = gl.maximum(largest, gl.abs(value))
        part.store(value.to(gl.float16))
    return gl.max(gl.max(largest, 1), 0)


@gluon.jit(do_not_specialize=["groups"])
def _effective_kernel(
    out,  # [m, n]
    stored,  # [m, n]
    scales,  # [m, groups], of codes
    rows,  # [m / M, M, M]
    row_channels,  # [m]
    columns,  # [n / N, N, N]
    column_channels,  # [n]
    stride,
    groups,
    M: gl.constexpr,
    N: gl.constexpr,
    RUN: gl.constexpr,
    IS_CODED: gl.constexpr,
    WARPS: gl.constexpr,
):
    DTYPE: gl.constexpr = out.dtype.element_ty
    TILE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // N, N // 8], [WARPS, 1], [1, 0])
    CODES: gl.constexpr = gl.BlockedLayout([1, 16], [512 // N, N // 16], [WARPS, 1], [1, 0])
    NARROW: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [WARPS, 1], [1, 0])
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    FEW: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [WARPS, 1], [1, 0])
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, _STRIP, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 2)
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    SHARED_NARROW: gl.constexpr = gl.NVMMASharedLayout(64, 16, 2)
    SHARED_BYTES: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    SHARED_OUT: gl.constexpr = gl.SwizzledSharedLayout(8, 2, 4, [1, 0])

    rows += gl.program_id(0).to(gl.int64) * (M * M)
    row_channels += gl.program_id(0) * M
    columns += gl.program_id(1).to(gl.int64) * (N * N)
    column_channels += gl.program_id(1) * N

    tile = gl.allocate_shared_memory(gl.float16, [M, N], SHARED)
    if IS_CODED:
        codes = gl.allocate_shared_memory(gl.int8, [M, N], SHARED_BYTES)
        _gather(codes, stored, row_channels, column_channels, stride, RUN, CODES)
        largest = _largest_scale(scales, row_channels, column_channels, groups, M, N // RUN, RUN, FEW)
        scale = _scale_of(127 * largest)
        async_copy.wait_group(0)
        _barrier()
        _decoded(tile, codes, scales, row_channels, column_channels, groups, scale, N // RUN, RUN, TILE)
        codes._keep_alive()
    else:
        bits = stored.to(gl.pointer_type(gl.float16), bitcast=True)
        _gather(tile, bits, row_channels, column_channels, stride, RUN, TILE)
        async_copy.wait_group(0)
        _barrier()
        sample = gl.abs(_weights(tile.slice(0, _PART // 2), DTYPE, TILE).to(gl.float32))
        largest = gl.max(gl.max(sample, 1), 0)
        scale = _scale_of(largest)
        _barrier()
        scaled = _scaled(tile, scale, DTYPE, TILE)
        if (scaled > _LARGEST) | (largest == 0):
            scale = _scale_of(scaled / scale)
            _barrier()
            _gather(tile, bits, row_channels, column_channels, stride, RUN, TILE)
            async_copy.wait_group(0)
            _barrier()
            scaled = _scaled(tile, scale, DTYPE, TILE)

    row_offsets = _channels(row_channels, 0, M, 1, gl.SliceLayout(1, NARROW)) * stride
    turn = gl.allocate_shared_memory(gl.float16, [N, _STRIP], SHARED)
    _barrier()
    _copy(turn, columns, N, 0, WIDE)
    for first in gl.static_range(0, N, _STRIP):
        even = gl.allocate_shared_memory(gl.float16, [M, _STEP], SHARED_NARROW)
        odd = gl.allocate_shared_memory(gl.float16, [M, _STEP], SHARED_NARROW)
        _copy(even, rows, M, 0, NARROW)
        _copy(odd, rows, M, _STEP, NARROW)
        async_copy.wait_group(2)
        fence_async_shared()
        _barrier()
        product = tile.slice(first, _STRIP, 1).load(PRODUCT).to(gl.float32)
        product = warpgroup_mma_wait(0, deps=[warpgroup_mma(tile, turn, product, is_async=True)])
        turn._keep_alive()
        _barrier()
        turned = gl.allocate_shared_memory(gl.float16, [M, _STRIP], SHARED)
        turned.store(product.to(gl.float16))
        fence_async_shared()
        for k in gl.static_range(0, M, _STEP):
            async_copy.wait_group(1)
            _barrier()
            if k % (2 * _STEP) == 0:
                part = even.load(LEFT)
            else:
                part = odd.load(LEFT)
            _barrier()
            if k + 2 * _STEP >= M:
                async_copy.commit_group()
            elif k % (2 * _STEP) == 0:
                _copy(even, rows, M, k + 2 * _STEP, NARROW)
            else:
                _copy(odd, rows, M, k + 2 * _STEP, NARROW)
            product = warpgroup_mma(part, turned.slice(k, _STEP), product, is_async=True)
            product = warpgroup_mma_wait(0, deps=[product])
        _barrier()
        turned._keep_alive()
        even._keep_alive()
        odd._keep_alive()
        if first + _STRIP < N:
            turn = gl.allocate_shared_memory(gl.float16, [N, _STRIP], SHARED)
            _copy(turn, columns, N, first + _STRIP, WIDE)
        staged = gl.allocate_shared_memory(DTYPE, [M, 32], SHARED_OUT)
        left, right = _halves((product * (1 / scale)).to(DTYPE))
        part_0, part_1 = _halves(left)
        part_2, part_3 = _halves(right)
        quarters = (part_0, part_1, part_2, part_3)
        for quarter in gl.static_range(4):
            j = _channels(column_channels, first + 32 * quarter, 32, RUN, gl.SliceLayout(0, NARROW))
            _barrier()
            staged.store(quarters[quarter])
            _barrier()
            gl.store(out + row_offsets[:, None] + j[None, :], staged.load(NARROW))
        staged._keep_alive()
        _barrier()


def serves(stored: Tensor, rows: Tensor | None, columns: Tensor | None, run: int) -> bool:
    """Whether these operands of :func:`effective_` fit: whole blocks of 128 or 256 along both sides."""
    return (
        stored.is_contiguous()
        and stored.data_ptr() % 16 == 0
        and all(side is not None and side.shape[-1] in WIDTHS for side in (rows, columns))
        and stored.shape == tuple(side.shape[0] * side.shape[1] for side in (rows, columns) if side is not None)
        and stored.numel() < 2**31
        and run >= 16
    )


def effective_(
    out: Tensor,
    stored: Tensor,
    scales: Tensor | None,
    rows: Tensor,
    row_channels: Tensor,
    columns: Tensor,
    column_channels: Tensor,
    run: int,
) -> None:
    """Write ``G_rows W₀ G_columns``, to 11 bits, rounded to the dtype of ``out``.

    Args:
        out: ``[m, n]``, bfloat16 or float16, contiguous.
        stored, scales: as in :func:`.naive.effective`; without ``scales`` of the dtype of ``out``.
        rows, columns: ``E`` in float16, ``[r, b, b]``, contiguous.
        run: columns that lie side by side, a power of two.
    """
    (row_blocks, m, _), (column_blocks, n, _) = rows.shape, columns.shape
    warps = m // 16
    _effective_kernel[(row_blocks, column_blocks)](
        out,
        stored,
        stored if scales is None else scales,
        rows,
        row_channels,
        columns,
        column_channels,
        stored.shape[1],
        1 if scales is None else scales.shape[1],
        M=m,
        N=n,
        RUN=min(run, GROUP, n),
        IS_CODED=scales is not None,
        WARPS=warps,
        num_warps=warps,
    )
