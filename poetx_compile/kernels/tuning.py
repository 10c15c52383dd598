"""Which tiles the Triton kernels run with: a table by architecture and block width, so that nobody waits for a search.

``python -m poetx_compile bench tune`` measures a table for the GPU at hand; :func:`place` is read where it exists.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from .precision import PRECISIONS

log = logging.getLogger(__name__)

WIDEST = 512
"""Channels of the widest blocks that a kernel holds in registers."""


@dataclass(frozen=True)
class GramTiles:
    """Tile of a Gram block (``i`` × ``j``), and tokens a step (``t``)."""

    i: int
    j: int
    t: int
    warps: int
    stages: int


@dataclass(frozen=True)
class RotateTiles:
    """Channels of the other side that one program turns (``across``), and channels of the block it writes at once."""

    across: int
    along: int
    warps: int
    stages: int


Tiles = GramTiles | RotateTiles

_SMALL: dict[str, Tiles] = {
    "gram/16": GramTiles(16, 16, 32, 4, 4),
    "gram/32": GramTiles(32, 32, 32, 4, 4),
    "gram/64": GramTiles(64, 64, 32, 4, 4),
    **{
        f"{side}/{precision}/{width}": RotateTiles(32, width, 4, 2)
        for side in ("rows", "columns")
        for precision in PRECISIONS
        for width in (16, 32)
    },
}


def _table(gram: tuple[Tiles, Tiles, Tiles], **rotate: tuple[Tiles, Tiles, Tiles, Tiles]) -> dict[str, Tiles]:
    """Of widths 128, 256 and 512, and of 64 to 512 for ``rows`` and ``columns`` in each precision."""
    table = _SMALL | {f"gram/{width}": tiles for width, tiles in zip((128, 256, 512), gram)}
    for name, row in rotate.items():
        side, precision = name.split("_")
        table |= {f"{side}/{precision}/{width}": tiles for width, tiles in zip((64, 128, 256, 512), row)}
    return table


def _either_side(**rotate: tuple[Tiles, Tiles, Tiles, Tiles]) -> dict[str, tuple[Tiles, Tiles, Tiles, Tiles]]:
    return {f"{side}_{precision}": row for side in ("rows", "columns") for precision, row in rotate.items()}


_SQUARE = GramTiles(128, 128, 32, 4, 4)
_WIDE = GramTiles(128, 256, 32, 8, 3)
_R = RotateTiles
_EXACT = (_R(32, 32, 4, 2), _R(32, 32, 4, 2), _R(32, 32, 4, 1), _R(32, 16, 4, 1))

TABLES: dict[str, dict[str, Tiles]] = {
    "sm80": _table(  # not measured: within its shared memory, and by Triton 3.6 within its registers
        (_SQUARE, _SQUARE, _SQUARE),
        rows_ieee=(_R(32, 32, 4, 2), _R(32, 32, 4, 2), _R(32, 32, 4, 1), _R(16, 16, 4, 1)),
        columns_ieee=(_R(32, 32, 4, 2), _R(32, 32, 4, 2), _R(32, 32, 4, 1), _R(32, 16, 4, 1)),
        rows_tf32x3=(_R(32, 32, 4, 2), _R(32, 32, 4, 2), _R(32, 32, 4, 1), _R(32, 16, 4, 1)),
        columns_tf32x3=(_R(32, 32, 4, 2), _R(32, 32, 4, 2), _R(32, 64, 8, 1), _R(16, 32, 4, 1)),
        **_either_side(tf32=(_R(64, 64, 4, 2), _R(64, 64, 4, 2), _R(64, 64, 4, 2), _R(32, 32, 4, 2))),
    ),
    "sm90": _table(  # by bench tune on an H100 with bfloat16 weights, but for ieee, and tf32x3 at 512
        (_SQUARE, _WIDE, _WIDE),
        rows_ieee=_EXACT,
        columns_ieee=_EXACT,
        rows_tf32x3=(_R(64, 64, 4, 2), _R(64, 64, 4, 2), _R(64, 64, 4, 2), _R(32, 64, 8, 1)),
        columns_tf32x3=(_R(128, 64, 8, 1), _R(64, 64, 4, 2), _R(128, 64, 8, 1), _R(16, 64, 8, 1)),
        rows_tf32=(_R(64, 64, 8, 1), _R(64, 64, 8, 2), _R(64, 64, 4, 2), _R(128, 64, 8, 1)),
        columns_tf32=(_R(64, 64, 8, 1), _R(64, 32, 8, 2), _R(64, 64, 4, 2), _R(64, 64, 8, 2)),
    ),
    "other": _table(  # 64 KiB of shared memory
        (GramTiles(64, 64, 32, 4, 2),) * 3,
        **_either_side(
            ieee=(_R(16, 16, 4, 1), _R(16, 16, 4, 1), _R(16, 16, 4, 1), _R(16, 16, 4, 1)),
            tf32x3=(_R(16, 16, 4, 1), _R(16, 16, 4, 1), _R(16, 16, 4, 1), _R(16, 16, 4, 1)),
            tf32=(_R(32, 32, 4, 1), _R(32, 32, 4, 1), _R(32, 32, 4, 1), _R(16, 16, 4, 1)),
        ),
    ),
}
TABLES["sm100"] = TABLES["sm90"]  # not measured
_ANY = TABLES["other"]


def gram_tiles(width: int, device: torch.device) -> GramTiles:
    """Tiles for Gram matrices of ``width`` channels; above :data:`WIDEST` those of it."""
    return _find(f"gram/{min(padded(width), WIDEST)}", device)


def rotate_tiles(width: int, transposed: bool, precision: str, device: torch.device) -> RotateTiles:
    """Tiles for the rotation of rows, or where ``transposed`` of columns, by blocks of ``width`` channels."""
    return _find(f"{'columns' if transposed else 'rows'}/{precision}/{padded(width)}", device)


def gram_splits(programs: int, tokens: int, device: torch.device) -> int:
    """Over how many programs the tokens of each tile are split: the last wave full, few partial sums."""
    waves = {splits: -(-programs * splits // processors(device)) / splits * (1 + splits / 25) for splits in range(1, 9)}
    allowed = [splits for splits in waves if splits == 1 or tokens // splits >= 256]
    return min(allowed, key=waves.__getitem__)


@functools.cache
def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _find(key: str, device: torch.device) -> Any:
    measured = _measured(torch.cuda.get_device_name(device)) if device.type == "cuda" else {}
    return measured.get(key) or TABLES[architecture(device)][key]


def architecture(device: torch.device) -> str:
    """The key of :data:`TABLES` for a device."""
    if device.type != "cuda" or torch.version.hip:
        return "other"
    major = torch.cuda.get_device_capability(device)[0]
    return {8: "sm80", 9: "sm90"}.get(major, "sm100" if major == 10 else "other")


def place() -> Path:
    """Where measured tables are kept: ``{device name: {key: numbers}}``."""
    given = os.environ.get("POETX_TUNING")
    return Path(given) if given else Path("~/.cache/poetx_compile/tiles.json").expanduser()


@functools.cache
def _measured(name: str) -> dict[str, Tiles]:
    """What was measured on a device of this name, and is of use here."""
    try:
        numbers = json.loads(place().read_text())[name]
        return {key: type(_ANY[key])(*map(int, row)) for key, row in numbers.items() if key in _ANY}
    except (OSError, RuntimeError, KeyError):
        return {}
    except (ValueError, TypeError, AttributeError) as error:
        log.warning("%s is not a table of bench tune's, and is not used: %s", place(), error)
        return {}


def keep(device: torch.device, chosen: dict[str, Tiles]) -> None:
    """Add measured tiles of a device to :func:`place`; kernels that ran before go on with what they have."""
    name = torch.cuda.get_device_name(device)
    try:
        measured = dict(json.loads(place().read_text()))
    except (OSError, ValueError):
        measured = {}
    measured[name] = {key: list(astuple(tiles)) for key, tiles in (_measured(name) | chosen).items()}
    place().parent.mkdir(parents=True, exist_ok=True)
    temporary = place().with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(measured, indent=1))
    temporary.replace(place())


def padded(width: int) -> int:
    """The power of two, 16 at least, that holds a block."""
    return max(16, 1 << (width - 1).bit_length())
