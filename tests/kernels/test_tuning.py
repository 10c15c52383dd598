"""Measured tiles: where they are kept, and that a damaged table harms nobody."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from poetx_compile.kernels import tuning
from poetx_compile.kernels.tuning import TABLES, GramTiles, RotateTiles, gram_splits

CPU = torch.device("cpu")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache" / "tiles.json"
    monkeypatch.setenv("POETX_TUNING", str(path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    tuning._measured.cache_clear()
    yield path
    tuning._measured.cache_clear()


def test_what_is_kept_is_read_back(place: Path) -> None:
    chosen = {"gram/256": GramTiles(64, 64, 32, 4, 2), "rows/tf32/128": RotateTiles(32, 16, 4, 1)}
    tuning.keep(CPU, {"gram/256": GramTiles(16, 16, 16, 4, 1)})
    tuning._measured.cache_clear()
    tuning.keep(CPU, chosen)
    tuning._measured.cache_clear()
    assert tuning._measured("a GPU") == chosen
    assert tuning._measured("another GPU") == {}
    assert [path.name for path in place.parent.iterdir()] == ["tiles.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", json.dumps({"a GPU": {"gram/256": [1, 2]}}), '{"a GPU": 3}'])
def test_a_damaged_table_is_left_aside_with_a_warning(place: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    place.parent.mkdir()
    place.write_text(text)
    assert tuning._measured("a GPU") == {}
    assert "not a table of bench tune's" in caplog.text


def test_tiles_of_another_version_are_left_aside(place: Path) -> None:
    place.parent.mkdir()
    place.write_text(json.dumps({"a GPU": {"gone/3": [1, 2]}}))
    assert tuning._measured("a GPU") == {}


def test_without_a_home_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("POETX_TUNING", raising=False)
    monkeypatch.setattr(Path, "expanduser", no_home)
    tuning._measured.cache_clear()
    assert tuning._measured("a GPU") == {}


def test_every_table_has_every_key() -> None:
    assert len({frozenset(table) for table in TABLES.values()}) == 1


def test_tokens_are_split_to_fill_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "processors", lambda device: 132)
    assert gram_splits(64, 8192, CPU) == 2
    assert gram_splits(64, 300, CPU) == 1
    assert gram_splits(1000, 8192, CPU) == 1
    assert gram_splits(1, 8192, CPU) == 8
