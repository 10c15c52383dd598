"""What fits which card: the planned peak of a training step with fused AdamW, by size and method. On a CPU, nothing is allocated.

    python benchmarks/fits.py                                                    # all sizes: minutes
    python benchmarks/fits.py --sizes 8b --seq 4096 --methods poetx,adamw --out fits.csv
    python benchmarks/fits.py --document docs/memory.md --measured benchmarks/results/train-step-h100.csv

Estimates are those of ``python -m poetx_compile plan``, of the very models and methods that ``train_step.py`` trains. What is in
the CSV is not estimated again. The table has beside an estimate what was measured, if it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import train_rows
from documents import table_line, write_into
from llama import SIZES
from matplotlib.figure import Figure
from rows import append_csv, facts, read_csv
from train_methods import Spec
from train_plan import PLANNED, planned
from train_run import Case

from poetx_compile.estimate import Peak

OUT = Path(__file__).parent / "results" / "fits.csv"
METHODS = (
    "adamw",
    "adamw:checkpointing=True",
    "poetx",
    "poetx:checkpointing=True",
    "poetx:checkpointing=True:skew_dtype=bfloat16",
    "poetx:storage=bf16-lean:checkpointing=True",
    "poetx:storage=int8:checkpointing=True",
)
CARDS = (24, 48, 80)
"""In 10⁹ bytes."""

NAME = "fits"
PARTS = {
    "weights": "#3b6ea5",
    "residuals": "#7fb2d9",
    "q": "#5aa469",
    "states": "#d9a441",
    "gradients": "#c8553d",
    "activations": "#b0b0b0",
    "logits": "#8a8a8a",
    "scratch": "#666666",
}


@dataclass(frozen=True)
class Row(Peak):
    """An estimate of a case: bytes at the peak, by what they are for."""

    size: str
    method: str
    batch: int
    seq: int

    @property
    def key(self) -> tuple[str, str, int, int]:
        return self.size, self.method, self.batch, self.seq


def estimated(case: Case) -> Row:
    found = planned(case)
    if found is None:
        raise ValueError(f"{case.method} is not known to the estimator")
    peak = {part.name: getattr(found, part.name) for part in fields(Peak)}
    return Row(**peak, size=case.size, method=case.method, batch=case.batch, seq=case.seq)


def measured_peaks(path: Path) -> dict[tuple[str, str, int, int], int]:
    """Of whole models at one micro-batch; what layers compiled one by one took counts for the model, with either ``updates``."""
    return {
        (
            row.size,
            row.method.replace(":regional=True", "").replace(":updates=given", ""),
            row.batch,
            row.seq,
        ): row.peak_bytes
        for row, _ in read_csv(path, train_rows.Row)
        if row.peak_bytes and row.micro == 1 and not row.is_cut
    }


def markdown(rows: Sequence[Row], peaks: dict[tuple[str, str, int, int], int]) -> str:
    """Sizes by methods; one table for the tokens that come first."""
    first = rows[0]
    found = {row.key: row for row in rows}
    methods = list(dict.fromkeys(row.method for row in rows))
    sizes = [size for size in SIZES if any(row.size == size for row in rows)]
    lines = [table_line([f"{first.batch} × {first.seq} tokens", *(f"`{method}`" for method in methods)])]
    lines.append(f"|---|{'---:|' * len(methods)}")
    for size in sizes:
        keys = [(size, method, first.batch, first.seq) for method in methods]
        lines.append(table_line([size, *(_cell(found.get(key), peaks.get(key)) for key in keys)]))
    return "\n".join(lines)


def _cell(row: Row | None, peak: int | None) -> str:
    if row is None:
        return ""
    return f"{row.total / 1e9:.1f}" + (f" (measured: {peak / 1e9:.1f})" if peak else "")


def picture(rows: Sequence[Row]) -> Figure:
    """What each peak is made of, beside the cards."""
    figure = Figure(figsize=(11, 1.5 + 0.33 * len(rows)), layout="constrained")
    axes = figure.subplots()
    labels = [f"{row.size}  {row.method}" for row in rows]
    left = [0.0] * len(rows)
    for part, color in PARTS.items():
        widths = [getattr(row, part) / 1e9 for row in rows]
        axes.barh(labels, widths, 0.72, left=left, label=part, color=color)
        left = [start + width for start, width in zip(left, widths)]
    for card in CARDS:
        axes.axvline(card, color="black", linestyle=":", linewidth=1)
    axes.set_xticks([0, *CARDS, *range(2 * CARDS[-1], int(max(left)), CARDS[-1])])
    axes.set_xlim(0, max([*left, *CARDS]) * 1.02)
    axes.margins(y=0.01)
    axes.set_xlabel(f"planned peak of a step of {rows[0].batch} × {rows[0].seq} tokens, GB")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", ncols=2, frameon=False, fontsize=9)
    return figure


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--sizes", type=words, default=[size for size in SIZES if size != "tiny"], metavar="SIZE,...")
    parser.add_argument("--methods", type=words, default=list(METHODS), metavar="METHOD,...", help=", ".join(PLANNED))
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--seq", type=int, default=2048, help="tokens in each")
    parser.add_argument("--out", type=Path, default=OUT, help="CSV; a picture is drawn beside it")
    parser.add_argument("--document", type=Path, help="write the table between its markers in this file")
    parser.add_argument("--measured", type=Path, help="CSV of train_step.py, for the table")
    args = parser.parse_args(argv)
    if unknown := [size for size in args.sizes if size not in SIZES]:
        parser.error(f"no size {', '.join(unknown)}; there are {', '.join(SIZES)}")
    for method in args.methods:
        try:
            spec = Spec.parse(method)
        except ValueError as error:
            parser.error(str(error))
        if spec.name not in PLANNED:
            parser.error(f"{method}: only {' and '.join(PLANNED)} can be planned")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    machine = facts(torch.device("cpu"))
    rows = [row for row, _ in read_csv(args.out, Row)] if args.out.exists() else []
    for size in args.sizes:
        for method in args.methods:
            case = Case(size, method, seq=args.seq, batch=args.batch, micro=1, device="cpu")
            if (size, method, args.batch, args.seq) in {row.key for row in rows}:
                continue
            row = estimated(case)
            append_csv(args.out, row, machine)
            rows.append(row)
            print(f"{size}, {method}: {row.total / 1e9:.1f} GB", flush=True)
    shown = [row for row in rows if (row.batch, row.seq) == (args.batch, args.seq)]
    picture(shown).savefig(args.out.with_suffix(".png"), dpi=150)
    table = markdown(shown, measured_peaks(args.measured) if args.measured else {})
    print(table)
    if args.document:
        write_into(args.document, {NAME: table})


if __name__ == "__main__":
    main()
