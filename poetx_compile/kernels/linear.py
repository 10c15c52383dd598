"""A linear layer whose weight learns by rotation only: the Gram route.

``W`` moves to ``(I + 2Ω_rows) W (I + 2Ω_columns)`` to first order, so the gradient at ``Ω = 0`` is the skew part of ``dW Wᵀ``
for the rows and of ``Wᵀ dW`` for the columns. Both are products of activations, ``dW`` is never formed
(arXiv 2506.08001, section 3, with the fold after every step).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .gram import GramSide
from .ops import block_gram, library
from .residual import master_dtype

LINEAR_VERSION = 3
"""Counts changes of the backward below: AOTAutograd's cache keys on the op's arguments, not on its code."""

library.define(
    "linear(Tensor input, Tensor weight, Tensor? bias, Tensor q, Tensor row_channels, Tensor column_channels,"
    " int row_width, int column_width, float scale, bool transposed, int version, int row_run=1,"
    " int column_run=1) -> Tensor"
)


class _RotatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        q: Tensor,
        row_channels: Tensor,
        column_channels: Tensor,
        widths: tuple[int, int],
        runs: tuple[int, int],
        scale: float,
        transposed: bool,
    ) -> Tensor:
        y = _apply(x, weight, bias, transposed)
        ctx.save_for_backward(x, weight, bias, y, row_channels, column_channels)
        ctx.widths, ctx.runs, ctx.scale, ctx.transposed = widths, runs, scale, transposed
        ctx.skew_dtype = q.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, y, row_channels, column_channels = ctx.saved_tensors
        dx = g @ (weight.mT if ctx.transposed else weight)
        x2, dx2 = (tensor.reshape(-1, x.shape[-1]) for tensor in (x, dx))  # [N, inputs]
        y2, g2 = (tensor.reshape(-1, y.shape[-1]) for tensor in (y, g))  # [N, outputs]

        row_width, column_width = ctx.widths
        row_run, column_run = ctx.runs
        left_right = ((dx2, x2), (g2, y2)) if ctx.transposed else ((g2, y2), (dx2, x2))
        rows = GramSide(*left_right[0], row_channels, row_width, row_run)
        columns = GramSide(*left_right[1], column_channels, column_width, column_run)
        sides = [side for side in (rows, columns) if side.width]
        outputs = columns if ctx.transposed else rows
        dbias = None if bias is None else g2.sum(0, dtype=master_dtype(g.dtype))
        corrected = (bias, dbias, len(sides) - 1 if ctx.transposed else 0) if outputs.width else ()  # y holds the bias
        scale = -2 * ctx.scale if ctx.transposed else 2 * ctx.scale  # dW transposed: so is every outer product
        dq = block_gram(*map(list, zip(*sides)), scale, *corrected)
        return (
            dx if ctx.needs_input_grad[0] else None,
            None,
            dbias.to(bias.dtype) if dbias is not None else None,
            dq.to(ctx.skew_dtype),
            *(None,) * 6,
        )


def _apply(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    if not transposed:
        return F.linear(x, weight, bias)
    if bias is None:
        return x @ weight
    return torch.addmm(bias, x, weight)


def _linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    q: Tensor,
    row_channels: Tensor,
    column_channels: Tensor,
    row_width: int,
    column_width: int,
    scale: float,
    transposed: bool,
    version: int,
    row_run: int = 1,
    column_run: int = 1,
) -> Tensor:
    """``x Wᵀ + c``, or ``x W + c`` where ``transposed``, with gradients for ``x``, ``c`` and ``q``, and none for ``W``.

    Args:
        input: ``[..., inputs]``; ``[N, inputs]`` where ``transposed`` with a bias, as ``torch.addmm`` asks.
        weight: ``[m, n]``.
        bias: ``[outputs]`` or None.
        q: packed skew parameters of rows, then columns; not read here, since they are zero.
        row_channels, column_channels: int64, the channels of the blocks of each side of ``weight``.
        row_width, column_width: channels of a block; 0 where that side is not rotated.
        scale: ``s``.
        transposed: whether ``weight`` is stored ``[inputs, outputs]``.
        version: :data:`LINEAR_VERSION`.
        row_run, column_run: channels that lie side by side, as :attr:`BlockLayout.run` says.

    Returns:
        ``[..., outputs]``, of the dtype that ``F.linear`` gives, autocast included.
    """
    device = input.device.type
    weight = weight.detach()
    if torch.is_autocast_enabled(device) and input.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        input, weight = input.to(dtype), weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        return _RotatedLinear.apply(
            input,
            weight,
            bias,
            q,
            row_channels,
            column_channels,
            (row_width, column_width),
            (row_run, column_run),
            scale,
            transposed,
        )


library.impl("linear", _linear, "CompositeImplicitAutograd")

rotated_linear = torch.ops.poetx.linear.default
