"""Tables between markers."""

from __future__ import annotations

from pathlib import Path

import pytest
from documents import markers, write_into


def test_a_table_is_written_anew_and_all_else_stays(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    begin, end = markers("here")
    document.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    for table in ("first", "second"):
        write_into(document, {"here": table})
    assert document.read_text() == f"before\n{begin}\nsecond\n{end}\nafter\n"


@pytest.mark.parametrize("text", ["none", "{end} {begin}", "{begin} {begin} {end}", "{begin} only"])
def test_a_document_without_its_markers_is_left_as_it_is(tmp_path: Path, text: str) -> None:
    document = tmp_path / "page.md"
    begin, end = markers("there")
    text = text.format(begin=begin, end=end) + "".join(markers("here"))
    document.write_text(text)
    with pytest.raises(ValueError, match="must hold <!-- there: begin --> and then <!-- there: end -->, once each"):
        write_into(document, {"here": "a table", "there": "another"})
    assert document.read_text() == text
