"""The pages that are written by scripts say what the tables of the tests say now."""

from __future__ import annotations

import runpy
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def test_compatibility_is_up_to_date() -> None:
    page = runpy.run_path(str(DOCS / "make_compatibility.py"))["page"]()
    assert (DOCS / "compatibility.md").read_text(encoding="utf-8") == page, "run python docs/make_compatibility.py"
