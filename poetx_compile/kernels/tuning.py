"""Which tiles the Triton kernels run with, by shape: a table, so that nobody waits for a search in a first step."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GramTiles:
    """Tile of a Gram block (``i`` × ``j``), tokens a step (``t``), and over how many programs the tokens are split."""

    i: int
    j: int
    t: int
    splits: int
    warps: int
    stages: int


@dataclass(frozen=True)
class RotateTiles:
    """Channels of the other side that one program turns (``across``), and the step along the block (``along``)."""

    across: int
    along: int
    warps: int
    stages: int


def gram_tiles(width: int, tokens: int, blocks: int, device: torch.device) -> GramTiles:
    """Tiles for ``blocks`` Gram matrices of ``width`` channels over ``tokens``."""
    side = 128 if width > 64 else 64 if width > 32 else 32 if width > 16 else 16
    wide = width > 192 and tokens >= 4096
    i, j, warps, stages = (128, 256, 8, 3) if wide else (side, side, 4, 4)
    programs = blocks * -(-width // i) * -(-width // j)
    fill = -(-processors(device) // programs)
    splits = 1 << (fill.bit_length() - 1)
    return GramTiles(i, j, 32, max(1, min(splits, tokens // 256)), warps, stages)


def rotate_tiles(width: int) -> RotateTiles:
    """Tiles for the rotation of one side by blocks of ``width`` channels."""
    return RotateTiles(64 if width > 64 else 32, 32 if width > 16 else 16, 8 if width > 64 else 4, 2)


@functools.cache
def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
