"""Tables of whole training steps in Markdown: ``python benchmarks/train_table.py results/train-step-....csv README.md``.

What stands in the second file between the two markers is written anew, with the columns of ``SHORT``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from documents import table_line, write_into
from rows import read_csv
from train_rows import Row

NAME = "train-step"
"""Of the markers in the document."""

SHORT = (
    *("model", "tokens a step", "method", "tokens/s", "step, ms", "optimizer", "of it retraction"),
    *("peak, GB", "step / floor"),
)
_TEXTS = 3


def markdown(rows: Sequence[Row], headings: Sequence[str] = ()) -> str:
    """A table with the last row of each method at each point; what failed says why below it.

    Args:
        headings: of the columns to show; all where none is given.
    """
    points = list(dict.fromkeys(row.point for row in rows))
    last = {(row.point, row.label, row.compiler, row.caches): row for row in rows}
    ordered = sorted(last.values(), key=lambda row: points.index(row.point))
    measured = [_cells(row) for row in ordered if row.step_ms is not None]
    shown = headings or (list(measured[0]) if measured else SHORT)
    lines = [table_line(shown), f"|{'---|' * _TEXTS}{'---:|' * (len(shown) - _TEXTS)}"]
    lines += [table_line([cells[heading] for heading in shown]) for cells in measured]
    remarks = [(row, text) for row in ordered for text in (_failure(row), row.note) if text]
    lines += ["", *(f"* {_model(row)}, {_tokens(row)}, {row.label}: {text}" for row, text in remarks)]
    return "\n".join(lines).rstrip()


def _cells(row: Row) -> dict[str, str]:
    """What stands under each heading."""
    milliseconds = {
        "step, ms": row.step_ms,
        "forward": row.forward_ms,
        "backward": row.backward_ms,
        "optimizer": row.optimizer_ms,
        "of it retraction": row.retraction_ms,
    }
    sizes = {
        "peak, GB": row.peak_bytes,
        "planned": row.planned_bytes,
        "weights": row.weight_bytes,
        "residuals": row.residual_bytes,
        "gradients": row.gradient_bytes,
        "states": row.state_bytes,
        "the rest": row.rest_bytes,
    }
    return {
        "model": _model(row),
        "tokens a step": _tokens(row),
        "method": row.label,
        "tokens/s": _number(row.tokens_per_s, ",.0f"),
        **{heading: _number(value, ".1f") for heading, value in milliseconds.items()},
        **{heading: _number(None if value is None else value / 1e9, ".2f") for heading, value in sizes.items()},
        "peak / planned": _number(_ratio(row.peak_bytes, row.planned_bytes), ".2f"),
        "floor, ms": _number(row.floor_ms, ".1f"),
        "step / floor": _number(row.gap, ".2f"),
        "first step, s": _number(row.first_step_s, ".0f"),
    }


def _failure(row: Row) -> str:
    planned = f" (planned: {row.planned_bytes / 1e9:.2f} GB)" if row.reason and row.planned_bytes else ""
    return row.reason + planned


def _model(row: Row) -> str:
    return f"{row.size}, {row.layers} layers" if row.is_cut else row.size


def _tokens(row: Row) -> str:
    micro = f"{row.micro} × " if row.micro > 1 else ""
    return f"{micro}{row.batch} × {row.seq}" + (" (most that fits)" if row.fits else "")


def _ratio(value: float | None, other: float | None) -> float | None:
    return value / other if value and other else None


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def main(source: str, document: str) -> None:
    write_into(Path(document), {NAME: markdown([row for row, _ in read_csv(Path(source), Row)], SHORT)})


if __name__ == "__main__":
    main(*sys.argv[1:])
