"""The table of several GPUs in Markdown: ``python benchmarks/ddp_table.py results/ddp-....csv docs/distributed.md``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ddp_rows import Row, fewer_bytes, read_csv
from documents import table_line, write_into

HEADINGS = (
    "model",
    "method",
    "tokens a GPU",
    "GPUs",
    "tokens/s of each",
    "over one",
    "MB handed over",
    "AdamW's / these",
    "peak, GB",
)


def markdown(rows: Sequence[Row]) -> str:
    measured = sorted((row for row in rows if row.ms_median), key=lambda row: (row.model, row.batch))
    dashes = f"|---|---|---|{'---:|' * (len(HEADINGS) - 3)}"
    return "\n".join([table_line(HEADINGS), dashes, *(table_line(_cells(row, measured)) for row in measured)])


def _cells(row: Row, rows: Sequence[Row]) -> list[str]:
    less = fewer_bytes(row, rows)
    return [
        row.model,
        row.described,
        f"{row.batch} × {row.seq}",
        str(row.ranks),
        f"{row.tokens_per_second:,.0f}",
        f"{row.efficiency:.3f}" if row.efficiency and row.ranks > 1 else "",
        f"{row.payload_bytes / 1e6:,.0f}" if row.payload_bytes else "",
        f"{less:.2f}" if less else "",
        f"{row.peak_mib * 2**20 / 1e9:.1f}" if row.peak_mib else "",
    ]


def main(csv: Path, document: Path) -> None:
    write_into(document, {"several gpus": markdown(read_csv(csv))})


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
