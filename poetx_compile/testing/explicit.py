"""The parametrisation that training never forms: ``W' = G_rows(q) W G_columns(q)``, exact and differentiable in ``q``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..factor import OrthogonalFactor
from ..kernels.polar import POLYNOMIALS
from ..layout import BlockLayout


def explicit_weight(factor: OrthogonalFactor, weight: Tensor, q: Tensor) -> Tensor:
    """What ``factor`` makes of ``weight`` when an optimizer has written ``q``. Autograd goes through it."""
    scale, turned = factor.config.scale, []
    for matrix, packed in zip(weight.reshape(factor.stack.shape), q.view(factor.stack.count, -1)):
        rows, columns = packed.split((factor.rows.skew, factor.columns.skew))
        matrix = _turn_rows(matrix, factor.rows, factor.row_channels, scale * rows)
        turned.append(_turn_rows(matrix.mT, factor.columns, factor.column_channels, -scale * columns).mT)
    return torch.stack(turned).view(weight.shape)


def _turn_rows(matrix: Tensor, layout: BlockLayout, channels: Tensor, skew: Tensor) -> Tensor:
    """``G M`` for the Cayley transforms ``G`` of the blocks in ``skew``; ``−skew`` gives their transposes."""
    if not layout.count:
        return matrix
    upper = torch.triu_indices(layout.width, layout.width, 1, device=skew.device)
    omega = skew.new_zeros(layout.count, layout.width, layout.width)
    omega = omega.index_put((torch.arange(layout.count, device=skew.device)[:, None], *upper), skew.view(layout.count, -1))
    omega = omega - omega.mT
    eye = torch.eye(layout.width, dtype=skew.dtype, device=skew.device)
    rotations = torch.linalg.solve(eye - omega, eye + omega)
    blocks = matrix.index_select(0, channels).unflatten(0, (layout.count, layout.width))
    return matrix.index_copy(0, channels, (rotations @ blocks).flatten(0, 1))


def spread(factor: OrthogonalFactor, q: Tensor) -> Tensor:
    """What is turned where an optimizer has written ``q``: with ``updates="given"`` the same, else near one angle a block."""
    if factor.config.updates == "given":
        return q
    sides = factor.stack.sides * factor.stack.count
    parts = zip(q.split([side.skew for side in sides]), sides)
    return torch.cat(
        [spread_block(packed, side.width) for part, side in parts for packed in part.split(side.skew_per_block)]
    )


def spread_block(packed: Tensor, width: int) -> Tensor:
    """What :func:`..kernels.polar.spread_in_torch` makes of one block, by its singular values."""
    upper = torch.triu_indices(width, width, 1, device=packed.device).unbind()
    block = packed.new_zeros(width, width).index_put(upper, packed)
    left, sizes, right = torch.linalg.svd(block - block.mT)
    norm = sizes.norm()
    if not norm > 0:
        return packed
    sizes = sizes / (sizes.pow(4).sum() / 2) ** 0.25
    for a, b, c in POLYNOMIALS:
        sizes = a * sizes + b * sizes**3 + c * sizes**5
    return (left @ torch.diag(sizes * (norm / sizes.norm())) @ right)[upper]
