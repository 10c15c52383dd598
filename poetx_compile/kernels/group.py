"""Products of rotations, as ``E = G − I``: how the rotations of many steps become one."""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import fits
from .precision import UNIT, full_precision, unscaled


def compose_(turn: Tensor, step: Tensor, from_left: bool) -> None:
    """``G ← G_step G``, or ``G ← G G_step`` where not ``from_left``, in place.

    Args:
        turn: ``E`` of ``G``, ``[r, b, b]``, float32 or float64.
        step: that of ``G_step``, of the same dtype or as :data:`.precision.UNIT` says.
    """
    if fits(turn, turn.shape[-1]) and turn.is_contiguous():
        from . import triton_rotate

        with torch.cuda.device(turn.device):
            triton_rotate.multiply_(turn, step.contiguous(), from_left)
        turn.add_(step, alpha=1 / UNIT if step.dtype == torch.float16 else 1)
        return
    step = unscaled(step).to(turn.dtype)
    with full_precision(turn.device):
        left, right = (step, turn) if from_left else (turn, step)
        turn.copy_(torch.baddbmm(turn + step, left, right))


def orthogonalize_(turn: Tensor) -> None:
    """One Newton–Schulz step, ``G ← G (3I − GᵀG) / 2``, in place: squares the distance of ``G`` from the orthogonal matrices.

    Args:
        turn: ``E``, ``[r, b, b]``.
    """
    with full_precision(turn.device):
        defect = turn + turn.mT + turn.mT @ turn  # GᵀG − I
        turn.sub_(torch.baddbmm(defect, turn, defect), alpha=0.5)
