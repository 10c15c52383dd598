"""``python -m poetx_compile bench tune``: measure the kernels' tiles on the GPU at hand, and keep the fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from .errors import PoetxError
from .kernels import tuning
from .kernels.gram import GramSide
from .kernels.tuning import GramTiles, RotateTiles, Tiles
from .layout import BlockLayout

WIDTHS = (64, 128, 256, 512)
_FEATURES, _TOKENS = 4096, 4096

_GRAM = ((64, 64, 32, 4, 4), (128, 128, 32, 4, 4), (128, 128, 64, 8, 3), (128, 256, 32, 8, 3), (128, 256, 64, 8, 3))
_ROTATE = (
    *((64, 64, 4, 2), (64, 64, 8, 2), (32, 64, 4, 2), (64, 64, 8, 1), (32, 64, 4, 1), (128, 64, 8, 1), (64, 32, 8, 2)),
    *((32, 32, 8, 1), (16, 32, 4, 1), (32, 16, 8, 1), (16, 64, 8, 1)),
)

Case = tuple[str, Tiles, Callable[[], object]]


def tune() -> None:
    """Time every candidate on the current device; about two minutes.

    Raises:
        PoetxError: there is no GPU, or no Triton.
    """
    if not torch.cuda.is_available():
        raise PoetxError("poetx: bench tune measures a GPU, and torch sees none")
    try:
        from triton.testing import do_bench
    except ImportError as error:
        raise PoetxError("poetx: bench tune measures Triton kernels; install triton first") from error

    device = torch.device("cuda", torch.cuda.current_device())
    console = Console()
    times: dict[str, list[tuple[float, Tiles]]] = {}
    cases = [*_gram_cases(device), *_rotate_cases(device)]
    for key, tiles, run in track(cases, "timing tiles", console=console):
        milliseconds = _time(run, do_bench)
        if milliseconds is not None:
            times.setdefault(key, []).append((milliseconds, tiles))
    chosen = {key: min(found, key=lambda pair: pair[0]) for key, found in times.items()}
    table = Table("kernel", "ms", "tiles", title=torch.cuda.get_device_name(device))
    for key, (milliseconds, tiles) in chosen.items():
        table.add_row(key, f"{milliseconds:.4f}", str(tiles))
    console.print(table)
    tuning.keep(device, {key: tiles for key, (_, tiles) in chosen.items()})
    console.print(f"kept in {tuning.place()}; new processes use it")


def _time(run: Callable[[], object], do_bench: Callable[..., float]) -> float | None:
    try:
        run()
        torch.cuda.synchronize()
        return do_bench(run, warmup=5, rep=30, return_mode="median")
    except Exception:  # whatever keeps Triton from compiling or launching these tiles
        return None


def _gram_cases(device: torch.device) -> Iterator[Case]:
    from .kernels import triton_gram

    left, right = (torch.randn(_TOKENS, _FEATURES, dtype=torch.bfloat16, device=device) for _ in range(2))
    for width in WIDTHS:
        layout = _layout(width)
        side = GramSide(left, right, layout.channels(0, 0, 0).to(device), layout.width, layout.run)
        for numbers in _GRAM:
            tiles = GramTiles(*numbers)
            if max(tiles.i, tiles.j) <= max(width, 128):
                yield f"gram/{width}", tiles, partial(triton_gram.block_gram, [side], tiles=tiles)


def _rotate_cases(device: torch.device) -> Iterator[Case]:
    from .kernels import triton_rotate

    weight = torch.zeros(_FEATURES, _FEATURES, dtype=torch.bfloat16, device=device)
    residual = torch.zeros_like(weight, dtype=torch.int8)
    for precision, dtype in (("tf32", torch.float16), ("tf32x3", torch.float32)):
        for width in WIDTHS:
            layout = _layout(width)
            channels = layout.channels(0, 0, 0).to(device)
            rotation = torch.zeros(layout.count, width, width, dtype=dtype, device=device)
            for side, rows, columns in (("rows", rotation, None), ("columns", None, rotation)):
                for numbers in _ROTATE:
                    tiles = RotateTiles(*numbers)
                    operands = (weight, residual, rows, channels, columns, channels, layout.run, precision, tiles)
                    yield f"{side}/{precision}/{width}", tiles, partial(triton_rotate.rotate_, *operands)


def _layout(width: int) -> BlockLayout:
    return BlockLayout.of(_FEATURES, width, 32)
