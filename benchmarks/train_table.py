"""Tables of whole training steps in Markdown: ``python benchmarks/train_table.py results/train-step-....csv README.md``.

The second file's lines between the two markers are written anew.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rows import read_csv
from train_rows import Row

BEGIN, END = "<!-- train-step: begin -->", "<!-- train-step: end -->"

_HEADINGS = (
    *("model", "tokens a step", "method", "tokens/s", "step, ms", "forward", "backward", "optimizer", "of it retraction"),
    *("peak, GB", "weights", "residuals", "gradients", "states", "the rest", "floor, ms", "step / floor", "first step, s"),
)


def markdown(rows: Sequence[Row]) -> str:
    """A table with the last row of each method at each point; what failed says why below it."""
    last = {(row.point, row.method, row.compiler, row.caches): row for row in rows}
    ordered = sorted(last.values(), key=lambda row: list(dict.fromkeys(r.point for r in rows)).index(row.point))
    lines = [f"| {' | '.join(_HEADINGS)} |", f"|{'---|' * 3}{'---:|' * (len(_HEADINGS) - 3)}"]
    lines += [f"| {' | '.join(_cells(row))} |" for row in ordered if row.step_ms is not None]
    lines += ["", *(f"* {_model(row)}, {_tokens(row)}, {row.method}: {row.reason}" for row in ordered if row.reason)]
    lines += [f"* {_model(row)}, {_tokens(row)}, {row.method}: {row.note}" for row in ordered if row.note]
    return "\n".join(lines).rstrip()


def write_into(document: Path, table: str) -> None:
    """Put a table between the markers of a document.

    Raises:
        ValueError: the document has no such markers, or not once each.
    """
    text = document.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{document} must hold {BEGIN} and then {END}, once each")
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    document.write_text(f"{before}{BEGIN}\n{table}\n{after}")


def _cells(row: Row) -> list[str]:
    milliseconds = (row.step_ms, row.forward_ms, row.backward_ms, row.optimizer_ms, row.retraction_ms)
    bytes_ = (
        *(row.peak_bytes, row.weight_bytes, row.residual_bytes, row.gradient_bytes),
        *(row.state_bytes, row.rest_bytes),
    )
    return [
        _model(row),
        _tokens(row),
        row.method,
        _number(row.tokens_per_s, ",.0f"),
        *(_number(value, ".1f") for value in milliseconds),
        *(_number(None if value is None else value / 1e9, ".2f") for value in bytes_),
        _number(row.floor_ms, ".1f"),
        _number(row.gap, ".2f"),
        _number(row.first_step_s, ".0f"),
    ]


def _model(row: Row) -> str:
    return f"{row.size}, {row.layers} layers" if row.is_cut else row.size


def _tokens(row: Row) -> str:
    micro = f"{row.micro} × " if row.micro > 1 else ""
    return f"{micro}{row.batch} × {row.seq}" + (" (most that fits)" if row.fits else "")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def main(source: str, document: str) -> None:
    write_into(Path(document), markdown([row for row, _ in read_csv(Path(source), Row)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
