"""Schemas of the operations, with shapes for tracing and an implementation for each device."""

from __future__ import annotations

import torch
from torch import Tensor

from . import naive
from .residual import master_dtype

library = torch.library.Library("poetx", "DEF")
library.define("block_gram(Tensor left, Tensor right, Tensor channels, int width) -> Tensor")
library.define("cayley_neumann(Tensor skew, int width, float scale) -> Tensor")
library.define(
    "rotate_(Tensor(a!) weight, Tensor(b!)? residual, Tensor? rows, Tensor row_channels, Tensor? columns,"
    " Tensor column_channels) -> ()"
)

for _device in ("CPU", "CUDA"):
    library.impl("block_gram", naive.block_gram, _device)
    library.impl("cayley_neumann", naive.cayley_neumann, _device)
    library.impl("rotate_", naive.rotate_, _device)


@torch.library.register_fake("poetx::block_gram", lib=library)
def _(left: Tensor, right: Tensor, channels: Tensor, width: int) -> Tensor:
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
) -> None:
    return None


block_gram = torch.ops.poetx.block_gram.default
cayley_neumann = torch.ops.poetx.cayley_neumann.default
rotate_ = torch.ops.poetx.rotate_.default
