"""``rotate_`` on Hopper GPUs: both sides in one pass, so that each weight is read from memory once and written once.

Weights of one shape share a launch: a table says how far their operands lie from those of the first. A program owns the tile of
one block of rows by one block of columns, and no other program touches it. It holds the tile as float16 in shared memory, turns
its columns strip by strip, then the rows of each strip, and adds what has changed to the weights in their full 24 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from . import triton_rotate
from .precision import UNIT

_UNIT = gl.constexpr(UNIT)
_STRIP = gl.constexpr(128)
_PART = gl.constexpr(64)
_STEP = gl.constexpr(32)
WIDTHS = (128, 256)

Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Weight, residual, rotations of rows, channels of these, rotations of columns, channels of these."""

_LARGEST = gl.constexpr(4000.0)  # a block of 256 can make a number 16 times larger, and float16 ends at 65504

_decode = gluon.jit(triton_rotate.decode.fn)
_encode = gluon.jit(triton_rotate.encode.fn)
_async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def _channels(channels, START: gl.constexpr, COUNT: gl.constexpr, RUN: gl.constexpr, LAYOUT: gl.constexpr):
    channel = gl.load(channels + START + gl.arange(0, COUNT, LAYOUT)).to(gl.int32)
    return gl.max_contiguous(gl.multiple_of(channel, RUN), RUN)


@gluon.jit
def _gather(target, source, row_channels, column_channels, stride, RUN: gl.constexpr, LAYOUT: gl.constexpr):
    """Rows and columns of a matrix, by their channels, into shared memory."""
    i = _channels(row_channels, 0, target.shape[0], 1, gl.SliceLayout(1, LAYOUT)) * stride
    j = _channels(column_channels, 0, target.shape[1], RUN, gl.SliceLayout(0, LAYOUT))
    _async_load(target, source + i[:, None] + j[None, :])
    async_copy.commit_group()


@gluon.jit
def _copy(target, rotation, WIDTH: gl.constexpr, COLUMN: gl.constexpr, LAYOUT: gl.constexpr):
    """Columns of a rotation ``[WIDTH, WIDTH]``, from ``COLUMN`` on, into shared memory."""
    i = gl.arange(0, WIDTH, gl.SliceLayout(1, LAYOUT))
    j = COLUMN + gl.arange(0, target.shape[1], gl.SliceLayout(0, LAYOUT))
    _async_load(target, rotation + i[:, None] * WIDTH + j[None, :])
    async_copy.commit_group()


@gluon.jit
def _scale_of(largest):
    """The power of two that brings ``largest`` to between 2¹⁰ and 2¹¹."""
    exponent = ((largest.to(gl.int32, bitcast=True) >> 23) & 0xFF) - 126
    exponent = gl.minimum(gl.maximum(11 - exponent, -100), 100)
    return gl.where(largest > 0, ((exponent + 127) << 23).to(gl.float32, bitcast=True), 1.0)


@gluon.jit
def _weights(tile, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):
    return tile.load(LAYOUT).to(gl.int16, bitcast=True).to(DTYPE, bitcast=True)


@gluon.jit
def _scaled(tile, rest, scale, DTYPE: gl.constexpr, KIND: gl.constexpr, LAYOUT: gl.constexpr):
    """Weights in a tile become float16 of ``scale`` times themselves; the largest of these is given back."""
    HEIGHT: gl.constexpr = tile.shape[0]
    largest = gl.full([_PART, tile.shape[1]], 0.0, gl.float32, LAYOUT)
    for start in gl.static_range(0, HEIGHT, _PART):
        part = tile.slice(start, _PART)
        value = _decode(_weights(part, DTYPE, LAYOUT), rest.slice(start, _PART).load(LAYOUT), KIND) * scale
        largest = gl.maximum(largest, gl.abs(value))
        part.store(value.to(gl.float16))
    return gl.max(gl.max(largest, 1), 0)


@gluon.jit
def _fetch(weight, residual, row_offsets, column_channels, START: gl.constexpr, RUN: gl.constexpr, LAYOUT: gl.constexpr):
    j = _channels(column_channels, START, 32, RUN, gl.SliceLayout(0, LAYOUT))
    offsets = row_offsets[:, None] + j[None, :]
    return offsets, gl.load(weight + offsets), gl.load(residual + offsets)


@gluon.jit
def _halves(tensor):
    """The left and the right half of the columns."""
    return tensor.reshape([tensor.shape[0], 2, tensor.shape[1] // 2]).permute([0, 2, 1]).split()


@gluon.jit
def _distance(distances, PLACE: gl.constexpr, MULTIPLE: gl.constexpr):
    """How many elements an operand lies behind that of the first weight."""
    return gl.multiple_of(gl.load(distances + PLACE), MULTIPLE)


@gluon.jit
def _rotate_kernel(
    distances,  # [weights, 6]
    weight,  # [m, n]
    residual,  # [m, n]
    rows,  # [m / M, M, M]
    row_channels,  # [m]
    columns,  # [n / N, N, N]
    column_channels,  # [n]
    stride,
    M: gl.constexpr,
    N: gl.constexpr,
    RUN: gl.constexpr,
    KIND: gl.constexpr,
    WARPS: gl.constexpr,
):
    DTYPE: gl.constexpr = weight.dtype.element_ty
    TILE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // N, N // 8], [WARPS, 1], [1, 0])
    REST: gl.constexpr = gl.BlockedLayout([1, 16], [512 // N, N // 16], [WARPS, 1], [1, 0])
    NARROW: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [WARPS, 1], [1, 0])
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, _STRIP, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 2)
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    SHARED_NARROW: gl.constexpr = gl.NVMMASharedLayout(64, 16, 2)
    SHARED_BYTES: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    SHARED_FLOATS: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])

    distances += gl.program_id(2) * 6
    weight += _distance(distances, 0, 8)
    residual += _distance(distances, 1, 16)
    rows += _distance(distances, 2, 8) + gl.program_id(1).to(gl.int64) * (M * M)
    row_channels += _distance(distances, 3, 2) + gl.program_id(1) * M
    columns += _distance(distances, 4, 8) + gl.program_id(0).to(gl.int64) * (N * N)
    column_channels += _distance(distances, 5, 2) + gl.program_id(0) * N

    tile = gl.allocate_shared_memory(gl.float16, [M, N], SHARED)
    rest = gl.allocate_shared_memory(gl.int8, [M, N], SHARED_BYTES)
    row_offsets = _channels(row_channels, 0, M, 1, gl.SliceLayout(1, NARROW)) * stride
    bits = weight.to(gl.pointer_type(gl.float16), bitcast=True)
    _gather(tile, bits, row_channels, column_channels, stride, RUN, TILE)
    _gather(rest, residual, row_channels, column_channels, stride, RUN, REST)
    async_copy.wait_group(0)
    _barrier()

    sample = gl.abs(_weights(tile.slice(0, _PART // 2), DTYPE, TILE).to(gl.float32))
    largest = gl.max(gl.max(sample, 1), 0)
    scale = _scale_of(largest)
    _barrier()
    scaled = _scaled(tile, rest, scale, DTYPE, KIND, TILE)
    if (scaled > _LARGEST) | (largest == 0):
        scale = _scale_of(scaled / scale)
        _barrier()
        _gather(tile, bits, row_channels, column_channels, stride, RUN, TILE)
        async_copy.wait_group(0)
        _barrier()
        scaled = _scaled(tile, rest, scale, DTYPE, KIND, TILE)
    rest._keep_alive()

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
        change = gl.full([M, _STRIP], 0.0, gl.float32, PRODUCT)
        change = warpgroup_mma_wait(0, deps=[warpgroup_mma(tile, turn, change, is_async=True)])
        turn._keep_alive()
        _barrier()
        before = tile.slice(first, _STRIP, 1).load(PRODUCT).to(gl.float32)
        turned = gl.allocate_shared_memory(gl.float16, [M, _STRIP], SHARED)
        turned.store((before + change * (1 / _UNIT)).to(gl.float16))
        fence_async_shared()
        offsets, high, low = _fetch(weight, residual, row_offsets, column_channels, first, RUN, NARROW)
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
            change = warpgroup_mma(part, turned.slice(k, _STEP), change, is_async=True)
            change = warpgroup_mma_wait(0, deps=[change])
        _barrier()
        turned._keep_alive()
        even._keep_alive()
        odd._keep_alive()
        if first + _STRIP < N:
            turn = gl.allocate_shared_memory(gl.float16, [N, _STRIP], SHARED)
            _copy(turn, columns, N, first + _STRIP, WIDE)
        floats = gl.allocate_shared_memory(gl.float32, [M, 32], SHARED_FLOATS)
        left, right = _halves(change * (1 / (scale * _UNIT)))
        change_0, change_1 = _halves(left)
        change_2, change_3 = _halves(right)
        quarters = (change_0, change_1, change_2, change_3)
        for quarter in gl.static_range(4):
            if quarter < 3:
                start = first + 32 * (quarter + 1)
                fetched = _fetch(weight, residual, row_offsets, column_channels, start, RUN, NARROW)
            _barrier()
            floats.store(quarters[quarter])
            _barrier()
            high, low = _encode(_decode(high, low, KIND) + floats.load(NARROW), KIND)
            gl.store(weight + offsets, high)
            gl.store(residual + offsets, low)
            if quarter < 3:
                offsets, high, low = fetched
        floats._keep_alive()
        _barrier()


def serves(operands: Sequence[Tensor | None], run: int) -> TypeGuard[Operands]:
    """Whether :func:`rotate_` takes these: a residual of 8 bits, and whole blocks of 128 or 256 along both sides, in float16."""
    present = [tensor for tensor in operands if tensor is not None]
    if len(present) < len(operands) or run < 16:
        return False
    weight, residual, rows, _, columns, _ = present
    sides = rows, columns
    return (
        residual.dtype == torch.int8
        and all(side.dtype == torch.float16 and side.shape[-1] in WIDTHS for side in sides)
        and weight.shape == tuple(side.shape[0] * side.shape[1] for side in sides)
        and weight.numel() < 2**31
        and all(tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 for tensor in present)
    )


def rotate_(operands: Sequence[Operands], run: int, distances: Tensor) -> None:
    """As :func:`.naive.rotate_`, for each of some half-precision weights that :func:`serves` accepts.

    Args:
        operands: of weights of one shape, dtype and device, with blocks of one width along each side.
        distances: between them, by :func:`distances_of`.
    """
    first = operands[0]
    weight, _, rows, _, columns, _ = first
    (row_blocks, m, _), (column_blocks, n, _) = rows.shape, columns.shape
    warps = m // 16
    grid = column_blocks, row_blocks, len(operands)  # in this order, whole rows of a weight are read and written together
    _rotate_kernel[grid](
        distances,
        *first,
        weight.shape[1],
        M=m,
        N=n,
        RUN=run,
        KIND=triton_rotate.KINDS[weight.dtype],
        WARPS=warps,
        num_warps=warps,
    )
    torch.autograd.graph.increment_version([tensor for each in operands for tensor in each[:2]])


def distances_of(operands: Sequence[Operands]) -> Tensor:
    """How many elements each operand lies behind that of the first weight.

    Returns:
        ``[weights * 6]``, int64 on the device of the weights, which is not waited for.
    """
    places = [(tensor.data_ptr(), tensor.element_size()) for tensor in operands[0]]
    distances = [(tensor.data_ptr() - place) // size for each in operands for tensor, (place, size) in zip(each, places)]
    return torch.tensor(distances, device="cpu", pin_memory=True).to(operands[0][0].device, non_blocking=True)
