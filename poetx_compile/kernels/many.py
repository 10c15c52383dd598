"""``rotate_`` for many matrices: those of one shape share a launch where a kernel takes both sides in one pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops


class Turn(NamedTuple):
    """What ``rotate_`` takes: a matrix ``[m, n]`` with its residual, and the rotations of its sides."""

    weight: Tensor
    residual: Tensor | None
    rows: Tensor | None
    row_channels: Tensor
    columns: Tensor | None
    column_channels: Tensor
    run: int
    precision: str
    seed: int | None = None

    @property
    def is_for_one_pass(self) -> bool:
        return ops.is_for_one_pass(*self[:6], run=self.run)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What matrices have in common that one launch can serve."""
        widths = [None if side is None else side.shape[-1] for side in (self.rows, self.columns)]
        return self.weight.shape, self.weight.dtype, self.weight.device, *widths, self.run


def rotate_all_(turns: Iterable[Turn]) -> None:
    """Rotate matrices in place, of which no two share memory. Those with launches of their own keep their order."""
    groups: dict[tuple[Any, ...], list[Turn]] = defaultdict(list)
    alone: list[Turn] = []
    for turn in turns:
        (groups[turn.kind] if turn.is_for_one_pass else alone).append(turn)
    for members in groups.values():
        with torch.cuda.device(members[0].weight.device):
            if not ops.rotate_in_one_pass([turn[:6] for turn in members], members[0].run):
                alone += members
    for turn in alone:
        ops.rotate_(*turn)
