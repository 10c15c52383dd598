"""Tables in Markdown, and where they stand in a document: between two markers, to be written anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def table_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def write_into(document: Path, tables: Mapping[str, str]) -> None:
    """Put each table between the markers of its name.

    Raises:
        ValueError: the document has no such markers, or not once each; it is left as it was.
    """
    text = document.read_text()
    for name, table in tables.items():
        begin, end = markers(name)
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise ValueError(f"{document} must hold {begin} and then {end}, once each")
        before, after = text[: text.index(begin)], text[text.index(end) :]
        text = f"{before}{begin}\n{table}\n{after}"
    document.write_text(text)
