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

from .effective import Made
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
library.define(
    "lean_linear(Tensor input, Tensor stored, Tensor? scales, Tensor? rows, Tensor row_channels, Tensor? columns,"
    " Tensor column_channels, Tensor? bias, Tensor q, ScalarType dtype, str precision, int row_width, int column_width,"
    " float scale, bool transposed, int version, int row_run=1, int column_run=1) -> Tensor"
)

Source = Tensor | Made
"""A weight, or what it is made of: then it is made twice, and not kept between."""


class _RotatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        source: Source,
        bias: Tensor | None,
        q: Tensor,
        row_channels: Tensor,
        column_channels: Tensor,
        widths: tuple[int, int],
        runs: tuple[int, int],
        scale: float,
        transposed: bool,
    ) -> Tensor:
        y = _apply(x, _weight(source, x), bias, transposed)
        kept, ctx.how = (source[:6], source[6:]) if isinstance(source, Made) else ((source,), None)
        ctx.save_for_backward(x, bias, y, row_channels, column_channels, *kept)
        ctx.widths, ctx.runs, ctx.scale, ctx.transposed = widths, runs, scale, transposed
        ctx.skew_dtype = q.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, bias, y, row_channels, column_channels, *kept = ctx.saved_tensors
        weight = _weight(kept[0] if ctx.how is None else Made(*kept, *ctx.how), x, after=g)
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


def _weight(source: Source, like: Tensor, after: Tensor | None = None) -> Tensor:
    return source.weight(after).to(like.dtype) if isinstance(source, Made) else source


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
    settings = (row_width, column_width), (row_run, column_run), scale, transposed
    weight = weight.detach()
    dtype = _autocast_dtype(input)
    if dtype is not None:
        input, weight = input.to(dtype), weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    with torch.autocast(input.device.type, enabled=False):
        return _RotatedLinear.apply(input, weight, bias, q, row_channels, column_channels, *settings)


def _lean_linear(
    input: Tensor,
    stored: Tensor,
    scales: Tensor | None,
    rows: Tensor | None,
    row_channels: Tensor,
    columns: Tensor | None,
    column_channels: Tensor,
    bias: Tensor | None,
    q: Tensor,
    dtype: torch.dtype,
    precision: str,
    row_width: int,
    column_width: int,
    scale: float,
    transposed: bool,
    version: int,
    row_run: int = 1,
    column_run: int = 1,
) -> Tensor:
    """As :func:`_linear`, of a weight that is made in the forward pass, and again in the backward pass.

    Args:
        stored, scales, rows, columns, dtype: as in :func:`.naive.effective`.
        precision: of the products on a GPU that make the weight.
    """
    made = Made(stored, scales, rows, row_channels, columns, column_channels, dtype, column_run, precision)
    settings = (row_width, column_width), (row_run, column_run), scale, transposed
    lower = _autocast_dtype(input)
    if lower is not None:
        input, bias = input.to(lower), bias if bias is None else bias.to(lower)
    elif input.dtype != dtype:
        raise RuntimeError(f"expected input and weight of one dtype, not {input.dtype} and {dtype}")
    with torch.autocast(input.device.type, enabled=False):
        return _RotatedLinear.apply(input, made, bias, q, row_channels, column_channels, *settings)


def _autocast_dtype(input: Tensor) -> torch.dtype | None:
    """What autocast turns the operands of a product to; None where it leaves them alone."""
    device = input.device.type
    is_lower = torch.is_autocast_enabled(device) and input.dtype != torch.float64
    return torch.get_autocast_dtype(device) if is_lower else None


library.impl("linear", _linear, "CompositeImplicitAutograd")
library.impl("lean_linear", _lean_linear, "CompositeImplicitAutograd")

rotated_linear = torch.ops.poetx.linear.default
lean_linear = torch.ops.poetx.lean_linear.default
