"""Tables of convergence in Markdown: ``python benchmarks/convergence_table.py results/convergence-....csv docs/convergence.md``.

For every question of ``convergence_suites.py``, what stands in the document between its two markers is written anew.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

from convergence_recipes import Recipe
from convergence_rows import Key, Line, Row, by_run, read_csv
from convergence_suites import SUITES
from documents import table_line, write_into

NOTHING = "*Not measured yet.*"


def markdown(lines: Sequence[Line]) -> str:
    """A table of runs that have ended, seeds together, for each size and horizon by their last validation loss."""
    groups: dict[Key, list[Row]] = {}
    for key, found in by_run(lines).items():
        if found[-1].row.end:
            groups.setdefault(replace(key, seed=0), []).append(found[-1].row)
    if not groups:
        return NOTHING
    kinds = sorted({kind for rows in groups.values() for row in rows for kind in row.by_kind})
    headings = ["model", "tokens, M", "epochs", "recipe", "validation", *kinds, "seeds", "seconds", "peak, GB"]
    ordered = sorted(groups, key=lambda key: (key.size, key.steps * key.batch * key.seq, _loss(groups[key])))
    table = [
        table_line(headings),
        f"|{'---|' * 4}{'---:|' * (len(headings) - 4)}".replace("---|---|---|---|", "---|---:|---:|---|", 1),
    ]
    return "\n".join([*table, *(table_line(_cells(key, groups[key], kinds)) for key in ordered)])


def tables(lines: Sequence[Line]) -> dict[str, str]:
    """The table of each question; runs count whose recipe it lists, at any size, horizon and seed."""
    asked = {name: {str(Recipe.parse(text)) for text in suite.recipes} for name, suite in SUITES.items()}
    return {name: markdown([line for line in lines if line.key.recipe in recipes]) for name, recipes in asked.items()}


def write_all(document: Path, lines: Sequence[Line]) -> None:
    """Put each question's table between its markers.

    Raises:
        ValueError: the document has no such markers for a question, or not once each.
    """
    write_into(document, {f"convergence {name}": table for name, table in tables(lines).items()})


def _loss(rows: Sequence[Row]) -> float:
    """The mean over seeds; infinite where one of them diverged."""
    return mean(float("inf") if row.val_loss is None else row.val_loss for row in rows)


def _cells(key: Key, rows: Sequence[Row], kinds: Sequence[str]) -> list[str]:
    first = rows[0]
    known = [row.val_loss for row in rows if row.val_loss is not None]
    spread = f" ± {(max(known) - min(known)) / 2:.3f}" if len(known) > 1 else ""
    loss = f"{_loss(rows):.3f}{spread}" if len(known) == len(rows) else "diverged"
    peaks = [row.peak_bytes for row in rows if row.peak_bytes is not None]
    return [
        key.size,
        f"{first.tokens / 1e6:.1f}",
        f"{first.epochs:.2f}",
        f"`{key.recipe}`",
        loss,
        *(
            f"{mean(row.by_kind[kind] for row in rows):.3f}" if all(kind in row.by_kind for row in rows) else ""
            for kind in kinds
        ),
        str(len(rows)),
        f"{mean(row.seconds for row in rows):.0f}",
        f"{max(peaks) / 1e9:.1f}" if peaks else "",
    ]


def main(source: str, document: str) -> None:
    write_all(Path(document), read_csv(Path(source)))


if __name__ == "__main__":
    main(*sys.argv[1:])
