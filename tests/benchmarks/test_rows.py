"""Files of results: what is added to them, and what was written before a column was."""

from __future__ import annotations

import csv
from dataclasses import dataclass, make_dataclass
from pathlib import Path

import pytest
import rows
import torch


@dataclass(frozen=True, kw_only=True)
class Older:
    name: str
    ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class Newer:
    name: str
    limit: int | None = None
    turns: int = 7
    ms: float | None = None


@pytest.fixture
def older(tmp_path: Path) -> Path:
    path = tmp_path / "X.csv"
    rows.append_csv(path, Older(name="a, b", ms=0.1 + 0.2), rows.facts(torch.device("cpu")))
    rows.append_csv(path, Older(name="c"), {})
    return path


def test_a_column_that_a_file_lacks_has_its_default(older: Path) -> None:
    found = [row for row, _ in rows.read_csv(older, Newer)]
    assert found == [Newer(name="a, b", ms=0.1 + 0.2), Newer(name="c")]


def test_an_older_file_is_written_anew_with_the_columns_it_lacks(older: Path) -> None:
    before = rows.read_csv(older, Older)
    for limit in (3, 4):
        rows.append_csv(older, Newer(name="d", limit=limit), {"device": "X"})
    found = rows.read_csv(older, Newer)
    first = [Newer(name="a, b", ms=0.1 + 0.2), Newer(name="c")]
    assert [row for row, _ in found] == [*first, Newer(name="d", limit=3), Newer(name="d", limit=4)]
    assert [machine for _, machine in found[:2]] == [machine for _, machine in before]
    assert [machine["device"] for _, machine in found[2:]] == ["X", "X"]
    with older.open(newline="") as file:
        header, *lines = list(csv.reader(file))
    assert header[:5] == ["name", "limit", "turns", "ms", "device"]
    assert {len(line) for line in lines} == {len(header)}
    assert not older.with_suffix(".tmp").exists()


@pytest.mark.parametrize(
    ("fields", "columns"),
    [([("name", str), ("size", int)], "ms, size"), ([("name", str)], "ms")],
    ids=["one without a default, and one of another kind of row", "one of another kind of row"],
)
def test_a_file_of_other_columns_is_left_alone(older: Path, fields: list[tuple[str, type]], columns: str) -> None:
    before = older.read_bytes()
    row = make_dataclass("Other", fields)(*(kind() for _, kind in fields))
    with pytest.raises(ValueError, match=rf"has other columns \({columns}\): give another file"):
        rows.append_csv(older, row, {})
    assert older.read_bytes() == before
