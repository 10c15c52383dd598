"""Products of rotations, as ``E = G − I``: how the rotations of many steps become one."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import full_precision


def compose_(turn: Tensor, step: Tensor, from_left: bool) -> None:
    """``G ← G_step G``, or ``G ← G G_step`` where not ``from_left``, in place.

    Args:
        turn, step: ``E`` of ``G`` and of ``G_step``, ``[r, b, b]``, float32 or float64.
    """
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
