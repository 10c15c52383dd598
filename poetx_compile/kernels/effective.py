"""The weight that stands for a stored matrix and the rotations it has made since: built where it is needed, kept nowhere."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import naive, wide
from .dense import project
from .ops import fits, for_hopper, library, rotate_in_place, succeeds
from .precision import UNIT
from .quantize import dequantize
from .residual import HALF, encode_

_NUMBERS_AT_ONCE = 1 << 22

library.define(
    "effective(Tensor stored, Tensor? scales, Tensor? rows, Tensor row_channels, Tensor? columns, Tensor column_channels,"
    " ScalarType dtype, int run=1, str precision='tf32x3', Tensor? after=None) -> Tensor"
)
library.define(
    "lean_weight(Tensor stored, Tensor? scales, Tensor? rows, Tensor row_channels, Tensor? columns, Tensor column_channels,"
    " Tensor q, ScalarType dtype, str precision, int row_width, int column_width, float scale, int version, int row_run=1,"
    " int column_run=1) -> Tensor"
)


class Made(NamedTuple):
    """What an effective weight is made of: the arguments of :func:`.naive.effective`, and how a GPU multiplies."""

    stored: Tensor
    scales: Tensor | None
    rows: Tensor | None
    row_channels: Tensor
    columns: Tensor | None
    column_channels: Tensor
    dtype: torch.dtype
    run: int
    precision: str

    def weight(self, after: Tensor | None = None) -> Tensor:
        """``[m, n]`` of ``dtype``.

        Args:
            after: a tensor that it waits for and does not read. What a backward pass makes after a gradient is no common
                subexpression of the forward pass, so that no compiler keeps it from there.
        """
        return effective(*self, after)


def _effective(
    stored: Tensor,
    scales: Tensor | None,
    rows: Tensor | None,
    row_channels: Tensor,
    columns: Tensor | None,
    column_channels: Tensor,
    dtype: torch.dtype,
    run: int = 1,
    precision: str = "tf32x3",
    after: Tensor | None = None,
) -> Tensor:
    sides = [side for side in (rows, columns) if side is not None]
    if not fits(stored, *(side.shape[-1] for side in sides)) or dtype == torch.float64:
        turn = wide.turn_ if fits(stored) and dtype in HALF and precision == "tf32" else None
        if turn is not None:
            rows, columns = (None if side is None else (side * UNIT).half() for side in (rows, columns))
        return naive.effective(stored, scales, rows, row_channels, columns, column_channels, dtype, turn)
    if dtype not in HALF:
        weight = stored.to(dtype, copy=True) if scales is None else dequantize(stored, scales, dtype)
        rotate_in_place(weight, None, rows, row_channels, columns, column_channels, run, precision)
        return weight
    weight = torch.empty(stored.shape, dtype=dtype, device=stored.device)
    if precision == "tf32":
        if _make_in_one_pass(weight, stored, scales, rows, row_channels, columns, column_channels, run):
            return weight
        rows, columns = (None if side is None else (side * UNIT).half() for side in (rows, columns))
    residual = torch.empty(stored.shape, dtype=torch.int8, device=stored.device)
    _unpack(weight, residual, stored, scales)
    rotate_in_place(weight, residual, rows, row_channels, columns, column_channels, run, precision)
    return weight


def _make_in_one_pass(
    weight: Tensor,
    stored: Tensor,
    scales: Tensor | None,
    rows: Tensor | None,
    row_channels: Tensor,
    columns: Tensor | None,
    column_channels: Tensor,
    run: int,
) -> bool:
    """Unpack and rotate both sides at once where that is possible, and say whether it was."""
    kernel = for_hopper("gluon_effective", weight.device)
    is_fit = scales is not None or stored.dtype == weight.dtype
    if kernel is None or not is_fit or not kernel.serves(stored, rows, columns, run):
        return False
    assert rows is not None and columns is not None
    sides = rows.half().contiguous(), row_channels, columns.half().contiguous(), column_channels, run
    with torch.cuda.device(weight.device):
        return succeeds(kernel.effective_, weight.device, weight, stored, scales, *sides)


def _unpack(weight: Tensor, residual: Tensor, stored: Tensor, scales: Tensor | None) -> None:
    """``W₀`` as a half-precision weight and what its rounding lost."""
    if scales is None and stored.dtype == weight.dtype:
        weight.copy_(stored)
        residual.zero_()
        return
    if scales is not None:
        from . import triton_unpack

        with torch.cuda.device(stored.device):
            triton_unpack.unpack_(weight, residual, stored, scales)
        return
    at_once = max(1, _NUMBERS_AT_ONCE // stored.shape[1])
    for start in range(0, len(stored), at_once):  # a base of the other half precision
        rows = slice(start, start + at_once)
        encode_(weight[rows], residual[rows], stored[rows].float())


for _device in ("CPU", "CUDA"):
    library.impl("effective", _effective, _device)


@torch.library.register_fake("poetx::effective", lib=library)
def _(
    stored: Tensor,
    scales: Tensor | None,
    rows: Tensor | None,
    row_channels: Tensor,
    columns: Tensor | None,
    column_channels: Tensor,
    dtype: torch.dtype,
    *others: Any,
    **by_name: Any,
) -> Tensor:
    return torch.empty_like(stored, dtype=dtype, memory_format=torch.contiguous_format)


effective = torch.ops.poetx.effective.default


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, made: Made, widths: tuple[int, int], runs: tuple[int, int], scale: float) -> Tensor:
        ctx.save_for_backward(*made[:6])
        ctx.how, ctx.widths, ctx.runs, ctx.scale, ctx.skew_dtype = made[6:], widths, runs, scale, q.dtype
        return made.weight()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        made = Made(*ctx.saved_tensors, *ctx.how)
        matrices = gradient[None], made.weight(after=gradient)[None]
        channels = made.row_channels, made.column_channels
        dq = project(*matrices, *channels, ctx.widths, ctx.runs, 2 * ctx.scale)
        return dq.to(ctx.skew_dtype), None, None, None, None


def _lean_weight(
    stored: Tensor,
    scales: Tensor | None,
    rows: Tensor | None,
    row_channels: Tensor,
    columns: Tensor | None,
    column_channels: Tensor,
    q: Tensor,
    dtype: torch.dtype,
    precision: str,
    row_width: int,
    column_width: int,
    scale: float,
    version: int,
    row_run: int = 1,
    column_run: int = 1,
) -> Tensor:
    """The effective weight as a function of ``q``, for whatever use: the dense route.

    Args:
        stored, scales, rows, row_channels, columns, column_channels, dtype: as in :func:`.naive.effective`.
        q, row_width, column_width, scale, version, row_run, column_run: as in :func:`.linear._linear`.
        precision: of the products on a GPU.
    """
    made = Made(stored, scales, rows, row_channels, columns, column_channels, dtype, column_run, precision)
    with torch.autocast(stored.device.type, enabled=False):
        return _Weight.apply(q, made, (row_width, column_width), (row_run, column_run), scale)


library.impl("lean_weight", _lean_weight, "CompositeImplicitAutograd")

lean_weight = torch.ops.poetx.lean_weight.default
