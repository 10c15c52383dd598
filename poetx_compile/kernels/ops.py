"""Schemas of the operations, with shapes for tracing and an implementation for each device."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from . import naive
from .residual import master_dtype

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_WIDEST = 512

library = torch.library.Library("poetx", "DEF")
library.define("block_gram(Tensor left, Tensor right, Tensor channels, int width, int run=1) -> Tensor")
library.define("cayley_neumann(Tensor skew, int width, float scale) -> Tensor")
library.define(
    "rotate_(Tensor(a!) weight, Tensor(b!)? residual, Tensor? rows, Tensor row_channels, Tensor? columns,"
    " Tensor column_channels, int run=1) -> ()"
)


def _block_gram(left: Tensor, right: Tensor, channels: Tensor, width: int, run: int = 1) -> Tensor:
    if _fits(left, width):
        from . import triton_gram

        with torch.cuda.device(left.device):
            return triton_gram.block_gram(left, right, channels, width, run)
    return naive.block_gram(left, right, channels, width)


def _cayley_neumann(skew: Tensor, width: int, scale: float) -> Tensor:
    if _fits(skew, width):
        from . import triton_cayley

        with torch.cuda.device(skew.device):
            return triton_cayley.cayley_neumann(skew, width, scale)
    return naive.cayley_neumann(skew, width, scale)


def _rotate_(
    weight: Tensor,
    residual: Tensor | None,
    rows: Tensor | None,
    row_channels: Tensor,
    columns: Tensor | None,
    column_channels: Tensor,
    run: int = 1,
) -> None:
    widths = [side.shape[-1] for side in (rows, columns) if side is not None]
    if _fits(weight, *widths) and weight.is_contiguous():
        from . import triton_rotate

        with torch.cuda.device(weight.device):
            triton_rotate.rotate_(weight, residual, rows, row_channels, columns, column_channels, run)
    else:
        naive.rotate_(weight, residual, rows, row_channels, columns, column_channels)


def _fits(tensor: Tensor, *widths: int) -> bool:
    """Whether the Triton kernels serve: a GPU, no float64, and blocks that stay in registers."""
    return tensor.is_cuda and _HAS_TRITON and tensor.dtype != torch.float64 and max(widths) <= _WIDEST


for _device in ("CPU", "CUDA"):
    library.impl("block_gram", _block_gram, _device)
    library.impl("cayley_neumann", _cayley_neumann, _device)
    library.impl("rotate_", _rotate_, _device)


@torch.library.register_fake("poetx::block_gram", lib=library)
def _(left: Tensor, right: Tensor, channels: Tensor, width: int, run: int = 1) -> Tensor:
    skew = channels.shape[0] // width * (width * (width - 1) // 2)
    return left.new_empty(skew, dtype=master_dtype(left.dtype))


@torch.library.register_fake("poetx::cayley_neumann", lib=library)
def _(skew: Tensor, width: int, scale: float) -> Tensor:
    return skew.new_empty(skew.shape[0] // (width * (width - 1) // 2), width, width)


@torch.library.register_fake("poetx::rotate_", lib=library)
def _(
    weight: Tensor,
    residual: Tensor | None,
    rows: Tensor | None,
    row_channels: Tensor,
    columns: Tensor | None,
    column_channels: Tensor,
    run: int = 1,
) -> None:
    return None


block_gram = torch.ops.poetx.block_gram.default
cayley_neumann = torch.ops.poetx.cayley_neumann.default
rotate_ = torch.ops.poetx.rotate_.default
