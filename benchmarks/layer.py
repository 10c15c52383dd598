"""Time of one linear layer's forward and backward pass and of its weight's update: rotated, ordinary, and the authors' own.

    python benchmarks/layer.py            # on a GPU: all shapes, minutes
    python benchmarks/layer.py --quick    # two shapes
    python benchmarks/layer.py --official CHECKOUT    # beside the layers of github.com/Sphere-AI-Lab/poet

README.md beside this file says how it is measured.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import floors
import methods
import plot_layer
import torch
from floors import Kernel, Peaks
from layer_rows import BASELINES, TRAINING, UPDATE, Row, floor_ratio
from methods import Source
from official import Official
from rich.console import Console
from rich.table import Table
from rows import facts, write_csv
from timing import Stopwatch, Timing, Work, one_line, peak_mib, side_by_side, stopwatch

RESULTS = Path(__file__).parent / "results"
SHAPES = [(2048, 2048), (4096, 4096), (14336, 4096), (4096, 14336), (5120, 13824)]
TOKENS = [1024, 2048, 8192, 16384]
BLOCKS = [128, 256, 512]
QUICK = {"shapes": [(4096, 4096), (14336, 4096)], "tokens": [2048, 8192], "blocks": [256]}


@dataclass(frozen=True)
class Case:
    """A method at a point: how to set its work up when its turn comes, and what it must do at least."""

    method: str
    block: int | None
    setup: Callable[[], Work]
    kernels: Sequence[Kernel]


@dataclass(frozen=True)
class Point:
    """Where methods are compared: ``tokens`` is None for the update of ``count`` weights."""

    m: int
    n: int
    tokens: int | None
    count: int = 1

    @property
    def what(self) -> str:
        return UPDATE if self.tokens is None else TRAINING

    def __str__(self) -> str:
        return f"{self.what}, {self.m}x{self.n}, " + (f"{self.tokens} tokens" if self.tokens else f"{self.count} weights")


class Benchmark:
    """All points and their methods, as the command line asks for them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._source = Source(args.device)
        self._official = Official(args.official, args.official_minutes) if args.official else None

    def points(self) -> Iterator[tuple[Point, list[Case]]]:
        """Updates first: should a capture of the official layer fail, it cannot harm them."""
        for m, n in self._args.shapes:
            yield Point(m, n, None, methods.weights_at_once(m, n)), list(self._updates(m, n))
        for m, n in self._args.shapes:
            for tokens in self._args.tokens:
                yield Point(m, n, tokens), list(self._layers(m, n, tokens))

    def _updates(self, m: int, n: int) -> Iterator[Case]:
        where = self._source, m, n, methods.weights_at_once(m, n)
        yield Case("adamw", None, partial(methods.adamw, *where), floors.adamw(m * n))
        for block in self._args.blocks:
            fold, even = floors.retract(m, n, block), floors.even_steps(m, n, block)
            step = floors.adamw(floors.skews(m, n, block), width=4)
            yield Case("poetx", block, partial(methods.retract, *where, block), fold)
            even_fold = partial(methods.retract, *where, block, is_even=True)
            yield Case("poetx, even steps", block, even_fold, [*even, *fold])
            whole = [*step, *even, *fold]
            yield Case("poetx with AdamW on q, even steps", block, partial(methods.step_and_retract, *where, block), whole)
        if self._official is None:
            return
        for block in self._args.official_blocks:
            step, fold = floors.adamw(floors.skews(m, n, block)), floors.official_merge(m, n, block)
            yield Case("official-adamw", block, partial(self._official.step, *where, block), step)
            yield Case("official-merge", block, partial(self._official.merge, *where, block), fold)

    def _layers(self, m: int, n: int, tokens: int) -> Iterator[Case]:
        x, g = self._source.normal(tokens, n).requires_grad_(), self._source.normal(tokens, m)
        where = self._source, m, n, x, g
        yield Case("linear", None, partial(methods.linear, *where), floors.linear(m, n, tokens))
        for block in self._args.blocks:
            yield Case("poetx", block, partial(methods.poetx, *where, block), floors.poetx(m, n, tokens, block))
        if self._official is None or tokens not in self._args.official_tokens:
            return
        for block in self._args.official_blocks:
            fast, mem = floors.official_fast(m, n, tokens, block), floors.official_mem(m, n, tokens, block)
            yield Case("official-fast", block, partial(self._official.layer, *where, block, is_lean=False), fast)
            yield Case("official-mem", block, partial(self._official.layer, *where, block, is_lean=True), mem)


def measure(point: Point, cases: Sequence[Case], device: torch.device, peaks: Peaks | None) -> list[Row]:
    """Set all methods of a point up, then time them in turns. One that fails gets a row that says why."""
    rows = []
    watches: dict[int, Stopwatch] = {}
    for place, case in enumerate(cases):
        row = _row(point, case, peaks)
        try:
            work = case.setup()
            watch = stopwatch(work, device)
            watch()  # a failure here is still this method's own
            if point.tokens and device.type == "cuda":
                row = replace(row, peak_mib=peak_mib(work))
            watches[place] = watch
        except Exception as error:
            row = replace(row, reason=one_line(error))
        rows.append(row)
    for (place, watch), timing in zip(watches.items(), side_by_side(list(watches.values()))):
        rows[place] = _timed(rows[place], watch, timing, point.count)
    return _with_ratios(rows)


def _row(point: Point, case: Case, peaks: Peaks | None) -> Row:
    return Row(
        what=point.what,
        method=case.method,
        block=case.block,
        m=point.m,
        n=point.n,
        tokens=point.tokens,
        flops=sum(kernel.flops for kernel in case.kernels),
        bytes=sum(kernel.bytes for kernel in case.kernels),
        floor_ms=floors.floor_ms(case.kernels, peaks),
    )


def _timed(row: Row, watch: Stopwatch, timing: Timing, count: int) -> Row:
    middle, low, high = (ms / count for ms in (timing.median, timing.q20, timing.q80))
    return replace(row, ms_median=middle, ms_q20=low, ms_q80=high, timed_by=watch.timed_by)


def _with_ratios(rows: Sequence[Row]) -> list[Row]:
    base = next((row.ms_median for row in rows if row.method == BASELINES[row.what]), None)
    return [replace(row, ratio_to_baseline=row.ms_median / base) if row.ms_median and base else row for row in rows]


def show(rows: Sequence[Row], console: Console) -> None:
    """A table for each kind of row: the ratio to the baseline, and in brackets the ratio of the floors."""
    for what, baseline in BASELINES.items():
        part = [row for row in rows if row.what == what]
        labels = list(dict.fromkeys(row.label for row in part if row.method != baseline))
        table = Table(title=f"{what}: time over that of {baseline} (floor over floor)", title_justify="left")
        for name in ("shape", "tokens", f"{baseline}, ms", *labels):
            table.add_column(name, justify="right", overflow="fold")
        for point in dict.fromkeys(row.point for row in part):
            here = {row.label: row for row in part if row.point == point}
            _, m, n, tokens = point
            first = here[baseline].ms_median
            cells = [_cell(here.get(label), rows) for label in labels]
            table.add_row(f"{m}x{n}", str(tokens or ""), f"{first:.3f}" if first else "failed", *cells)
        console.print(table)


def _cell(row: Row | None, rows: Sequence[Row]) -> str:
    if row is None:
        return ""
    if row.ratio_to_baseline is None:
        return "failed"
    floor = floor_ratio(row, rows)
    return f"{row.ratio_to_baseline:.3f}" + (f" ({floor:.3f})" if floor else "")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="two shapes, two numbers of tokens, one block size")
    parser.add_argument("--shapes", type=_shapes, metavar="MxN,...", help="outputs x inputs")
    parser.add_argument("--tokens", type=_numbers, metavar="N,...")
    parser.add_argument("--blocks", type=_numbers, metavar="B,...")
    parser.add_argument("--official", type=Path, metavar="DIR", help="the folder that holds poet_torch")
    parser.add_argument("--official-minutes", type=float, default=5.0, help="how long it may compile altogether")
    parser.add_argument("--peak-flops", type=float, help="bfloat16 flop/s, for the floors; default: by device")
    parser.add_argument("--peak-bandwidth", type=float, help="bytes/s, for the floors; default: by device")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/layer-<device>.csv")
    args = parser.parse_args(argv)
    args.official_tokens = args.tokens or QUICK["tokens"]
    args.official_blocks = args.blocks or QUICK["blocks"]
    grid = QUICK if args.quick else {"shapes": SHAPES, "tokens": TOKENS, "blocks": BLOCKS}
    for name, default in grid.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    return args


def _shapes(text: str) -> list[tuple[int, int]]:
    shapes = [shape.split("x") for shape in text.split(",")]
    return [(int(m), int(n)) for m, n in shapes]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")
    machine = facts(args.device)
    device = str(machine["device"])
    out = args.out or RESULTS / f"layer-{re.sub(r'[^a-z0-9]+', '-', device.lower())}.csv"
    rows: list[Row] = []
    told: set[str] = set()
    for point, cases in Benchmark(args).points():
        print(point, flush=True)
        rows += measure(point, cases, args.device, floors.peaks(device, args.peak_flops, args.peak_bandwidth))
        write_csv(out, rows, machine)
        for row in rows[-len(cases) :]:
            if row.reason and row.reason not in told:
                print(f"  {row.label}: {row.reason}")
                told.add(row.reason)
    pictures = plot_layer.draw(out)
    show(rows, Console(width=None if sys.stdout.isatty() else 160))
    print("\n".join(map(str, (out, *pictures))))
    if failed := [row for row in rows if row.reason and not row.method.startswith("official")]:
        raise SystemExit(f"{len(failed)} of our own rows failed; column 'reason' of {out} says why")


if __name__ == "__main__":
    main()
