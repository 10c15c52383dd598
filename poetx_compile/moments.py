"""What an optimizer keeps of a rotation's states when new permutations are drawn.

A first moment is a skew matrix over channels, known within the old blocks. A new block asks for pairs of channels: those that
shared a block before are known, with their sign; of the others nothing is. A second moment is a size for each pair.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import PoetxError
from .factor import COLUMNS, ROWS, OrthogonalFactor
from .layout import BlockLayout

Entry = dict[str, Any]

_FIRST = {"exp_avg", "momentum_buffer", "grad_avg"}
_SECOND = {"exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "sum"}


def check_known(factor: OrthogonalFactor, entry: Entry) -> None:
    """Raises:
    PoetxError: the state has tensors of which it is not known how they would move to other blocks.
    """
    moments = factor.config.moments
    if not factor.config.permutation_period or moments in ("reset", "keep"):
        return
    for name, value in _like_q(factor, entry):
        if name not in _FIRST | _SECOND or type(value) is not Tensor:
            raise PoetxError(
                f"poetx: moments={moments!r} cannot carry the state {name!r} of '{factor.name}' to new permutations; it knows "
                f"{', '.join(sorted(_FIRST | _SECOND))} as plain tensors. Use moments='reset', or permutation_period=0"
            )


@torch.no_grad()
def carried(factor: OrthogonalFactor, entry: Entry) -> Entry | None:
    """The state for the factor's blocks of now, by ``config.moments``; None where it starts again.

    * ``keep``: every number stays at its place, whatever pair of channels stands there now.
    * ``transport``: pairs that share a block again keep both moments. Of the others the first moment is zero, and the second the
      mean over the side's.
    * ``second``: first moments are zero, second moments the mean over the side's.

    Args:
        entry: of a live optimizer, made with the draw ``entry["poetx_moments"]``.
    """
    moments = factor.config.moments
    if moments == "reset":
        return None
    if moments == "keep":
        return entry
    sources = [_Source(side, factor, number, entry["poetx_moments"]) for side, number in _sides(factor)]
    if moments == "second":
        for source in sources:
            source.known.zero_()
    new = {name: _moved(value, name, factor, sources) for name, value in _like_q(factor, entry)}
    return {**entry, **new}


class _Source:
    """Where the numbers of one side of a matrix come from, ``[count · b(b−1)/2]`` each.

    Attributes:
        index: int64, the place in the old order.
        sign: −1 where the two channels have changed their order.
        known: whether the two channels shared a block.
    """

    def __init__(self, side: BlockLayout, factor: OrthogonalFactor, number: int, epoch: int) -> None:
        now = factor.row_channels if number == ROWS else factor.column_channels
        old = side.channels(factor.key, number, epoch).to(now.device)
        places = torch.full((side.features,), -1, device=now.device)
        places[old] = torch.arange(side.rotated, device=now.device)
        rows, columns = torch.triu_indices(side.width, side.width, 1, device=now.device)
        here = places[now].view(side.count, side.width)
        first, second = here[:, rows].flatten(), here[:, columns].flatten()
        low, high = torch.minimum(first, second), torch.maximum(first, second)
        self.known = (low >= 0) & (low // side.width == high // side.width)
        self.sign = torch.where(first < second, 1, -1)
        row, column = low % side.width, high % side.width
        packed = row * (2 * side.width - row - 1) // 2 + column - row - 1
        self.index = (low // side.width * side.skew_per_block + packed).where(self.known, 0)


def _moved(value: Tensor, name: str, factor: OrthogonalFactor, sources: list[_Source]) -> Tensor:
    parts = value.view(factor.stack.count, -1).split([side.skew for side in factor.stack.sides], 1)
    moved = []
    for part, source in zip(parts, sources):
        if name in _FIRST:
            moved.append((part[:, source.index] * source.sign).where(source.known, 0))
        else:
            mean = part.mean(1, keepdim=True, dtype=torch.promote_types(part.dtype, torch.float32)).to(part.dtype)
            moved.append(part[:, source.index].where(source.known, mean))
    return torch.cat(moved, 1).flatten()


def _sides(factor: OrthogonalFactor) -> list[tuple[BlockLayout, int]]:
    return [(side, number) for side, number in ((factor.rows, ROWS), (factor.columns, COLUMNS)) if side.count]


def _like_q(factor: OrthogonalFactor, entry: Entry) -> list[tuple[str, Tensor]]:
    return [
        (name, value)
        for name, value in entry.items()
        if torch.is_tensor(value) and value.shape == factor.q.shape and not name.startswith("poetx_")
    ]
