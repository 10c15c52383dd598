"""What fits which card: estimates of the cases that ``train_step.py`` measures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import fits
import pytest
from documents import markers
from rows import append_csv, read_csv
from train_plan import planned_bytes
from train_run import Case

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = ["--sizes", "tiny", "--seq", "64"]
LEAN = "poetx:storage=int8:checkpointing=True"


def test_estimates_are_those_of_the_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, document, measured = tmp_path / "X.csv", tmp_path / "page.md", tmp_path / "measured.csv"
    document.write_text("\n".join(markers(fits.NAME)))
    case = Case("tiny", f"{LEAN}:regional=True", seq=64, batch=1, micro=1)
    append_csv(measured, replace(case.row(""), peak_bytes=12_340_000_000), {})
    arguments = [*TINY, "--out", str(out), "--document", str(document), "--measured", str(measured)]
    fits.main([*arguments, "--methods", f"adamw,{LEAN}"])
    rows = [row for row, _ in read_csv(out, fits.Row)]
    assert [row.method for row in rows] == ["adamw", LEAN]
    assert [row.total for row in rows] == [planned_bytes(replace(case, method=row.method)) for row in rows]
    assert out.with_suffix(".png").exists()
    cells = document.read_text().splitlines()[3].split(" | ")
    assert cells[0] == "| tiny" and cells[2].endswith("(measured: 12.3) |")

    capsys.readouterr()
    fits.main([*arguments, "--methods", f"adamw,{LEAN}"])
    assert "tiny, adamw" not in capsys.readouterr().out, "what is in the CSV is not estimated again"
    assert len(read_csv(out, fits.Row)) == 2


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--sizes", "7b"], "no size 7b"),
        (["--methods", "muon"], "muon: only poetx and adamw can be planned"),
        (["--methods", "adamw:rank=4"], "adamw takes mode, checkpointing, regional, not rank"),
    ],
)
def test_what_cannot_be_planned_is_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str) -> None:
    with pytest.raises(SystemExit):
        fits.parse(arguments)
    assert reason in capsys.readouterr().err


def test_the_committed_estimates_are_near_what_was_measured() -> None:
    """Within 5 %, for each whole model that both files have."""
    peaks = fits.measured_peaks(BENCHMARKS / "results" / "train-step-h100.csv")
    both = [(row.total, peaks[row.key]) for row, _ in read_csv(fits.OUT, fits.Row) if row.key in peaks]
    assert len(both) >= 5
    assert all(planned == pytest.approx(peak, rel=0.05) for planned, peak in both)
