"""Codes of 8 bits as a half-precision weight and its residual, on a GPU: what the rotation kernels turn."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .quantize import GROUP
from .triton_rotate import KINDS, encode

_COLUMNS = 1024


@triton.jit(do_not_specialize=["groups"])
def _unpack_kernel(
    codes,  # [m, n]
    scales,  # [m, groups]
    weight,  # [m, n]
    residual,  # [m, n]
    n,
    groups,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < n
    code = tl.load(codes + row * n + column, mask=mask, other=0)
    scale = tl.load(scales + row * groups + column // GROUP, mask=mask, other=0.0)
    high, low = encode(code.to(tl.float32) * scale.to(tl.float32), KIND)
    tl.store(weight + row * n + column, high, mask=mask)
    tl.store(residual + row * n + column, low, mask=mask)


def unpack_(weight: Tensor, residual: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Write what codes and scales stand for, exact to the weight's 24 bits; no scratch memory.

    Args:
        weight: ``[m, n]``, bfloat16 or float16, contiguous.
        residual: int8 ``[m, n]``, as :mod:`.residual` says.
        codes, scales: as :mod:`.quantize` says.
    """
    m, n = codes.shape
    _unpack_kernel[(m, triton.cdiv(n, _COLUMNS))](
        codes,
        scales,
        weight,
        residual,
        n,
        scales.shape[1],
        GROUP=GROUP,
        COLUMNS=_COLUMNS,
        KIND=KINDS[weight.dtype],
        num_warps=4,
    )
    torch.autograd.graph.increment_version([weight, residual])
