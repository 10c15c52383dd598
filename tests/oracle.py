"""The explicit parametrisation that the package never forms: ``W' = G_rows(q) W G_columns(q)``, dense and differentiable."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from poetx_compile.factor import OrthogonalFactor
from poetx_compile.layout import BlockLayout
from poetx_compile.registry import factors


def orthogonal(skew: Tensor, layout: BlockLayout, channels: Tensor, scale: float) -> Tensor:
    """The whole ``[features, features]`` orthogonal matrix of one side, by an exact Cayley transform."""
    full = torch.eye(layout.features, dtype=skew.dtype)
    if not layout.count:
        return full
    rows, columns = torch.triu_indices(layout.width, layout.width, 1)
    for block in range(layout.count):
        packed = skew[block * layout.skew_per_block : (block + 1) * layout.skew_per_block]
        omega = torch.zeros(layout.width, layout.width, dtype=skew.dtype).index_put((rows, columns), scale * packed)
        omega = omega - omega.T
        eye = torch.eye(layout.width, dtype=skew.dtype)
        g = torch.linalg.solve(eye - omega, eye + omega)
        inside = channels[block * layout.width : (block + 1) * layout.width]
        full = full.index_put((inside[:, None], inside[None, :]), g)
    return full


def explicit_weight(factor: OrthogonalFactor, weight: Tensor, q: Tensor) -> Tensor:
    """The weight that ``factor`` makes of ``weight`` when the optimizer has written ``q``, matrix by matrix of its stack."""
    turned = []
    for matrix, packed in zip(weight.reshape(factor.stack.shape), q.view(factor.stack.count, -1)):
        rows, columns = packed.split((factor.rows.skew, factor.columns.skew))
        left = orthogonal(rows, factor.rows, factor.row_channels, factor.config.scale)
        right = orthogonal(columns, factor.columns, factor.column_channels, factor.config.scale)
        turned.append(left @ matrix @ right)
    return torch.stack(turned).view(weight.shape)


def rotation_gradients(model: nn.Module, loss: Callable[[Callable[..., Any]], Tensor]) -> dict[str, Tensor]:
    """The gradient of every converted weight's ``q``, by autograd through :func:`explicit_weight`.

    Args:
        loss: of a callable that stands for the model.
    """
    found = {name: factor for name, weight in model.named_parameters() if (factor := factors.of_weight(weight)) is not None}
    skews = {name: torch.zeros_like(factor.q, requires_grad=True) for name, factor in found.items()}
    weights = {name: explicit_weight(factor, factor.weight.detach(), skews[name]) for name, factor in found.items()}
    value = loss(lambda *args: torch.func.functional_call(model, weights, args))
    return dict(zip(skews, torch.autograd.grad(value, list(skews.values()))))


def by_singular_values(matrix: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """What Newton–Schulz makes of a skew matrix, on its singular values alone."""
    left, sizes, right = torch.linalg.svd(matrix)
    a, b, c = coefficients
    sizes = sizes / (sizes.norm() / math.sqrt(2))
    for _ in range(steps):
        sizes = a * sizes + b * sizes**3 + c * sizes**5
    return left @ torch.diag(sizes) @ right
