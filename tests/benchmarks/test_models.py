from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import models
import pytest

SMALL = ["--size", "tiny", "--dtype", "float32", "--device", "cpu", "--jobs", "1", "--steps", "3", "--check"]


def run(out: Path, *extra: str) -> list[dict[str, str]]:
    models.main([*SMALL, "--out", str(out), *extra])
    with out.open(newline="") as file:
        return list(csv.DictReader(file))


def test_two_models(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    rows = run(tmp_path / "models.csv", "--only", "Llama*", "nanoGPT*")
    assert [row["model"] for row in rows] == ["Llama 3.2 1B", "nanoGPT gpt2-medium"]
    for row in rows:
        assert row["reason"] == ""
        assert float(row["last_loss"]) < float(row["first_loss"])
        assert float(row["raw_loss"]) == pytest.approx(float(row["compiled_loss"]))
        assert 0 < float(row["spectrum_error"]) < 1e-6 < float(row["least_change"])
        assert float(row["coverage"]) > 80
        assert row["device"].endswith("CPU") and row["size"] == "tiny" and row["date"]


def test_a_failure_is_a_row_and_an_error(tmp_path: Path) -> None:
    out = tmp_path / "models.csv"
    with pytest.raises(SystemExit, match="nanoGPT gpt2-medium: column 'reason'"):
        run(out, "--only", "nanoGPT*", "--seconds", "0.01")
    with out.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["reason"] == "no result after 0.01 s" and row["last_loss"] == ""


def test_a_missing_library_is_said_and_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    args = models.parse(SMALL)
    monkeypatch.setitem(models.MODELS, "absent", replace(models.MODELS["timm ViT large"], name="absent", library="no_such"))
    row = models.one("absent", args)
    assert row.reason == "not installed: no_such" and not row.is_failed


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"last_loss": float("nan")}, "the loss did not fall"),
        ({"least_change": 0.0}, "a weight did not move"),
        ({"spectrum_error": 2e-4}, "singular values moved by 2.0e-04"),
        ({"raw_loss": 4.1}, "raw loss 4.1, compiled 4"),
        ({"raw_loss": 4.1, "ordinary_loss": 4.2}, "raw loss 4.1, compiled 4, by torch.compile alone 4.2"),
        ({"coverage": 0.0}, "nothing was rotated"),
    ],
)
def test_what_does_not_hold_is_named(change: dict[str, float], reason: str) -> None:
    good = models.Row(
        model="", note="", dtype="bfloat16", steps=6, coverage=80.0, first_loss=5.0, last_loss=4.5,
        raw_loss=4.0, compiled_loss=4.0, spectrum_error=1e-6, least_change=1e-3,
    )  # fmt: skip
    assert models.broken(good) == models.broken(replace(good, raw_loss=4.1, ordinary_loss=4.0)) == []
    assert models.broken(replace(good, **change)) == [reason]
