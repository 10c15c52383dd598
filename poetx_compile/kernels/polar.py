"""Skew matrices brought near their polar factors, which turn all their channels by one angle."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .naive import pack_skew, unpack_skew
from .ops import fits, for_hopper, library, succeeds
from .precision import full_precision

LEAST_NORM = 1e-7
POLYNOMIALS = ((8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526))
"""``(a, b, c)`` of the steps of :func:`spread_evenly`: each the best of its degree for what the one before leaves."""


def orthogonalize_skew(
    blocks: Tensor, coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315), steps: int = 5
) -> Tensor:
    """Bring the singular values of skew matrices towards 1, and keep their singular vectors.

    Each step is ``X ← aX + (bS + cS²)X`` with ``S = XXᵀ``, from ``X`` over a bound of its spectral norm: singular values of a skew
    matrix come in pairs, so its Frobenius norm over √2 is one. Matrices of smaller norms than 1e-7 are taken as they are, as
    ``torch.optim.Muon`` does, and so fade to zero.

    Args:
        blocks: ``[r, b, b]``, skew.
        coefficients: ``(a, b, c)``.

    Returns:
        ``[r, b, b]``, exactly skew, of the dtype of ``blocks``.
    """
    a, b, c = coefficients
    dtype = _products(blocks)
    bound = torch.linalg.matrix_norm(blocks, keepdim=True) / math.sqrt(2)
    x = (blocks / bound.clamp(min=LEAST_NORM)).to(dtype)
    with full_precision(blocks.device):
        for _ in range(steps):
            turned = _step(x, x @ x.mT, a, b, c)
            x = (turned - turned.mT) / 2
    return x.to(blocks.dtype)


def kernel_for(skew: Tensor, width: int) -> Any:
    """The module of the kernel that makes blocks of this width even, on the device of their skew parameters; else None."""
    kernel = for_hopper("gluon_polar", skew.device) if fits(skew, width) else None
    return kernel if kernel is not None and width == kernel.WIDTH else None


def _spread_evenly(packed: Tensor, width: int) -> Tensor:
    kernel = kernel_for(packed, width)
    if kernel is not None and kernel.serves(packed):
        out = torch.empty_like(packed)
        with torch.cuda.device(packed.device):
            if succeeds(kernel.spread_evenly, packed.device, out, packed):
                return out
    return spread_in_torch(packed, width)


def spread_in_torch(packed: Tensor, width: int) -> Tensor:
    """Replace each block by its polar factor, nearly, at the Frobenius norm that it had: all its channels turn by one angle.

    Three steps of an iteration like that of :func:`orthogonalize_skew`, with the polynomials that bring singular values from
    0.01 to 1 as near to 1 as these degrees can (https://arxiv.org/abs/2505.16932), within 0.27. They start from a block over a
    tighter bound of its spectral norm, ``(‖S‖² / 2)^¼``, and run in bfloat16 on a GPU, elsewhere in the dtype of ``packed``, in
    float64 for float64. This is the meaning of ``poetx::spread_evenly``, which has a kernel on Hopper GPUs.

    Args:
        packed: ``[r · b(b − 1)/2]``, blocks of ``width`` ``b``, packed as ``q``.

    Returns:
        The same shape and dtype. Zero stays zero, and a block with NaN or infinity is NaN.
    """
    dtype = _products(packed)
    flat = packed.view(-1, width * (width - 1) // 2)
    least = torch.finfo(packed.dtype).tiny
    sizes = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    x = unpack_skew((flat / sizes.clamp(min=least)).to(dtype).view(-1), width)
    with full_precision(packed.device):
        square = x @ x.mT
        bound = (torch.linalg.matrix_norm(square, keepdim=True) / math.sqrt(2)).sqrt().clamp(min=LEAST_NORM)
        first, *others = POLYNOMIALS
        x = _step(x / bound, square / bound.square(), *first)
        for polynomial in others:
            x = _step(x, x @ x.mT, *polynomial)
    turned = pack_skew(x).to(packed.dtype).view_as(flat)
    turned *= sizes / torch.linalg.vector_norm(turned, dim=1, keepdim=True).clamp(min=least)
    return turned.view_as(packed)


def _step(x: Tensor, square: Tensor, a: float, b: float, c: float) -> Tensor:
    """``aX + (bS + cS²)X``."""
    return torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)


def _products(tensor: Tensor) -> torch.dtype:
    return torch.bfloat16 if tensor.is_cuda and tensor.dtype != torch.float64 else tensor.dtype


library.define("spread_evenly(Tensor packed, int width) -> Tensor")
for _device in ("CPU", "CUDA"):
    library.impl("spread_evenly", _spread_evenly, _device)


@torch.library.register_fake("poetx::spread_evenly", lib=library)
def _(packed: Tensor, width: int) -> Tensor:
    return torch.empty_like(packed)


spread_evenly = torch.ops.poetx.spread_evenly.default
