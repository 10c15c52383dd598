"""How one dimension of a weight is cut into blocks, and which channels sit in which block."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

_COALESCED, _WIDE = 32, 64
_LONG = 1024


def automatic_chunk(block_size: int) -> int:
    """The largest power of two up to 32 of which blocks are made, but at least 8 of blocks that hold 8."""
    return max(math.gcd(block_size, _COALESCED), min(block_size, 8))


@dataclass(frozen=True)
class BlockLayout:
    """Blocks along one dimension: ``count`` blocks of ``width`` channels out of ``features``.

    The width need not divide the dimension. Left-over channels sit out until a new permutation brings them in.
    """

    features: int
    count: int
    width: int
    chunk: int

    @classmethod
    def of(cls, features: int, block_size: int, chunk: int) -> BlockLayout:
        """Blocks of equal width, at most ``block_size``, made of whole chunks: they leave as few channels out as possible.

        A dimension too short for one chunk, or for a block of two channels, is not rotated (``count`` is 0). Where
        ``chunk`` is 0, it is :func:`automatic_chunk`, or 64 in long dimensions where that leaves no more channels out.
        """
        if chunk == 0:
            layout = cls.of(features, block_size, automatic_chunk(block_size))
            if features < _LONG or features % _WIDE or block_size % (4 * _WIDE):
                return layout
            wide = cls.of(features, block_size, _WIDE)
            return wide if wide.rotated == layout.rotated else layout
        most = max(1, -(-features // block_size))
        counts = (most, most - 1) if most > 1 else (most,)
        shapes = [(count, min(block_size, chunk * (features // (chunk * count)))) for count in counts]
        count, width = max(shapes, key=lambda shape: (shape[0] * shape[1], shape[1]))
        return cls(features, count, width, chunk) if width > 1 else cls(features, 0, 0, chunk)

    @property
    def rotated(self) -> int:
        """Channels that take part under one permutation."""
        return self.count * self.width

    @property
    def skew_per_block(self) -> int:
        return self.width * (self.width - 1) // 2

    @property
    def skew(self) -> int:
        """Numbers in the packed upper triangles of all blocks."""
        return self.count * self.skew_per_block

    @property
    def run(self) -> int:
        """Channels that are sure to lie side by side, from a multiple of their number on: what a kernel may read at once."""
        return math.gcd(self.chunk, _WIDE) if self.features % self.chunk == 0 else 1

    def channels(self, key: int, side: int, epoch: int) -> Tensor:
        """Draw the channels of all blocks, in block order: int64 ``[rotated]``, on CPU.

        Channels move in runs of ``chunk``, so that a gather reads whole memory sectors. The grid of runs starts at a
        random offset where ``chunk`` does not divide the dimension. The draw depends on nothing but its arguments.
        """
        digest = hashlib.sha256(f"{key}:{side}:{epoch}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "little"))
        with torch.device("cpu"):
            offset = int(torch.randint(self.features % self.chunk + 1, (), generator=generator))
            runs = torch.randperm(self.features // self.chunk, generator=generator)[: self.rotated // self.chunk]
            return (offset + runs[:, None] * self.chunk + torch.arange(self.chunk)).reshape(-1)


@dataclass(frozen=True)
class StackLayout:
    """A weight read as ``count`` equal matrices, each with blocks of its own along both dimensions: one for a linear layer."""

    count: int
    rows: BlockLayout
    columns: BlockLayout

    @classmethod
    def of(cls, matrices: tuple[int, int, int], block_size: int, chunk: int, sides: str = "both") -> StackLayout:
        """The blocks of ``matrices`` ``[count, m, n]``; of its ``rows`` or ``columns`` only where ``sides`` says so."""
        count, *features = matrices
        rows, columns = (BlockLayout.of(size, block_size, chunk) for size in features)
        if sides == "rows":
            columns = replace(columns, count=0, width=0)
        elif sides == "columns":
            rows = replace(rows, count=0, width=0)
        return cls(count, rows, columns)

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        return self.count, self.rows.features, self.columns.features

    @cached_property
    def sides(self) -> tuple[BlockLayout, ...]:
        """The sides of a matrix that are rotated: rows, then columns."""
        return tuple(side for side in (self.rows, self.columns) if side.count)

    @cached_property
    def skew(self) -> int:
        """Numbers in the packed upper triangles of all blocks of all matrices."""
        return self.count * sum(side.skew for side in self.sides)


def permutation_key(seed: int, name: str) -> int:
    """What stands for (seed, parameter name) in every draw; 56 bits, so that it survives in a checkpoint."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "little")


def rounding_seed(key: int, step: int, place: int) -> int:
    """What decides the stochastic rounding of one matrix of a stack after one step; 63 bits, so that it fits an int64."""
    return int.from_bytes(hashlib.sha256(f"{key}:{step}:{place}".encode()).digest()[:8], "little") >> 1
