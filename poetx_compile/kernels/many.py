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
    """Rotate matrices in place. Those with launches of their own come last, in their order.

    Raises:
        torch.OutOfMemoryError: there is none for the launches of many; no matrix was rotated then.
    """
    groups: dict[tuple[Any, ...], list[Turn]] = defaultdict(list)
    alone: list[Turn] = []
    places: set[int] = set()
    for turn in turns:
        place = turn.weight.data_ptr()
        is_alone = place in places or not turn.is_for_one_pass  # what two weights share is rotated twice, not at once
        (alone if is_alone else groups[turn.kind]).append(turn)
        places.add(place)
    launches = []
    for members in groups.values():
        operands = [turn[:6] for turn in members]
        launches.append((members, operands, ops.distances_for_one_pass(operands)))
    for members, operands, distances in launches:
        with torch.cuda.device(distances.device):
            if not ops.rotate_in_one_pass(operands, members[0].run, distances):
                alone += members
    for turn in alone:
        ops.rotate_(*turn)
