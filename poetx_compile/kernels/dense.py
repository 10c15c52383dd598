"""The dense route: from the gradient of a weight to that of its rotation, for whatever use the weight has."""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import block_gram
from .residual import master_dtype

_NUMBERS_AT_ONCE = 1 << 26
"""Of a stack's matrices that share a launch: their transposed copies take four times as many numbers."""


def project(
    gradient: Tensor,
    weight: Tensor,
    row_channels: Tensor,
    column_channels: Tensor,
    widths: tuple[int, int],
    runs: tuple[int, int] = (1, 1),
    scale: float = 1.0,
) -> Tensor:
    """Packed skew parts of ``dW Wᵀ`` (rows) and ``Wᵀ dW`` (columns), block by block, times ``scale``.

    Each is a Gram matrix over the other dimension. The matrices of a stack stand side by side in it, as further channels.

    Args:
        gradient, weight: ``[count, m, n]``.
        row_channels, column_channels: int64, of the blocks of one matrix: the same for all.
        widths: channels of a block of rows and of columns; 0 where that side is not rotated.
        runs: channels that lie side by side, as :attr:`BlockLayout.run` says.

    Returns:
        For each matrix all row blocks, then all column blocks: 1-D, float32, or float64 for a float64 weight.
    """
    if gradient.dtype != weight.dtype:
        gradient, weight = (tensor.to(master_dtype(weight.dtype)) for tensor in (gradient, weight))
    m, n = weight.shape[1:]
    at_once = max(1, _NUMBERS_AT_ONCE // (m * n))
    packed = []
    for d, w in zip(gradient.split(at_once), weight.split(at_once)):
        sides = []
        if widths[0]:
            rows = (tensor.flatten(0, 1).T for tensor in (d, w))  # [n, matrices · m]
            sides.append((*rows, _of_each(row_channels, len(w), m), widths[0], runs[0]))
        if widths[1]:
            columns = (tensor.movedim(0, 1).flatten(1) for tensor in (w, d))  # [m, matrices · n]
            sides.append((*columns, _of_each(column_channels, len(w), n), widths[1], runs[1]))
        skews = block_gram(*map(list, zip(*sides)), scale)
        lengths = [channels.numel() * (width - 1) // 2 for *_, channels, width, _ in sides]
        packed.append(torch.cat([skew.view(len(w), -1) for skew in skews.split(lengths)], 1).flatten())
    return torch.cat(packed)


def _of_each(channels: Tensor, matrices: int, features: int) -> Tensor:
    """The channels of all matrices that stand side by side."""
    starts = torch.arange(0, matrices * features, features, device=channels.device)
    return (starts[:, None] + channels).flatten()
