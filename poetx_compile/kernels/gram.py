"""What a Gram product is made of."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class GramSide(NamedTuple):
    """The operands of one side of a weight: ``A[J] = left[:, J]ᵀ right[:, J]`` for every block ``J`` of channels.

    Attributes:
        left, right: ``[N, n]``, one dtype.
        channels: int64 ``[r · width]``, block after block.
        width: channels of a block.
        run: channels that lie side by side, as :attr:`BlockLayout.run` says.
    """

    left: Tensor
    right: Tensor
    channels: Tensor
    width: int
    run: int = 1

    @property
    def blocks(self) -> int:
        return self.channels.shape[0] // self.width

    @property
    def skew(self) -> int:
        """Numbers in the packed upper triangles of all blocks."""
        return self.blocks * (self.width * (self.width - 1) // 2)
