"""The kernels' meaning in plain PyTorch: the oracle of every faster version, and what runs until there is one.

Notation as in the papers (arXiv 2506.08001, 2603.05500): a skew block ``Ω`` is packed as its upper triangle, row by
row; ``G`` is the Cayley transform ``(I + Ω)(I − Ω)⁻¹``; kernels hand on ``E = G − I``, which keeps its digits where ``G``
would round to 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .precision import full_precision
from .quantize import dequantize
from .residual import decode, encode_, master_dtype
from .stochastic import round_stochastically_

_DOUBLINGS = 5
LARGEST_SQUARE = 3.0

Turn = Callable[[Tensor, Tensor | None, Tensor, Tensor | None, Tensor], None]
"""What takes the arguments of :func:`turn_`."""


@functools.lru_cache(maxsize=64)
def _triangle(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rows, columns = torch.triu_indices(width, width, 1, device=device)
    return rows, columns


def pack_skew(blocks: Tensor) -> Tensor:
    """Upper triangles of ``A − Aᵀ``: ``[r, b, b]`` to ``[r · b(b−1)/2]``."""
    rows, columns = _triangle(blocks.shape[-1], blocks.device)
    return (blocks[:, rows, columns] - blocks[:, columns, rows]).reshape(-1)


def unpack_skew(packed: Tensor, width: int) -> Tensor:
    """The skew matrices of packed upper triangles: ``[r · b(b−1)/2]`` to ``[r, b, b]``."""
    rows, columns = _triangle(width, packed.device)
    blocks = packed.new_zeros(packed.numel() // rows.numel(), width, width)
    blocks[:, rows, columns] = packed.view(-1, rows.numel())
    return blocks - blocks.mT


def block_gram(left: Tensor, right: Tensor, channels: Tensor, width: int) -> Tensor:
    """Packed skew part of ``A[J] = left[:, J]ᵀ right[:, J]`` for every block ``J`` of channels.

    Args:
        left, right: ``[N, n]``, one dtype.
        channels: int64 ``[r · width]``, block after block.

    Returns:
        ``[r · width(width−1)/2]``, accumulated in float32, or in float64 for float64 inputs.
    """
    dtype = master_dtype(left.dtype)
    blocks = (tensor.index_select(1, channels).unflatten(1, (-1, width)) for tensor in (left, right))
    a, b = (tensor.permute(1, 0, 2) for tensor in blocks)  # [r, N, width]
    with torch.autocast(left.device.type, enabled=False):
        if left.is_cuda and left.dtype != dtype:
            return pack_skew(torch.bmm(a.mT, b, out_dtype=dtype))
        return pack_skew(torch.bmm(a.mT.to(dtype), b.to(dtype)))


def cayley_neumann(skew: Tensor, width: int, scale: float) -> Tensor:
    """``E = G − I`` for the Cayley transform ``G`` of ``Ω = scale · skew``.

    With ``B = −Ω²``, symmetric and positive, ``E = 2(Ω − B)(I + B)⁻¹``. float64 solves this; other dtypes sum the Neumann
    series of ``I + B`` about the middle of its spectrum, in five doublings, so that it converges for every ``Ω``.
    ``G`` is orthogonal to float32 rounding. Rotations by more than 120 degrees in one step are shortened to that, in wide
    blocks somewhat earlier, and a block with a non-finite number is not rotated.

    Args:
        skew: packed ``[r · width(width−1)/2]``, float32 or float64.

    Returns:
        ``[r, width, width]``.
    """
    omega = unpack_skew(skew * scale, width)
    eye = torch.eye(width, dtype=omega.dtype, device=omega.device)
    with full_precision(skew.device):
        square = omega.mT @ omega
        bound = square.abs().sum(-1).amax(-1)[:, None, None]  # ≥ the largest eigenvalue of B
        finite = bound.isfinite()
        shorten = (LARGEST_SQUARE / bound).clamp(max=1).where(finite, 0)
        omega, square = omega.nan_to_num() * shorten.sqrt(), square.nan_to_num() * shorten
        if omega.dtype == torch.float64:
            factor, _ = torch.linalg.cholesky_ex(eye + square)  # not LU: pytorch/pytorch#142815
            return 2 * torch.cholesky_solve(omega - square, factor).contiguous()
        middle = 1 + (bound * shorten).nan_to_num() / 2
        remainder = eye - (eye + square) / middle
        inverse = eye + remainder
        for _ in range(_DOUBLINGS - 1):
            remainder = remainder @ remainder
            inverse = inverse + inverse @ remainder
        return 2 * ((omega - square) @ inverse) / middle


def rotate_(
    weight: Tensor,
    residual: Tensor | None,
    rows: Tensor | None,
    row_channels: Tensor,
    columns: Tensor | None,
    column_channels: Tensor,
    seed: int | None = None,
    turn: Turn | None = None,
) -> None:
    """``W ← G_rows W G_columns`` in place, each ``G = I + E`` block-diagonal over its channels.

    Args:
        weight: ``[m, n]``; any floating dtype.
        residual: of half-precision weights: int8 ``[m, n]`` or uint8 ``[m, ⌈n/2⌉]``, as :mod:`.residual` says.
        rows, columns: ``E`` of each side, ``[r, b, b]``; None leaves that side alone.
        row_channels, column_channels: int64 ``[r · b]``.
        seed: of the stochastic rounding of a half-precision weight without residual; None rounds to nearest.
        turn: in place of :func:`turn_`.
    """
    master = decode(weight, residual)
    (turn or turn_)(master, rows, row_channels, columns, column_channels)
    if seed is None:
        encode_(weight, residual, master)
    else:
        round_stochastically_(weight, master, seed)


def effective(
    stored: Tensor,
    scales: Tensor | None,
    rows: Tensor | None,
    row_channels: Tensor,
    columns: Tensor | None,
    column_channels: Tensor,
    dtype: torch.dtype,
    turn: Turn | None = None,
) -> Tensor:
    """``G_rows W₀ G_columns`` as a new tensor.

    Args:
        stored: ``W₀`` ``[m, n]``, floating; or its int8 codes.
        scales: of codes, bfloat16 ``[m, ⌈n/128⌉]``, as :mod:`.quantize` says.
        rows, columns, row_channels, column_channels: as in :func:`rotate_`.
        dtype: of the result; rotated in float32, or in float64 for float64.
        turn: in place of :func:`turn_`, for rotations of whatever dtype it takes.
    """
    master = master_dtype(dtype)
    weight = stored.to(master, copy=True) if scales is None else dequantize(stored, scales, master)
    if turn is None:
        rows, columns = (None if side is None else side.to(master) for side in (rows, columns))
    (turn or turn_)(weight, rows, row_channels, columns, column_channels)
    return weight.to(dtype)


def turn_(
    master: Tensor, rows: Tensor | None, row_channels: Tensor, columns: Tensor | None, column_channels: Tensor
) -> None:
    """:func:`rotate_` of a float32 or float64 weight."""
    with full_precision(master.device):
        if rows is not None:
            part = master.index_select(0, row_channels).view(*rows.shape[:2], -1)  # [r, b, n]
            master.index_copy_(0, row_channels, torch.baddbmm(part, rows, part).flatten(0, 1))
        if columns is not None:
            part = master.index_select(1, column_channels).unflatten(1, columns.shape[:2]).transpose(0, 1)  # [r, m, b]
            turned = torch.baddbmm(part, part, columns).transpose(0, 1).flatten(1)
            master.index_copy_(1, column_channels, turned)
